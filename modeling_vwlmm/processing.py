"""Processors for VW-LMM models, which are LLaVA's own, set up from the model's config."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from transformers import BatchFeature, LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from .configuration_vwlmm import VWLmmConfig
from .template_check import rendering


IMAGE_MARKER = "<image>"
CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"
# An LLM's own chat template takes texts alone. This goes before it and turns lists of parts into texts. As in LLaVA,
# an image stands on a line of its own before the text that follows it
IMAGE_PARTS = """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message["content"] is string or message["content"] is none -%}
        {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
        {%- set content = namespace(text="") -%}
        {%- for part in message["content"] -%}
            {%- if part["type"] == "image" -%}
                {%- set content.text = content.text + "<image>" -%}
                {%- set next = loop.nextitem if not loop.last else {} -%}
                {%- if next["type"] == "text" and next["text"] and not next["text"].startswith("\\n") -%}
                    {%- set content.text = content.text + "\\n" -%}
                {%- endif -%}
            {%- else -%}
                {%- set content.text = content.text + part["text"] -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def make_processor(
    config: VWLmmConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_mean: list[float],
    image_std: list[float],
    chat_template: str | None = None,
) -> LlavaProcessor:
    """The processor of a model, which writes one placeholder for each patch that the vision tower makes of an image.

    It is a stock [`~transformers.LlavaProcessor`], so that `AutoProcessor` loads it with or without this package.

    Args:
        config: the model's.
        tokenizer: the LLM's. It gets an image token and a padding token if it has none, and pads on the left from now
            on.
        image_mean, image_std: what the vision tower was trained with, one number a channel, for pixel values in 0 to
            1. The mean is also the colour that pads an image to a square.
        chat_template: the tokenizer's own if not given. A template that has no place for images gets [`IMAGE_PARTS`]
            before it.

    Raises:
        ValueError: if the image token is not the config's `image_token_id`.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_MARKER]}, replace_extra_special_tokens=False)
    check_tokens(tokenizer, IMAGE_MARKER, config)
    # Generation needs padding on the left; training asks for padding on the right itself. Only init_kwargs are saved
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chat_template = chat_template or tokenizer.chat_template
    if chat_template is not None and "image" not in chat_template:
        chat_template = IMAGE_PARTS + chat_template
    height, width = config.image_size
    # LLaVA's processor writes (height // patch_size) * (width // patch_size) + additional placeholders, and one less
    # under the strategy "default". The two numbers are chosen to give image_seq_length for any tower
    patch_size = round(math.sqrt(height * width / config.image_seq_length))
    has_cls = config.vision_feature_select_strategy == "default"
    additional = config.image_seq_length - (height // patch_size) * (width // patch_size) + has_cls
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=config.image_aspect_ratio == "pad",
            size={"shortest_edge": min(height, width)},
            crop_size={"height": height, "width": width},
            image_mean=image_mean,
            image_std=image_std,
        ),
        tokenizer=tokenizer,
        patch_size=patch_size,
        num_additional_image_tokens=additional,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_MARKER,
        chat_template=chat_template,
    )


def check_processor(processor: LlavaProcessor, config: VWLmmConfig) -> None:
    """`ValueError` if a processor does not fit a model.

    Its tokens are those of [`check_tokens`], it counts the patches of an image, and it pads images with a colour.
    """
    check_tokens(processor.tokenizer, processor.image_token, config)
    if not processor.patch_size:
        raise ValueError("the processor has no patch_size: vwlmm convert writes one that counts its model's patches")
    mean = processor.image_processor.image_mean
    is_colour = isinstance(mean, (list, tuple)) and all(0 <= value <= 1 for value in mean)
    if getattr(processor.image_processor, "do_pad", False) and not is_colour:
        raise ValueError(f"the processor pads with its image_mean {mean}, expected a list of numbers from 0 to 1")


def check_tokens(tokenizer: PreTrainedTokenizerBase, image_token: str, config: VWLmmConfig) -> None:
    """`ValueError` if the tokenizer has another image token than the model, or a special token the LLM has no row for.

    Only a batch with such a token would fail, and on a GPU without a word of the reason.
    """
    image_token_id = tokenizer.convert_tokens_to_ids(image_token)
    if image_token_id != config.image_token_id:
        raise ValueError(
            f"the tokenizer's {image_token} is token {image_token_id}, but the config's image_token_id is "
            f"{config.image_token_id}"
        )
    vocab_size = config.text_config.vocab_size
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token, token_id = getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= vocab_size and token_id != image_token_id:
            raise ValueError(
                f"the tokenizer's {name} {token} is token {token_id}, but the LLM's vocabulary ends at "
                f"{vocab_size - 1}"
            )


def patch_grid(processor: LlavaProcessor, patches: int) -> tuple[int, int]:
    """The rows and columns of the grid that an image's patches form; `ValueError` if they form none."""
    size = processor.image_processor.crop_size
    rows, columns = size.height // processor.patch_size, size.width // processor.patch_size
    if rows * columns != patches:
        raise ValueError(f"{patches} patches are no grid over an image of {size.width} x {size.height} pixels")
    return rows, columns


def question_about(processor: LlavaProcessor, images: Sequence[Image], text: str) -> BatchFeature:
    """Images and a question about them as a model reads them, in its chat template if it has one."""
    inputs: Any
    if processor.chat_template is None:
        rendered = "".join(f"{processor.image_token}\n" for _ in images) + text
        inputs = processor(images=list(images), text=rendered, return_tensors="pt")
        return inputs
    content: list[Any] = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    message: Any = {"role": "user", "content": content}
    with rendering():
        inputs = processor.apply_chat_template(
            [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    return inputs


def read_chat_template(name: str) -> str:
    """A chat template in Jinja: "vicuna_v1", "mistral" or "plain" (no roles); `ValueError` for any other name.

    The templates render the text that the published code feeds to its tokenizer, which adds the beginning-of-sequence
    token itself. They mark with `{% generation %}` what the assistant says, up to and with the end of its turn.
    """
    names = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
    if name not in names:
        raise ValueError(f"found chat template {name!r}, expected one of {', '.join(names)}")
    return (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
