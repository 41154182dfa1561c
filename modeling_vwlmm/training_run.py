"""The record of how a model was trained, which every folder of a trained model holds."""

import hashlib
import os
import platform
import re
from collections.abc import Collection
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from .configuration_vwlmm import VWLmmConfig
from .files import read_json, write_json


if TYPE_CHECKING:  # the record of a run is read without them
    from peft import PeftConfig
    from transformers import TrainingArguments


TRAINING_RUN_NAME = "training_run.json"
_PACKAGES = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "modeling_vwlmm"]
# What a recipe's model_init_kwargs may say of how a repository is read: it holds for all of its files
FROM_THE_HUB = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# The fields of a model's config that a stage may set
TRAINED_WITH = ("visual_word_loss_weight", "visual_word_target", "detach_visual_words")
_LORA = ["r", "lora_alpha", "lora_dropout"]
# pad_token and eos_token are no secrets, so that a name that just ends in `token` does not match
_SECRET = re.compile(r"^token$|(hub|auth|access|api)_?token$|api_?key$|password|secret|credential", re.IGNORECASE)


def read_training_run(folder: str | os.PathLike, **kwargs: Any) -> list[dict]:
    """The records of the stages that made a model, oldest first; an empty list if this package did not train it.

    Args:
        folder: of the model, or its repository.
        kwargs: for `hf_hub_download`, such as a `revision`.

    Raises:
        ValueError: the file is there, but is no such record.
    """
    path = Path(folder) / TRAINING_RUN_NAME
    if not os.path.isdir(folder):
        try:
            path = Path(hf_hub_download(os.fspath(folder), TRAINING_RUN_NAME, **kwargs))
        except (OSError, HFValidationError):  # the repository has no such file or cannot be reached
            return []
    if not path.is_file():
        return []
    try:
        stages = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no record of a training run: {error}") from error
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{path} is no record of a training run: expected a list of JSON objects, one a stage")
    return stages


def write_training_run(folder: str | os.PathLike, stages: list[dict]) -> None:
    """Write a record that [`read_training_run`] reads."""
    write_json(Path(folder) / TRAINING_RUN_NAME, stages)


def given_fields(arguments: Any, names: Collection[str] | None = None) -> dict[str, Any]:
    """The named fields of a dataclass as JSON has them; without names, those that differ from their defaults."""
    given = {}
    for field in fields(arguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(arguments, field.name)
        if field.init and (value != default if names is None else field.name in names):
            given[field.name] = value
    return _plain(given)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model's weights, which training changes: of the name, shape and some 1,000 values of each weight.

    The values are rounded to bfloat16, so that a model has the same fingerprint in float32 and in 16 bits.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 1000)].to("cpu", torch.bfloat16).contiguous()
        found.update(f"{name} {tuple(tensor.shape)}".encode() + values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def describe_run(
    base_model: str | None,
    config: VWLmmConfig,
    args: Any,
    trainable: list[str],
    peft_config: "PeftConfig | None" = None,
    base_fingerprint: str | None = None,
    stage: str | None = None,
    dataset: str | list[str] | None = None,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of one stage.

    Args:
        base_model: the name of the model that the stage starts from, as given.
        config: of the model as it is trained. The folder of an adapter records it nowhere else.
        args: of the trainer, a [`VWLmmSFTConfig`].
        trainable: the parts that train, see [`trained_parts`].
        peft_config: of the adapter, if one is trained.
        base_fingerprint: of the model that the stage starts from, see [`fingerprint`].
        stage: what it is called, if it is none of `STAGES`.
        dataset: its name, as given; the names of several, whose shares are in the recipe.
        recipe: the fields that were given.
    """
    return {
        "stage": stage or args.stage,
        "base_model": base_model or None,
        "base_fingerprint": base_fingerprint,
        "dataset": dataset,
        "trainable": trainable,
        "recipe": _plain(recipe),
        "config": {name: getattr(config, name) for name in TRAINED_WITH},
        "peft": None if peft_config is None else {**given_fields(peft_config, _LORA), **given_fields(peft_config)},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "hardware": {"device": device_name(args), "processes": args.world_size},
        "seed": args.seed,
    }


def device_name(args: "TrainingArguments") -> str:
    """The name of the GPU or CPU that a trainer with these arguments uses."""
    return torch.cuda.get_device_name() if args.device.type == "cuda" else _cpu_name()


def _plain(value: Any) -> Any:
    """The value as JSON has it, without tokens and passwords."""
    if is_dataclass(value) and not isinstance(value, type):
        value = given_fields(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not _SECRET.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
