"""hub_card/vwlmm-nano, which comes with the source code, is as it would be pushed and does what its card says."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from test_card import ROOT, metadata_of, strange_figures
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_vwlmm.card import write_card
from modeling_vwlmm.data import easy_vqa
from modeling_vwlmm.repository import AUTO_MAP, check_loads


sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))

from measure import accuracy, naming_share  # noqa: E402


NANO = ROOT / "hub_card" / "vwlmm-nano"
CODE = {"configuration_vwlmm.py", "modeling_vwlmm.py", "visual_word_loss.py"}
FILES = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
    *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("training_run.json", "trainer_state.json", "eval_results.json"),
    *("assets/losses.json", "assets/losses.png", "assets/visual_words.png"),
    *(f"examples/{i}.png" for i in range(6)),
    *CODE,
}


@pytest.fixture(scope="module")
def nano():
    return AutoModelForCausalLM.from_pretrained(NANO).eval(), AutoProcessor.from_pretrained(NANO)


def recorded(name, split="test"):
    results = json.loads((NANO / "eval_results.json").read_text())
    (found,) = [r for r in results if r["metric_name"] == name and r["dataset_split"] == split]
    return found["metric_value"]


def test_is_small_and_whole():
    files = {path.relative_to(NANO).as_posix(): path for path in NANO.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == FILES
    assert sum(path.stat().st_size for path in files.values()) <= 8e6


def test_its_code_is_the_package_s():
    for name in CODE:
        assert (NANO / name).read_bytes() == (ROOT / "modeling_vwlmm" / name).read_bytes(), "run: make nano-refresh"
    assert json.loads((NANO / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_loads_without_this_package():
    check_loads(NANO, NANO)


def test_answers_questions(nano):
    questions = easy_vqa("test", "question").select(range(0, 9500, 19))
    right, _ = accuracy(*nano, questions)
    assert len(questions) == 500 and right["overall"] >= 0.995
    assert recorded("right answers") >= 0.995


def test_its_visual_words_name_what_is_there(nano):
    share, shuffled, patches = naming_share(*nano)
    assert share >= 0.9 and shuffled < 0.6 and patches > 1000
    assert share == pytest.approx(
        recorded("of these, its colour or shape is among the three most probable words"), abs=0.002
    )


def test_its_card_is_that_of_its_records(tmp_path):
    copy = shutil.copytree(NANO, tmp_path / NANO.name)
    (copy / "assets" / "visual_words.png").unlink()
    write_card(copy)
    assert (copy / "README.md").read_text() == (NANO / "README.md").read_text(), "run: make nano-refresh"
    drawn, shipped = (np.asarray(Image.open(folder / "assets/visual_words.png"), float) for folder in (copy, NANO))
    assert drawn.shape == shipped.shape and abs(drawn - shipped).mean() < 1  # fonts differ a little
    assert strange_figures(NANO) == set()
    found = metadata_of(NANO)
    assert found["license"] == "apache-2.0" and found["language"] == "en" and found["datasets"] == ["easy-vqa"]
    accuracy_of = {
        metric["name"]: metric["value"]
        for result in found["model-index"][0]["results"]
        for metric in result["metrics"]
    }
    assert accuracy_of["right answers, pseudo image features"] == recorded("right answers, pseudo image features")
