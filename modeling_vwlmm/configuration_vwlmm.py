"""Configuration of VW-LMM models."""

import functools
import json
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModel, LlavaConfig
from transformers.utils import logging

from .visual_word_loss import check_loss_fields


logger = logging.get_logger(__name__)


def select_image_features(hidden_states, vision_feature_layer, vision_feature_select_strategy):
    """The patch features that the projector reads, from the hidden states of a vision tower.

    Args:
        hidden_states (`tuple[torch.Tensor]`):
            What the tower returns, a layer each: (images, tokens, channels), or a feature map (images, channels,
            height, width), whose cells become the patches, row by row.
        vision_feature_layer (`int` or `list[int]`):
            Which layer is read; several are concatenated along the channels.
        vision_feature_select_strategy (`str`):
            `"default"` drops the first token (CLS), `"full"` keeps all. A feature map has no such token.

    Returns:
        `torch.Tensor` of shape (images, patches, channels).
    """
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
    """Configuration of a [`VWLmmForCausalLM`]: that of LLaVA, and what VW-LMM (arXiv 2403.07720) adds.

    `vision_config` may be any vision model of transformers. It has to name its `image_size`: give it to the
    constructor of a tower that does not ask for one, as in `ResNetConfig(..., image_size=224)`.

    Args:
        image_seq_length (`int`, *optional*):
            Placeholders an image takes: the patches that `vision_config`, `vision_feature_layer` and
            `vision_feature_select_strategy` make of it, counted on the tower itself if not given.
        image_aspect_ratio (`str`, *optional*, defaults to `"pad"`):
            `"pad"`: images are padded to a square with the processor's mean colour, as LLaVA-1.5 does. `"crop"`: they
            are resized to the shortest edge and cropped.
        visual_word_loss_weight (`float`, *optional*, defaults to 1.0):
            Lambda, the weight of the visual-word loss. At 0 it is not computed.
        visual_word_target (`str`, *optional*, defaults to `"visual_words"`):
            `"visual_words"` for KL(w || p), joint training; `"language_model"` for KL(p || w), VM-head training.
        detach_visual_words (`bool`, *optional*, defaults to `False`):
            Whether joint training stops the gradient through its target, the visual words.
        visual_vocab_size (`int`, *optional*):
            V, the entries of the LLM's vocabulary that a visual word is a distribution over: its first V. All that
            the LLM came with (`text_config.vocab_size`) if not given.
        pseudo_image_features (`bool`, *optional*, defaults to `False`):
            Whether the LLM reads sum_v w[v] E[v], visual words times its input embeddings, in place of the features.

    An `image_token_id` beyond the LLM's vocabulary is fine: placeholders are never looked up or predicted, so the
    embeddings need no row for it and the LLM's logits stay as they were.
    """

    model_type = "vwlmm"

    image_seq_length: int | None = None
    image_aspect_ratio: Literal["pad", "crop"] = "pad"
    visual_word_loss_weight: float = 1.0
    visual_word_target: Literal["visual_words", "language_model"] = "visual_words"
    detach_visual_words: bool = False
    visual_vocab_size: int | None = None
    pseudo_image_features: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
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
                # LLaVA's head, a linear map, would compute other logits than this LLM does
                raise ValueError(f"text_config has {name}: LLMs that scale or cap their logits are not supported")
        if self.image_seq_length is None:
            self.image_seq_length = self.image_feature_shape()[0]
            if self.vision_feature_select_strategy == "default" and self.image_seq_length + 1 == self.squares():
                logger.warning(
                    f'vision_feature_select_strategy is "default", which drops the first token of the tower: a '
                    f'{self.vision_config.model_type} seems to have no CLS token there, but a patch. Use "full".'
                )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "llava" or "mm_vision_tower" in config_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a LLaVA checkpoint, or a VW-LMM one as published. To make a "
                f"model of it: vwlmm convert {pretrained_model_name_or_path} NEW_FOLDER"
            )
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
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
        """How many squares of `patch_size` the vision tower cuts an image into; None if it makes a feature map."""
        patch_size = getattr(self.vision_config, "patch_size", None)
        if not isinstance(patch_size, int):
            return None
        height, width = self.image_size
        return (height // patch_size) * (width // patch_size)

    def image_feature_shape(self) -> tuple[int, int]:
        """Patches an image becomes, and their channels before the projector.

        Read off the tower, run on the meta device, so that it holds for any architecture: CLS tokens, registers,
        strides and pooling included.
        """
        vision_config = {name: value for name, value in self.vision_config.to_dict().items() if name != "dtype"}
        layers = self.vision_feature_layer
        return _image_feature_shape(
            json.dumps(vision_config, sort_keys=True),
            self.image_size,
            layers if isinstance(layers, int) else tuple(layers),
            self.vision_feature_select_strategy,
        )


# Once a tower: DeepSpeed's ZeRO-3 leaves modules that are made while a model is loaded without their weights
@functools.lru_cache
def _image_feature_shape(vision_config, image_size, layers, strategy):
    vision_config = AutoConfig.for_model(**json.loads(vision_config))
    with torch.device("meta"):
        tower = AutoModel.from_config(vision_config)
        pixel_values = torch.empty(1, getattr(vision_config, "num_channels", 3), *image_size)
        outputs = tower(pixel_values.to(tower.dtype), output_hidden_states=True, return_dict=True)
    layers = layers if isinstance(layers, int) else list(layers)
    return tuple(select_image_features(outputs.hidden_states, layers, strategy).shape[1:])


__all__ = ["VWLmmConfig"]
