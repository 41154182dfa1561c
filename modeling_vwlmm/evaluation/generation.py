"""Greedy answers to questions, in batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm.auto import tqdm
from transformers import LlavaProcessor

from ..data.images import open_images
from ..modeling_vwlmm import VWLmmForCausalLM
from .questions import Question


@torch.no_grad()
def generate_answers(
    model: VWLmmForCausalLM,
    processor: LlavaProcessor,
    questions: Sequence[Question],
    batch_size: int = 32,
    progress: bool = False,
    **generation: Any,
) -> Iterator[tuple[int, str]]:
    """The place of each question with its greedy answer, as batches become ready.

    Questions of like length go together, so that little is padded. In float32 an answer does not depend on its batch;
    in 16 bits rounding may decide between two words that are nearly as probable.

    Args:
        generation: of `model.generate`, such as `max_new_tokens`.

    Raises:
        ValueError: an image cannot be read, or a prompt does not fit the chat template or its images.
    """
    texts = [prompt_text(processor, question) for question in questions]
    # The longest first, so that a batch that does not fit the memory fails at once
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].images), -len(texts[i])))
    with tqdm(total=len(order), desc="questions", unit="", disable=None if progress else True) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            inputs = inputs_of(processor, [questions[i] for i in batch], [texts[i] for i in batch])
            found = generate_texts(model, processor, inputs, **generation)
            yield from zip(batch, found, strict=True)
            bar.update(len(batch))


def prompt_text(processor: LlavaProcessor, question: Question) -> str:
    """The prompt of a question as the processor's chat template renders it."""
    if isinstance(question.prompt, str):
        return question.prompt
    try:
        return processor.apply_chat_template(question.prompt, add_generation_prompt=True)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"question {question.id}: {error}") from error


def inputs_of(processor: LlavaProcessor, questions: Sequence[Question], texts: Sequence[str]) -> Any:
    """A batch for `model.generate`, padded on the left."""
    images = []
    for question, text in zip(questions, texts, strict=True):
        if text.count(processor.image_token) != len(question.images):
            raise ValueError(
                f"question {question.id} has {len(question.images)} image(s), but its prompt has "
                f"{text.count(processor.image_token)} {processor.image_token} markers"
            )
        images += open_images(question.row())
    bos_token = processor.tokenizer.bos_token
    return processor(
        images=images or None,
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
