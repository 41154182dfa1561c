"""VW-LMM: a LLaVA model whose VM head names each image patch with a distribution over the LLM's vocabulary."""

from typing import Any

import torch
from torch import nn

from .compatibility import (
    ACT2FN,
    CACHE,
    LAYERS_CAN_BE_SELECTED,
    AutoModel,
    Cache,
    LlavaForConditionalGeneration,
    LlavaModel,
    TransformersKwargs,
    Unpack,
    VWLmmCausalLMOutputWithPast,
    VWLmmImageOutput,
    VWLmmModelOutputWithPast,
    can_return_tuple,
    kept_positions,
    logging,
    name_cache,
    torch_compilable_check,
)
from .configuration_vwlmm import VWLmmConfig, select_image_features
from .image_token import ImageTokenGenerationMixin, add_image_token
from .strict_loading import VWLmmPreTrainedModel, refuse_other_adapters
from .visual_word_loss import sample_starts, scored_positions, select_scored, visual_word_loss
from .wrapped_weights import embedding_rows, in_dtype_of, weight_and_bias


logger = logging.get_logger(__name__)


class VWLmmMultiModalProjector(nn.Module):
    """LLaVA's projector for towers of any width: (images, patches, channels) to (images, patches, d)."""

    def __init__(self, config: VWLmmConfig):
        super().__init__()
        hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.image_feature_shape()[1], hidden_size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features)))


class VWLmmModel(VWLmmPreTrainedModel, LlavaModel):
    """LLaVA's vision tower, projector and LLM without its head, with the VM head, a linear map from d to V."""

    def __init__(self, config: VWLmmConfig):
        super(LlavaModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VWLmmMultiModalProjector(config)  # type: ignore[assignment]  # LLaVA's own
        self.language_model = AutoModel.from_config(config.text_config)
        add_image_token(self.language_model.get_input_embeddings(), config.image_token_id)
        self.vm_head = nn.Linear(config.text_config.hidden_size, config.visual_vocab_size, bias=False)
        self.post_init()

    def train(self, mode: bool = True) -> "VWLmmModel":
        super().train(mode)
        self._train_tower(mode)
        return self

    def _train_tower(self, mode: bool) -> None:
        self.vision_tower.train(mode and self._tower_trains())
        # In training mode, running statistics (BatchNorm) move. Those of a frozen layer would be saved with no adapter
        for module in self.vision_tower.modules():
            if getattr(module, "running_mean", None) is not None:
                parameters = list(module.parameters()) or list(self.vision_tower.parameters())
                module.train(module.training and all(parameter.requires_grad for parameter in parameters))

    def _tower_trains(self) -> bool:
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Checkpoints of the model with a head load here too.

        With `_keys_to_ignore_on_load_unexpected`, vLLM would leave the head out of the model that has one.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        loading_info.unexpected_keys = {k for k in loading_info.unexpected_keys if not k.startswith("lm_head.")}

    def project_images(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> VWLmmImageOutput:
        """The vision tower's output with the projected features f, (images, patches, d), as `image_hidden_states`."""
        layers = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = layers if LAYERS_CAN_BE_SELECTED else True
        # Activation checkpointing makes embeddings require a gradient, so even a frozen tower would build a graph
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self._tower_trains() or pixel_values.requires_grad)):
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), **{**kwargs, "return_dict": True})
        features = select_image_features(outputs.hidden_states, layers, strategy)
        features = in_dtype_of(self.multi_modal_projector.linear_1, features)
        kept = {name: outputs.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
        return VWLmmImageOutput(**kept, image_hidden_states=self.multi_modal_projector(features))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ) -> tuple | VWLmmImageOutput:
        """The vision tower's output, with what the LLM reads, (images, patches, d), as its `pooler_output`."""
        outputs = self.project_images(pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs)
        outputs.pooler_output = self._read_by_the_llm(outputs.image_hidden_states)
        return outputs

    def _read_by_the_llm(self, image_features: torch.Tensor) -> torch.Tensor:
        if not self.config.pseudo_image_features:
            return image_features
        return self.pseudo_image_features(image_features.to(self.language_model.dtype))

    def pseudo_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """f'_j = sum_v w_j[v] E[v], E the LLM's input embeddings; (..., d) to (..., d), whose dtype autocast keeps."""
        visual_words = self.visual_words(image_features)
        embeddings = embedding_rows(self.get_input_embeddings(), self.config.visual_vocab_size, visual_words.device)
        return (visual_words.to(embeddings.dtype) @ embeddings).to(image_features.device, image_features.dtype)

    def visual_words(self, image_features: torch.Tensor) -> torch.Tensor:
        """w_j = softmax(W_vm f_j), in float32; (..., d) to (..., V)."""
        return self.vm_head(in_dtype_of(self.vm_head, image_features)).softmax(-1, dtype=torch.float32)

    def _needs_image_graph(self) -> bool:
        """Whether a batch without images must still reach the projector and the VM head, with zero gradients.

        Ranks that train together must gather the same weights, so all need the same graph. Where the LLM is frozen, a
        batch without images would have no graph at all.
        """
        trains_llm = any(parameter.requires_grad for parameter in self.language_model.parameters())
        return torch.distributed.is_initialized() or (self.training and not trains_llm)

    def _no_images(self, inputs_embeds: torch.Tensor) -> VWLmmImageOutput:
        """The features of no image, (0, patches, d), whose graph reaches all that those of an image would reach."""
        channels = getattr(self.config.vision_config, "num_channels", 3)
        # Attention refuses an empty batch, so the tower reads a blank image, in eval mode to keep its statistics
        training = self.vision_tower.training
        self.vision_tower.eval()
        blank = inputs_embeds.new_zeros(1, channels, *self.config.image_size)
        features = self.project_images(blank).image_hidden_states[:0]
        self._train_tower(training)
        return VWLmmImageOutput(pooler_output=self._read_by_the_llm(features), image_hidden_states=features)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: dict | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VWLmmModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")

        image_features = read = None
        image_outputs = (mm_encoder_outputs or {}).get("image")
        has_images = image_outputs is not None or pixel_values is not None
        image_mask = self.image_mask(input_ids, inputs_embeds, has_images)
        # The embeddings come before the tower, with images or without, for ranks must gather weights in one order
        if inputs_embeds is None:
            # The embeddings of placeholders are replaced, if there are images
            looked_up = input_ids.masked_fill(image_mask, 0) if has_images else input_ids
            inputs_embeds = self.get_input_embeddings()(looked_up)
        if image_outputs is None and pixel_values is not None:
            image_outputs = self.get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                return_dict=True,
            )
        # While decoding, the single token is a generated one and no placeholder
        is_prompt = image_mask is not None and inputs_embeds.shape[1] > 1
        if image_outputs is None and is_prompt and self._needs_image_graph():
            image_outputs = self._no_images(inputs_embeds)
        if image_outputs is not None:
            read = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            image_features = image_outputs.get("image_hidden_states", read).to(read.device, read.dtype)
        if read is not None or is_prompt:
            self._check_placeholders(image_mask, read)
        if read is not None:
            inputs_embeds = inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), read)

        outputs = self.language_model(inputs_embeds=inputs_embeds, **{**name_cache(kwargs), "return_dict": True})
        kept = {name: outputs.get(name) for name in ("last_hidden_state", CACHE, "hidden_states", "attentions")}
        return VWLmmModelOutputWithPast(**kept, image_hidden_states=image_features)

    def image_mask(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, has_images: bool) -> Any:
        """Where placeholders stand, (B, T): by their id or, in embeddings with images, by theirs; or else None."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if not has_images or inputs_embeds is None:
            return None
        image_token_id = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token_id)).all(-1)

    def _check_placeholders(self, image_mask: torch.Tensor, image_features: torch.Tensor | None) -> None:
        found, image_token_id = image_mask.sum(), self.config.image_token_id
        if image_features is None and image_token_id < self.config.text_config.vocab_size:
            # As in LLaVA, the placeholders are then read as the token that they are
            if not torch.compiler.is_compiling() and found:
                logger.warning_once(
                    f"the text has {found} image placeholders (id {image_token_id}), but no image is given"
                )
            return
        images, patches = (0, self.config.image_seq_length) if image_features is None else image_features.shape[:2]
        torch_compilable_check(
            found == images * patches,
            lambda: (
                f"the text has {found} image placeholders (id {image_token_id}), but {images} image(s) of {patches} "
                f"patches need {images * patches}"
            ),
        )


class VWLmmForCausalLM(VWLmmPreTrainedModel, ImageTokenGenerationMixin, LlavaForConditionalGeneration):
    """VW-LMM: LLaVA with a VM head, trained on its text and on its image positions (arXiv 2403.07720)."""

    def __init__(self, config: VWLmmConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = VWLmmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(refuse_other_adapters)
        self.post_init()

    def visual_words(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The visual words w_j = softmax(W_vm f_j) of images, from the `pixel_values` that the processor makes.

        Maps (images, channels, height, width) to probabilities in float32, (images, patches, V).
        """
        return self.model.visual_words(self.model.project_images(pixel_values).image_hidden_states)

    def visual_word_loss(
        self, outputs: Any, image_mask: torch.Tensor, attention_mask: Any = None, position_ids: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The visual-word loss of a batch: the sum over the scored image positions, in nats, and their number.

        Args:
            outputs: what the forward pass through `self.model` returned.
            image_mask: of shape (B, T), true where a patch stands, as `self.model.image_mask` gives it.
        """
        hidden_states = outputs.last_hidden_state
        image_mask = image_mask.to(hidden_states.device)
        positions = scored_positions(image_mask, attention_mask, position_ids).to(hidden_states.device)
        # A model that is split across devices may have its features on another one
        image_features = outputs.image_hidden_states.flatten(0, 1).to(hidden_states.device)
        predicted_from, image_features, keep = select_scored(hidden_states, image_features, image_mask, positions)
        lm_head_weight, lm_head_bias = weight_and_bias(self.lm_head, predicted_from)
        vm_head_weight, vm_head_bias = weight_and_bias(self.model.vm_head, image_features)
        loss = visual_word_loss(
            predicted_from,
            lm_head_weight,
            image_features,
            vm_head_weight,
            lm_head_bias=lm_head_bias,
            vm_head_bias=vm_head_bias,
            target=self.config.visual_word_target,
            detach_visual_words=self.config.detach_visual_words,
            keep=keep,
        )
        return loss, positions.sum()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | VWLmmCausalLMOutputWithPast:
        """The forward pass of LLaVA, which returns the losses if there are `labels`.

        Args:
            input_ids: of shape (B, T), `config.image_token_id` once a patch, images in the order of `pixel_values`.
            pixel_values: of shape (images, channels, height, width), any number of images a row.
            labels: of shape (B, T), aligned with `input_ids` and shifted inside. -100 and placeholders are ignored.
            position_ids: of shape (B, T). Without attention_mask, but with labels or `use_cache=False`, a row may have
                several samples: `sample_starts`. With a cache, transformers would let them read each other.

        Raises:
            ValueError: if the placeholders do not match the images.
        """
        kwargs = name_cache(kwargs if past_key_values is None else {**kwargs, "past_key_values": past_key_values})
        if (starts := None if labels is None else sample_starts(position_ids, attention_mask)) is not None:
            kwargs["use_cache"] = False  # with a cache, transformers takes a row for one sample
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            mm_encoder_outputs=mm_encoder_outputs,
            **{**kwargs, "return_dict": True},
        )
        logits = self.lm_head(kept_positions(outputs.last_hidden_state, logits_to_keep))

        loss = lm_loss = vw_loss = None
        if labels is not None:
            image_mask = self.model.image_mask(input_ids, inputs_embeds, outputs.image_hidden_states is not None)
            if image_mask is not None:
                labels = labels.masked_fill(image_mask, -100)
            labels = labels if starts is None else labels.masked_fill(starts, -100)
            loss = lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if self.config.visual_word_loss_weight and outputs.image_hidden_states is not None:
                total, positions = self.visual_word_loss(outputs, image_mask, attention_mask, position_ids)
                mean = total / positions.clamp(min=1)
                # A compiler cannot know the number of positions
                vw_loss = mean if torch.compiler.is_compiling() or positions > 0 else None
                # Over no positions the mean is 0, but its graph must still reach the VM head
                loss = lm_loss + self.config.visual_word_loss_weight * mean

        return VWLmmCausalLMOutputWithPast(
            loss=loss,
            lm_loss=lm_loss,
            vw_loss=vw_loss,
            logits=logits,
            **{CACHE: outputs[CACHE] if CACHE in outputs else None},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["VWLmmForCausalLM", "VWLmmModel", "VWLmmPreTrainedModel"]
