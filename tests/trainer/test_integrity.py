"""A run goes on from what it wrote, on the data that it saw, in a folder of its own."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from helpers.command_line import CPU, error_of, recipe_of
from helpers.conversations import conversations, picture
from helpers.training import trainer_of
from modeling_vwlmm.cli import main


SAVES = [
    *CPU[: CPU.index("--save_strategy")],
    "--save_strategy",
    "steps",
    "--save_steps",
    "1",
    "--disable_tqdm",
    "true",
]


@pytest.fixture
def recipe(tmp_path, model_folder, data):
    return recipe_of(tmp_path, model_folder, data, max_steps=2, learning_rate=0.01)


@pytest.fixture
def command(tmp_path, recipe):
    """That of a run which was stopped when its second checkpoint was whole."""
    argv = ["train", "--config", recipe, *SAVES]
    main(argv)
    (tmp_path / "out" / "trainer_state.json").unlink()
    return argv


def last_line(capsys, argv):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def take_another_step(path):
    path.write_text(path.read_text().replace('"global_step": 2', '"global_step": 1'))


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("model.safetensors", flip_a_bit, "is not as it was written"),
        ("optimizer.pt", flip_a_bit, "is not as it was written"),
        ("optimizer.pt", lambda path: os.truncate(path, 100), "has 100 bytes, but "),
        ("trainer_state.json", take_another_step, "is not as it was written"),
        ("rng_state.pth", os.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("asked_for", [[], ["--resume_from_checkpoint", "true"]], ids=["", "asked for"])
def test_a_damaged_checkpoint_is_named_with_the_one_before_it(
    tmp_path, capsys, command, name, damage, says, asked_for
):
    damage(tmp_path / "out" / "checkpoint-2" / name)
    message = last_line(capsys, [*command, *asked_for])
    assert f"{tmp_path}/out/checkpoint-2/{name} {says}" in message
    assert f"the one before it is {tmp_path}/out/checkpoint-1: remove" in message
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    main(command)
    assert f"going on from {tmp_path}/out/checkpoint-1" in capsys.readouterr().err


def test_what_a_checkpoint_has_not_is_said_before_it_starts_anew(tmp_path, capsys, caplog, recipe):
    command = ["train", "--config", recipe, *SAVES, "--save_only_model", "true"]
    main(command)
    (tmp_path / "out" / "trainer_state.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    message = last_line(capsys, command)
    for what in ("the optimizer's averages", "the learning rate's schedule", "the random numbers"):
        assert what in message
    main([*command, "--resume_from_checkpoint", "true"])
    assert "the optimizer's averages start" in caplog.text


def edit_an_answer(data):
    data.write_text(data.read_text().replace("w33", "w34"))


def edit_an_image(data):
    picture(9).save(data.parent / "images" / "2.png")


def drop_a_sample(data):
    data.write_text(json.dumps(json.loads(data.read_text())[:-1]))


@pytest.mark.parametrize(
    "change, says",
    [
        (edit_an_answer, "the texts of its samples are others"),
        (edit_an_image, "an image of sample 2 is another"),
        (drop_a_sample, "there were 4 samples, there are 3"),
    ],
)
def test_data_that_changed_since_are_named(tmp_path, capsys, caplog, command, data, change, says):
    change(data)
    assert f"{data} changed since: {says}" in last_line(capsys, command)
    main([*command, "--resume_from_checkpoint", "true"])
    assert f"{data} changed since: {says}" in caplog.text


def test_data_may_move(tmp_path, capsys, command, data, model_folder):
    moved = data.parent / "moved"
    moved.mkdir()
    for name in ("data.json", "images"):
        shutil.move(data.parent / name, moved / name)
    moved.rename(data.parent / "elsewhere")
    (data.parent / "data.json").symlink_to(data.parent / "elsewhere" / "data.json")
    (data.parent / "images").symlink_to(data.parent / "elsewhere" / "images")
    main(command)
    assert "going on from" in capsys.readouterr().err


def test_rotation_goes_by_steps_not_by_the_clock(tmp_path, recipe, monkeypatch):
    rename = os.rename

    def clock_set_back(source, target, *args):
        rename(source, target, *args)
        if "checkpoint-" in os.path.basename(target):
            step = int(os.path.basename(target).rpartition("-")[2])
            os.utime(target, (10_000 - 1_000 * step,) * 2)

    monkeypatch.setattr("os.rename", clock_set_back)
    main(["train", "--config", recipe, *SAVES, "--max_steps", "4", "--save_total_limit", "2"])
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_a_folder_is_of_one_process(tmp_path, capsys, recipe):
    (tmp_path / "out").mkdir()
    held = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]).acquire(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", held, str(tmp_path / "out" / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        assert "another process trains in" in error_of(capsys, "train", "--config", recipe, *CPU)
        with pytest.raises(ValueError, match="another process trains in"):
            trainer_of(tmp_path / "out", max_steps=1).train()
    main(["train", "--config", recipe, *CPU])


def test_a_folder_that_is_anothers_is_refused_before_anything_is_read(tmp_path, capsys, recipe, model_folder, data):
    train = ["train", "--config", recipe, *CPU]
    message = error_of(capsys, *train, "--output_dir", str(model_folder))
    assert f"output_dir {model_folder} is the model too" in message
    shutil.copytree(model_folder, tmp_path / "another")
    message = error_of(capsys, *train, "--output_dir", str(tmp_path / "another"))
    assert "holds a model that no run trained" in message
    assert "is the image_folder too" in error_of(capsys, *train, "--output_dir", str(data.parent / "images"))
    main(train)
    data.rename(tmp_path / "gone.json")
    message = error_of(capsys, *train, "--seed", "7")
    assert f"{tmp_path}/out is of another run (seed was not given, is 7)" in message


def test_a_run_without_checkpoints_is_finished_once(tmp_path, capsys, recipe):
    train = ["train", "--config", recipe, *CPU]
    main(train)
    written = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    main(train)
    assert "is finished, there is nothing left to do" in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == written


def test_records_of_earlier_versions_are_gone_on_from(tmp_path, capsys, command):
    record = tmp_path / "out" / "checkpoint-2" / "training_run.json"
    stages = json.loads(record.read_text())
    for name in ("base_fingerprint", "trainable"):
        del stages[-1][name]
    record.write_text(json.dumps(stages))
    (record.parent / "checkpoint_contents.json").unlink()
    main(command)
    assert f"going on from {tmp_path}/out/checkpoint-2" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, recipe):
    train = ["train", "--config", recipe, "--learning_rate", "1e39", "--max_steps", "1", "--max_grad_norm", "0"]
    for saves in (SAVES, CPU):
        assert "is no longer finite after step 1, so nothing is saved" in last_line(capsys, [*train, *saves])
        left = [path.name for path in (tmp_path / "out").rglob("*") if path.suffix == ".safetensors"]
        assert left == []


def test_a_run_without_a_step_is_an_error(tmp_path, capsys, recipe):
    train = ["train", "--config", recipe, *CPU, "--dataloader_drop_last", "true"]
    message = last_line(capsys, [*train, "--per_device_train_batch_size", "5", "--auto_find_batch_size", "true"])
    assert "no step was taken, and nothing learnt" in message
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_no_token_is_written_with_the_arguments(tmp_path):
    trainer = trainer_of(tmp_path, dataset=conversations(), hub_token="hf_" + "a" * 34, max_steps=1)
    trainer.save_model()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
    assert trainer.args.hub_token == "hf_" + "a" * 34
