"""Values of a recipe that no field takes: one line with the file, the field, what was found and what is expected."""

import json
import re

import pytest

from helpers.command_line import CPU, error_of, recipe_of
from modeling_vwlmm.arguments import LoraArguments, TrainArguments
from modeling_vwlmm.cli import main
from modeling_vwlmm.cli.field_types import check_values
from modeling_vwlmm.trainer import VWLmmSFTConfig


WRONG = {
    "output_dir": (21, "21, expected a text or null"),
    "model": (None, "null, expected a text"),
    "dataset": (["a"], "['a'], expected a text or null"),
    "image_folder": (21, "21, expected a text or null"),
    "stage": (["joint"], "['joint'], expected a text or null"),
    "trainable": ([7], "[7], expected a list, each a text or null"),
    "max_steps": (1.5, "1.5, expected a whole number"),
    "learning_rate": (True, "True, expected a number"),
    "visual_word_loss_weight": ([1], "[1], expected a number or null"),
    "dataset_kwargs": ("nope", "'nope', expected a mapping"),
    "lr_scheduler_kwargs": ("nope", "'nope', expected a mapping"),
    "model_init_kwargs": ([1], "[1], expected a mapping"),
    "gradient_checkpointing_kwargs": ("nope", "'nope', expected a mapping"),
    "lora_kwargs": ("nope", "'nope', expected a mapping"),
    "report_to": (7, "7, expected null or a text or a list, each a text"),
    "bf16": (3, "3, expected true or false or null"),
    "train_sampling_strategy": (
        "grouped",
        '"grouped", expected one of random, sequential, group_by_length, batch_rebalance',
    ),
    "packing_strategy": ("bdf", '"bdf", expected one of bfd, bfd_split, wrapped'),
}


@pytest.mark.parametrize("name", WRONG)
def test_types_of_values(tmp_path, capsys, model_folder, data, name):
    value, problem = WRONG[name]
    recipe = recipe_of(tmp_path, model_folder, data, **{name: value})
    assert error_of(capsys, "train", "--config", recipe) == f"vwlmm train: {recipe}: {name} is {problem}"


BAD = {
    "pad_token": ({"pad_token": "nope"}, 'pad_token is "nope", expected a token of the vocabulary'),
    "best": (
        {
            "metric_for_best_model": "nope",
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
        },
        "'eval_nope', which is not found in the evaluation metrics. .*eval_vw_loss",
    ),
    "report_to": ({"report_to": "wandb"}, "report_to is .*wandb.* to be installed"),
    "schedule": ({"lr_scheduler_kwargs": {"nope": 1}}, "lr_scheduler_kwargs {'nope': 1} cannot be read: .*'nope'"),
    "model": ({"model_init_kwargs": {"nope": 1}}, "the model .* cannot be read: .*'nope'"),
    "accelerator": ({"accelerator_config": {"nope": 1}}, "recipe.yaml: .*'nope'"),
    "batch": ({"per_device_train_batch_size": 0}, "batch_size should be a positive integer"),
    "no steps": ({"max_steps": 0}, "max_steps is 0, expected 1 or more, or -1 for num_train_epochs"),
    "no epochs": ({"max_steps": -1, "num_train_epochs": -1}, "num_train_epochs is -1.*, expected more than 0"),
    "no accumulation": ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps is -2, expected 1 or more"),
    "no batch": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 1000},
        "dataloader_drop_last leaves no batch: the data have [0-9]+ rows, expected at least 1000",
    ),
    "length": ({"max_length": -1}, "max_length is -1, expected 1 or more"),
    "expression": ({"use_peft": True, "lora_target_modules": "(("}, r"target_modules is '\(\(', expected a regular"),
    "no model": ({"model": "/nowhere/a"}, "/nowhere/a: no such folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_values_that_libraries_refuse(tmp_path, capsys, model_folder, data, case):
    fields, problem = BAD[case]
    fields = {"use_cpu": True, "bf16": False, "report_to": "none", "eval_dataset": str(data), **fields}
    recipe = recipe_of(tmp_path, model_folder, data, **fields)
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_of:
        main(["train", "--config", recipe])
    assert exit_of.value.code == 2
    printed = capsys.readouterr().err
    assert re.search(problem, printed.strip().splitlines()[-1]) and "Traceback" not in printed


def test_values_that_fit():
    kinds = (TrainArguments, VWLmmSFTConfig, LoraArguments)
    for name, value in {
        "learning_rate": "1e-3",
        "num_train_epochs": 1,
        "max_length": None,
        "report_to": ["none"],
        "eval_strategy": "steps",
        "fsdp": "",
        "optim": "adamw_torch",
        "lr_scheduler_kwargs": '{"a": 1}',
    }.items():
        assert check_values("a", {name: value}, kinds) == {name: value}
    assert check_values("a", {"lora_target_modules": "q_proj"}, kinds) == {"lora_target_modules": ["q_proj"]}


def test_a_command_line_says_what_a_recipe_can(tmp_path, capsys, model_folder, data, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = recipe_of(tmp_path, "~/model", data, use_peft=True, image_folder="~/images")
    flags = ["--dataset", "~/data.json", "--lora_target_modules", r".*\.(q|v)_proj", "--lora_r", "2"]
    main(["train", "--config", recipe, *CPU, *flags, "--lora_kwargs", '{"bias": "lora_only"}'])
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["bias"] == "lora_only" and config["target_modules"] == r".*\.(q|v)_proj"
    error = error_of(capsys, "train", "--config", recipe, *CPU, "--lr_scheduler_kwargs", "nope")
    assert "lr_scheduler_kwargs" in error


def test_a_file_is_no_model(tmp_path, capsys, data):
    image = str(data.parent / "images" / "0.png")
    message = error_of(capsys, "generate", str(data), image, "--prompt", "w5")
    assert message == f"vwlmm generate: {data} is a file, expected the folder or repository of a model"
