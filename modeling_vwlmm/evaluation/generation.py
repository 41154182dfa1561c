"""Greedy answers to questions, in batches."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import LlavaProcessor
from transformers.utils import logging

from ..data.images import open_images
from ..modeling_vwlmm import VWLmmForCausalLM
from ..template_check import rendering
from .questions import Question


logger = logging.get_logger(__name__)


@torch.no_grad()
def generate_answers(
    model: VWLmmForCausalLM,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    batch_size: int = 32,
    progress: bool = False,
    skip_broken_images: bool = False,
    **generation: Any,
) -> Iterator[tuple[int, str]]:
    """The place of each question with its greedy answer, as batches become ready.

    Questions of like length go together, so that little is padded. In float32 an answer does not depend on its batch;
    in 16 bits rounding may decide between two words that are nearly as probable.

    Args:
        skip_broken_images: questions with an image that cannot be read get no answer, and a warning names the image.
            It is an error otherwise.
        generation: of `model.generate`, such as `max_new_tokens`.

    Raises:
        ValueError: an image cannot be read, or a prompt does not fit the chat template or its images.
    """
    texts = [prompt_text(processor, question) for question in questions]
    # The longest first, so that a batch that does not fit the memory fails at once
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].images), -len(texts[i])))
    broken: set[Hashable] = set()
    with tqdm(total=len(order), desc="questions", unit="", disable=None if progress else True) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            opened: dict[int, list[Any]] = {}
            for i in batch:
                try:
                    opened[i] = open_images(questions[i].row())
                except ValueError as error:
                    if not skip_broken_images:
                        raise
                    if questions[i].image_key not in broken:
                        logger.warning(f"skipped: {error}")
                    broken.add(questions[i].image_key)
            if opened:
                asked = [questions[i] for i in opened]
                inputs = inputs_of(processor, asked, [texts[i] for i in opened], list(opened.values()))
                yield from zip(opened, generate_texts(model, processor, inputs, **generation), strict=True)
            bar.update(len(batch))


def prompt_text(processor: LlavaProcessor, question: Question) -> str:
    """The prompt of a question as the processor's chat template renders it."""
    if isinstance(question.prompt, str):
        return question.prompt
    try:
        with rendering():
            return processor.apply_chat_template(question.prompt, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"question {question.id}: {error}") from error


def inputs_of(
    processor: LlavaProcessor, questions: Sequence[Question], texts: Sequence[str], images: Sequence[list[Any]]
) -> Any:
    """A batch for `model.generate`, padded on the left, of prompts and of each one's open images."""
    for question, text in zip(questions, texts, strict=True):
        if text.count(processor.image_token) != len(question.images):
            raise ValueError(
                f"question {question.id} has {len(question.images)} image(s), but its prompt has "
                f"{text.count(processor.image_token)} {processor.image_token} markers"
            )
    bos_token = processor.tokenizer.bos_token
    return processor(
        images=[image for own in images for image in own] or None,
        text=list(texts),
        # As in training: templates without a beginning-of-sequence token leave it to the tokenizer
        add_special_tokens=bos_token is None or not texts[0].startswith(bos_token),
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def generate_texts(model: Any, processor: LlavaProcessor, inputs: Any, **generation: Any) -> list[str]:
    """What the model says after each row of a batch; greedily, if `generation` says nothing else."""
    inputs = inputs.to(model.device, model.dtype)
    # An own sampling configuration of the model's would warn that greedy search does not read it
    given = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, **generation}
    generated = model.generate(**inputs, **given)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
