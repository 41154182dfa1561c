"""Model cards: valid metadata, nothing that no record says, hand-written text kept."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from helpers import ROOT
from helpers.cards import RESULTS, RUN, log, metadata_of, strange_figures, write
from helpers.command_line import CPU, recipe_of
from helpers.conversations import picture
from modeling_vwlmm.cli import main
from modeling_vwlmm.hub.card import BEGIN, END, write_card


def test_metadata_is_what_the_hub_reads(model_folder):
    write(model_folder, RUN, RESULTS, log(2.0, 1.0))
    returned = write_card(model_folder, "someone/model")
    found = metadata_of(model_folder)
    assert (
        found.items()
        >= {
            "base_model": ["someone/llm", "someone/tower"],
            "base_model_relation": "finetune",
            "datasets": ["someone/captions"],
            "library_name": "transformers",
            "pipeline_tag": "image-text-to-text",
            "tags": ["vwlmm", "visual-words", "trl", "sft"],
        }.items()
    )
    assert found.keys() == {
        *("base_model", "base_model_relation", "datasets", "library_name", "pipeline_tag", "tags", "model-index")
    }
    name, results = model_index_to_eval_results(found["model-index"])
    assert name == "model" and results == [EvalResult(**result) for result in RESULTS]
    loaded = ModelCard.load(model_folder / "README.md")
    assert loaded.data.to_dict() == found == returned.data.to_dict() and loaded.text == returned.text


def test_says_what_the_records_say(model_folder):
    text = str(write_card(write(model_folder, RUN, RESULTS, log(2.0, 1.0)), "someone/model"))
    assert "| align | start | someone/captions | projector | 7 steps | 0.003 |" in text
    assert "| instruct | align | data.json | projector | 2 epochs |  |" in text
    assert "- align, instruct: A Device, processes: 2; torch 2.13.0, trl 1.16.0" in text
    assert "| Questions | test (41 questions) | train (41 questions) |" in text
    assert "| right answers | 0.8125 | 0.9375 |" in text
    assert text.index("## Limits") < text.index("| perplexity | 17.25 |") and "None are measured" not in text
    assert "deepspeed: z.json" in text and "/home" not in text and "/etc" not in text
    assert 'model="someone/model"' in text
    assert strange_figures(model_folder) == set()
    assert (model_folder / "assets/losses.png").is_file() and "](assets/losses.png)" in text


def test_nothing_is_invented(model_folder):
    text = str(write_card(model_folder))
    assert metadata_of(model_folder) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["vwlmm", "visual-words"],
    }
    assert "| license | none is recorded |" in text and "None is recorded." in text and "None are measured" in text
    assert "## Training" not in text and "losses" not in text and "made of" not in text
    assert strange_figures(model_folder) == set()
    assert {path.name for path in (model_folder / "assets").iterdir()} == {"visual_words.png"}


HAND_WRITTEN = """---
license: mit
inference: false
tags:
- mine
datasets:
- my/data
widget:
- text: what's "this"?
  src: a.png
---

# My model

Before.
"""


def test_what_is_written_by_hand_is_kept(model_folder):
    write(model_folder, results=RESULTS)
    write_card(model_folder, "someone/model", HAND_WRITTEN)
    # As someone goes on from there
    readme = model_folder / "README.md"
    edited = readme.read_text().replace("- mine\n", "- mine\n- new\n") + "\nAfter.\n"
    first = edited.replace("Before.", "Before, --- and more.")
    write(model_folder, RUN, RESULTS[:1])
    card = write_card(model_folder, "someone/model", first)
    assert card.text.startswith("\n# My model\n\nBefore, --- and more.\n\n" + BEGIN)
    assert card.text.endswith(END + "\n\nAfter.\n")
    assert card.text.count("# My model") == card.text.count(BEGIN) == card.text.count("## Evaluation") == 1
    assert "\n# model" not in card.text
    found = metadata_of(model_folder)
    assert found["license"] == "mit" and found["inference"] is False and "| license | mit |" in card.text
    assert found["tags"] == ["vwlmm", "visual-words", "trl", "sft", "mine", "new"]
    assert found["datasets"] == ["someone/captions"] and len(found["model-index"][0]["results"]) == 1
    assert r'"url": "a.png"' in card.text and "this" in card.text
    # Renewed from what it says itself, it stays as it is
    before = readme.read_bytes()
    write_card(model_folder, "someone/model")
    assert readme.read_bytes() == before
    # Figures that were recorded once are not hand-written
    (model_folder / "eval_results.json").unlink()
    write_card(model_folder, "someone/model")
    assert "model-index" not in metadata_of(model_folder)


def test_a_card_that_cannot_be_written_leaves_the_one_that_is_there(model_folder, monkeypatch):
    (model_folder / "README.md").write_text("by hand")

    def half(card, path):
        Path(path).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(ModelCard, "save", half)
    with pytest.raises(OSError, match="disk full"):
        write_card(model_folder)
    assert (model_folder / "README.md").read_text() == "by hand"
    assert not list(model_folder.glob(".*README.md"))


def test_what_goes_with_a_renewed_key_is_renewed(model_folder):
    old = write_card(write(model_folder, results=RESULTS), "someone/other").data.to_dict()
    old |= {"license": "other", "license_name": "mine", "license_link": "LICENSE", "base_model_relation": "quantized"}
    by_hand = f"---\n{yaml.safe_dump(old)}---\n"
    run = [{"stage": "convert", "base_model": ["lmsys/vicuna-7b-v1.5", "a/tower"]}]
    write_card(write(model_folder, run, RESULTS[:1]), "someone/model", by_hand)
    found = metadata_of(model_folder)
    assert found["license"] == "llama2" and not {"license_name", "license_link", "base_model_relation"} & found.keys()
    name, results = model_index_to_eval_results(found["model-index"])
    assert name == "model" and results == [EvalResult(**RESULTS[0])]


@pytest.mark.parametrize("draft", ["It has been trained using [TRL](https://github.com)", "[More Information Needed]"])
def test_what_libraries_drafted_is_not_kept(model_folder, draft):
    (model_folder / "README.md").write_text(f"---\nlibrary_name: other\nlicence: license\n---\n\n{draft}\n")
    card = write_card(model_folder)
    assert draft not in card.text and "licence" not in metadata_of(model_folder)


def with_bases(*bases):
    return [{"stage": "align", "base_model": base, "recipe": {}} for base in bases]


def local_base(tmp_path, license):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\nlicense: {license}\nlanguage: fr\n---\n")
    return str(tmp_path / "base")


def test_licenses_of_base_models_carry_over(model_folder, tmp_path):
    def license_of(*bases):
        text = write_card(write(model_folder, with_bases(*bases)), card_text="\n").text
        found = metadata_of(model_folder)
        assert f"| license | {found.get('license', 'none is recorded')}" in text
        return found.get("license")

    base = local_base(tmp_path, "gemma")
    assert license_of(base) == "gemma" and metadata_of(model_folder)["language"] == "fr"
    assert "base_model" not in metadata_of(model_folder)
    assert license_of([base, "someone/tower"], "runs/align") == "gemma"
    assert license_of(["someone/unknown", base]) is None  # a vision tower's is not the LLM's
    for llama in ("lmsys/vicuna-7b-v1.5", "MYTH-Lab/VW-LMM-Vicuna-pif-7b", "meta-llama/Llama-2-7b-hf"):
        assert license_of(llama, "out") == license_of([llama, "openai/clip-vit-large-patch14-336"], "out") == "llama2"
    assert license_of("someone/unknown") is None
    assert "none is recorded: look for that of someone/unknown" in (model_folder / "README.md").read_text()
    assert metadata_of(model_folder)["base_model"] == "someone/unknown"


def test_an_adapter(tmp_path, monkeypatch, model_folder, data):
    monkeypatch.chdir(tmp_path)
    lora = ["--use_peft", "true", "--lora_r", "2", "--model", "model", "--output_dir", "adapter"]
    main(["train", "--config", recipe_of(tmp_path, model_folder, data), *CPU, *lora])
    text = str(write_card("adapter", "someone/adapter"))
    found = metadata_of(tmp_path / "adapter")
    assert found["library_name"] == "peft" and {"lora", "trl"} < set(found["tags"]) and "base_model" not in found
    assert "  r: 2" in text and "This is an adapter" in text and str(tmp_path) not in text
    assert (tmp_path / "adapter/assets/visual_words.png").is_file()
    # Pushed, it names the repository of that model
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "me/model"})
    )
    text = str(write_card("adapter", "someone/adapter"))
    found = metadata_of(tmp_path / "adapter")
    assert (
        found["base_model"] == "me/model" and found["base_model_relation"] == "adapter" and "## Visual words" in text
    )
    # Of a model that is not at hand
    write(tmp_path / "adapter", [{"stage": "joint", "base_model": "other/model"}])
    text = str(write_card("adapter", "someone/adapter"))
    found = metadata_of(tmp_path / "adapter")
    assert found["base_model"] == "me/model" and found["base_model_relation"] == "adapter"
    assert "## Visual words" not in text


def test_losses_of_all_stages_also_when_their_folders_are_gone(tmp_path, monkeypatch, model_folder, data):
    monkeypatch.chdir(tmp_path)
    main(
        [
            "train",
            "--config",
            recipe_of(tmp_path, model_folder, data, model="model", output_dir="first", logging_steps=1),
            *CPU,
        ]
    )
    longer = recipe_of(tmp_path, model_folder, data, model="first", output_dir="second", max_steps=2, logging_steps=1)
    main(["train", "--config", longer, *CPU])
    write_card("second")
    losses = json.loads(Path("second/assets/losses.json").read_text())
    assert [stage["step"] for stage in losses] == [[1], [1, 2]]
    logged = json.loads(Path("second/trainer_state.json").read_text())["log_history"]
    assert losses[1]["vw_loss"] == [entry["vw_loss"] for entry in logged if "vw_loss" in entry]
    picture = Image.open("second/assets/losses.png")
    Path("first").rename("gone")
    write_card("second")
    assert json.loads(Path("second/assets/losses.json").read_text()) == losses
    assert Image.open("second/assets/losses.png") == picture


def test_visual_words_are_drawn_over_the_examples(model_folder):
    write_card(model_folder)
    drawn = Image.open(model_folder / "assets/visual_words.png")
    (model_folder / "examples").mkdir()
    for i in range(3):
        picture(i).save(model_folder / "examples" / f"{i}.png")
    write_card(model_folder)
    three = Image.open(model_folder / "assets/visual_words.png")
    assert three.size[0] > drawn.size[0] and three.size[1] > drawn.size[1]


def test_results_as_transformers_writes_them(model_folder):
    flat = {"eval_loss": 0.25, "eval_vw_loss": 0.125, "eval_runtime": 3.5}
    write(model_folder, results=flat)
    assert "None is recorded." in write_card(model_folder).text  # on what?
    run = [{"stage": "joint", "base_model": None, "recipe": {"eval_dataset": "/data/test.json"}}]
    text = write_card(write(model_folder, run)).text
    assert "| test.json |" in text and "| vw_loss | 0.125 |" in text and "/data" not in text


def test_errors_name_the_record(model_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no config.json or adapter_config.json"):
        write_card(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="the present card of model has metadata that cannot be read"):
        write_card(model_folder, card_text="---\na: [\n---\n")
    for name, broken, message in (
        ("eval_results.json", "{", "eval_results.json is not JSON"),
        ("eval_results.json", '[{"accuracy": 1}]', "eval_results.json holds no results: expected a list of objects"),
        ("training_run.json", "{}", "training_run.json is no record of a training run"),
        ("trainer_state.json", "[", "trainer_state.json is not JSON"),
    ):
        (model_folder / name).write_text(broken)
        with pytest.raises(ValueError, match=message):
            write_card(model_folder)
        (model_folder / name).unlink()
        assert not (model_folder / "README.md").exists()


def test_the_template_is_installed(tmp_path):
    build = ["build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True)
    installed = tmp_path / "lib" / "modeling_vwlmm" / "hub_card" / "modelcard_template.md"
    assert installed.read_bytes() == (ROOT / "hub_card" / "modelcard_template.md").read_bytes()
    assert not list((tmp_path / "lib").rglob("*.safetensors"))
