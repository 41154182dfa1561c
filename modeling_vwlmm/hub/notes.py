"""What stands in files of weights and images beside weights and pixels: nobody sees it, and a push would send it."""

import struct
from pathlib import Path

from PIL import Image, ImageOps
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..files import read_json_object


# What libraries write into every file of weights and every index
_USUAL = {"format", "total_size", "total_parameters"}
# Chunks of a PNG that its pixels need, or its colours
_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"sBIT", b"bKGD", b"pHYs"}


def has_notes(weights: Path) -> bool:
    """Whether a safetensors file, or an index of several, has metadata that no library writes by itself."""
    if weights.name == SAFE_WEIGHTS_INDEX_NAME:
        metadata = read_json_object(weights).get("metadata")
    else:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata()
    return bool(set(metadata or {}) - _USUAL)


def remove_notes(image: Path) -> None:
    """Take texts, EXIF tags (camera, place, time) and profiles out of an image file. Its pixels stay as they look."""
    content = image.read_bytes()
    if content.startswith(b"\x89PNG"):
        image.write_bytes(content[:8] + b"".join(chunk for kind, chunk in _png_chunks(content) if kind in _PIXELS))
        return
    with Image.open(image, formats=["JPEG", "WEBP"]) as opened:
        if not {"exif", "comment", "icc_profile", "xmp", "photoshop", "adobe"} & opened.info.keys():
            return
        # Decoded and written anew, which alone is sure to leave nothing behind
        upright, kind = ImageOps.exif_transpose(opened), opened.format
        pixels = Image.frombytes(upright.mode, upright.size, upright.tobytes())
    pixels.save(
        image, "WEBP" if kind == "WEBP" else "JPEG", **({"lossless": True} if kind == "WEBP" else {"quality": 95})
    )


def _png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    chunks, place = [], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place : place + length + 12]))
        place += length + 12
    return chunks
