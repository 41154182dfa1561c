"""Recipes of several data sets, and of streams."""

import json
import re
import subprocess
import sys

import pytest
import torch

from helpers.command_line import CPU, error_of, recipe_of
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main
from modeling_vwlmm.data import load_conversations
from modeling_vwlmm.trainer import VWLmmSFTTrainer


@pytest.fixture
def datasets(data):
    """A data file with its folder, and what is in it as a saved data set."""
    saved = data.parent / "saved"
    load_conversations(data, data.parent / "images").save_to_disk(saved)
    files = {"path": str(data), "image_folder": str(data.parent / "images"), "fraction": 0.75}
    return [files, {"path": str(saved), "image_folder": str(data.parent / "images"), "fraction": 0.25}]


@pytest.fixture
def recipe(tmp_path, model_folder, data, datasets):
    def make(**fields):
        given = {"dataset": None, "image_folder": None, "datasets": datasets, "learning_rate": 0.01, **fields}
        return recipe_of(tmp_path, model_folder, data, **given)

    return make


def test_a_mixture_trains_and_is_on_record(tmp_path, capsys, data, recipe):
    main(["train", "--config", recipe(), *CPU])
    assert f"5 samples of {data}, {data.parent / 'saved'}, 2 a step" in capsys.readouterr().err
    (run,) = json.loads((tmp_path / "out" / "training_run.json").read_text())
    assert run["dataset"] == [str(data), str(data.parent / "saved")]
    assert [entry["fraction"] for entry in run["recipe"]["datasets"]] == [0.75, 0.25]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "data.json (75%), saved (25%)" in card and str(tmp_path) not in card


def test_data_files_without_an_image_folder_take_that_of_the_recipe(capsys, data, recipe):
    entries = [str(data), {"path": str(data)}]
    message = error_of(capsys, "train", "--config", recipe(datasets=entries, image_folder="nowhere"), *CPU)
    assert "nowhere: no such image folder" in message
    main(["train", "--config", recipe(datasets=entries, image_folder=str(data.parent / "images")), *CPU])
    assert f"samples of {data}, {data}" in capsys.readouterr().err


def test_a_stream_goes_on_as_if_it_had_not_stopped(tmp_path, monkeypatch, capsys, recipe):
    arguments = [*CPU[: CPU.index("--save_strategy")], "--save_strategy", "steps", "--save_steps", "2"]
    command = ["train", "--config", recipe(streaming=True, max_steps=4, shuffle_dataset=True), *arguments]
    main([*command, "--output_dir", str(tmp_path / "whole")])
    assert "a stream of " in capsys.readouterr().err
    step_of = VWLmmSFTTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step_of(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(VWLmmSFTTrainer, "training_step", stop)
        with pytest.raises(SystemExit):
            main(command)
    main(command)
    assert f"going on from {tmp_path}/out/checkpoint-2" in capsys.readouterr().err
    weights = [VWLmmForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "out")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_stream_of_less_than_a_batch_begins_again(tmp_path, recipe):
    path = recipe(streaming=True, max_steps=2, per_device_train_batch_size=16, dataloader_drop_last=True)
    main(["train", "--config", path, *CPU])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


def test_a_part_can_be_held_out(tmp_path, recipe):
    main(["train", "--config", recipe(test_split_size=0.4, eval_strategy="steps", eval_steps=1), *CPU])
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_vw_loss" in log for log in logs)


BAD = {
    "typo": (lambda d: {"datasets": [d[0], {**d[1], "fractoin": 1}]}, r'datasets\[1\]: unknown field "fractoin", is '),
    "type": (lambda d: {"datasets": [{**d[0], "path": 3}]}, r"datasets\[0\]: path is 3, expected a text"),
    "no path": (lambda d: {"datasets": [{"fraction": 1.0}]}, r"datasets\[0\]: path is missing"),
    "no list": (lambda d: {"datasets": d[0]}, r"datasets is \{.*, expected a list, each a mapping"),
    "both": (lambda d: {"dataset": d[0]["path"]}, "expected the data as dataset, or several as datasets"),
    "none": (lambda d: {"datasets": []}, "expected the data as dataset, or several as datasets"),
    "max_steps": (lambda d: {"streaming": True, "max_steps": -1}, "streaming .*data.json, .*saved takes max_steps"),
    "held out": (lambda d: {"streaming": True, "test_split_size": 0.5}, "streaming .* leaves nothing to test_split"),
    "fractions": (lambda d: {"datasets": [d[0], {**d[1], "fraction": -1}]}, "saved has the fraction -1, expected"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_mixtures_are_one_line(capsys, recipe, datasets, case):
    fields, message = BAD[case]
    path = recipe(**fields(datasets))
    line = error_of(capsys, "train", "--config", path, *CPU)
    assert re.search(message, line), line


def test_help_lists_what_this_package_adds_without_torch():
    code = (
        "import atexit, sys; from modeling_vwlmm.cli import main; heavy = {'torch', 'transformers', 'datasets'};"
        "atexit.register(lambda: print([*heavy & sys.modules.keys()], end=''));"
        "main(['train', '--help'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("[]")
    for field in ("--model MODEL", "--datasets", "--stage", "--lora_r", "--help-all", "example"):
        assert field in printed
    assert "--per_device_train_batch_size" not in printed


def test_all_fields_can_be_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-all"])
    printed = capsys.readouterr().out
    assert printed.index("--stage") < printed.index("--per_device_train_batch_size")
