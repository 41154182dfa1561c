"""The command line, the recipes it runs and the pictures it draws."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_trainer import picture, tiny_processor
from tiny import TOWERS, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main
from modeling_vwlmm.words import _rows, draw_words, seen_image, top_words


ROOT = Path(__file__).parent.parent
# read.yaml is that of a script, see test_photos.py
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if path.parent.name != "accelerate" and path.name != "read.yaml"
)
CPU = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]


@pytest.fixture
def model_folder(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    records = []
    for i in range(4):
        picture(i).save(tmp_path / "images" / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nw20 w21"}, {"from": "gpt", "value": f"w{30 + i}"}]
        records.append({"id": f"a{i}", "image": f"{i}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def recipe_of(tmp_path, model_folder, data, **fields):
    recipe = {
        "model": str(model_folder),
        "dataset": str(data),
        "image_folder": str(data.parent / "images"),
        "output_dir": str(tmp_path / "out"),
        "stage": "joint",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        **fields,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def error_of(capsys, *argv):
    """The one line that a bad call prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_of:
        main(list(argv))
    assert exit_of.value.code == 2
    printed = capsys.readouterr().err.strip().split("\n")
    assert len(printed) == 1 and "Traceback" not in printed[0]
    return printed[0]


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
    assert "learning_rat" in error_of(capsys, "train", "--config", recipe, *CPU, "--learning_rat", "1")


def test_errors_of_workers_are_one_line(tmp_path, capsys, model_folder, data):
    recipe = recipe_of(tmp_path, model_folder, data, max_length=3, dataloader_num_workers=1)
    with pytest.raises(SystemExit):
        main(["train", "--config", recipe, *CPU])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"vwlmm train: ValueError: sample \d \(id a\d\) has .* do not fit max_length 3", last)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_start_with_their_command_and_parse(recipe, monkeypatch, tmp_path):
    from modeling_vwlmm import cli

    command = recipe.read_text().splitlines()[0]
    assert command == f"# vwlmm train --config {recipe.relative_to(ROOT)}"
    seen = []
    monkeypatch.setattr(cli, "load_dataset", lambda *args: seen.append(args) or pytest.skip.Exception)
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


def test_bad_calls_are_one_line_and_status_2(tmp_path, capsys, model_folder):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "not a recipe" in error_of(capsys, "train", "--config", str(tmp_path / "list.yaml"))
    assert "nowhere.yaml" in error_of(capsys, "train", "--config", str(tmp_path / "nowhere.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [1,")
    assert "broken.yaml is not YAML" in error_of(capsys, "train", f"--config={tmp_path / 'broken.yaml'}")
    assert 'no verb "trian"' in error_of(capsys, "trian")

    picture(0).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    os.truncate(tmp_path / "c.png", 200)
    out = str(tmp_path / "out.png")
    for name in ("b.png", "c.png", "d.png"):
        assert name in error_of(capsys, "words", str(model_folder), str(tmp_path / name), "--output", out)
    for top in ("0", "1000"):
        image = str(tmp_path / "a.png")
        message = error_of(capsys, "words", str(model_folder), image, "--output", out, "--top", top)
        assert f"{top} words a patch are asked for, expected 1 to 99" in message
    assert not Path(out).exists()

    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    llama.save_pretrained(tmp_path / "llama")
    image = str(tmp_path / "a.png")
    message = error_of(capsys, "generate", str(tmp_path / "llama"), image, "--prompt", "w5")
    assert 'expected a model of type "vwlmm", got one of type "llama"' in message


def test_weights_that_disagree_with_the_config_are_one_line_and_status_2(tmp_path, capsys, model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (model_folder / "config.json").write_text(json.dumps(config))
    picture(0).save(tmp_path / "a.png")
    message = error_of(capsys, "generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w5")
    assert "of another shape than the config says" in message and "mlp.up_proj.weight" in message


def test_generate_prints_what_the_model_generates(tmp_path, capsys, model_folder):
    picture(0).save(tmp_path / "a.png")
    main(["generate", str(model_folder), str(tmp_path / "a.png"), "--prompt", "w20 w21", "--max-new-tokens", "4"])
    model = VWLmmForCausalLM.from_pretrained(model_folder).eval()
    processor = tiny_processor(model.config)
    inputs = processor(images=picture(0), text="<s><image> w20 w21 w97", add_special_tokens=False, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.split() == processor.tokenizer.decode(expected, skip_special_tokens=True).split()


def test_words_draws_and_prints(tmp_path, capsys, model_folder):
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, path in enumerate(paths):
        picture(i).save(path)
    main(["words", str(model_folder), *paths, "--output", str(tmp_path / "words.png"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    model = VWLmmForCausalLM.from_pretrained(model_folder).eval()
    processor = tiny_processor(model.config)
    pixel_values = processor.image_processor([picture(i) for i in range(3)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model.visual_words(pixel_values)
    for image, path, expected in zip(printed, paths, probabilities, strict=True):
        assert image["image"] == path and len(image["patches"]) == model.config.image_seq_length
        for patch, distribution in zip(image["patches"], expected, strict=True):
            assert [probability for _, probability in patch] == pytest.approx(distribution.topk(3).values.tolist())
            assert patch[0][0] == processor.tokenizer.decode([distribution.argmax()])
    assert Image.open(tmp_path / "words.png").size[0] > 1000


def test_the_picture_lays_words_over_the_patches_they_belong_to():
    model = tiny_model()
    processor = tiny_processor(model.config)
    image = Image.new("RGB", (16, 16), (200, 0, 0))
    words = [[("mm", probability)] for probability in (1.0, 0.1, 0.5, 0.1)]
    drawn = np.asarray(draw_words(processor, [image], words=[words], size=160)).astype(int)
    overlay = drawn[10:170, 175:335].sum(-1)
    darkest = [overlay[y : y + 78, x : x + 78].min() for y in (1, 81) for x in (1, 81)]
    assert darkest[0] < darkest[2] < darkest[1] == darkest[3]
    assert len(top_words(model, processor, [image], k=2)[0][0]) == 2
    assert np.abs(np.asarray(seen_image(processor, image)).astype(int) - [200, 0, 0]).max() <= 1
    with pytest.raises(ValueError, match="3 patches are no grid over an image of 16 x 16 pixels"):
        draw_words(processor, [image], words=[words[:3]])


def test_help_has_an_example():
    for verb in ("train", "generate", "words"):
        printed = subprocess.run(
            [sys.executable, "-m", "modeling_vwlmm", verb, "--help"], capture_output=True, text=True, cwd=ROOT
        )
        assert printed.returncode == 0 and "example: vwlmm" in printed.stdout
    printed = subprocess.run([sys.executable, "-m", "modeling_vwlmm"], capture_output=True, text=True, cwd=ROOT)
    assert printed.returncode == 2 and "usage: vwlmm" in printed.stderr


@pytest.mark.parametrize("tower", TOWERS)
def test_the_grid_of_words_is_that_of_the_tower(tower):
    model = tiny_model(tower=tower)
    processor = tiny_processor(model.config)
    words = top_words(model, processor, [picture(0)])
    rows, columns = TOWERS[tower][2]
    assert _rows(len(words[0]), seen_image(processor, picture(0))) == rows and len(words[0]) == rows * columns
    assert draw_words(processor, [picture(0)], words).size[0] > 0
