"""hub_card/vwlmm-nano, which comes with the source code, does what its card says. It is as it would be pushed."""

import json
import re
import sys

import numpy as np
import pytest
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from helpers import CODE, ROOT
from helpers.cards import metadata_of, strange_figures
from modeling_vwlmm.data import easy_vqa
from modeling_vwlmm.hub.push import prepare
from modeling_vwlmm.hub.repository import read_folder


sys.path.insert(0, str(ROOT / "recipes" / "quickstart"))

from measure import accuracy, naming_share  # noqa: E402


NANO = ROOT / "hub_card" / "vwlmm-nano"
PICTURES = {"assets/losses.png", "assets/visual_words.png"}


@pytest.fixture(scope="module")
def nano():
    return AutoModelForCausalLM.from_pretrained(NANO).eval(), AutoProcessor.from_pretrained(NANO)


def recorded(name, split="test"):
    results = json.loads((NANO / "eval_results.json").read_text())
    (found,) = [r for r in results if r["metric_name"] == name and r["dataset_split"] == split]
    return found["metric_value"]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def test_is_what_a_push_would_send(tmp_path):
    """Which loads it without this package too; its code is the package's, and its card that of its records."""
    sent, shipped = files_of(prepare(read_folder(NANO), tmp_path, NANO.name).folder), files_of(NANO)
    shipped = {name: path for name, path in shipped.items() if "__pycache__" not in name}
    assert sent.keys() == shipped.keys() and CODE < sent.keys()
    for name in sent.keys() - PICTURES:
        assert sent[name].read_bytes() == shipped[name].read_bytes(), f"{name} is not up to date: make nano-refresh"
    assert sum(path.stat().st_size for path in shipped.values()) <= 8e6
    words = [np.asarray(Image.open(files["assets/visual_words.png"]), float) for files in (sent, shipped)]
    assert words[0].shape == words[1].shape and abs(words[0] - words[1]).mean() < 1  # fonts differ a little


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


def test_its_card(monkeypatch, capsys):
    assert strange_figures(NANO) == set()
    found = metadata_of(NANO)
    assert found["license"] == "apache-2.0" and found["language"] == "en" and found["datasets"] == ["easy-vqa"]
    name, results = model_index_to_eval_results(found["model-index"])
    assert name == NANO.name
    assert results == [EvalResult(**result) for result in json.loads((NANO / "eval_results.json").read_text())]
    (example,) = re.findall(r"```python\n(.*?)```", (NANO / "README.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(NANO)
    exec(example.replace(f'"{NANO.name}"', '"."'), {})
    assert capsys.readouterr().out.strip() == "red"
