"""`vwlmm train`: trains a model as a recipe says."""

import contextlib
import difflib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..files import reading
from .errors import Parser, check_texts
from .field_types import check_values
from .shared import existing


if TYPE_CHECKING:
    from ..trainer import VWLmmSFTConfig, VWLmmSFTTrainer
    from ..trainer.lora import LoraArguments

SUMMARY = "train a model, as a recipe says"
EXAMPLE = "vwlmm train --config recipes/stage2_instruct.yaml --learning_rate 1e-5"
LONGEST_RECIPE = 10_000  # values


@dataclass
class TrainArguments:
    """What a recipe trains on, beside the fields of [`VWLmmSFTConfig`]."""

    model: str = field(metadata={"help": "Folder or repository of the model to start from."})
    dataset: str = field(
        metadata={
            "help": "A .json or .jsonl file in LLaVA's format, with image_folder; easy-vqa/caption, "
            "easy-vqa/conversation or easy-vqa/shuffled-conversation; or a dataset in TRL's vision format, its "
            "repository or a folder written by `Dataset.save_to_disk`."
        }
    )
    image_folder: str | None = field(default=None, metadata={"help": "Folder of the images that a data file names."})
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset to evaluate on, named in the same ways, with the same image_folder."},
    )
    eval_split: str = field(default="test", metadata={"help": "Split of the eval_dataset."})


def main(argv: list[str]) -> None:
    arguments, config, lora, recipe = _parse(argv)
    config.check_amount()
    with _own_folder(arguments, config, recipe):
        trainer = _load(arguments, config, lora, recipe)
        is_finished, checkpoint = _resume(trainer)
        if not is_finished:
            _run(trainer, checkpoint)
        if config.push_to_hub:
            _push(trainer)


def _parse(argv: list[str]) -> "tuple[TrainArguments, VWLmmSFTConfig, LoraArguments, dict[str, Any]]":
    """The arguments of the run, and those of them that the recipe or the command line names, for its record."""
    from trl import TrlParser

    class RecipeParser(Parser, TrlParser):
        pass

    from ..trainer import VWLmmSFTConfig
    from ..trainer.lora import LoraArguments
    from ..training_run import given_fields

    recipe_parser = Parser(prog="vwlmm train", add_help=False, allow_abbrev=False)
    recipe_parser.add_argument(
        "--config", metavar="RECIPE", help="the recipe, a YAML file of the fields below; arguments override it"
    )
    kinds = (TrainArguments, VWLmmSFTConfig, LoraArguments)
    parser = RecipeParser(
        kinds, prog="vwlmm train", allow_abbrev=False, parents=[recipe_parser], epilog=f"example: {EXAMPLE}"
    )
    named = {part[2:].split("=")[0].replace("-", "_") for part in argv if part.startswith("--")}
    named |= {name.removeprefix("no_") for name in named}
    path = recipe_parser.parse_known_args(argv)[0].config
    if path is not None:
        recipe = _read_recipe(path, [known.name for kind in kinds for known in fields(kind) if known.init])
        recipe = check_values(path, recipe, kinds)
        parser.set_defaults_with_config(**recipe)
        named |= recipe.keys()
    source = path or "the command line"
    try:
        arguments, config, lora, *_ = parser.parse_args_into_dataclasses(argv)
    except (TypeError, AttributeError) as error:  # of transformers, on what a mapping of the right type holds
        raise ValueError(f"{source}: {error}") from error
    for name in ("model", "dataset", "eval_dataset", "image_folder"):
        if (value := getattr(arguments, name)) is not None:
            setattr(arguments, name, os.path.expanduser(value))
    mappings = {known.name: getattr(config, known.name) for known in fields(config) if known.name.endswith("_kwargs")}
    check_values(source, mappings, kinds)
    recorded: dict[str, Any] = {}
    for part in (arguments, config, lora):
        recorded |= given_fields(part, named)
    return arguments, config, lora, recorded


def _read_recipe(path: str, known: list[str]) -> dict[str, Any]:
    """The fields of a recipe, which must be known. Its `env` goes to the environment, as TRL's own reader does it."""
    import yaml

    with open(path, encoding="utf-8") as file:
        try:
            recipe = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    with reading(path):
        check_texts(list(_texts_of(recipe)))
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} is not a recipe: expected a YAML mapping of fields to values")
    environment = recipe.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: env is {environment!r}, expected a mapping of variables to values")
    for name in recipe:
        if name not in known:
            close = difflib.get_close_matches(str(name), [*known, "env"], n=1)
            raise ValueError(f'{path}: unknown field "{name}"' + (f', is "{close[0]}" meant?' if close else ""))
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return recipe


def _texts_of(value: Any) -> Iterator[str]:
    """All texts in a value; `ValueError` if it is endless, or its aliases make it too large to write down."""
    queue = [value]
    for _ in range(LONGEST_RECIPE):
        if not queue:
            return
        item = queue.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, set, tuple)):
            queue += item
    raise ValueError(f"aliases make it larger than {LONGEST_RECIPE:,} values")


@contextlib.contextmanager
def _own_folder(arguments: TrainArguments, config: "VWLmmSFTConfig", recipe: dict[str, Any]) -> Iterator[None]:
    """Refuse a folder that is another's before anything is read, and keep others out of it until the end."""
    from ..trainer.checkpoints import last_checkpoint
    from ..trainer.lock import locked
    from ..trainer.output_dir import check_output_dir

    asked_for, folder = str(config.resume_from_checkpoint).lower(), config.output_dir
    # The other processes of a run rely on its first
    with locked(folder) if config.process_index == 0 else contextlib.nullcontext():
        if asked_for == "false" and (last := last_checkpoint(folder)):
            raise ValueError(f"{last} is there: to start anew, remove it or name another output_dir")
        if asked_for in ("none", "false"):
            sources = {name: getattr(arguments, name) for name in ("model", "dataset", "image_folder", "eval_dataset")}
            check_output_dir(folder, sources, recipe)
        yield


def _load(
    arguments: TrainArguments, config: "VWLmmSFTConfig", lora: "LoraArguments", recipe: dict[str, Any]
) -> "VWLmmSFTTrainer":
    """The trainer, with its model and data."""
    import torch
    from transformers import get_scheduler

    from ..data.load import load_dataset
    from ..trainer import VWLmmSFTTrainer

    dataset = load_dataset(arguments.dataset, arguments.image_folder, arguments.dataset_split)
    eval_dataset = None
    if arguments.eval_dataset is not None:
        eval_dataset = load_dataset(arguments.eval_dataset, arguments.image_folder, arguments.eval_split)
    if config.lr_scheduler_kwargs:  # training itself would find out at its start
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        with reading(f"lr_scheduler_kwargs {config.lr_scheduler_kwargs}"):
            get_scheduler(config.lr_scheduler_type, optimizer, 0, 1, config.lr_scheduler_kwargs)
    try:
        return VWLmmSFTTrainer(
            model=existing(arguments.model),
            args=config,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            peft_config=lora.peft_config(),
            quantization_config=lora.quantization_config(torch.bfloat16 if config.bf16 else torch.float32),
            run_record={"dataset": arguments.dataset, "recipe": recipe},
        )
    except RuntimeError as error:
        if "to be installed" not in str(error):
            raise
        raise ImportError(f"report_to is {config.report_to}: {error}") from error


def _resume(trainer: "VWLmmSFTTrainer") -> tuple[bool, str | bool | None]:
    """Whether the training is finished already; if not, the checkpoint that it goes on from, if there is one."""
    from ..trainer.checkpoints import is_finished, own_checkpoint

    folder, asked_for = trainer.args.output_dir, trainer.args.resume_from_checkpoint
    if asked_for is not None:
        return False, {"true": True, "false": False}.get(str(asked_for).lower(), asked_for)
    checkpoint = own_checkpoint(folder, trainer.stages)
    if is_finished(folder, trainer.stages):
        _say(trainer, f"{folder} is finished, there is nothing left to do")
        return True, None
    if checkpoint:
        if differences := trainer.differences_to(checkpoint):
            raise ValueError(
                f"{checkpoint} would not go on as if it had not stopped: {'; '.join(differences)}. Name another "
                "output_dir, or go on all the same with --resume_from_checkpoint true"
            )
        _say(trainer, f"going on from {checkpoint}")
    return False, checkpoint


def _run(trainer: "VWLmmSFTTrainer", checkpoint: str | bool | None) -> None:
    from ..trainer.checkpoints import last_checkpoint
    from ..trainer.summary import summary_of

    try:
        _say(trainer, "\n" + summary_of(trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(_internal_call=True)  # it is pushed afterwards, when all of the folder is there
        trainer.save_state()
        trainer.create_model_card()
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0]) from error
    except KeyboardInterrupt:
        last = last_checkpoint(trainer.args.output_dir)
        raise KeyboardInterrupt(f", the last checkpoint is {last}" if last else ", there is no checkpoint") from None


def _push(trainer: "VWLmmSFTTrainer") -> None:
    """Push what is not on the Hub yet. A run that has ended goes on to be one, whatever comes of its push."""
    folder, repo = trainer.args.output_dir, trainer.hub_model_id
    try:
        trainer.push_finished()
    except (ValueError, OSError) as error:
        message = f"{folder} is finished, but not on the Hub; vwlmm push {folder} {repo} sends it: {error}"
        raise OSError(message) from error


def _say(trainer: "VWLmmSFTTrainer", message: str) -> None:
    if trainer.is_world_process_zero():
        print(f"vwlmm train: {message}", file=sys.stderr)
