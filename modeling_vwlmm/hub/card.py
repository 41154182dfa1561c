"""Writes the card of a model, README.md, from the records in its folder."""

import itertools
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..files import read_json_object, replacing
from ..modeling_vwlmm import VWLmmForCausalLM
from ..training_run import read_training_run
from .card_facts import facts_of, hardware_lines, listed, metadata_of, read_eval_results, result_tables, stage_rows
from .card_pictures import LIMITS_PICTURE, LOSSES, draw_losses, draw_visual_words


BEGIN = "<!-- vwlmm card: what stands from here to its end is written anew at every push -->"
END = "<!-- vwlmm card: end -->"
# Results of this task in the metadata are measured on visual words; the card shows them under its limits
LIMITS_TASK = "image-feature-extraction"
# Sentences in the cards that transformers, TRL and PEFT write by themselves
_DRAFTS = (
    "This model card has been generated automatically",
    "It has been trained using [TRL]",
    "[More Information Needed]",
)
# Where the records renew a key of the metadata, these keys of the old card go: they describe the old value
_TOGETHER = {
    "license": ("license_name", "license_link"),
    "base_model": ("base_model_relation",),
    "eval_results": ("model-index",),
}


def write_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    card_text: str | None = None,
    model: VWLmmForCausalLM | None = None,
) -> ModelCard:
    """Write the card of a model and its pictures into the model's folder, from the records there.

    The records are its config, `training_run.json`, `trainer_state.json`, `eval_results.json` (a list of objects with
    the fields of [`~huggingface_hub.EvalResult`]), and the cards of the models that it was made of. The card leaves
    out what has no record.

    Args:
        folder (`str` or `os.PathLike`): of a model or an adapter.
        repo_id (`str`, *optional*): of the repository that the card is for. The folder's name stands in for it.
        card_text (`str`, *optional*): a card, such as the one in the repository. Its metadata and the text around the
            part that was written here are kept. Where it is not given, the card in the folder is taken, unless
            transformers, TRL or PEFT wrote it.
        model: the model in the folder, with its adapter. It is loaded if not given.

    Raises:
        ValueError: a record or the metadata of a card cannot be read.
        OSError: there is no model.
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json or adapter_config.json, expected the folder of a model")
    stages = read_training_run(folder)
    bases = [listed(stage.get("base_model")) for stage in reversed(stages)]
    if is_adapter:
        # The record may name a folder that has been pushed since; the adapter's config then names its repository
        bases.insert(0, listed(read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")))
    results = read_eval_results(folder, stages)
    kept, before, after = _hand_written(folder, card_text)
    model_id = repo_id or folder.resolve().name
    found = metadata_of(stages, bases, results, is_adapter, model_id)
    for key, others in _TOGETHER.items():
        for other in others if key in found else ():
            kept.pop(other, None)
    metadata = {**kept, **found, "tags": [*found["tags"], *listed(kept.get("tags"))]}

    if model is None:
        model = _load_adapter(folder, bases) if is_adapter else _load_model(folder)
    (folder / "assets").mkdir(exist_ok=True)
    template = resources.files("modeling_vwlmm.hub_card").joinpath("modelcard_template.md")
    card = ModelCard.from_template(
        ModelCardData(**metadata),
        template_str=template.read_text(encoding="utf-8"),
        title=None if re.search("^# ", before, flags=re.MULTILINE) else model_id.split("/")[-1],
        model_id=model_id,
        example=next((example for example in listed(kept.get("widget")) if isinstance(example, dict)), {}),
        is_adapter=is_adapter,
        facts=facts_of(model.config if model else None, metadata),
        stages=stage_rows(stages),
        losses=draw_losses(folder, stages),
        losses_data=LOSSES,
        words=draw_visual_words(model, folder) if model else None,
        runs=hardware_lines(stages),
        evaluation=result_tables(result for result in results if result.task_type != LIMITS_TASK),
        limits_picture=LIMITS_PICTURE if (folder / LIMITS_PICTURE).is_file() else None,
        limits=result_tables(result for result in results if result.task_type == LIMITS_TASK),
    )
    card.text = "\n" + "\n\n".join(filter(None, [before, BEGIN, card.text.strip(), END, after])) + "\n"
    with replacing(folder / "README.md") as beside:
        card.save(beside)
    return card


def _load_model(folder: Path) -> VWLmmForCausalLM:
    return VWLmmForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _load_adapter(folder: Path, bases: list[list[str]]) -> VWLmmForCausalLM | None:
    """The adapter on its base model; None if that is not at hand."""
    names = list(itertools.chain(*bases[:2]))
    try:
        name = next(filter(os.path.isdir, names), names[0] if names else "")
        # transformers makes a model's dtype torch's default while it loads. In float32 that changes nothing for a
        # training that goes on in another thread meanwhile
        model = VWLmmForCausalLM.from_pretrained(name, dtype=torch.float32)
    except OSError:
        return None
    model.load_adapter(str(folder))
    return model.eval()


def _hand_written(folder: Path, card_text: str | None) -> tuple[dict[str, Any], str, str]:
    """The metadata of a card, and the texts before and after the part that was written here."""
    if card_text is None and (folder / "README.md").is_file():
        card_text = (folder / "README.md").read_text(encoding="utf-8")
        if BEGIN not in card_text and any(draft in card_text for draft in _DRAFTS):
            card_text = None
    if not card_text:
        return {}, "", ""
    try:
        card = ModelCard(card_text, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the present card of {folder.name} has metadata that cannot be read: {error}") from error
    metadata = card.data.to_dict()
    own = re.search(f"{re.escape(BEGIN)}.*?{re.escape(END)}", card.text, flags=re.DOTALL)
    if own is None:
        return metadata, card.text.strip("\r\n"), ""
    metadata.pop("model-index", None)
    return metadata, card.text[: own.start()].strip("\r\n"), card.text[own.end() :].strip("\r\n")
