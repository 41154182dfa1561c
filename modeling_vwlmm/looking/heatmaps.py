"""Where is a word: its probability on every patch, as colours over the image."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import LlavaProcessor

from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import patch_grid
from ..words import caption_font, drawable, seen_image
from .vocabulary import entries_of, texts_of


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
) -> Image.Image:
    """A row an image: as the model sees it, then once for each word with the word's probability as colour.

    The brightest patch of a picture has the word's greatest probability on this image, which stands above it.
    """
    from matplotlib import colormaps

    margin, line = size // 24, 24
    width, height = size + margin, size + margin + line
    sheet = Image.new("RGB", ((len(words) + 1) * width + margin, len(images) * height + margin), "white")
    draw = ImageDraw.Draw(sheet)
    rows, columns = patch_grid(processor, probabilities.shape[-1])
    for y, (image, of_words) in enumerate(zip(images, probabilities, strict=True)):
        seen = seen_image(processor, image).resize((size, size), Image.Resampling.NEAREST)
        top = y * height + margin
        sheet.paste(seen, (margin, top + line))
        grey = np.asarray(seen.convert("L").convert("RGB"), dtype=float)
        for x, (word, values) in enumerate(zip(words, of_words, strict=True), start=1):
            heat = (values / max(values.max(), 1e-12)).reshape(rows, columns)
            heat = np.asarray(
                Image.fromarray((255 * heat).astype(np.uint8)).resize((size, size), Image.Resampling.BOX)
            )
            colors = 255 * colormaps["inferno"](heat)[..., :3]
            left = x * width + margin
            sheet.paste(Image.fromarray((0.45 * grey + 0.55 * colors).astype(np.uint8)), (left, top + line))
            title = f"{drawable(word)}: up to {values.max():.3f}"
            draw.text((left, top), title, fill="black", font=caption_font(15))
    return sheet
