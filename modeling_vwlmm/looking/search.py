"""Search through visual words: an image is a sparse vector over the vocabulary."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import LlavaProcessor

from ..data.images import open_images
from ..drawing import canvas, fonts_for, paste
from ..files import new_folder, read_json_object, write_json
from ..modeling_vwlmm import VWLmmForCausalLM
from .vocabulary import entries_of, texts_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


VECTORS, NAMES = "vectors.npz", "index.json"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
SMALLEST = 1e-3  # weights below it are left out
POOLINGS = ("max", "sum")


class Index(NamedTuple):
    """Vectors of images: a `scipy.sparse.csr_array` (images, V), paths, and the text of every entry of V."""

    vectors: Any
    paths: list[str]
    texts: list[str]


def pool(words: torch.Tensor, pooling: str) -> torch.Tensor:
    """The vector of an image of its visual words, (images, patches, V) to (images, V).

    "max" is the greatest probability of a word on any patch, "sum" log(1 + sum over patches), which saturates as in
    SPLADE.
    """
    if pooling not in POOLINGS:
        raise ValueError(f'pooling is "{pooling}", expected {" or ".join(POOLINGS)}')
    return words.amax(1) if pooling == "max" else words.sum(1).log1p()


def find_images(folder: str | os.PathLike) -> list[str]:
    """The image files below a folder, sorted; `ValueError` if there are none."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder, expected one of images")
    found = sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{folder} has no images, expected files that end in {', '.join(SUFFIXES)}")
    return found


@torch.no_grad()
def make_index(
    model: VWLmmForCausalLM,
    processor: LlavaProcessor,
    paths: Sequence[str],
    pooling: str = "max",
    batch_size: int = 16,
) -> tuple[Index, list[str]]:
    """The index of images, and for each that does not open, a line that says why it was skipped.

    Raises:
        ValueError: none of them opens.
        ImportError: scipy is missing.
    """
    sparse = _sparse()
    kept: list[str] = []
    skipped: list[str] = []
    rows = []
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            try:
                images += open_images({"images": [{"path": path, "bytes": None}]})
                kept.append(path)
            except ValueError as error:
                skipped.append(str(error))
        if images:
            pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
            words = model.visual_words(pixel_values.to(model.device, model.dtype))
            pooled = pool(words, pooling).cpu().numpy()
            rows.append(sparse.csr_array(np.where(pooled < SMALLEST, 0, pooled)))
    if not kept:
        raise ValueError(f"none of {len(paths)} images opens, the first: {skipped[0]}")
    texts = texts_of(processor.tokenizer, model.config.visual_vocab_size)
    return Index(sparse.csr_array(sparse.vstack(rows)), kept, texts), skipped


def search(index: Index, text: str, k: int = 10) -> list[tuple[str, float]]:
    """The k images with the most of all words of a text: (path, score), the best first.

    A score is the sum of the words' weights, each times its idf: a word that is everywhere decides nothing.

    Raises:
        ValueError: a word is not in the vocabulary, or there are none.
    """
    if not text.split():
        raise ValueError("there is nothing to search for, expected one or more words")
    scores = np.zeros(len(index.paths))
    for word in text.split():
        weights = index.vectors[:, entries_of(word, index.texts)].sum(axis=1)
        # The share of images that have the word, counted by its weight, which is hardly ever 0
        scores += weights * np.log(1 + 1 / max(weights.mean(), 1e-6))
    best = np.argsort(-scores, kind="stable")[:k]
    return [(index.paths[i], float(scores[i])) for i in best]


def save_index(index: Index, folder: str | os.PathLike) -> None:
    """Write an index into a new folder; `FileExistsError` if there is one."""
    with new_folder(folder) as place:
        _sparse().save_npz(place / VECTORS, index.vectors)
        write_json(place / NAMES, {"paths": index.paths, "texts": index.texts})


def load_index(folder: str | os.PathLike) -> Index:
    """Read an index; `ValueError` if a file is damaged or does not fit the other, `OSError` if it is missing."""
    folder = Path(folder)
    names = read_json_object(folder / NAMES)
    vectors, paths, texts = _sparse().load_npz(folder / VECTORS), names.get("paths"), names.get("texts")
    if not (isinstance(paths, list) and isinstance(texts, list) and vectors.shape == (len(paths), len(texts))):
        raise ValueError(
            f"{folder} is no index of `vwlmm index`, or its files are of different ones: {vectors.shape[0]} vectors "
            f"of {vectors.shape[1]} words do not fit {NAMES}"
        )
    return Index(_sparse().csr_array(vectors), paths, texts)


def draw_results(results: Sequence[tuple[str, float]], size: int = 160, columns: int = 5) -> "Figure":
    """A `matplotlib.figure.Figure` of the images found, the best first, each with its score and name below."""
    line, gap = 18, 10
    width, height = size + gap, size + 2 * line + gap
    rows = -(-len(results) // columns)
    figure, axes = canvas(columns * width + gap, rows * height + gap)
    names = [Path(path).name for path, _ in results]
    fonts = fonts_for([*names, "…"])
    for i, ((path, score), name) in enumerate(zip(results, names, strict=True)):
        left, top = i % columns * width + gap, i // columns * height + gap
        (image,) = open_images({"images": [{"path": path, "bytes": None}]})
        image.thumbnail((size, size))
        scale = size / max(image.size)
        paste(axes, image, left, top, *(scale * side for side in image.size))
        fonts.write(axes, left, top + size + line / 2 + 2, f"{i + 1}: {score:.3f}", 12, va="center")
        name = fonts.drawable(name)
        while fonts.width(name) * 11 > size:
            name = f"…{name.removeprefix('…')[1:]}"
        fonts.write(axes, left, top + size + 1.5 * line, name, 11, va="center")
    return figure


def _sparse():
    try:
        from scipy import sparse
    except ImportError as error:
        raise ImportError('search needs scipy: pip install "modeling-vwlmm[search]"') from error
    return sparse
