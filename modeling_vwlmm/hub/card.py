"""Model cards: what the records in a model's folder say of it, as a README.md with pictures."""

import itertools
import json
import math
import os
import re
from importlib import resources
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image, ImageDraw
from transformers import AutoProcessor

from ..files import read_json, read_json_object
from ..modeling_vwlmm import VWLmmForCausalLM
from ..stages import STAGES
from ..training_run import read_training_run
from ..words import draw_words, top_words
from .redaction import base_name, without_paths


BEGIN = "<!-- vwlmm card: what stands from here to its end is written anew at every push -->"
END = "<!-- vwlmm card: end -->"
EVAL_RESULTS_NAME = "eval_results.json"
# In the metadata, what is measured of visual words is of this task: the card has it among the limits
LIMITS_TASK = "image-feature-extraction"
LOSSES, LOSSES_PICTURE = "assets/losses.json", "assets/losses.png"
EXAMPLES, WORDS_PICTURE = "examples", "assets/visual_words.png"
# Models under the Llama 2 Community License, not all of whose cards say so in their metadata
_LLAMA_2 = re.compile(
    r"(^|/)(meta-llama/Llama-2-|lmsys/vicuna-\d+b-v1\.5|liuhaotian/llava-v1\.5-|llava-hf/llava-1\.5-"
    r"|MYTH-Lab/VW-LMM-Vicuna-)"
)
# Found in the cards that transformers, TRL and PEFT write by themselves
_DRAFTS = (
    "This model card has been generated automatically",
    "It has been trained using [TRL]",
    "[More Information Needed]",
)
_TOGETHER = {
    "license": ("license_name", "license_link"),
    "base_model": ("base_model_relation",),
    "eval_results": ("model-index",),
}
_LOSSES = ["loss", "lm_loss", "vw_loss"]
# Fields of a recipe that stand elsewhere in the card, or name places of the machine that it ran on
_NOT_SHOWN = {"model", "dataset", "eval_dataset", "image_folder", "output_dir", "resume_from_checkpoint", "stage"}


def write_card(folder: str | os.PathLike, repo_id: str | None = None, card_text: str | None = None) -> ModelCard:
    """Write the card of a model, README.md, and its pictures into its folder, from the records there.

    These are its config, `training_run.json`, `trainer_state.json`, `eval_results.json` (a list of objects with the
    fields of [`~huggingface_hub.EvalResult`]), and the cards of the models that it was made of. What has no record is
    left out. Visual words are drawn over the images in `examples`, or over a drawn one if there are none.

    Args:
        folder: of a model or an adapter.
        repo_id (`str`, *optional*): of the repository that the card is for. The folder's name stands in for it.
        card_text (`str`, *optional*): a card whose hand-written parts, text and metadata, are kept, such as the one
            in the repository. The one in the folder if not given, unless transformers, TRL or PEFT wrote it.

    Raises:
        ValueError: a record, or the metadata of a card, holds something else.
        OSError: there is no model.
    """
    folder = Path(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no config.json or adapter_config.json, expected the folder of a model")
    stages = read_training_run(folder)
    bases = [_listed(stage.get("base_model")) for stage in reversed(stages)]
    if is_adapter:
        # It may have been trained on a folder that has become this repository
        bases.insert(0, _listed(read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")))
    results = _read_eval_results(folder, stages)
    kept, before, after = _hand_written(folder, card_text)
    model_id = repo_id or folder.resolve().name
    found = _metadata(stages, bases, results, is_adapter, model_id)
    # What goes with a key that is renewed is not kept beside it
    for key, others in _TOGETHER.items():
        for other in others if key in found else ():
            kept.pop(other, None)
    data = {**kept, **found, "tags": [*found["tags"], *_listed(kept.get("tags"))]}

    if is_adapter:
        model = _load_adapter(folder, bases)
    else:
        model = VWLmmForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    (folder / "assets").mkdir(exist_ok=True)
    template = resources.files("modeling_vwlmm.hub_card").joinpath("modelcard_template.md")
    card = ModelCard.from_template(
        ModelCardData(**data),
        template_str=template.read_text(encoding="utf-8"),
        title=None if re.search("^# ", before, flags=re.MULTILINE) else model_id.split("/")[-1],
        model_id=model_id,
        example=next((example for example in _listed(kept.get("widget")) if isinstance(example, dict)), {}),
        is_adapter=is_adapter,
        facts=_facts(model, data),
        stages=[_describe(stage, _own_folders(stages)) for stage in stages],
        losses=_draw_losses(folder, stages),
        losses_data=LOSSES,
        words=_draw_words(model, folder) if model else None,
        runs=_runs(stages),
        evaluation=_tables(result for result in results if result.task_type != LIMITS_TASK),
        limits=_tables(result for result in results if result.task_type == LIMITS_TASK),
    )
    card.text = "\n" + "\n\n".join(filter(None, [before, BEGIN, card.text.strip(), END, after])) + "\n"
    card.save(folder / "README.md")
    return card


def _load_adapter(folder, bases):
    """The adapter on its base model; None if that is not at hand."""
    names = list(itertools.chain(*bases[:2]))
    try:
        name = next(filter(os.path.isdir, names), names[0] if names else "")
        # In another dtype it would be torch's default meanwhile, for a training that goes on beside this too
        model = VWLmmForCausalLM.from_pretrained(name, dtype=torch.float32)
    except OSError:
        return None
    model.load_adapter(folder)
    return model.eval()


def _listed(value):
    return [] if value is None else value if isinstance(value, list) else [value]


def _hand_written(folder, card_text):
    """Metadata of a card, and the texts before and after what was written here."""
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


def _read_eval_results(folder, stages):
    path = folder / EVAL_RESULTS_NAME
    if not path.is_file():
        return []
    results = read_json(path)
    if isinstance(results, dict):
        # As `trainer.save_metrics` writes it: it does not say on what it was measured, but the recipe may
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


def _is_repo(name, own_folders=()):
    """Whether a name is that of a repository, as far as can be told without asking: not of a folder of this run."""
    if "/" not in name or os.path.exists(name) or os.path.normpath(name) in own_folders:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _shown(name, own_folders=()):
    """A name without the place on a machine that it may be."""
    return name if name is None or _is_repo(name, own_folders) else base_name(name)


def _own_folders(stages):
    """What the stages wrote, and the next ones started from."""
    recipes = [stage.get("recipe") or {} for stage in stages]
    return [os.path.normpath(recipe["output_dir"]) for recipe in recipes if recipe.get("output_dir")]


def _metadata(stages, bases, results, is_adapter, model_id):
    own_folders = _own_folders(stages)
    repos = [[name for name in names if _is_repo(name, own_folders)] for names in bases]
    base_model = next(filter(None, repos), [])  # the nearest that others can find
    is_trained = any(stage.get("stage") != "convert" for stage in stages)
    relation = "adapter" if is_adapter else "finetune" if is_trained else None
    datasets = [stage["dataset"] for stage in stages if stage.get("dataset")]
    # easy-VQA is a package, not a repository
    datasets = [name.split("/")[0] if name.startswith("easy-vqa/") else name for name in datasets if _is_repo(name)]
    # Of an LLM and a vision tower, the LLM comes first, and its license is the one that carries over
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


def _card_data(name):
    """Metadata of the card of a folder or repository, as far as it can be reached."""
    path = Path(name, "README.md") if os.path.isdir(name) else name
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}


def _facts(model, data):
    facts, bases = {}, _listed(data.get("base_model"))
    if model:
        config = model.config
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
    return {**facts, "license": data.get("license_name") or data.get("license") or unknown}


def _describe(stage, own_folders):
    """A row of the table of stages, and the stage's recipe as YAML."""
    recipe = stage.get("recipe") or {}
    steps = recipe.get("max_steps", -1)
    epochs = recipe.get("num_train_epochs")
    shown = {name: value for name, value in recipe.items() if name not in _NOT_SHOWN}
    shown |= {"peft": stage["peft"]} if stage.get("peft") else {}
    shown |= {"seed": stage["seed"]} if stage.get("seed") is not None else {}
    return {
        "name": stage.get("stage") or "",
        "base_model": ", ".join(_shown(name, own_folders) for name in _listed(stage.get("base_model"))),
        "dataset": _shown(stage.get("dataset")) or "",
        "trains": ", ".join(_listed(recipe.get("trainable") or STAGES.get(stage.get("stage"), {}).get("trainable"))),
        "length": f"{steps} steps" if steps > 0 else f"{epochs} epochs" if epochs is not None else "",
        "learning_rate": recipe.get("learning_rate", ""),
        "recipe": yaml.safe_dump(without_paths(shown, is_log=True), sort_keys=False).strip() if shown else None,
    }


def _runs(stages):
    """What the stages ran on and with, a line for those that have it in common."""
    lines = []
    for (hardware, versions), group in itertools.groupby(stages, lambda s: (s.get("hardware"), s.get("versions"))):
        names = ", ".join(stage.get("stage") or "training" for stage in group)
        where = [f"{hardware['device']}, processes: {hardware['processes']}"] if hardware else []
        where += [", ".join(f"{name} {version}" for name, version in versions.items())] if versions else []
        lines += [f"{names}: {'; '.join(where)}"] if where else []
    return lines


def _tables(results):
    """Results as Markdown tables, one a data set, with a column for each of its splits."""
    tables = []
    for dataset, group in itertools.groupby(results, lambda result: result.dataset_name):
        values = {}
        for result in group:
            counts = ", ".join(f"{count} {what}" for what, count in (result.dataset_args or {}).items())
            split = (result.dataset_split or "") + (f" ({counts})" if counts else "")
            values.setdefault(result.metric_name or result.metric_type, {})[split] = result.metric_value
        splits = list(dict.fromkeys(split for row in values.values() for split in row))
        rows = [[dataset, *splits], ["---"] * (len(splits) + 1)]
        rows += [[name, *(str(row.get(split, "")) for split in splits)] for name, row in values.items()]
        tables.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    return tables


def _losses(folder, stages):
    """The losses of each stage, from the folder that it wrote if that is at hand, else as the last card had them."""
    known = read_json(folder / LOSSES) if (folder / LOSSES).is_file() else []
    names = [stage.get("stage") for stage in stages] or [None]
    # A stage wrote what the next one started from
    sources = [*((_listed(stage.get("base_model")) or [None])[0] for stage in stages[1:]), folder]
    losses = []
    for i, (name, source) in enumerate(zip(names, sources, strict=True)):
        path = Path(source or "") / "trainer_state.json"
        if source and path.is_file():
            log = [entry for entry in read_json_object(path)["log_history"] if "loss" in entry]
            columns = {key: [entry[key] for entry in log if key in entry] for key in ("step", *_LOSSES)}
            losses.append({"stage": name, **{key: column for key, column in columns.items() if column}})
        else:
            losses.append(known[i] if i < len(known) else {"stage": name})
    return losses


def _draw_losses(folder, stages):
    losses = _losses(folder, stages)
    panels = [stage for stage in losses if "step" in stage]
    if not panels:
        return None
    from matplotlib.figure import Figure  # takes a second

    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3 * columns + 0.5, 3 * rows), dpi=150, layout="constrained")
    for i, stage in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, i)
        # An LLM alone, say, has the one loss
        for name in [name for name in _LOSSES[1:] if any(stage.get(name, []))] or _LOSSES[:1]:
            axes.plot(stage["step"], stage[name], label=name, linewidth=1)
        axes.set(title=stage["stage"] or "training", xlabel="step", ylabel="nats", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.savefig(folder / LOSSES_PICTURE)
    lines = ",\n".join(json.dumps(stage) for stage in losses)
    (folder / LOSSES).write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return LOSSES_PICTURE


def _draw_words(model, folder):
    processor = AutoProcessor.from_pretrained(folder)
    images = [Image.open(path).convert("RGB") for path in sorted((folder / EXAMPLES).glob("*.png"))] or [_shapes()]
    words = top_words(model, processor, images, k=1)
    try:
        picture = draw_words(processor, images, words)
    except ValueError:  # patches that are no grid
        return None
    picture.save(folder / WORDS_PICTURE)
    return WORDS_PICTURE


def _shapes():
    image = Image.new("RGB", (336, 336), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 150, 160), fill="red")
    draw.rectangle((190, 50, 310, 140), fill="green")
    draw.polygon([(168, 190), (90, 310), (246, 310)], fill="blue")
    return image


__all__ = ["write_card"]
