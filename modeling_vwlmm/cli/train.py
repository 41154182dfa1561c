"""`vwlmm train`: trains a model as a recipe says."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..files import reading
from .errors import Parser, check_texts
from .field_types import check_names, check_values
from .shared import existing


if TYPE_CHECKING:
    from ..arguments import LoraArguments, MixedDataset, MixtureArguments, TrainArguments
    from ..trainer import VWLmmSFTConfig, VWLmmSFTTrainer

SUMMARY = "train a model, as a recipe says"
EXAMPLE = "vwlmm train --config recipes/stage2_instruct.yaml --learning_rate 1e-5"
LONGEST_RECIPE = 10_000  # values


def main(argv: list[str]) -> None:
    if {"-h", "--help", "--help-all"} & set(argv):
        _print_help("--help-all" in argv)
        sys.exit(0)
    arguments, mixture, config, lora, recipe = _parse(argv)
    config.check_amount()
    datasets = _datasets_of(arguments, mixture, config)
    sources = {"model": arguments.model, "eval_dataset": arguments.eval_dataset}
    for i, entry in enumerate(datasets):
        where = "" if arguments.dataset is not None else f"datasets[{i}]: "
        sources |= {f"{where}dataset": entry.path, f"{where}image_folder": entry.image_folder}
    with _own_folder(sources, config, recipe):
        trainer = _load(arguments, mixture, datasets, config, lora, recipe)
        is_finished, checkpoint = _resume(trainer)
        if not is_finished:
            _run(trainer, checkpoint)
        if config.push_to_hub:
            _push(trainer)


def _parser_of(kinds: tuple[type, ...], **kwargs: Any) -> Any:
    from trl import TrlParser

    class RecipeParser(Parser, TrlParser):
        pass

    return RecipeParser(kinds, prog="vwlmm train", allow_abbrev=False, **kwargs)


def _recipe_parser() -> Parser:
    parser = Parser(prog="vwlmm train", add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--config", metavar="RECIPE", help="the recipe, a YAML file of the fields below; arguments override it"
    )
    return parser


def _print_help(with_all: bool) -> None:
    """The fields that this package adds, which needs no torch: with TRL's, the import would take seconds."""
    from ..arguments import LoraArguments, MixtureArguments, TrainArguments, VWLmmArguments

    kinds = (TrainArguments, MixtureArguments, VWLmmArguments, LoraArguments)
    epilog = f"Fields of TRL's SFTConfig can be given too: vwlmm train --help-all; example: {EXAMPLE}"
    usage = "vwlmm train --config RECIPE [--FIELD VALUE ...]"
    print(_parser_of(kinds, usage=usage, parents=[_recipe_parser()], epilog=epilog).format_help())
    if with_all:
        from trl import SFTConfig

        print(_parser_of((SFTConfig,), usage="and the fields of TRL's SFTConfig", add_help=False).format_help())


def _parse(
    argv: list[str],
) -> "tuple[TrainArguments, MixtureArguments, VWLmmSFTConfig, LoraArguments, dict[str, Any]]":
    """The arguments of the run, and those of them that the recipe or the command line names, for its record."""
    from ..arguments import LoraArguments, MixtureArguments, TrainArguments
    from ..trainer import VWLmmSFTConfig
    from ..training_run import given_fields

    recipe_parser = _recipe_parser()
    kinds = (TrainArguments, MixtureArguments, VWLmmSFTConfig, LoraArguments)
    parser = _parser_of(kinds, parents=[recipe_parser])
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
        arguments, mixture, config, lora, *_, rest = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True
        )
    except (TypeError, AttributeError) as error:  # of transformers, on what a mapping of the right type holds
        raise ValueError(f"{source}: {error}") from error
    if rest:
        unknown = dict.fromkeys(part[2:].split("=")[0].replace("-", "_") for part in rest if part.startswith("--"))
        check_names("the command line", unknown, [known.name for kind in kinds for known in fields(kind)])
        raise ValueError(f'the command line: found "{rest[0]}", expected --FIELD VALUE')
    for name in ("model", "dataset", "eval_dataset", "image_folder"):
        if (value := getattr(arguments, name)) is not None:
            setattr(arguments, name, os.path.expanduser(value))
    mappings = {known.name: getattr(config, known.name) for known in fields(config) if known.name.endswith("_kwargs")}
    check_values(source, mappings, kinds)
    recorded: dict[str, Any] = {}
    for part in (arguments, mixture, config, lora):
        recorded |= given_fields(part, named)
    return arguments, mixture, config, lora, recorded


def _datasets_of(
    arguments: "TrainArguments", mixture: "MixtureArguments", config: "VWLmmSFTConfig"
) -> "list[MixedDataset]":
    """The data sets that the recipe names."""
    from ..arguments import MixedDataset

    if (arguments.dataset is None) == (not mixture.datasets):
        raise ValueError("expected the data as dataset, or several as datasets, and not both")
    # One image_folder may serve all, as it serves the eval_dataset
    datasets = [
        dataclasses.replace(entry, image_folder=arguments.image_folder) if entry.image_folder is None else entry
        for entry in mixture.datasets
    ]
    if arguments.dataset is not None:
        given = {"image_folder": arguments.image_folder, "split": arguments.dataset_split}
        datasets = [MixedDataset(path=arguments.dataset, **given)]
    names = ", ".join(entry.path for entry in datasets)
    if mixture.streaming and config.max_steps < 1:
        raise ValueError(f"streaming {names} takes max_steps, for how many rows come is not known before")
    if mixture.streaming and mixture.test_split_size:
        raise ValueError(f"streaming {names} leaves nothing to test_split_size: name an eval_dataset")
    if arguments.eval_dataset is not None and mixture.test_split_size:
        raise ValueError("expected an eval_dataset or a test_split_size, and not both")
    return datasets


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
    check_names(path, recipe, [*known, "env"])
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
def _own_folder(sources: dict[str, str | None], config: "VWLmmSFTConfig", recipe: dict[str, Any]) -> Iterator[None]:
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
            check_output_dir(folder, sources, recipe)
        yield


def _load(
    arguments: "TrainArguments",
    mixture: "MixtureArguments",
    datasets: "list[MixedDataset]",
    config: "VWLmmSFTConfig",
    lora: "LoraArguments",
    recipe: dict[str, Any],
) -> "VWLmmSFTTrainer":
    """The trainer, with its model and data."""
    import torch
    from transformers import get_scheduler

    from ..data.load import load_dataset
    from ..data.mixture import load_mixture
    from ..trainer import VWLmmSFTTrainer

    dataset: Any = load_mixture(datasets, mixture.streaming, config.seed, config.dataset_text_field)
    if mixture.streaming and config.shuffle_dataset:  # whole data sets are shuffled as they are read
        dataset = dataset.shuffle(config.seed)
    eval_dataset = None
    if arguments.eval_dataset is not None:
        eval_dataset = load_dataset(arguments.eval_dataset, arguments.image_folder, arguments.eval_split)
    elif mixture.test_split_size:
        parts = dataset.train_test_split(mixture.test_split_size, seed=config.seed)
        dataset, eval_dataset = parts["train"], parts["test"]
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
            run_record={"dataset": arguments.dataset or [entry.path for entry in datasets], "recipe": recipe},
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
