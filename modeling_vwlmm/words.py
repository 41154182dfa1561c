"""Visual words as pictures and as numbers."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .processing import patch_grid


def top_words(model, processor, images, k=3):
    """The most probable words of every patch.

    Args:
        model ([`VWLmmForCausalLM`]), processor ([`~transformers.LlavaProcessor`]): a pair.
        images (`list[PIL.Image.Image]`): of any size.
        k (`int`, *optional*, defaults to 3): words a patch.

    Raises:
        ValueError: if there are not as many words.

    Returns:
        `list[list[list[tuple[str, float]]]]`: for each image and patch, row by row, the k (word, probability), the
        most probable first.
    """
    if not 0 < k <= model.config.visual_vocab_size:
        raise ValueError(f"{k} words a patch are asked for, expected 1 to {model.config.visual_vocab_size}")
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model.visual_words(pixel_values.to(model.device, model.dtype))
    values, indices = probabilities.topk(k, dim=-1)
    tokens = {index: processor.tokenizer.decode([index]).strip() for index in indices.unique().tolist()}
    return [
        [
            list(zip((tokens[i] for i in patch_indices), patch_values, strict=True))
            for patch_indices, patch_values in zip(*patches, strict=True)
        ]
        for patches in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def seen_image(processor, image):
    """The image as the vision tower sees it: padded or cropped, at its resolution."""
    image_processor = processor.image_processor
    pixels = image_processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    pixels = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def draw_words(processor, images, words, captions=None, size=384, columns=2):
    """A picture of images, each beside itself with the most probable word of every patch laid over it.

    The more probable a word, the darker it is.

    Args:
        processor ([`~transformers.LlavaProcessor`]): the model's.
        images (`list[PIL.Image.Image]`): the images that `words` belong to.
        words: what [`top_words`] returned for them.
        captions (`list[str]`, *optional*): a line to write under each.
        size (`int`, *optional*, defaults to 384): side of an image in the picture, in pixels.
        columns (`int`, *optional*, defaults to 2): images a row.

    Returns:
        `PIL.Image.Image`
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
            draw.text(
                (left, top + size + line // 4), captions[index], fill="black", font=ImageFont.load_default(line * 0.6)
            )
    return picture


def _overlay(image, patches, rows, columns):
    image = image.convert("RGBA")
    layer = Image.new("RGBA", image.size)
    draw = ImageDraw.Draw(layer)
    width, height = image.width / columns, image.height / rows
    for index, patch in enumerate(patches):
        word, probability = patch[0]
        x, y = index % columns * width, index // columns * height
        draw.rectangle((x, y, x + width, y + height), fill=(255, 255, 255, 120), outline=(0, 0, 0, 40))
        font = ImageFont.load_default(_font_size(word, min(width, height)))
        shade = 70 + round(185 * probability)
        draw.text((x + width / 2, y + height / 2), word, fill=(0, 0, 0, shade), font=font, anchor="mm")
    return Image.alpha_composite(image, layer).convert("RGB")


def _font_size(word, cell):
    """The largest size at which the word fits its cell, so that it can be read."""
    reference = 100
    width = ImageFont.load_default(reference).getlength(word or " ")
    return max(4.0, min(cell * 0.26, 0.85 * cell * reference / width))
