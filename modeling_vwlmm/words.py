"""Visual words as pictures or numbers."""

import collections
import itertools
import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .drawing import Fonts, canvas, fonts_for, paste
from .modeling_vwlmm import VWLmmForCausalLM
from .processing import patch_grid


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Words = list[list[list[tuple[str, float]]]]
SIGNS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "␣"}
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of tokenizers that cut texts into bytes
# In pixels. At 576 patches, an image is drawn large enough for words of about eight letters
CELL, SIZE, SMALLEST = 44, 384, 8


def top_words(
    model: VWLmmForCausalLM,
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    k: int = 3,
    relative: bool = False,
) -> Words:
    """The k words of every patch: the most probable ones, or those that say most about it.

    Args:
        model, processor: a pair.
        images: of any size.
        k: words a patch.
        relative: rank by w log(w / m), m being the mean of the visual words w over all patches of all `images`. What
            is probable everywhere then ranks low. The terms of a patch sum to KL(w || m).

    Returns:
        For each image and patch, row by row, the k (word, probability), the highest rank first.

    Raises:
        ValueError: there are not as many words, or there is no image.
    """
    if not isinstance(images, Image.Image) and len(images) == 0:
        raise ValueError("found no image, expected one or more")
    if not 0 < k <= model.config.visual_vocab_size:
        raise ValueError(f"{k} words a patch are asked for, expected 1 to {model.config.visual_vocab_size}")
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model.visual_words(pixel_values.to(model.device, model.dtype))  # (images, patches, V)
    ranks = probabilities
    if relative:
        mean = probabilities.mean((0, 1))
        ranks = torch.special.xlogy(probabilities, probabilities) - torch.special.xlogy(probabilities, mean)
    indices = ranks.topk(k, dim=-1).indices
    values = probabilities.gather(-1, indices)
    words = {index: readable(processor.tokenizer, index) for index in indices.unique().tolist()}
    return [
        [
            list(zip((words[i] for i in patch_indices), patch_values, strict=True))
            for patch_indices, patch_values in zip(*patches, strict=True)
        ]
        for patches in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def readable(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as text that can be seen.

    A line break is ⏎, a token of blanks ␣, an accent alone stands on ◌, a character that nothing shows is its code
    point, a part of a character its bytes, as in \\xe7, and a token without any text its own name.
    """
    text, name = tokenizer.decode([token_id]), str(tokenizer.convert_ids_to_tokens(token_id))
    if "\ufffd" in text and text != name:
        is_bytes = all(character in _BYTES for character in name)
        text = bytes(_BYTES[c] for c in name).decode("utf-8", "backslashreplace") if is_bytes else name
    text = text.strip() or "".join(SIGNS.get(character, "␣") for character in text) or name
    if unicodedata.combining(text[:1] or " "):
        text = f"◌{text}"
    return "".join(c if c.isprintable() else SIGNS.get(c, f"<U+{ord(c):04X}>") for c in text)


def most_frequent_word(words: Words) -> tuple[str, float]:
    """The word that comes first on the most patches, with its share of all patches."""
    first = [patch[0][0] for patches in words for patch in patches]
    ((word, count),) = collections.Counter(first).most_common(1)
    return word, count / len(first)


def seen_image(processor: LlavaProcessor, image: Image.Image) -> Image.Image:
    """The image as the vision tower sees it: padded or cropped, at its resolution."""
    image_processor = processor.image_processor
    pixels = image_processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    pixels = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def draw_words(
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    words: Words,
    captions: Sequence[str] | None = None,
    size: int | None = None,
    columns: int | None = None,
) -> "Figure":
    """A figure of images, each beside itself with the first word of every patch laid over it.

    Neighbours in a row that have the same word are one field, which has it once. The more probable a word, the darker
    it is. A word that does not fit its field is cut, with an ellipsis.

    Args:
        processor: the model's.
        images: the images that `words` belong to.
        words: what [`top_words`] returned for them.
        captions: a line to write under each.
        size: the longer side of an image in the figure, in pixels. By default large enough for its words.
        columns: images a row, by default two, or one where they are large.

    Returns:
        `matplotlib.figure.Figure`: `figure.savefig("words.png")` writes it, or `.pdf`, `.svg`.

    Raises:
        ValueError: the patches of an image are no grid, or images, words and captions are not as many.
    """
    if isinstance(images, Image.Image) or len(images) != len(words):
        found = "one by itself" if isinstance(images, Image.Image) else f"{len(images)} of them"
        raise ValueError(f"expected a list of {len(words)} images, as words has, found {found}")
    if captions and len(captions) != len(images):
        raise ValueError(f"expected {len(images)} captions, one an image, found {len(captions)}")
    grids = [patch_grid(processor, len(patches)) for patches in words]
    size = size or max([SIZE, *(CELL * max(grid) for grid in grids)])
    columns = min(columns or (2 if size < 2 * SIZE else 1), len(images))
    crop = processor.image_processor.crop_size
    own_width, own_height = (round(size * side / max(crop.width, crop.height)) for side in (crop.width, crop.height))
    margin = SIZE // 16
    line = 2 * margin if captions else 0
    width, height = 2 * own_width + 3 * margin, own_height + margin + line
    figure, axes = canvas(columns * width, math.ceil(len(images) / columns) * height + margin)
    fonts = fonts_for([*(patch[0][0] for patches in words for patch in patches), *(captions or []), "…"])
    for index, (image, patches, grid) in enumerate(zip(images, words, grids, strict=True)):
        left, top = index % columns * width + margin, index // columns * height + margin
        seen = seen_image(processor, image)
        paste(axes, seen, left, top, own_width, own_height)
        beside = left + own_width + margin // 2
        paste(axes, seen, beside, top, own_width, own_height)
        paste(axes, np.full((1, 1, 4), (1, 1, 1, 0.55)), beside, top, own_width, own_height)  # a veil
        cell = own_width / grid[1], own_height / grid[0]
        faint: dict[str, Any] = {"color": "black", "alpha": 0.06, "linewidth": 0.5}
        axes.vlines([beside + i * cell[0] for i in range(grid[1])], top, top + own_height, **faint)
        axes.hlines([top + i * cell[1] for i in range(grid[0])], beside, beside + own_width, **faint)
        for row, column, length, word, probability in _runs(patches, grid[1]):
            x, y = beside + column * cell[0], top + row * cell[1]
            _draw_field(axes, fonts, (x, y, length * cell[0], cell[1]), word, probability)
        if captions:
            caption = fonts.drawable(captions[index])
            fonts.write(axes, left, top + own_height + line / 2, caption, margin * 2 / 3, va="center")
    return figure


def _runs(patches: Sequence[Sequence[tuple[str, float]]], columns: int) -> Iterator[tuple[int, int, int, str, float]]:
    """Neighbours in a row whose first words are equal: row, first column, how many, word, mean probability."""
    for row in range(len(patches) // columns):
        column = 0
        firsts = (patch[0] for patch in patches[row * columns : (row + 1) * columns])
        for word, run in itertools.groupby(firsts, key=lambda first: first[0]):
            probabilities = [probability for _, probability in run]
            yield row, column, len(probabilities), word, sum(probabilities) / len(probabilities)
            column += len(probabilities)


def _draw_field(axes, fonts: Fonts, field: tuple[float, float, float, float], word: str, probability: float) -> None:
    from matplotlib.patches import Rectangle

    x, y, width, height = field
    axes.add_artist(Rectangle((x, y), width, height, fill=False, edgecolor="black", alpha=0.2, linewidth=0.5))
    word, room = fonts.drawable(word), 0.9 * width
    while (fit := room / max(fonts.width(word), 1e-9)) < SMALLEST and len(word) > 2:
        word = f"{word.removesuffix('…')[:-1]}…"
    fonts.write(
        axes,
        x + width / 2,
        y + height / 2,
        word,
        min(fit, max(14, 0.26 * height), 0.6 * height),
        ha="center",
        va="center_baseline",
        color="black",
        alpha=0.35 + 0.65 * probability,
    )
