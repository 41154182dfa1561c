"""What every folder of a trained model says about how it came to be."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import AutoProcessor

from helpers.command_line import CPU, recipe_of
from helpers.conversations import conversations
from helpers.tiny import tiny_model
from helpers.training import sft_config
from modeling_vwlmm.cli import main
from modeling_vwlmm.trainer import VWLmmSFTTrainer
from modeling_vwlmm.training_run import read_training_run


KEYS = {
    "stage",
    "base_model",
    "dataset",
    "trainable",
    "base_fingerprint",
    "recipe",
    "config",
    "peft",
    "versions",
    "hardware",
    "seed",
}
SAVES = ["--save_strategy", "steps", "--save_steps", "1"]


def test_every_folder_holds_the_record_of_all_stages(tmp_path, monkeypatch, model_folder, data):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path, "model", data, learning_rate=0.01, output_dir="out", max_steps=2, weight_decay=0.0)
    cpu = [*CPU[: CPU.index("--save_strategy")], "--seed", "3"]
    main(["train", "--config", recipe, *cpu, *SAVES, "--hub_token=hf_secret"])
    (first,) = read_training_run("out")
    assert first.keys() == KEYS
    assert first["stage"] == "joint" and first["base_model"] == "model" and first["dataset"] == str(data)
    assert first["config"]["visual_word_target"] == "visual_words"
    assert first["trainable"] == ["projector", "language_model"]
    assert first["peft"] is None and first["seed"] == 3
    assert first["hardware"].keys() == {"device", "processes"} and first["hardware"]["processes"] == 1
    assert first["versions"]["torch"] == torch.__version__ and first["versions"].keys() >= {"python", "modeling_vwlmm"}
    assert first["recipe"] == {
        "model": "model",
        "dataset": str(data),
        "image_folder": str(data.parent / "images"),
        "output_dir": "out",
        "stage": "joint",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "steps",
        "save_steps": 1,
        "seed": 3,
    }
    for folder in ("out/checkpoint-1", "out/checkpoint-2"):
        assert read_training_run(folder) == [first]
        assert AutoProcessor.from_pretrained(folder).chat_template

    lora = ["--use_peft", "true", "--lora_r", "2"]
    main(["train", "--config", recipe, *cpu, *SAVES, "--model", "out", "--output_dir", "adapter", *lora])
    for folder in ("adapter", "adapter/checkpoint-2"):
        before, second = read_training_run(folder)
        assert before == first and second["base_model"] == "out"
        assert second["peft"].items() >= {"r": 2, "lora_alpha": 32, "lora_dropout": 0.05}.items()
        assert second["peft"]["modules_to_save"] == ["multi_modal_projector"]
        assert AutoProcessor.from_pretrained(folder).chat_template
    main(["merge", "adapter", "merged"])
    assert read_training_run("merged") == read_training_run("adapter")


def test_the_python_api_records_what_differs_from_the_defaults(tmp_path, model_folder):
    secrets = {"model_init_kwargs": {"token": "hf_secret", "dtype": "float32"}, "hub_token": "hf_secret"}
    trainer = VWLmmSFTTrainer(
        str(model_folder),
        sft_config(tmp_path / "out", stage="joint", max_steps=1, **secrets),
        train_dataset=conversations(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )
    trainer.save_model()
    (run,) = read_training_run(tmp_path / "out")
    assert run["recipe"]["model_init_kwargs"] == {"dtype": "float32"} and run["recipe"]["learning_rate"] == 0.01
    assert not {"hub_token", "adam_beta1", "pad_token"} & run["recipe"].keys()
    assert run["dataset"] is None and run["base_model"] == str(model_folder)
    assert run["peft"]["r"] == 4 and run["peft"]["target_modules"] == ["q_proj"]
    assert "hf_secret" not in (tmp_path / "out" / "training_run.json").read_text()


def test_a_model_that_was_not_trained_here_has_no_record(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    assert read_training_run(tmp_path / "model") == []
    for text, message in (("[", "no record of a training run"), (json.dumps({"stage": 1}), "expected a list")):
        (tmp_path / "model" / "training_run.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_training_run(tmp_path / "model")
