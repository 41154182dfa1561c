"""Configuration of VW-LMM models."""

import functools
import json
import os
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict

from .compatibility import AutoConfig, AutoModel, LlavaConfig, logging
from .visual_word_loss import check_loss_fields


logger = logging.get_logger(__name__)
MOST_LAYERS = 1_000


def select_image_features(
    hidden_states: tuple[torch.Tensor, ...],
    vision_feature_layer: int | list[int],
    vision_feature_select_strategy: str,
) -> torch.Tensor:
    """Select the patch features that the projector reads from the hidden states of a vision tower.

    Args:
        hidden_states:
            One tensor a layer, as the tower returns them: tokens (images, tokens, channels), or a feature map (images,
            channels, height, width), whose cells become the patches, row by row.
        vision_feature_layer:
            The layer that is read. Several layers are concatenated along the channels.
        vision_feature_select_strategy:
            `"default"` drops the first token (CLS), `"full"` keeps all. A feature map has no such token.

    Returns:
        The features, of shape (images, patches, channels).
    """
    if vision_feature_select_strategy not in ("default", "full"):
        raise ValueError(
            f'vision_feature_select_strategy is "{vision_feature_select_strategy}", expected "default" or "full"'
        )
    layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
    selected = []
    for layer in layers:
        features = hidden_states[layer]
        if features.dim() == 4:
            features = features.flatten(2).transpose(1, 2)
        elif vision_feature_select_strategy == "default":
            features = features[:, 1:]
        selected.append(features)
    return torch.cat(selected, dim=-1)


@strict
class VWLmmConfig(LlavaConfig):
    """Configuration of a [`VWLmmForCausalLM`]: LLaVA's fields and those that VW-LMM (arXiv 2403.07720) adds.

    `vision_config` may be any vision model of transformers, and must name its `image_size`. Where the model's own
    config does not ask for a size, pass one to its constructor, as in `ResNetConfig(..., image_size=224)`.

    Args:
        image_seq_length:
            The number of placeholders, and so of patches, an image takes. If it is not given, the tower itself says
            how many patches `vision_feature_layer` and `vision_feature_select_strategy` make of an image.
        image_aspect_ratio:
            `"pad"` pads images to a square with the processor's mean colour, as LLaVA-1.5 does. `"crop"` resizes them
            to the shortest edge and crops the rest.
        visual_word_loss_weight:
            Lambda, the weight of the visual-word loss. At 0 the loss is not computed.
        visual_word_target:
            `"visual_words"` for KL(w || p), joint training; `"language_model"` for KL(p || w), VM-head training.
        detach_visual_words:
            Whether joint training stops the gradient through its target, the visual words.
        visual_vocab_size:
            V: a visual word is a distribution over the first V entries of the LLM's vocabulary. If it is not given, V
            is the vocabulary that the LLM came with, `text_config.vocab_size`.
        pseudo_image_features:
            Whether the LLM reads sum_v w[v] E[v], the visual words times its input embeddings, in place of the
            features.

    `image_token_id` may lie beyond the LLM's vocabulary, as it does in the models that `vwlmm convert` makes. It is
    never predicted, and its embedding is replaced by those of patches, so that it needs no row in the weights: the
    LLM's logits, their shape and the text loss stay what they were. See [`~modeling_vwlmm.image_token`].
    """

    model_type = "vwlmm"

    image_seq_length: int | None = None  # type: ignore[assignment]  # LLaVA fixes 576, here the tower says it
    image_aspect_ratio: Literal["pad", "crop"] = "pad"
    visual_word_loss_weight: float = 1.0
    visual_word_target: Literal["visual_words", "language_model"] = "visual_words"
    detach_visual_words: bool = False
    visual_vocab_size: int | None = None
    pseudo_image_features: bool = False

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        for part in ("vision_config", "text_config"):
            for name in ("num_hidden_layers", "num_layers", "depths"):
                layers = getattr(getattr(self, part), name, None)
                layers = sum(layers) if isinstance(layers, (list, tuple)) else layers
                if isinstance(layers, int) and layers > MOST_LAYERS:  # modules without weights take time too
                    raise ValueError(f"{part}.{name} is {layers:,}, expected at most {MOST_LAYERS:,} layers")
        if self.image_token_id < 0:
            raise ValueError(f"image_token_index is {self.image_token_id}, expected the id of a token, 0 or more")
        vocab_size = self.text_config.vocab_size
        if self.visual_vocab_size is None:
            self.visual_vocab_size = vocab_size
        if not 0 < self.visual_vocab_size <= vocab_size:
            raise ValueError(
                f"visual_vocab_size is {self.visual_vocab_size}, but the LLM has a vocabulary of {vocab_size}"
            )
        check_loss_fields(self.visual_word_loss_weight, self.visual_word_target)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
            if getattr(self.text_config, name, None) not in (None, 1.0):
                # The model's head is a plain linear map, whose logits would not be those of this LLM
                raise ValueError(f"text_config has {name}: LLMs that scale or cap their logits are not supported")
        if self.image_seq_length is None:
            self.image_seq_length = self.image_feature_shape()[0]
            if self.vision_feature_select_strategy == "default" and self.image_seq_length + 1 == self.squares():
                logger.warning(
                    f'vision_feature_select_strategy is "default", which drops the first token of the tower: a '
                    f'{self.vision_config.model_type} seems to have no CLS token there, but a patch. Use "full".'
                )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "llava" or "mm_vision_tower" in config_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a LLaVA checkpoint, or a VW-LMM one as published. To make a "
                f"model of it: vwlmm convert {pretrained_model_name_or_path} NEW_FOLDER"
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "VWLmmConfig":
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f'expected a model of type "{cls.model_type}", got one of type "{model_type}"')
        return super().from_dict(config_dict, **kwargs)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the vision tower reads."""
        size = getattr(self.vision_config, "image_size", None)
        if size is None:
            raise ValueError(
                f'the vision_config of type "{self.vision_config.model_type}" has no image_size: '
                f"pass {type(self.vision_config).__name__}(..., image_size=224), say"
            )
        return (size, size) if isinstance(size, int) else tuple(size)

    def squares(self) -> int | None:
        """The number of squares of `patch_size` in an image; None for a tower that makes a feature map instead."""
        patch_size = getattr(self.vision_config, "patch_size", None)
        if not isinstance(patch_size, int):
            return None
        height, width = self.image_size
        return (height // patch_size) * (width // patch_size)

    def image_feature_shape(self) -> tuple[int, int]:
        """The number of patches an image becomes, and of their channels before the projector.

        The tower runs once on the meta device, so the numbers hold for any architecture: they include CLS tokens,
        registers, strides and pooling.
        """
        vision_config = {name: value for name, value in self.vision_config.to_dict().items() if name != "dtype"}
        layers = self.vision_feature_layer
        return _image_feature_shape(
            json.dumps(vision_config, sort_keys=True),
            self.image_size,
            layers if isinstance(layers, int) else tuple(layers),
            self.vision_feature_select_strategy,
        )


# Under DeepSpeed's ZeRO-3 a tower that is built while a model loads has no weights and cannot run, so the cache has to
# know its shape by then
@functools.lru_cache
def _image_feature_shape(
    vision_config: str, image_size: tuple[int, int], layers: int | tuple[int, ...], strategy: str
) -> tuple[int, int]:
    config = AutoConfig.for_model(**json.loads(vision_config))
    with torch.device("meta"):
        tower = AutoModel.from_config(config)
        pixel_values = torch.empty(1, getattr(config, "num_channels", 3), *image_size)
        outputs = tower(pixel_values.to(tower.dtype), output_hidden_states=True, return_dict=True)
    _, patches, channels = select_image_features(
        outputs.hidden_states, layers if isinstance(layers, int) else list(layers), strategy
    ).shape
    return patches, channels


__all__ = ["VWLmmConfig"]
