"""The record of a run that every folder of a trained model holds: what was trained, from what, how and where."""

import hashlib
import os
import platform
import re
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from .files import read_json, write_json


TRAINING_RUN_NAME = "training_run.json"
_PACKAGES = ["torch", "transformers", "trl", "peft", "accelerate", "datasets", "modeling_vwlmm"]
# Of a model's config, what a stage may set
TRAINED_WITH = ("visual_word_loss_weight", "visual_word_target", "detach_visual_words")
_LORA = ["r", "lora_alpha", "lora_dropout"]
# pad_token and eos_token are none
_SECRET = re.compile(r"^token$|(hub|auth|access|api)_?token$|api_?key$|password|secret|credential", re.IGNORECASE)


def read_training_run(folder: str | os.PathLike) -> list[dict]:
    """The records of the stages that made a model, oldest first; none for a model that was not trained here.

    Args:
        folder: folder or repository.

    Raises:
        ValueError: the file is there, but holds something else.
    """
    path = Path(folder) / TRAINING_RUN_NAME
    if not os.path.isdir(folder):
        try:
            path = Path(hf_hub_download(os.fspath(folder), TRAINING_RUN_NAME))
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
    """Write what [`read_training_run`] reads."""
    write_json(Path(folder) / TRAINING_RUN_NAME, stages)


def given_fields(arguments, names=None) -> dict:
    """Fields of a dataclass that stand in JSON: those of the given names, or those that differ from their defaults."""
    given = {}
    for field in fields(arguments):
        default = field.default_factory() if callable(field.default_factory) else field.default
        value = getattr(arguments, field.name)
        if field.init and (value != default if names is None else field.name in names):
            given[field.name] = value
    return _plain(given)


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of a model's weights: of the name, the shape and up to 1,000 values of each, evenly spaced.

    Values are rounded to bfloat16, so that a model has one whatever dtype it is loaded in. Training changes it.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.flatten()[:: max(1, tensor.numel() // 1000)].to("cpu", torch.bfloat16).contiguous()
        found.update(f"{name} {tuple(tensor.shape)}".encode() + values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def describe_run(
    base_model, config, args, trainable, peft_config=None, base_fingerprint=None, dataset=None, recipe=None
) -> dict:
    """The record of one stage.

    Args:
        base_model (`str`): the name of the model that it starts from, as given.
        config ([`VWLmmConfig`]): of the model as it is trained, for which an adapter has no other place.
        args ([`VWLmmSFTConfig`]): of the trainer.
        trainable (`list[str]`): the parts that train, see [`trained_parts`].
        peft_config ([`~peft.PeftConfig`], *optional*): of the adapter, if one is trained.
        base_fingerprint (`str`, *optional*): of the model that it starts from, see [`fingerprint`].
        dataset (`str`, *optional*): its name, as given.
        recipe (`dict`): the fields that were given.
    """
    return {
        "stage": args.stage,
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


def device_name(args) -> str:
    """What training arguments train on."""
    return torch.cuda.get_device_name() if args.device.type == "cuda" else _cpu_name()


def _plain(value):
    """The value as JSON has it, without tokens and passwords."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not _SECRET.search(str(key))}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _cpu_name():
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
