"""Training that pushes what it saves."""

import json
import time
from pathlib import Path

import pytest

from helpers.adapters import base_folder, train
from helpers.conversations import conversations
from helpers.hub_server import READ_ONLY, TOKEN, Repo
from helpers.training import sft_config
from modeling_vwlmm.hub.push import push
from modeling_vwlmm.trainer import VWLmmSFTTrainer, hub_mixin


def test_training_pushes_checkpoints_and_the_model(tmp_path, hub, checked, monkeypatch):
    """The first of them when it has been deleted."""

    def push_late(folder, *arguments, **switches):
        deadline = time.monotonic() + 60
        while Path(folder).name == "checkpoint-1" and (tmp_path / "out" / "checkpoint-1").exists():
            assert time.monotonic() < deadline
        return push(folder, *arguments, **switches)

    monkeypatch.setattr(hub_mixin, "push", push_late)
    trainer = train_model(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, hub_always_push=True)
    trainer.train()
    trainer.save_model()
    titles = list(hub.repos["me/trained"].titles.values())
    assert titles == ["initial commit", *(f"Training in progress, step {i}" for i in (1, 2)), "Model save"]
    assert len(checked) == 3
    files = hub.files("me/trained")
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "log_history" in json.loads(files["trainer_state.json"]) and "modeling_vwlmm.py" in files
    assert not any(path.startswith(("checkpoint", "optimizer", "training_args")) for path in files)
    assert not any(TOKEN.encode() in content for content in files.values())
    assert not list((tmp_path / "out").glob(".push-*"))


def train_model(tmp_path, **arguments):
    hub_arguments = {"push_to_hub": True, "hub_model_id": "me/trained", "hub_token": TOKEN}
    config = sft_config(tmp_path / "out", stage="joint", max_steps=2, **{**hub_arguments, **arguments})
    return VWLmmSFTTrainer(str(base_folder(tmp_path)), config, train_dataset=conversations())


def test_a_push_that_fails_does_not_end_training(tmp_path, hub, checked, monkeypatch):
    warnings = []
    monkeypatch.setattr(hub_mixin.logger, "warning", warnings.append)
    hub.faults.append(("commit", 500))
    trainer = train_model(tmp_path, save_strategy="steps", save_steps=1, hub_always_push=True)
    trainer.train()
    assert len(warnings) == 1 and "checkpoint-1 was not pushed: me/trained: the Hub answered 500" in warnings[0]
    assert list(hub.repos["me/trained"].titles.values())[-1] == "Training in progress, step 2"


def test_training_that_could_not_be_pushed_does_not_start(tmp_path, hub, monkeypatch):
    with pytest.raises(ValueError, match='hub_strategy is "checkpoint", which uploads optimizer states'):
        train_model(tmp_path, hub_strategy="checkpoint")
    with pytest.raises(ValueError, match="cannot be loaded by others: push that first"):
        train(tmp_path, push_to_hub=True, hub_model_id="me/adapter")
    with pytest.raises(OSError, match="may only read"):
        train_model(tmp_path, hub_token=READ_ONLY)
    assert not hub.repos


def test_a_trainer_pushes_its_adapter(tmp_path, hub, checked):
    base = base_folder(tmp_path)
    push(base, "me/base")
    trainer = train(tmp_path, base)
    trainer.push_to_hub(base_model="me/base", dataset_name="easy-vqa")
    config = json.loads(hub.files("me/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/base"


def test_a_revision_holds_for_all_files_of_a_model(hub, tmp_path, model_folder):
    """What is on the main branch has another vocabulary, no record, and cannot be loaded."""
    repo = hub.repos["me/model"] = Repo(private=False)
    files = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    files["training_run.json"] = json.dumps([{"stage": "align"}]).encode()
    repo.commit("main", {"config.json": b"{}"}, "broken")
    repo.commit("dev", files, "whole")
    arguments = {"max_steps": 1, "stage": "joint", "model_init_kwargs": {"revision": "dev"}}
    trainer = VWLmmSFTTrainer("me/model", sft_config(tmp_path / "out", **arguments), train_dataset=conversations())
    assert trainer.processing_class.chat_template and [stage["stage"] for stage in trainer.stages] == [
        "align",
        "joint",
    ]


def test_a_revision_of_an_adapter_is_not_that_of_its_base(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)  # PEFT asks it, which was made at its import
    train(tmp_path)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "me/base"}))
    for name, ref in (("base", "main"), ("adapter", "dev")):
        repo = hub.repos[f"me/{name}"] = Repo(private=False)
        repo.commit(
            ref, {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}, name
        )
    arguments = {"max_steps": 1, "stage": "joint", "model_init_kwargs": {"revision": "dev"}}
    trainer = VWLmmSFTTrainer("me/adapter", sft_config(tmp_path / "out", **arguments), train_dataset=conversations())
    assert [stage["stage"] for stage in trainer.stages] == ["joint", "joint"]
