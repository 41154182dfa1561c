"""The images of a data set: found below a folder, opened as LLaVA opens them."""

import functools
import io
import os
import stat
import warnings

import numpy as np
import PIL.Image

from ..files import describe


def open_images(example: dict) -> list[PIL.Image.Image]:
    """Opens the images of a row, see [`to_rgb`]. As in LLaVA, no EXIF tag turns them.

    Args:
        example: `images` holds `{"path", "bytes"}` or PIL images; `sample_index` and `id` (optional) name the row.

    Raises:
        ValueError: a file is missing, broken, no image, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
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


def _open_image(image: dict | PIL.Image.Image, example: dict) -> PIL.Image.Image:
    try:
        with warnings.catch_warnings():
            # Pillow warns above its limit of pixels and raises above twice it: here the limit is one
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            if isinstance(image, PIL.Image.Image):
                return to_rgb(image)
            source = image["path"] if image.get("bytes") is None else io.BytesIO(image["bytes"])
            with PIL.Image.open(source) as opened:
                return to_rgb(opened)
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        sample = example.get("sample_index", example.get("id"))
        where = "" if sample is None else f"sample {sample}: "
        name = image.get("path") if isinstance(image, dict) else None
        raise ValueError(
            f"{where}image {name or '(in memory)'}: {type(error).__name__}: {error}, expected a whole image"
        ) from error


class ImageFolder:
    """Finds images below a folder with one or two calls of the file system for each."""

    def __init__(self, path: str):
        self.path = path
        self.root = os.path.realpath(path)
        self.realpath = functools.cache(os.path.realpath)  # of folders, which are few

    def find(self, name, where: str) -> str:
        """The absolute path of an image, links resolved; `ValueError` if it is outside of the folder or missing."""
        if not isinstance(name, str):
            raise ValueError(f"{where}: image: found {describe(name)}, expected a path")
        found = f"{where}: image: found {describe(name)}"
        try:
            parent, base = os.path.split(name)
            path = os.path.join(self.realpath(os.path.join(self.root, parent)), base)
            if os.path.islink(path):
                path = os.path.realpath(path)
            is_inside = path.startswith(os.path.join(self.root, "")) and not os.path.isabs(name)
            is_file = is_inside and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            is_inside, is_file = True, False
        if not is_inside:
            raise ValueError(f"{found}, which leads out of the folder, expected a path below {self.path}")
        if not is_file:
            raise ValueError(f"{found}, which does not exist or is no file, expected a file below {self.path}")
        return path
