"""The layout of the published VW-LMM checkpoints, which is that of the original LLaVA-1.5 and a VM head."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

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
    """A published model: the LLM inside, what it was told to answer to, and what it reads."""

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
# Of a config, the first being the default
SUPPORTED = {
    "mm_projector_type": ["mlp2x_gelu"],
    "mm_use_im_start_end": [False],
    "mm_use_im_patch_token": [False],
    "mm_vision_select_feature": ["patch", "cls_patch"],
    "image_aspect_ratio": [None, "square", "pad"],
}
# Of tensors
RENAMED = (
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"^vm_head\.", "model.vm_head."),
)


def published_name(name):
    """What we call a tensor of a published checkpoint."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def find_variant(folder, raw, has_vm_head, variant=None):
    """The [`Variant`] that a published config is of, or the one of that name.

    Raises:
        ValueError: the config says that the model is built in another way, or not what a VM head is for.
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


def read_text_config(config_class, raw):
    """The LLM's own config of a published one."""
    # What remains are settings of LLaVA and of generation. Old names of fields are told apart by from_dict
    names = {*config_class.__annotations__, *PreTrainedConfig.__annotations__, "rope_theta", "rope_scaling"}
    dropped = {"architectures", "dtype", "return_dict", "output_hidden_states", "transformers_version"}
    given = {name: raw[name] for name in names - dropped if raw.get(name) is not None}
    if "sliding_window" in raw:
        given["sliding_window"] = raw["sliding_window"]
    return config_class.from_dict({**given, "model_type": config_class.model_type})


def published_tokenizer(folder):
    """The tokenizer of a published checkpoint, which gives the ids that its pipeline made of whole prompts.

    That pipeline tokenized the text around each image on its own with sentencepiece, which begins every text with a
    space of its own. So here the text after an image begins with one.

    Args:
        folder (`str`): with `tokenizer.model` and `tokenizer_config.json`.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder / 'tokenizer.model'}: no such file, expected a sentencepiece model")
    settings = read_json_object(folder / "tokenizer_config.json")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    spaces = normalizers.Replace(" ", "▁")
    if settings.get("legacy", True) is not False:
        # Any special token begins a new text
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        backend.pre_tokenizer = None
    else:
        # Only an image does: its token is looked for in normalized text, and so found with what it begins. The space
        # at the very start has to come with Metaspace, which alone knows where that is; spaces of the text being
        # replaced by then, it adds one always
        image = Regex(rf"{IMAGE_MARKER}(?=(?!{IMAGE_MARKER})[\s\S])")
        backend.normalizer = normalizers.Sequence([spaces, normalizers.Replace(image, f"{IMAGE_MARKER}▁")])
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False),
            ]
        )
    # LlamaTokenizer would build its own rules again when it is loaded
    tokenizer = TokenizersBackend(
        tokenizer_object=backend, model_max_length=tokenizer.model_max_length, **tokenizer.special_tokens_map
    )
    image = AddedToken(IMAGE_MARKER, special=True, normalized=settings.get("legacy", True) is False)
    tokenizer.add_special_tokens({"additional_special_tokens": [image]}, replace_extra_special_tokens=False)
    return tokenizer


def from_published(folder, raw, vision_tower, variant, vm_head, seed):
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
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_MARKER),
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
    return Checkpoint(config, tensors, processor, read_generation_config(folder))
