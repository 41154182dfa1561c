"""The layout of the published VW-LMM checkpoints: the original LLaVA-1.5's with a VM head."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaTokenizer, MistralConfig, PreTrainedConfig, TokenizersBackend

from ..configuration_vwlmm import VWLmmConfig
from ..files import read_json_object
from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import IMAGE_MARKER, make_processor, read_chat_template
from ..weights import read_weights
from .checkpoint import (
    RECOMPUTED,
    Checkpoint,
    add_new_parts,
    fitting_weights,
    read_generation_config,
    read_vision_tower,
    vision_tower_weights,
)


@dataclass
class Variant:
    """A published model: its LLM, the chat template it was trained with, and whether it reads pseudo features."""

    text_config: type[PreTrainedConfig]
    chat_template: str
    pseudo_image_features: bool = False


VARIANTS = {
    "vicuna": Variant(LlamaConfig, "vicuna_v1"),
    "mistral": Variant(MistralConfig, "mistral"),
    "vicuna-pif": Variant(LlamaConfig, "vicuna_v1", pseudo_image_features=True),
}
ARCHITECTURES = {
    "vwLlamaForCausalLM": "vicuna",
    "vwMistralForCausalLM": "mistral",
    "vwPifLlamaForCausalLM": "vicuna-pif",
    "LlavaLlamaForCausalLM": "vicuna",
    "LlavaMistralForCausalLM": "mistral",
}
# The values that a field of a published config may have. The first is the default
SUPPORTED: dict[str, list] = {
    "mm_projector_type": ["mlp2x_gelu"],
    "mm_use_im_start_end": [False],
    "mm_use_im_patch_token": [False],
    "mm_vision_select_feature": ["patch", "cls_patch"],
    "image_aspect_ratio": [None, "square", "pad"],
}
# Patterns in the names of published tensors, and what stands there in ours
RENAMED = (
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"^vm_head\.", "model.vm_head."),
)


def published_name(name: str) -> str:
    """The name that a VW-LMM model here has for a tensor of a published checkpoint."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def find_variant(folder: Path, raw: dict[str, Any], has_vm_head: bool, variant: str | None = None) -> Variant:
    """The [`Variant`] of the given name, or else the one that a published config describes.

    Raises:
        ValueError: the model is built in a way that is not supported, or the config does not say which variant it is.
    """
    path = folder / "config.json"
    for field, supported in SUPPORTED.items():
        if raw.get(field, supported[0]) not in supported:
            raise ValueError(
                f"{path}: {field} is {json.dumps(raw[field])}, expected {' or '.join(map(json.dumps, supported))}"
            )
    if variant is not None:
        if variant not in VARIANTS:
            raise ValueError(f'variant is "{variant}", expected one of {", ".join(VARIANTS)}')
        return VARIANTS[variant]
    for architecture in raw.get("architectures") or []:
        if architecture in ARCHITECTURES:
            return VARIANTS[ARCHITECTURES[architecture]]
    if raw.get("architectures"):
        raise ValueError(
            f"{path}: found the architecture {', '.join(raw['architectures'])}, expected one of "
            f"{', '.join(ARCHITECTURES)}; --variant says which it is like"
        )
    if has_vm_head:
        raise ValueError(
            f"{path} names no architecture, so that pseudo image features cannot be told: give --variant "
            f"{', '.join(VARIANTS)}"
        )
    return VARIANTS["mistral" if "sliding_window" in raw else "vicuna"]


def read_text_config(config_class: type[PreTrainedConfig], raw: dict[str, Any]) -> PreTrainedConfig:
    """The LLM's config, from a published config that holds its fields among others."""
    # The other fields are settings of LLaVA and of generation. from_dict knows the old names of fields
    names = {*config_class.__annotations__, *PreTrainedConfig.__annotations__, "rope_theta", "rope_scaling"}
    dropped = {"architectures", "dtype", "return_dict", "output_hidden_states", "transformers_version"}
    given = {name: raw[name] for name in names - dropped if raw.get(name) is not None}
    if "sliding_window" in raw:
        given["sliding_window"] = raw["sliding_window"]
    return config_class.from_dict({**given, "model_type": config_class.model_type})


def published_tokenizer(folder: str | os.PathLike) -> TokenizersBackend:
    """The tokenizer of a published checkpoint, which turns a whole prompt into the ids of the published pipeline.

    That pipeline tokenized the texts before, between and after images one by one, and sentencepiece puts a space
    before every text. So this tokenizer puts a space before the text that follows an image.

    Args:
        folder: has `tokenizer.model` and `tokenizer_config.json`.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.model'}: no such file, expected a sentencepiece model")
    settings = read_json_object(folder / "tokenizer_config.json")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    spaces = normalizers.Replace(" ", "▁")
    if settings.get("legacy", True) is not False:
        # A legacy tokenizer begins a new text, with a space, after any special token
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        backend.pre_tokenizer = None
    else:
        # Here a new text begins after an image only. The image token is looked for in normalized text, so the
        # normalizer can put a space after it. The space at the very start is left to Metaspace, which alone knows
        # where the start is. The spaces of the text are replaced by then, so Metaspace always adds one
        before_text = Regex(rf"{IMAGE_MARKER}(?=(?!{IMAGE_MARKER})[\s\S])")
        backend.normalizer = normalizers.Sequence([spaces, normalizers.Replace(before_text, f"{IMAGE_MARKER}▁")])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False),
            ]
        )
    # A saved LlamaTokenizer would replace these rules with its own when it is loaded
    tokenizer = TokenizersBackend(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **tokenizer.special_tokens_map
    )
    image = AddedToken(IMAGE_MARKER, special=True, normalized=settings.get("legacy", True) is False)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]}, replace_extra_special_tokens=False)
    return tokenizer


def from_published(
    folder: Path,
    raw: dict[str, Any],
    vision_tower: str | os.PathLike | None,
    variant: str | None,
    vm_head: str,
    seed: int,
) -> Checkpoint:
    """The VW-LMM model that a published checkpoint becomes. `raw` is its config; the rest is as for [`convert`]."""
    found = read_weights(folder)
    tensors = {published_name(name): found[name] for name in found if not RECOMPUTED.search(name)}
    has_vm_head = "model.vm_head.weight" in tensors
    kind = find_variant(folder, raw, has_vm_head, variant)
    tokenizer = published_tokenizer(folder)
    vision_tower = vision_tower or raw["mm_vision_tower"]
    vision_config, pixels = read_vision_tower(vision_tower)
    if kind.pseudo_image_features and not has_vm_head:
        raise ValueError(f"{folder} has no VM head, which a model that reads pseudo image features needs")
    config = VWLmmConfig(
        vision_config=vision_config,
        text_config=read_text_config(kind.text_config, raw),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARKER),  # type: ignore[arg-type]  # one id of one token
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if raw.get("mm_vision_select_feature") == "cls_patch" else "default",
        image_aspect_ratio="pad" if raw.get("image_aspect_ratio") == "pad" else "crop",
        pseudo_image_features=kind.pseudo_image_features,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
    )
    if not any(name.startswith("model.vision_tower.") for name in tensors):
        tensors.update(vision_tower_weights(vision_tower, vision_config))
    if not has_vm_head:
        add_new_parts(tensors, config, vm_head, seed)
    try:
        tensors = fitting_weights(tensors, VWLmmForCausalLM, config, folder)
    except ValueError as error:
        if "vision_tower" in str(error):
            raise ValueError(f"{error} (vision tower: {vision_tower}; --vision-tower names another)") from error
        raise
    template = read_chat_template(kind.chat_template)
    processor = make_processor(config, tokenizer, pixels["image_mean"], pixels["image_std"], template)
    stages_before = ("align", "instruct", *(("visual_words", "joint") if has_vm_head else ()))
    return Checkpoint(config, tensors, processor, read_generation_config(folder), stages_before)
