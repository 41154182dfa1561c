"""Turns the records of a model into what its card says."""

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..configuration_vwlmm import VWLmmConfig
from ..files import read_json
from .redaction import base_name, without_paths


EVAL_RESULTS_NAME = "eval_results.json"
INTERVAL = "95 % interval"  # in the `metric_args` of a result; the card shows it beside the value
# Models under the Llama 2 Community License. The cards of some of them do not say so in their metadata
_LLAMA_2 = re.compile(
    r"(^|/)(meta-llama/Llama-2-|lmsys/vicuna-\d+b-v1\.5|liuhaotian/llava-v1\.5-|llava-hf/llava-1\.5-"
    r"|MYTH-Lab/VW-LMM-Vicuna-)"
)
# Fields of a recipe that the card shows elsewhere, or that name places on the machine that it ran on
_NOT_SHOWN = {"model", "dataset", "datasets", "eval_dataset", "image_folder", "output_dir", "stage"}
_NOT_SHOWN |= {"resume_from_checkpoint"}


def listed(value: Any) -> list:
    """A list as it is, another value as a list of it, None as an empty list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def read_eval_results(folder: Path, stages: list[dict[str, Any]]) -> list[EvalResult]:
    """The results in `eval_results.json`, none if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / EVAL_RESULTS_NAME
    if not path.is_file():
        return []
    results = read_json(path)
    if isinstance(results, dict):
        # `trainer.save_metrics` of transformers wrote it, which does not name the data set; the recipe may
        recipe = stages[-1].get("recipe") or {} if stages else {}
        dataset = recipe.get("eval_dataset")
        results = [
            {
                "task_type": "image-text-to-text",
                "dataset_type": _shown(dataset),
                "dataset_name": _shown(dataset),
                "dataset_split": recipe.get("eval_split"),
                "metric_type": name.removeprefix("eval_"),
                "metric_value": value,
            }
            for name, value in results.items()
            if dataset is not None and isinstance(value, (int, float))
        ]
    try:
        return [EvalResult(**result) for result in results]
    except TypeError as error:
        raise ValueError(
            f"{path} holds no results: expected a list of objects with the fields of huggingface_hub.EvalResult"
        ) from error


def metadata_of(
    stages: list[dict[str, Any]], bases: list[list[str]], results: list[EvalResult], is_adapter: bool, model_id: str
) -> dict[str, Any]:
    """The fields of [`~huggingface_hub.ModelCardData`] that the records fill.

    Args:
        bases (`list[list[str]]`): the models that this one was made of, the last stage's first. An LLM and a vision
            tower stand together, the LLM first.
    """
    own_folders = _own_folders(stages)
    repos = [[name for name in names if _is_repo(name, own_folders)] for names in bases]
    base_model = next(filter(None, repos), [])  # the nearest that others can find
    is_trained = any(stage.get("stage") != "convert" for stage in stages)
    relation = "adapter" if is_adapter else "finetune" if is_trained else None
    datasets = [name for stage in stages for name in listed(stage.get("dataset"))]
    # easy-VQA is a package, not a repository
    datasets = [name.split("/")[0] if name.startswith("easy-vqa/") else name for name in datasets if _is_repo(name)]
    # The license that carries over is the LLM's
    first = [names[0] for names in bases if names]
    origins = [_card_data(name) for name in first if os.path.isdir(name) or _is_repo(name, own_folders)]
    licenses = [card for card in origins if card.get("license")]
    if any(map(_LLAMA_2.search, first)):
        licenses = [{"license": "llama2"}]
    language = next((card["language"] for card in origins if card.get("language")), None)
    tags = ["vwlmm", "visual-words"]
    tags += ["trl", "sft"] if is_trained else []
    tags += ["lora"] if any(stage.get("peft") for stage in stages) else []
    found = {
        **{key: (licenses or [{}])[0].get(key) for key in ("license", "license_name", "license_link")},
        "language": language,
        "base_model": base_model[0] if len(base_model) == 1 else base_model or None,
        "base_model_relation": relation if base_model else None,
        "datasets": list(dict.fromkeys(datasets)) or None,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": tags,
        "model_name": model_id.split("/")[-1] if results else None,
        "eval_results": results or None,
    }
    return {name: value for name, value in found.items() if value is not None}


def facts_of(config: VWLmmConfig | None, metadata: dict[str, Any]) -> dict[str, str]:
    """What a model is, as the first table of its card has it; its parts are left out without a config."""
    facts, bases = {}, listed(metadata.get("base_model"))
    if config is not None:
        height, width = config.image_size
        read = "pseudo image features" if config.pseudo_image_features else "projected features"
        facts = {
            "vision tower": f"{config.vision_config.model_type}: {config.image_seq_length} patches of an image of "
            f"{width} x {height} pixels",
            "LLM": f"{config.text_config.model_type} of hidden size {config.text_config.hidden_size}, reads {read}",
            "visual words": f"over a vocabulary of {config.visual_vocab_size}",
        }
    if bases:
        facts["made of"] = ", ".join(bases)
    unknown = "none is recorded" + (f": look for that of {' and '.join(bases)}" if bases else "")
    return {**facts, "license": metadata.get("license_name") or metadata.get("license") or unknown}


def stage_rows(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each stage its row in the table of stages, and its recipe as YAML."""
    own_folders = _own_folders(stages)
    return [_stage_row(stage, stage.get("recipe") or {}, own_folders) for stage in stages]


def _stage_row(stage: dict[str, Any], recipe: dict[str, Any], own_folders: list[str]) -> dict[str, Any]:
    steps = recipe.get("max_steps", -1)
    epochs = recipe.get("num_train_epochs")
    shown = {name: value for name, value in recipe.items() if name not in _NOT_SHOWN}
    shown |= {"peft": stage["peft"]} if stage.get("peft") else {}
    shown |= {"seed": stage["seed"]} if stage.get("seed") is not None else {}
    return {
        "name": stage.get("stage") or "",
        "base_model": ", ".join(_shown(name, own_folders) for name in listed(stage.get("base_model"))),
        "dataset": _mixture(stage, recipe),
        # Old records have no parts beside the stage, only those that the recipe names
        "trains": ", ".join(listed(stage.get("trainable") or recipe.get("trainable"))),
        "length": f"{steps} steps" if steps > 0 else f"{epochs} epochs" if epochs is not None else "",
        "learning_rate": recipe.get("learning_rate", ""),
        "recipe": yaml.safe_dump(without_paths(shown, is_log=True), sort_keys=False).strip() if shown else None,
    }


def _mixture(stage: dict[str, Any], recipe: dict[str, Any]) -> str:
    """The data of a stage; where they are several, with their shares if it gave them any."""
    names = listed(stage.get("dataset"))
    fractions = [entry.get("fraction") for entry in recipe.get("datasets") or []]
    if len(fractions) != len(names) or None in fractions:
        return ", ".join(map(_shown, names))
    shares = [fraction / sum(fractions) for fraction in fractions]
    return ", ".join(f"{_shown(name)} ({share:.0%})" for name, share in zip(names, shares, strict=True))


def hardware_lines(stages: list[dict[str, Any]]) -> list[str]:
    """The hardware and the versions of the stages; consecutive stages that share them have one line."""
    lines = []
    for (hardware, versions), group in itertools.groupby(stages, lambda s: (s.get("hardware"), s.get("versions"))):
        names = ", ".join(stage.get("stage") or "training" for stage in group)
        where = [f"{hardware['device']}, processes: {hardware['processes']}"] if hardware else []
        where += [", ".join(f"{name} {version}" for name, version in versions.items())] if versions else []
        lines += [f"{names}: {'; '.join(where)}"] if where else []
    return lines


def result_tables(results: Iterable[EvalResult]) -> list[str]:
    """A Markdown table for each data set, with a column for each of its splits."""
    tables = []
    for dataset, group in itertools.groupby(results, lambda result: result.dataset_name):
        values: dict[str, dict[str, str]] = {}
        for result in group:
            counts = ", ".join(f"{count} {what}" for what, count in (result.dataset_args or {}).items())
            split = (result.dataset_split or "") + (f" ({counts})" if counts else "")
            low, high = (result.metric_args or {}).get(INTERVAL, (None, None))
            shown = f"{result.metric_value}" + ("" if low is None else f" [{low}, {high}]")
            values.setdefault(result.metric_name or result.metric_type, {})[split] = shown
        splits = list(dict.fromkeys(split for row in values.values() for split in row))
        rows = [[dataset, *splits], ["---"] * (len(splits) + 1)]
        rows += [[name, *(row.get(split, "") for split in splits)] for name, row in values.items()]
        tables.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return tables


def _is_repo(name: str, own_folders: Iterable[str] = ()) -> bool:
    """Whether a name looks like that of a repository: it is valid, and no folder here or of the run has it."""
    if "/" not in name or os.path.exists(name) or os.path.normpath(name) in own_folders:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _shown(name: str, own_folders: Iterable[str] = ()) -> str:
    """The name of a repository as it is, and the base name of a folder."""
    return name if _is_repo(name, own_folders) else base_name(name)


def _own_folders(stages: list[dict[str, Any]]) -> list[str]:
    """The folders that the stages wrote, from which the next ones started."""
    recipes = [stage.get("recipe") or {} for stage in stages]
    return [os.path.normpath(recipe["output_dir"]) for recipe in recipes if recipe.get("output_dir")]


def _card_data(name: str) -> dict[str, Any]:
    """The metadata in the card of a folder or repository; none if there is no card or it cannot be reached."""
    path = Path(name, "README.md") if os.path.isdir(name) else name
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
