"""Images in every place and form where TRL and transformers find them."""

import base64
import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.conversations import picture, tiny_processor
from helpers.tiny import tiny_config
from helpers.training import batch_of, trainer_of
from modeling_vwlmm.data import open_images
from modeling_vwlmm.data.collator import VWLmmDataCollator


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path):
    picture(0).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


FORMS = {
    "path": lambda path: path,
    "path object": lambda path: __import__("pathlib").Path(path),
    "bytes": lambda path: png(picture(0)),
    "data URL": lambda path: "data:image/png;base64," + base64.b64encode(png(picture(0))).decode(),
    "dict of bytes": lambda path: {"bytes": png(picture(0)), "path": None},
    "dict of a path": lambda path: {"path": path},
    "array": lambda path: np.asarray(picture(0)),
    "channels first": lambda path: np.asarray(picture(0)).transpose(2, 0, 1),
    "tensor": lambda path: torch.from_numpy(np.array(picture(0))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_image_has_its_pixels(path, form):
    (image,) = open_images({"images": [FORMS[form](path)]})
    assert np.array_equal(image, picture(0))


def test_a_path_may_start_at_home(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_images({"images": ["~/a.png"]})) == 1


@pytest.mark.parametrize("bad", [7, "", "nowhere.png", b"", {}, "data:image/png;base64,xx", np.zeros((2, 2, 7))])
def test_what_is_no_image_names_the_sample(bad):
    with pytest.raises(ValueError, match=r"^sample 3: image .*expected a whole image$"):
        open_images({"images": [bad], "sample_index": 3})


def text(value):
    return {"type": "text", "text": value}


# Where three images are: what `images` holds, what the user's turn does; the column's in order, the others in place
PLACES = {
    "column": lambda images: (images, [{"type": "image"}] * 3),
    "parts": lambda images: ([], [{"type": "image", "image": image} for image in images]),
    "both": lambda images: (
        images[::2],
        [{"type": "image"}, {"type": "image", "image": images[1]}, {"type": "image"}],
    ),
    "nulls": lambda images: (images, [{"type": "image", "image": None, "text": None}] * 3),
    "base64": lambda images: (
        [],
        [{"type": "image", "base64": base64.b64encode(png(image)).decode()} for image in images],
    ),
}


def collated(images, messages, **row):
    processor = tiny_processor(tiny_config())
    return VWLmmDataCollator(processor=processor)([{"images": images, "messages": messages, **row}]), processor


@pytest.mark.parametrize("place", PLACES)
def test_images_keep_the_order_of_their_markers(place):
    """The order and pixels are those of transformers' own `apply_chat_template`."""
    images = [picture(i) for i in range(3)]
    column, parts = PLACES[place](images)
    answer = {"role": "assistant", "content": [text("w7")]}
    batch, processor = collated(column, [{"role": "user", "content": [*parts, text("w5")]}, answer])
    shown = [{"type": "image", "image": image} for image in images]
    stock = processor.apply_chat_template(
        [{"role": "user", "content": [*shown, text("w5")]}, answer],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], stock[name]), name


@pytest.mark.parametrize("key", ["path", "url", "image"])
def test_rows_whose_messages_name_their_images_need_no_column(tmp_path, path, key):
    rows = []
    for _ in range(4):
        content = [{"type": "image", key: path, "text": None}, {"type": "text", key: None, "text": "w20"}]
        rows.append(
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": [text("w7")]}]}
        )
    batch = batch_of(trainer_of(tmp_path, dataset=datasets.Dataset.from_list(rows)))
    assert batch["pixel_values"].shape[0] == 4
    expected, _ = collated([picture(0)], [{"role": "user", "content": "w20"}, {"role": "assistant", "content": "w7"}])
    assert torch.equal(batch["pixel_values"][:1], expected["pixel_values"])


def test_prompts_name_their_images_too(tmp_path, path):
    row = {
        "prompt": [{"role": "user", "content": [{"type": "image", "path": path}, text("w20")]}],
        "completion": [{"role": "assistant", "content": [text("w7")]}],
    }
    processor = tiny_processor(tiny_config())
    batch = VWLmmDataCollator(processor=processor, completion_only_loss=True)([{**row, "images": []}])
    assert batch["pixel_values"].shape[0] == 1
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist()[:1] == [7]


def user(content):
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "w7"}]


BAD_MESSAGES = {
    "no text": (user([{"type": "text"}]), "found a part of type 'text' with the text nothing"),
    "video": (user([{"type": "video", "path": "a.mp4"}]), "found a part of type 'video'"),
    "no part": (user(["w5"]), "found 'w5' in a content, expected parts"),
    "two images in one": (user([{"type": "image", "path": "a", "url": "b"}]), "fields url and path, expected one"),
    "a number": (user(7), "found the content 7, expected a text"),
    "no role": ([{"content": "w5"}], "found the message a record, expected one with a role"),
    "too many": (user([{"type": "image"}, text("w5")]), r"images provided \(0\) .* placeholders \(1\)"),
    "a marker in a text": (user("<image> w5"), "the text of a message holds <image>, which cannot be written as text"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES)
def test_bad_messages_name_the_sample(case):
    messages, problem = BAD_MESSAGES[case]
    with pytest.raises(ValueError, match=f"^sample 2 .id x.: .*{problem}"):
        collated([], messages, sample_index=2, id="x")


def test_photos_stand_upright_as_transformers_turns_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(0).save(tmp_path / "a.png", exif=exif)
    (image,) = open_images({"images": [str(tmp_path / "a.png")]})
    (decoded,) = datasets.Dataset.from_dict({"a": [str(tmp_path / "a.png")]}).cast_column("a", datasets.Image())["a"]
    assert image.size == (16, 20) and np.array_equal(image, decoded)


@pytest.mark.parametrize(
    "size, problem",
    [((8000, 1), "8000 x 1 pixels, expected no side of 200 times"), ((80, 14000), "expected at most 13377 a side")],
)
def test_images_that_take_much_memory_to_pad_name_the_sample(size, problem):
    with pytest.raises(ValueError, match=f"^sample 3: image .in memory.: .*{problem}"):
        open_images({"images": [Image.new("L", size)], "sample_index": 3})
    assert len(open_images({"images": [Image.new("L", (199, 1))]})) == 1
