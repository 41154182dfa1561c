"""Images below a folder, opened as LLaVA opens them."""

import io
import os
import re

import pytest
from datasets import Dataset, Features, Image, List
from PIL import Image as PILImage

from helpers.messages import RECORDS, TALK, turns
from modeling_vwlmm.data import open_images


@pytest.mark.parametrize(
    "name, problem",
    [
        ("../secret.png", "which leads out of the folder"),
        ("sub/../../secret.png", "which leads out of the folder"),
        ("../missing.png", "which leads out of the folder"),
        ("../images-of-others/a.png", "which leads out of the folder"),
        ("{absolute}", "which leads out of the folder"),
        ("link.png", "which leads out of the folder"),
        ("folder_link/secret.png", "which leads out of the folder"),
        ("none.png", "which does not exist or is no file"),
        ("nowhere/a.png", "which does not exist or is no file"),
        ("sub", "which does not exist or is no file"),
        ("", "which does not exist or is no file"),
        ("a\0.png", "which does not exist or is no file"),
        ("loop.png", "which does not exist or is no file"),
        ("x" * 5000, "which does not exist or is no file"),
    ],
)
def test_images_outside_of_the_folder_or_missing(load, tmp_path, images, name, problem):
    (tmp_path / "images-of-others").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "images-of-others" / "a.png"):
        PILImage.new("RGB", (2, 2)).save(path)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "folder_link").symlink_to(tmp_path)
    (images / "loop.png").symlink_to(images / "loop.png")
    name = name.format(absolute=images / "a.png")
    with pytest.raises(ValueError) as error:
        load([{"conversations": TALK}, {"image": name, "conversations": turns("<image>", "Hi")}])
    message, found = str(error.value), repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..."
    assert message.startswith(f"{tmp_path / 'data.json'}: sample 1: image: found {found}, {problem}, expected "), (
        message
    )
    assert message.endswith(f" below {images}")


def test_links_inside_of_the_folder(load, images):
    (images / "link.png").symlink_to(images / "sub" / "c.png")
    (images / "other").symlink_to(images / "sub")
    names = ["link.png", "other/c.png", "sub/../sub/c.png"]
    row = load([{"image": names, "conversations": turns("<image>" * 3, "Hi")}])[0]
    assert {image["path"] for image in row["images"]} == {os.path.realpath(images / "sub" / "c.png")}


def test_images_are_not_read_before_they_are_opened(load, images):
    (images / "a.png").write_text("no image")
    row = load(RECORDS[:1])[0]
    with pytest.raises(ValueError, match=r"^sample x: image .*/a\.png: UnidentifiedImageError: .*expected a whole"):
        open_images(row)
    with pytest.raises(ValueError, match=r"^sample 12: image .*/a\.png: "):
        open_images({**row, "sample_index": 12})
    os.remove(images / "a.png")
    with pytest.raises(ValueError, match=r"^sample x: image .*/a\.png: FileNotFoundError: "):
        open_images(row)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_truncated_image(tmp_path, format):
    path = tmp_path / "image"
    PILImage.effect_noise((64, 64), 50).save(path, format)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"^sample 3: image {re.escape(str(path))}: OSError: .*truncated"):
        open_images({"sample_index": 3, "images": [{"path": str(path), "bytes": None}]})
    with pytest.raises(ValueError, match=r"^sample 3: image \(in memory\): OSError: .*truncated"):
        open_images({"sample_index": 3, "images": [{"path": None, "bytes": path.read_bytes()}]})
    with pytest.raises(ValueError, match=r"^sample 3: image \(in memory\): OSError: .*truncated"):
        open_images({"sample_index": 3, "images": [PILImage.open(io.BytesIO(path.read_bytes()))]})


@pytest.mark.parametrize("limit, error", [(10, "DecompressionBombWarning"), (7, "DecompressionBombError")])
def test_decompression_bomb(images, monkeypatch, limit, error):
    path = str(images / "b.png")  # 15 pixels
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"^sample 0: image {re.escape(path)}: {error}: .*decompression bomb"):
        open_images({"sample_index": 0, "images": [{"path": path, "bytes": None}]})
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 15)
    assert len(open_images({"sample_index": 0, "images": [{"path": path, "bytes": None}]})) == 1


def test_images_open_as_in_llava(tmp_path):
    """Every mode becomes RGB as `Image.open(file).convert("RGB")` makes it."""
    color = PILImage.effect_noise((9, 7), 90).convert("RGB")
    palette = color.quantize(8)
    palette.info["transparency"] = 0
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    saved = {
        "rgba.png": (PILImage.merge("RGBA", [*color.split(), PILImage.effect_noise((9, 7), 90)]), {}),
        "palette.png": (palette, {"transparency": 0}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "grey16.png": (PILImage.new("I;16", (9, 7), 300), {}),
        "bilevel.png": (color.convert("1"), {}),
        "turned.jpg": (color, {"exif": exif}),
    }
    for name, (image, options) in saved.items():
        image.save(tmp_path / name, **options)
        path = str(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        expected = PILImage.open(io.BytesIO(data)).convert("RGB")
        stored = [{"path": path, "bytes": None}, {"path": "gone.png", "bytes": data}, PILImage.open(io.BytesIO(data))]
        opened = open_images({"images": stored})
        assert [(i.mode, i.size, i.tobytes()) for i in opened] == [("RGB", (9, 7), expected.tobytes())] * 3, name


def test_open_images_of_other_datasets(images):
    features = Features({"images": List(Image())})
    row = Dataset.from_dict({"images": [[str(images / "a.png"), str(images / "b.png")]]}, features=features)[0]
    assert [image.size for image in open_images(row)] == [(4, 3), (5, 3)]
    assert open_images({"images": []}) == []
