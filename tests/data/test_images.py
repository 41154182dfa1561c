"""Images below a folder, opened as LLaVA opens them."""

import io
import os
import re

import numpy as np
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from helpers.messages import RECORDS, TALK, turns
from modeling_vwlmm.data import open_images
from modeling_vwlmm.data.load import load_dataset


@pytest.mark.parametrize(
    "name, problem",
    [
        ("../secret.png", "which leads out of the folder"),
        ("sub/../../secret.png", "which leads out of the folder"),
        ("../missing.png", "which leads out of the folder"),
        ("../images-of-others/a.png", "which leads out of the folder"),
        ("{outside}", "which leads out of the folder"),
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
    name = name.format(outside=tmp_path / "secret.png")
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
    names = ["link.png", "other/c.png", "sub/../sub/c.png", str(images / "sub" / "c.png")]
    row = load([{"image": names, "conversations": turns("<image>" * 4, "Hi")}])[0]
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
    """Opaque images of 8 bits become RGB as `Image.open(file).convert("RGB")` makes it."""
    color = PILImage.effect_noise((9, 7), 90).convert("RGB")
    saved = {
        "palette.png": (color.quantize(8), {}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "bilevel.png": (color.convert("1"), {}),
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


def pixels_of(image, path, **options):
    """What is opened of an image, from a file and from memory."""
    image.save(path, **options)
    from_file, from_memory = open_images({"images": [{"path": str(path), "bytes": None}, image]})
    assert from_file.mode == "RGB" and np.array_equal(from_file, from_memory)
    return np.asarray(from_file)[0].tolist()


def test_transparent_images_lie_on_white(tmp_path):
    """Whatever colours their transparency hides."""
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    expected = [[10, 20, 30], [255, 255, 255], [204, 204, 204]]
    assert pixels_of(PILImage.fromarray(rgba), tmp_path / "rgba.png") == expected
    grey = PILImage.fromarray(np.array([[[7, 255], [7, 0]]], dtype=np.uint8), "LA")
    assert pixels_of(grey, tmp_path / "la.png") == [[7, 7, 7], [255, 255, 255]]
    palette = PILImage.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.info["transparency"] = 1
    assert pixels_of(palette, tmp_path / "p.png", transparency=1) == [[1, 2, 3], [255, 255, 255]]


@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_16_bits_are_scaled(tmp_path, mode, dtype):
    values = np.array([[0, 16384, 32768, 65535]], dtype=dtype)
    image = PILImage.frombytes(mode, (4, 1), values.tobytes())
    assert pixels_of(image, tmp_path / "a.tiff") == [[grey] * 3 for grey in (0, 64, 128, 255)]


def test_floating_point_is_scaled_from_0_to_1(tmp_path):
    image = PILImage.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert pixels_of(image, tmp_path / "a.tiff") == [[grey] * 3 for grey in (0, 128, 255)]


@pytest.mark.parametrize("value, found", [(300.0, "0 to 300"), (float("nan"), "nan to nan"), (70000, "0 to 70000")])
def test_values_that_no_grey_has(value, found):
    dtype = np.float32 if isinstance(value, float) else np.int32
    image = PILImage.fromarray(np.array([[0, value]], dtype=dtype))
    with pytest.raises(ValueError, match=f"sample 3: .*mode [IF] with values from {found}, expected 0 to"):
        open_images({"images": [image], "sample_index": 3})


def test_formats_that_pillow_runs_programs_for_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("a program was run"))
    PILImage.new("RGB", (4, 3)).save(tmp_path / "a.eps")
    for image in ({"path": str(tmp_path / "a.eps"), "bytes": None}, (tmp_path / "a.eps").read_bytes()):
        with pytest.raises(ValueError, match="UnidentifiedImageError.*expected a whole image"):
            open_images({"images": [image]})


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a.png: ValueError: found no file"):
        open_images({"images": [{"path": str(tmp_path / "a.png"), "bytes": None}]})


@pytest.mark.parametrize(
    "column, value",
    [
        ("images", lambda path: [{"path": path, "bytes": None}]),
        ("images", lambda path: [path]),
        ("image", lambda path: path),
        ("messages", lambda path: [{"role": "user", "content": [{"type": "image", "path": path}]}]),
    ],
)
def test_a_saved_data_set_names_files_below_its_folders_alone(tmp_path, column, value):
    (tmp_path / "images").mkdir()
    PILImage.new("RGB", (4, 3)).save(tmp_path / "images" / "a.png")
    rows = Dataset.from_list([{column: value(str(tmp_path / "images" / "a.png"))}])
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"saved: column {column}: found the image .*a.png, which leads out of"):
        load_dataset(str(tmp_path / "saved"))
    assert len(load_dataset(str(tmp_path / "saved"), tmp_path / "images")) == 1
    with pytest.raises(ValueError, match="leads out of"):
        load_dataset(str(tmp_path / "saved"), tmp_path / "imag")


def test_a_saved_data_set_of_whole_images_names_none(tmp_path):
    rows = [{"images": [{"path": "/etc/passwd", "bytes": b"pixels"}], "text": "/etc/passwd"}]
    Dataset.from_list(rows, features=Features({"images": List(Image()), "text": Value("string")})).save_to_disk(
        tmp_path / "saved"
    )
    assert len(load_dataset(str(tmp_path / "saved"))) == 1
