"""Visual words as pictures or numbers."""

import collections
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import LlavaProcessor, PreTrainedTokenizerBase

from .modeling_vwlmm import VWLmmForCausalLM
from .processing import patch_grid


Words = list[list[list[tuple[str, float]]]]
SIGNS = {"\n": "⏎", "\r": "⏎", "\t": "⇥", " ": "␣"}


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
        ValueError: there are not as many words.
    """
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
    """A token as text that can be seen: a line break is ⏎, a token of blanks ␣, one without text its own name."""
    text = tokenizer.decode([token_id])
    if text.strip():
        return text.strip()
    signs = "".join(SIGNS.get(character, "␣") for character in text)
    return signs or str(tokenizer.convert_ids_to_tokens(token_id))


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
    size: int = 384,
    columns: int = 2,
) -> Image.Image:
    """A picture of images, each beside itself with the first word of every patch laid over it.

    The more probable a word, the darker it is.

    Args:
        processor: the model's.
        images: the images that `words` belong to.
        words: what [`top_words`] returned for them.
        captions: a line to write under each.
        size: side of an image in the picture, in pixels.
        columns: images a row.

    Raises:
        ValueError: the patches of an image are no grid.
    """
    margin = size // 16
    line = size // 12 if captions else 0
    width, height = 2 * size + 3 * margin, size + margin + line
    columns = min(columns, len(images))
    picture = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height + margin), "white")
    draw = ImageDraw.Draw(picture)
    for index, (image, patches) in enumerate(zip(images, words, strict=True)):
        left, top = index % columns * width + margin, index // columns * height + margin
        seen = seen_image(processor, image)
        grid = patch_grid(processor, len(patches))
        seen = seen.resize((size, size), Image.Resampling.NEAREST)
        picture.paste(seen, (left, top))
        picture.paste(_overlay(seen, patches, *grid), (left + size + margin // 2, top))
        if captions:
            caption = drawable(captions[index])
            draw.text((left, top + size + line // 4), caption, fill="black", font=caption_font(line * 0.5))
    return picture


def _overlay(image, patches, rows, columns):
    image = image.convert("RGBA")
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    width, height = image.width / columns, image.height / rows
    for index, patch in enumerate(patches):
        word, probability = drawable(patch[0][0]), patch[0][1]
        x, y = index % columns * width, index // columns * height
        draw.rectangle((x, y, x + width, y + height), fill=(255, 255, 255, 120), outline=(0, 0, 0, 40))
        font = caption_font(_font_size(word, min(width, height)))
        shade = 70 + round(185 * probability)
        draw.text((x + width / 2, y + height / 2), word, fill=(0, 0, 0, shade), font=font, anchor="mm")
    return Image.alpha_composite(image, layer).convert("RGB")


@functools.cache
def _font_file():
    import matplotlib  # half a second, and it brings a font for most alphabets

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return path, matplotlib.ft2font.FT2Font(str(path)).get_charmap()


def drawable(word: str) -> str:
    """The word with the code point of every character that the font lacks, which would all be the same box."""
    _, characters = _font_file()
    return "".join(c if ord(c) in characters else f"[{ord(c):x}]" for c in word)


@functools.cache
def caption_font(size: float) -> ImageFont.FreeTypeFont:
    """The font of pictures, which brings most alphabets, in pixels."""
    return ImageFont.truetype(_font_file()[0], size)


def _font_size(word, cell):
    """The largest size at which the word fits its cell, so that it can be read."""
    reference = 100
    width = caption_font(reference).getlength(word or " ")
    return max(4.0, min(cell * 0.26, 0.85 * cell * reference / width))
