"""VW-LMM: a LLaVA model whose VM head names each image patch with a distribution over the LLM's vocabulary."""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModel,
    Cache,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaPreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaModelOutputWithPast,
    LlavaMultiModalProjector,
)
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from .configuration_vwlmm import VWLmmConfig, select_image_features
from .visual_word_loss import scored_positions, visual_word_loss


@dataclass
class VWLmmModelOutputWithPast(LlavaModelOutputWithPast):
    """LLaVA's output, and

    image_mask (`torch.BoolTensor` of shape (B, T), *optional*): where the patches stand in the sequence.

    `image_hidden_states` are the projected features f, (images, patches, d), also with pseudo image features.
    """

    image_mask: torch.BoolTensor | None = None


@dataclass
class VWLmmCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """LLaVA's output, where `loss = lm_loss + config.visual_word_loss_weight * vw_loss`, and

    lm_loss (`torch.Tensor`, *optional*): cross-entropy of the text labels, mean over the labelled tokens.
    vw_loss (`torch.Tensor`, *optional*): visual-word loss, mean over the scored image positions, in nats. None where
        none is scored or its weight is 0.
    """

    lm_loss: torch.Tensor | None = None
    vw_loss: torch.Tensor | None = None


class VWLmmMultiModalProjector(LlavaMultiModalProjector):
    """LLaVA's projector for towers of any width: (images, patches, channels) to (images, patches, d)."""

    def __init__(self, config: VWLmmConfig):
        nn.Module.__init__(self)
        hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.image_feature_shape()[1], hidden_size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)


def _as_read_by(linear, features):
    """Features in the dtype of a layer, which may train in float32 beside others in 16 bits, and without autocast."""
    dtype = linear.weight.dtype
    return features.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else features  # not if quantized


def _linear_map(head, inputs):
    """Weight and bias of a head. One that has them in another form is asked for them, at the cost of d + 1 rows."""
    weight = head.weight
    # Sharded and quantized weights are of other types; that of a layer with an adapter (PEFT) leaves the adapter out
    is_plain = type(weight) in (torch.Tensor, nn.Parameter) and weight.is_floating_point() and weight.itemsize > 1
    if is_plain and not hasattr(head, "base_layer"):
        return weight.to(inputs.device), head.bias
    size = inputs.shape[-1]
    rows = head(torch.eye(size + 1, size, dtype=inputs.dtype, device=inputs.device))  # the last one is 0
    if head.bias is None:
        return rows[:size].t(), None
    return (rows[:size] - rows[size]).t(), rows[size]


# A weight of the adapter of that name, among those of a PEFT model
_ADAPTER_WEIGHT = re.compile(r"\.(?:lora_\w+|modules_to_save)\.(\w+)(?:\.|$)")


def _refuse(what, problems):
    problems = [f"{problem}: {', '.join(sorted(keys))}" for problem, keys in problems.items() if keys]
    if problems:
        raise ValueError(f"the weights in {what} do not fit: {'; '.join(problems)}")


class VWLmmPreTrainedModel(LlavaPreTrainedModel):
    config: VWLmmConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """As in transformers, but weights that are missing, unexpected or of another shape are a `ValueError`."""
        # Otherwise a tensor of another shape is an error that does not say which checkpoint
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
        if not ignore_mismatched_sizes:
            problems["of another shape than the config says"] = [
                f"{name} {tuple(found)} instead of {tuple(expected)}"
                for name, found, expected in info["mismatched_keys"]
            ]
        _refuse(pretrained_model_name_or_path, problems)
        return (model, info) if output_loading_info else model

    def load_adapter(self, peft_model_id=None, *args, **kwargs):
        """As in transformers, but adapter weights that are missing or unexpected are a `ValueError`."""
        info = super().load_adapter(peft_model_id, *args, **kwargs)
        _refuse("the adapter", {"missing": info.missing_keys, "unexpected": info.unexpected_keys})
        return info


class VWLmmModel(VWLmmPreTrainedModel, LlavaModel):
    """LLaVA's vision tower, projector and LLM without its head, and the VM head, a linear map from d to V."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # of the checkpoint of a model with a head

    def __init__(self, config: VWLmmConfig):
        super(LlavaModel, self).__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = VWLmmMultiModalProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.vm_head = nn.Linear(config.text_config.hidden_size, config.visual_vocab_size, bias=False)
        self.post_init()

    def train(self, mode: bool = True):
        super().train(mode)
        # Running statistics of a frozen tower (BatchNorm) must not move
        if not self._tower_trains():
            self.vision_tower.eval()
        return self

    def _tower_trains(self):
        return any(parameter.requires_grad for parameter in self.vision_tower.parameters())

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states("vision_feature_layer")
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ):
        """The vision tower's output, with the projected features, (images, patches, d), as its `pooler_output`."""
        # Under activation checkpointing, a frozen tower would build a graph too: its embeddings are told to
        with torch.set_grad_enabled(torch.is_grad_enabled() and (self._tower_trains() or pixel_values.requires_grad)):
            outputs = self.vision_tower(pixel_values.to(self.vision_tower.dtype), return_dict=True, **kwargs)
        features = select_image_features(outputs.hidden_states, vision_feature_layer, vision_feature_select_strategy)
        features = _as_read_by(self.multi_modal_projector.linear_1, features)
        outputs.pooler_output = self.multi_modal_projector(features)
        return outputs

    def pseudo_image_features(self, image_features: torch.Tensor) -> torch.Tensor:
        """f'_j = sum_v w_j[v] E[v], in the span of the LLM's input embeddings E; (..., d) to (..., d)."""
        visual_words = self.visual_words(image_features).to(image_features.dtype)
        return visual_words @ self.get_input_embeddings().weight[: self.config.visual_vocab_size]

    def visual_words(self, image_features: torch.Tensor) -> torch.Tensor:
        """w_j = softmax(W_vm f_j), in float32; (..., d) to (..., V)."""
        return self.vm_head(_as_read_by(self.vm_head, image_features)).softmax(-1, dtype=torch.float32)

    def _needs_image_graph(self):
        """Whether a batch without images must still reach the projector and the VM head, with zero gradients.

        Ranks that work together gather the same weights and have the same graph, and where a frozen LLM trains nothing
        there is no other graph.
        """
        trains_llm = any(parameter.requires_grad for parameter in self.language_model.parameters())
        return torch.distributed.is_initialized() or (self.training and not trains_llm)

    def _no_image_features(self, inputs_embeds):
        """Features of no image, (0, patches, d), that depend on the vision tower and the projector."""
        channels = getattr(self.config.vision_config, "num_channels", 3)
        # Attention does not take an empty batch, so one image is read, in eval mode for it to leave no statistics
        training = self.vision_tower.training
        self.vision_tower.eval()
        features = self.get_image_features(
            inputs_embeds.new_zeros(1, channels, *self.config.image_size), return_dict=True
        ).pooler_output[:0]
        self.vision_tower.train(training)
        return features.to(inputs_embeds.device, inputs_embeds.dtype)

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
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> tuple | VWLmmModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is not None and pixel_values is not None:
            raise ValueError("pixel_values need input_ids, whose placeholders say where the images go")

        image_mask = image_features = None
        if input_ids is not None:
            image_mask = input_ids == self.config.image_token_id
            # The placeholder may lie beyond the vocabulary, and its embedding is replaced in any case
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(image_mask, 0))
            image_outputs = (mm_encoder_outputs or {}).get("image")
            if image_outputs is None and pixel_values is not None:
                image_outputs = self.get_image_features(
                    pixel_values=pixel_values,
                    vision_feature_layer=vision_feature_layer,
                    vision_feature_select_strategy=vision_feature_select_strategy,
                    return_dict=True,
                )
            if image_outputs is not None:
                image_features = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            elif input_ids.shape[1] > 1 and self._needs_image_graph():
                image_features = self._no_image_features(inputs_embeds)
            # A single token has been generated, so it is no placeholder: nothing to count while decoding
            if image_features is not None or input_ids.shape[1] > 1:
                self._check_placeholders(image_mask, image_features)
            if image_features is not None:
                lmm_features = image_features
                if self.config.pseudo_image_features:
                    # Under autocast they come out of a matrix product, in 16 bits
                    lmm_features = self.pseudo_image_features(image_features).to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(image_mask.unsqueeze(-1), lmm_features)

        outputs = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **{**kwargs, "return_dict": True},
        )
        return VWLmmModelOutputWithPast(**{**outputs, "image_hidden_states": image_features, "image_mask": image_mask})

    def _check_placeholders(self, image_mask, image_features):
        found = image_mask.sum()
        images, patches = (0, self.config.image_seq_length) if image_features is None else image_features.shape[:2]
        torch_compilable_check(
            found == images * patches,
            lambda: (
                f"input_ids hold {found} image placeholders (id {self.config.image_token_id}), but {images} image(s) "
                f"of {patches} patches need {images * patches}"
            ),
        )


class VWLmmForCausalLM(VWLmmPreTrainedModel, LlavaForConditionalGeneration):
    """VW-LMM: LLaVA with a VM head, trained on its text and on its image positions (arXiv 2403.07720)."""

    def __init__(self, config: VWLmmConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = VWLmmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # As PEFT loads adapters: it says nothing of modules_to_save that are missing, and warns of other weights
        adapters = {match[1] for match in map(_ADAPTER_WEIGHT.search, state_dict) if match}
        if adapters:
            own = {f"{prefix}{name}" for name in self.state_dict()}
            expected = {name for name in own if (match := _ADAPTER_WEIGHT.search(name)) and match[1] in adapters}
            _refuse("the adapter", {"missing": expected - state_dict.keys(), "unexpected": state_dict.keys() - own})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def visual_words(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The visual words of images: w_j = softmax(W_vm f_j).

        Args:
            pixel_values (`torch.Tensor` of shape (images, channels, height, width)): as the processor makes them.

        Returns:
            `torch.Tensor` of shape (images, patches, V), probabilities in float32.
        """
        image_features = self.model.get_image_features(pixel_values, return_dict=True).pooler_output
        return self.model.visual_words(image_features)

    def visual_word_loss(self, outputs: VWLmmModelOutputWithPast, attention_mask: torch.Tensor | None = None):
        """The visual-word loss of a batch, from what its forward pass through `self.model` returned.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the sum over the scored image positions, in nats, and their number.
        """
        positions = scored_positions(outputs.image_mask, attention_mask).to(outputs.last_hidden_state.device)  # (B, T)
        predicted_from = outputs.last_hidden_state[:, :-1][positions[:, 1:]]  # (N, d)
        # The device is another one in a model that is split across several
        image_features = outputs.image_hidden_states.flatten(0, 1).to(predicted_from.device)
        image_features = image_features[positions[outputs.image_mask.to(predicted_from.device)]]  # (N, d)
        lm_head_weight, lm_head_bias = _linear_map(self.lm_head, predicted_from)
        vm_head_weight, vm_head_bias = _linear_map(self.model.vm_head, image_features)
        loss = visual_word_loss(
            predicted_from,
            lm_head_weight,
            image_features,
            vm_head_weight,
            lm_head_bias=lm_head_bias,
            vm_head_bias=vm_head_bias,
            target=self.config.visual_word_target,
            detach_visual_words=self.config.detach_visual_words,
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
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        **kwargs,
    ) -> tuple | VWLmmCausalLMOutputWithPast:
        """As LLaVA's, and with `labels` the losses.

        Args:
            input_ids (`torch.LongTensor` of shape (B, T)):
                With `config.image_token_id` once for every patch of every image, in the order of `pixel_values`.
            pixel_values (`torch.Tensor` of shape (images, channels, height, width), *optional*):
                The images of all rows; a row may have none, one or several.
            labels (`torch.LongTensor` of shape (B, T), *optional*):
                Aligned with `input_ids`, shifted inside; -100 is ignored, and so is every placeholder.

        Raises:
            ValueError: if the placeholders do not match the images.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            mm_encoder_outputs=mm_encoder_outputs,
            **{**kwargs, "return_dict": True},
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss = lm_loss = vw_loss = None
        if labels is not None:
            if outputs.image_mask is not None:
                labels = labels.masked_fill(outputs.image_mask, -100)
            loss = lm_loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if self.config.visual_word_loss_weight and outputs.image_hidden_states is not None:
                total, positions = self.visual_word_loss(outputs, attention_mask)
                mean = total / positions.clamp(min=1)
                vw_loss = mean if positions > 0 else None
                # The mean over no positions is 0, but still reaches the VM head
                loss = lm_loss + self.config.visual_word_loss_weight * mean

        return VWLmmCausalLMOutputWithPast(
            loss=loss,
            lm_loss=lm_loss,
            vw_loss=vw_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )


__all__ = ["VWLmmForCausalLM", "VWLmmModel", "VWLmmPreTrainedModel"]
