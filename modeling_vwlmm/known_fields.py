"""The types of well-known fields in the JSON files of a model's folder."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

from .files import read_json_object


_FILES = (
    *("config.json", "generation_config.json", "processor_config.json"),
    *("preprocessor_config.json", "tokenizer_config.json"),
)
_FREE = ("id2label", "label2id", "task_specific_params", "quantization_config")  # whose keys are no fields
_NUMBER, _COUNTS = "a number", "a whole number or a list of them"
_SIZE = "a whole number below 100,000,000, a list or a mapping of them"
_NEVER_NULL = ("num_additional_image_tokens",)
_KINDS = {
    "a text": (
        *("model_type", "rope_type", "processor_class", "tokenizer_class", "image_processor_type"),
        *("vision_feature_select_strategy", "image_aspect_ratio", "padding_side", "mm_vision_tower"),
    ),
    "a whole number": (
        *("num_additional_image_tokens", "image_token_index", "num_hidden_layers", "num_channels", "vocab_size"),
        *("max_new_tokens", "max_length", "top_k", "num_beams", "pad_token_id", "bos_token_id"),
    ),
    _NUMBER: (
        *("rope_theta", "rms_norm_eps", "layer_norm_eps", "rescale_factor", "model_max_length"),
        *("temperature", "top_p", "visual_word_loss_weight"),
    ),
    "true or false": ("do_sample", "do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"),
    "a number or a list of them": ("image_mean", "image_std"),
    _COUNTS: ("hidden_size", "intermediate_size", "num_attention_heads", "vision_feature_layer", "eos_token_id"),
    _SIZE: ("image_size", "patch_size", "size", "crop_size"),
    "a text or a mapping": ("image_token", "bos_token", "eos_token", "pad_token", "unk_token"),
    "a list of texts": ("architectures",),
    "a mapping": ("text_config", "vision_config", "rope_parameters", "rope_scaling", "image_processor"),
    "the name of a floating-point dtype of torch": ("dtype", "torch_dtype"),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names}


def check_fields(folder: str | os.PathLike, **hub: Any) -> None:
    """`ValueError` with file and field if a well-known field, at any depth, is of a type that no library reads.

    Args:
        folder: of a model, or its repository.
        hub: for `hf_hub_download`, such as a `revision`.
    """
    is_folder = os.path.isdir(folder)
    for name in _FILES:
        path = Path(folder) / name
        if not is_folder:
            try:
                path = Path(hf_hub_download(os.fspath(folder), name, **hub))
            except RemoteEntryNotFoundError:
                continue
            except (OSError, HFValidationError):  # it cannot be reached, which loading it will say
                return
        if path.is_file():
            _check(Path(folder) / name, read_json_object(path), "")


def _check(path: Path, fields: dict[str, Any], prefix: str) -> None:
    for name, value in fields.items():
        kind = _KIND_OF.get(name)
        if kind is not None and (value is not None or name in _NEVER_NULL) and not _fits(value, kind):
            found = json.dumps(value, ensure_ascii=False)
            found = found if len(found) <= 80 else f"{found[:77]}..."
            raise ValueError(f"{path}: {prefix}{name} is {found}, expected {kind}")
        if isinstance(value, dict) and name not in _FREE:
            _check(path, value, f"{prefix}{name}.")


def _fits(value: Any, kind: str) -> bool:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    is_number = is_count or isinstance(value, float)
    if kind == "a text":
        return isinstance(value, str)
    if kind == "a whole number":
        return is_count
    if kind == _NUMBER:
        return is_number
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "a mapping":
        return isinstance(value, dict)
    if kind == "a text or a mapping":
        return isinstance(value, (str, dict))
    if kind == "a list of texts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "a number or a list of them":
        return is_number or (isinstance(value, list) and all(_fits(item, _NUMBER) for item in value))
    if kind in (_COUNTS, _SIZE):
        items = list(value.values()) if isinstance(value, dict) and kind == _SIZE else value
        items = items if isinstance(items, list) else [value]
        # A library multiplies sizes, or has 32 bits for them
        most = 10**8 if kind == _SIZE else float("inf")
        return all(item is None or (_fits(item, "a whole number") and item < most) for item in items)
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return value == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point)
