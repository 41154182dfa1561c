"""Runs that are killed, interrupted or broken go on as if nothing was. What is left is whole, an error is one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from helpers import ROOT
from helpers.command_line import CPU, recipe_of
from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import first_gradients, sft_config, trainer_of
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main
from modeling_vwlmm.trainer import VWLmmSFTTrainer


SAVES = [*CPU[: CPU.index("--save_strategy")], "--save_strategy", "steps", "--save_steps", "1"]


def error_of(capsys, *argv):
    """The line that a run ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in printed
    return printed.splitlines()[-1]


@pytest.mark.parametrize("lora", [False, True])
def test_killed_while_saving_it_ends_with_the_same_weights(tmp_path, lora):
    script = ROOT / "tests" / "kill_while_saving.py"
    command = [sys.executable, script, tmp_path / "runs", "--times", "3", *(["--lora"] if lora else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "3 times killed while saving" in done.stdout


@pytest.fixture
def recipe(tmp_path, model_folder, data):
    return recipe_of(tmp_path, model_folder, data, max_steps=3, learning_rate=0.01)


def weights(folder):
    return VWLmmForCausalLM.from_pretrained(folder).state_dict()


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def stop_after(monkeypatch, step, error):
    """Lets a run end with this error when it has taken so many steps."""
    step_of = VWLmmSFTTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error
        return step_of(self, *args, **kwargs)

    monkeypatch.setattr(VWLmmSFTTrainer, "training_step", training_step)


def test_the_same_command_goes_on_and_then_has_nothing_to_do(tmp_path, capsys, monkeypatch, recipe):
    main(["train", "--config", recipe, *SAVES, "--output_dir", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        stop_after(patch, 2, KeyboardInterrupt())
        with pytest.raises(SystemExit) as stop:
            main(["train", "--config", recipe, *SAVES])
    assert stop.value.code == 130
    message = f"vwlmm train: interrupted, the last checkpoint is {tmp_path}/out/checkpoint-2"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert not (tmp_path / "out" / "model.safetensors").exists()
    main(["train", "--config", recipe, *SAVES])
    assert f"going on from {tmp_path}/out/checkpoint-2" in capsys.readouterr().err
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))

    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    main(["train", "--config", recipe, *SAVES])
    assert "is finished, there is nothing left to do" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written
    # Killed after the last checkpoint, in the middle of an epoch, and before the model itself was written
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "out" / "trainer_state.json").unlink()
    main(["train", "--config", recipe, *SAVES])
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_another_run_is_not_gone_on_from(tmp_path, capsys, recipe):
    main(["train", "--config", recipe, *SAVES])
    again = ["train", "--config", recipe, *SAVES]
    message = error_of(capsys, *again, "--max_steps", "5")
    assert f"{tmp_path}/out/checkpoint-3 is of another run (max_steps was 3, is 5)" in message
    assert "seed was not given, is 7" in error_of(capsys, *again, "--seed", "7")
    # Unless it is asked for, or there is nothing to go on from
    main([*again, "--max_steps", "5", "--resume_from_checkpoint", "true"])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 5
    main([*again, "--max_steps", "2", "--resume_from_checkpoint", "false", "--output_dir", str(tmp_path / "new")])
    message = error_of(capsys, *again, "--resume_from_checkpoint", "false")
    assert f"{tmp_path}/out/checkpoint-5 is there: to start anew, remove it or name another output_dir" in message
    record = tmp_path / "out" / "checkpoint-5" / "training_run.json"
    record.write_text(record.read_text().replace('"processes": 1', '"processes": 8'))
    assert "processes was 8, is 1" in error_of(capsys, *again, "--max_steps", "5")
    (tmp_path / "new" / "checkpoint-2" / "training_run.json").unlink()
    message = error_of(capsys, *again, "--max_steps", "2", "--output_dir", str(tmp_path / "new"))
    assert "it has no record of a run" in message


def test_a_base_that_was_trained_anew_makes_another_run(tmp_path, capsys, recipe):
    base = ["train", "--config", recipe, *CPU, "--output_dir", str(tmp_path / "base")]
    main(base)
    next_stage = ["train", "--config", recipe, *SAVES, "--model", str(tmp_path / "base")]
    main(next_stage)
    shutil.rmtree(tmp_path / "base")
    main([*base, "--learning_rate", "0.02"])
    assert f"its model {tmp_path}/base was trained differently" in error_of(capsys, *next_stage)


def test_the_best_checkpoint_is_named_where_it_is(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    model = tiny_model()
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, load_best_model_at_end=True, save_total_limit=1, learning_rate=1.0, **arguments),
        train_dataset=conversations(),
        eval_dataset=conversations(),
        processing_class=tiny_processor(model.config),
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir() and not (tmp_path / ".unfinished").exists()
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


FULL_DISK = """
import resource, signal, sys
from modeling_vwlmm.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), -1))
main(sys.argv[2:])
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, recipe):
    command = ["train", "--config", recipe, *SAVES]
    main([*command, "--max_steps", "1"])
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "checkpoint-1").iterdir()}
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    for limit in (size // 2, size + 1000):  # of the weights, and of the optimizer's state
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(limit), *command, "--resume_from_checkpoint", "true"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"vwlmm train: {tmp_path}/out/checkpoint-2 cannot be written, with ")
        assert last.endswith(f"the last whole checkpoint is {tmp_path}/out/checkpoint-1")
        assert {path: path.read_bytes() for path in (tmp_path / "out" / "checkpoint-1").iterdir()} == before
        assert not (tmp_path / "out" / ".unfinished").exists()


@pytest.mark.parametrize("where, max_grad_norm", [("loss", "1"), ("gradient", "1"), ("gradient", "0")])
def test_what_is_not_finite_ends_the_run_before_it_is_saved(
    tmp_path, capsys, monkeypatch, recipe, where, max_grad_norm
):
    def spoil(trainer):
        if trainer.state.global_step == 1:
            if where == "loss":
                trainer.model.model.multi_modal_projector.linear_2.bias.data.fill_(float("nan"))
            else:
                trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))

    step_of = VWLmmSFTTrainer.training_step
    monkeypatch.setattr(
        VWLmmSFTTrainer, "training_step", lambda self, *args, **kwargs: spoil(self) or step_of(self, *args, **kwargs)
    )
    message = error_of(capsys, "train", "--config", recipe, *SAVES, "--max_grad_norm", max_grad_norm)
    what = "lm_loss is nan" if where == "loss" else "the norm of the gradient is (nan|inf)"
    assert re.search(f"{what} at step 2", message)
    assert message.endswith(f"the last checkpoint is {tmp_path}/out/checkpoint-1")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out" / "checkpoint-1").values())


@pytest.fixture
def broken(data):
    """A training set whose third image has become something else."""

    def break_it():
        os.truncate(data.parent / "images" / "2.png", 300)
        return data.parent / "images" / "2.png"

    return break_it


def test_a_broken_image_in_the_middle_of_an_epoch_is_named(tmp_path, capsys, recipe, broken):
    path = broken()
    command = ["train", "--config", recipe, *SAVES, "--per_device_train_batch_size", "1", "--max_steps", "4"]
    message = error_of(capsys, *command)
    assert message.startswith(f"vwlmm train: sample 2: image {path}: ") and "expected a whole image" in message
    path.unlink()
    assert "sample 2: image: found '2.png', which does not exist" in error_of(capsys, *command)


def test_a_broken_image_can_be_skipped_and_is_counted(tmp_path, capsys, recipe, broken):
    broken()
    main(
        ["train", "--config", recipe, *SAVES, "--skip_broken_images", "true"]
        + ["--per_device_train_batch_size", "1", "--max_steps", "8", "--logging_steps", "4"]
    )
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [log["skipped_samples"] for log in logs if "skipped_samples" in log] == [1, 2]


@pytest.mark.parametrize("padding", ["longest", "shortest"])
def test_a_skipped_sample_teaches_nothing(tmp_path, padding):
    """The gradients of a batch are those of its other samples."""

    def gradients(rows):
        dataset = datasets.Dataset.from_list(rows, features=dataset_of_paths.features)
        trainer = trainer_of(tmp_path, dataset=dataset, skip_broken_images=True, max_grad_norm=0)
        return first_gradients(trainer)

    rows = conversations(images=(1, 0, 2, 1)).cast_column("images", datasets.List(datasets.Image(decode=False)))
    dataset_of_paths = rows
    rows = rows.to_list()
    index = 2 if padding == "longest" else 0
    broken = [dict(row) for row in rows]
    broken[index] = {**rows[index], "images": [{"path": None, "bytes": b"broken"} for _ in rows[index]["images"]]}
    found, expected = gradients(broken), gradients(rows[:index] + rows[index + 1 :])
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)


def test_decoded_images_name_their_sample_too(tmp_path):
    rows = conversations().cast_column("images", datasets.List(datasets.Image(decode=False))).to_list()
    rows[3]["images"] = [{"path": None, "bytes": b"broken"}]
    dataset = datasets.Dataset.from_list(rows, features=conversations().features)
    with pytest.raises(ValueError, match="sample 3: image .in memory.: .*expected a whole image"):
        trainer_of(tmp_path, dataset=dataset).train()


def test_a_removed_data_file_is_named_and_nothing_is_lost(tmp_path, capsys, recipe, data):
    main(["train", "--config", recipe, *SAVES])
    data.unlink()
    assert error_of(capsys, "train", "--config", recipe, *SAVES) == f"vwlmm train: {data}: no such data file"
    assert weights(tmp_path / "out" / "checkpoint-3")
