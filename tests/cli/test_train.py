"""`vwlmm train`, the recipes it runs."""

import json
import os
import re

import pytest
import torch
import yaml

from helpers import ROOT
from helpers.command_line import CPU, error_of, recipe_of
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main


RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate")


def test_train_runs_a_recipe_and_the_next_stage_starts_from_what_it_wrote(tmp_path, model_folder, data):
    recipe = recipe_of(tmp_path, model_folder, data)
    main(["train", "--config", recipe, *CPU, "--learning_rate", "0.01"])
    first = VWLmmForCausalLM.from_pretrained(tmp_path / "out")
    assert first.config.visual_word_loss_weight == 1 and first.config.visual_word_target == "visual_words"
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 1

    out = str(tmp_path / "next")
    main(
        [
            "train",
            "--config",
            recipe,
            *CPU,
            "--model",
            str(tmp_path / "out"),
            "--output_dir",
            out,
            "--stage",
            "visual_words",
        ]
    )
    second = VWLmmForCausalLM.from_pretrained(out)
    assert second.config.visual_word_target == "language_model"
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]) != ("vm_head" in name)


def test_a_recipe_can_change_the_models_config(tmp_path, model_folder, data):
    recipe = recipe_of(tmp_path, model_folder, data, model_init_kwargs={"pseudo_image_features": True})
    main(["train", "--config", recipe, *CPU, "--trainable", "vm_head", "projector"])
    assert VWLmmForCausalLM.from_pretrained(tmp_path / "out").config.pseudo_image_features


def test_a_recipe_can_evaluate_and_names_are_not_guessed(tmp_path, capsys, model_folder, data):
    recipe = recipe_of(tmp_path, model_folder, data, eval_dataset=str(data), eval_strategy="steps", eval_steps=1)
    main(["train", "--config", recipe, *CPU])
    logs = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_vw_loss" in log for log in logs)
    message = error_of(capsys, "train", "--config", recipe, *CPU, "--learning-rat", "1")
    assert message == 'vwlmm train: the command line: unknown field "learning_rat", is "learning_rate" meant?'
    message = error_of(capsys, "train", "--config", recipe, *CPU, "stray")
    assert message == 'vwlmm train: the command line: found "stray", expected --FIELD VALUE'


def test_a_recipe_can_set_the_environment(tmp_path, monkeypatch, capsys, model_folder, data):
    monkeypatch.setenv("VWLMM_TEST", "before")
    recipe = recipe_of(tmp_path, model_folder, data, env={"VWLMM_TEST": 7})
    main(["train", f"--config={recipe}", *CPU])
    assert os.environ["VWLMM_TEST"] == "7"
    assert "env" not in json.loads((tmp_path / "out" / "training_run.json").read_text())[0]["recipe"]
    recipe = recipe_of(tmp_path, model_folder, data, env=["VWLMM_TEST"])
    assert "recipe.yaml: env is ['VWLMM_TEST'], expected" in error_of(capsys, "train", "--config", recipe, *CPU)


def test_errors_of_workers_are_one_line(tmp_path, capsys, model_folder, data):
    recipe = recipe_of(tmp_path, model_folder, data, max_length=3, dataloader_num_workers=1)
    with pytest.raises(SystemExit):
        main(["train", "--config", recipe, *CPU])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"vwlmm train: ValueError: sample \d \(id a\d\) has .* do not fit max_length 3", last)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_start_with_their_command_and_parse(recipe, monkeypatch, tmp_path):
    from modeling_vwlmm.data import mixture

    command = recipe.read_text().splitlines()[0]
    assert command == f"# vwlmm train --config {recipe.relative_to(ROOT)}"
    seen = []
    monkeypatch.setattr(mixture, "load_mixture", lambda *args: seen.append(args))
    monkeypatch.setattr(
        VWLmmForCausalLM, "from_pretrained", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("stop"))
    )
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main([*command.removeprefix("# vwlmm ").split(), *CPU, "--output_dir", str(tmp_path)])
    assert len(seen) == 1  # every field was known and valid
    stages = yaml.safe_load(recipe.read_text())
    assert stages["model"] != stages["output_dir"]


def test_each_stage_starts_where_the_one_before_it_ended():
    for folder in (ROOT / "recipes", ROOT / "recipes" / "quickstart", ROOT / "recipes" / "photos"):
        stages = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("stage*.yaml"))]
        assert len(stages) == 4
        for before, after in zip(stages[:-1], stages[1:], strict=True):
            assert after["model"] == before["output_dir"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"learning_rat": 1e-3}, r'recipe.yaml: unknown field "learning_rat", is "learning_rate" meant\?'),
        ({"stage": "stage9"}, r'stage is "stage9", expected one of align, instruct, visual_words, joint'),
        ({"trainable": ["head"]}, r"trainable is \['head'\], expected one or more of vision_tower"),
        ({"dataset": "missing.json"}, r"missing.json: no such data file"),
        ({"image_folder": "nowhere"}, r"nowhere: no such image folder"),
        ({"image_folder": None}, r"image_folder must say where its images are"),
        ({"dataset": "easy-vqa/poems"}, r"easy_vqa: found task 'poems'"),
    ],
)
def test_bad_recipes_are_one_line_and_status_2(tmp_path, capsys, model_folder, data, fields, message):
    recipe = recipe_of(tmp_path, model_folder, data, **fields)
    assert re.search(message, error_of(capsys, "train", "--config", recipe, *CPU))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_whose_push_failed_is_pushed_by_the_same_command(tmp_path, capsys, model_folder, data, hub, checked):
    out = tmp_path / "out"
    call = ["train", "--config", recipe_of(tmp_path, model_folder, data), *CPU, "--push_to_hub", "true"]
    call += ["--hub_model_id", "me/trained"]
    hub.faults.append(("commit", 500))
    with pytest.raises(SystemExit) as exit_of:
        main(call)
    *_, last = capsys.readouterr().err.strip().splitlines()
    assert exit_of.value.code == 2 and last.startswith(
        f"vwlmm train: {out} is finished, but not on the Hub; vwlmm push {out} me/trained sends it: "
        "me/trained: the Hub answered 500"
    )
    assert "model.safetensors" not in hub.files("me/trained")
    written = (out / "model.safetensors").stat()
    main(call)
    assert f"{out} is finished, there is nothing left to do" in capsys.readouterr().err
    assert hub.files("me/trained")["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").stat().st_mtime_ns == written.st_mtime_ns  # it was not trained again
