"""Where is a word: its probability on every patch, as colours over the image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor

from ..drawing import canvas, fonts_for, paste
from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import patch_grid
from ..words import seen_image
from .vocabulary import entries_of, texts_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def word_probabilities(
    model: VWLmmForCausalLM, processor: LlavaProcessor, images: Sequence[Image.Image], words: Sequence[str]
) -> np.ndarray:
    """The probability of each word on every patch, (images, words, patches); entries written alike are summed.

    Raises:
        ValueError: a word is not in the vocabulary.
    """
    texts = texts_of(processor.tokenizer, model.config.visual_vocab_size)
    entries = [entries_of(word, texts) for word in words]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    found = model.visual_words(pixel_values.to(model.device, model.dtype)).cpu().numpy()
    return np.stack([found[..., own].sum(-1) for own in entries], axis=1)


def draw_heatmaps(
    processor: LlavaProcessor,
    images: Sequence[Image.Image],
    words: Sequence[str],
    probabilities: np.ndarray,
    size: int = 288,
) -> "Figure":
    """A row an image: as the model sees it, then once for each word with the word's probability as colour.

    Colours are the same for all images: the brightest patch has the word's greatest probability on any of them. Its
    greatest on an image stands above it. `size` is the longer side of an image in the figure, in pixels.

    Returns:
        `matplotlib.figure.Figure`: `figure.savefig("heat.png")` writes it.

    Raises:
        ValueError: the patches of an image are no grid.
    """
    from matplotlib import colormaps

    rows, columns = patch_grid(processor, probabilities.shape[-1])
    crop = processor.image_processor.crop_size
    own_width, own_height = (round(size * side / max(crop.width, crop.height)) for side in (crop.width, crop.height))
    margin, line = size // 24, 24
    width, height = max(own_width, size // 2) + margin, own_height + margin + line
    figure, axes = canvas((len(words) + 1) * width + margin, len(images) * height + margin)
    fonts = fonts_for(words)
    most = probabilities.max((0, 2)).clip(1e-12)  # (words,)
    for y, (image, of_words) in enumerate(zip(images, probabilities, strict=True)):
        seen, top = seen_image(processor, image), y * height + margin
        paste(axes, seen, margin, top + line, own_width, own_height)
        grey = np.asarray(seen.convert("L"))
        for x, (word, values) in enumerate(zip(words, of_words, strict=True), start=1):
            colors = colormaps["inferno"]((values / most[x - 1]).reshape(rows, columns))
            colors[..., 3] = 0.55
            left = x * width + margin
            for layer in (np.stack([grey] * 3, axis=-1), colors):
                paste(axes, layer, left, top + line, own_width, own_height)
            fonts.write(axes, left, top + 8, f"{fonts.drawable(word)}: up to {values.max():.3f}", 15, va="center")
    return figure
