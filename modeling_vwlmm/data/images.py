"""The images of a data set: found below a folder, opened as LLaVA opens them."""

import base64
import contextlib
import functools
import io
import math
import os
import stat
import warnings
from typing import Any

import httpx2
import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from ..files import describe


# A processor pads an image to a square of its longer side, or shrinks its shorter one to the tower's: both take memory
# that has nothing to do with the size of the image's file
MAX_ASPECT_RATIO = 200
# Pillow opens others by running a program (EPS runs Ghostscript) or with decoders that few ever tried
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
WAIT = 30.0  # seconds for the server of an image to answer


def open_images(example: dict) -> list[PIL.Image.Image]:
    """Opens the images of a row, see [`to_rgb`], upright as their EXIF tag says and transformers' pipelines turn them.

    Args:
        example: `images` holds PIL images, `{"path", "bytes"}`, paths, URLs, data URLs, bytes of files, or arrays of
            8 bits, (height, width, channels) or (channels, height, width); `sample_index` and `id` (optional) name
            the row.

    Raises:
        ValueError: a file is missing, broken, of none of `FORMATS`, has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels,
            more than twice that when it is padded to a square, or a side of 200 times the other.
    """
    return [_open_image(image, example) for image in example["images"]]


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in RGB.

    A transparent image is laid over white: Pillow would show the colours that its transparency hides. 16-bit grey
    (modes I;16 and I) is scaled to 8 bits, floating point (mode F) from 0 to 1: Pillow would cut both off at 255. Any
    other mode becomes what Pillow makes of it.

    Raises:
        ValueError: values of a mode I or F are outside of that range.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values, white = np.asarray(image, dtype=np.float64), 1 if image.mode == "F" else 65535
        if not (values.min() >= 0 and values.max() <= white):  # false for nan
            raise ValueError(
                f"mode {image.mode} with values from {values.min():g} to {values.max():g}, expected 0 to {white}"
            )
        return PIL.Image.fromarray((values / white * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _open_image(image: Any, example: dict) -> PIL.Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns above its limit of pixels and raises above twice it: here the limit is one
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            with contextlib.ExitStack() as files:
                opened = _opened(image, files)
                _check_size(opened.size)
                return to_rgb(PIL.ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        sample = example.get("sample_index", example.get("id"))
        where = "" if sample is None else f"sample {sample}: "
        name = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
        name = str(name or "(in memory)")
        if name.startswith("data:"):  # all of the image
            name = describe(name)[1:-1]
        raise ValueError(f"{where}image {name}: {type(error).__name__}: {error}, expected a whole image") from error


def _opened(image: Any, files: contextlib.ExitStack) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        image = image.numpy(force=True)
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 3, 4):
            image = image.transpose(1, 2, 0)
        return PIL.Image.fromarray(np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image))
    source = image
    if isinstance(image, dict):
        source = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(source, str) and source.startswith("data:"):
        source = base64.b64decode(source.partition(",")[2])
    elif isinstance(source, str) and source.startswith(("http://", "https://")):
        source = httpx2.get(source, timeout=WAIT, follow_redirects=True).raise_for_status().content
    if isinstance(source, (bytes, bytearray)):
        source = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        source = os.path.expanduser(source)
        if not stat.S_ISREG(os.stat(source).st_mode):  # to open a pipe would wait for its other end
            raise ValueError("found no file")
    else:
        raise TypeError(f"found {describe(image)}, expected an image, its path, URL or bytes")
    return files.enter_context(PIL.Image.open(source, formats=FORMATS))


def _check_size(size: tuple[int, int]) -> None:
    short, long = sorted(size)
    if long >= MAX_ASPECT_RATIO * short:
        raise ValueError(
            f"{size[0]} x {size[1]} pixels, expected no side of {MAX_ASPECT_RATIO} times the other or more"
        )
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and long**2 > 2 * limit:
        raise ValueError(f"{size[0]} x {size[1]} pixels, expected at most {math.isqrt(2 * limit)} a side")


class ImageFolder:
    """Finds images below a folder: each folder in it is listed once, which is faster than to ask for each file."""

    def __init__(self, path: str):
        self.path = path
        self.root = os.path.realpath(path)
        self.prefix = os.path.join(self.root, "")
        self.listed = functools.cache(self._listed)

    def find(self, name, where: str) -> str:
        """The absolute path of an image, links resolved; `ValueError` if it is outside of the folder or missing."""
        if not isinstance(name, str):
            raise ValueError(f"{where}: image: found {describe(name)}, expected a path")
        parent, slash, base = name.rpartition("/")
        folder, files = self.listed(parent + slash)
        return folder + base if base in files else self._look_for(name, where)

    def _listed(self, parent: str) -> tuple[str, set[str]]:
        """A folder and the names of its files, links left out; no names if it is outside or missing."""
        try:
            folder = os.path.join(os.path.realpath(os.path.join(self.root, parent)), "")
            if not folder.startswith(self.prefix):
                return folder, set()
            with os.scandir(folder) as entries:
                return folder, {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
        except (OSError, ValueError):
            return "", set()

    def _look_for(self, name: str, where: str) -> str:
        """As `find`, for links and for what is not there."""
        found = f"{where}: image: found {describe(name)}"
        try:
            path = os.path.realpath(os.path.join(self.root, name))
            is_inside = os.path.join(path, "").startswith(self.prefix)
            is_file = is_inside and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            is_inside, is_file = True, False
        if not is_inside:
            raise ValueError(f"{found}, which leads out of the folder, expected a path below {self.path}")
        if not is_file:
            raise ValueError(f"{found}, which does not exist or is no file, expected a file below {self.path}")
        return path
