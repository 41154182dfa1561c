"""The collator that makes batches of conversations with images."""

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from jinja2 import TemplateError
from transformers.utils import logging
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import apply_chat_template, is_conversational, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from ..processing import IMAGE_PARTS
from ..template_check import rendering
from .images import open_images
from .message_images import gather_images
from .packing import lay_out


logger = logging.get_logger(__name__)


@dataclass
class VWLmmDataCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator for images and text, which takes all of TRL's formats, with six differences.

    - With `assistant_only_loss` (the default here), the labels of `messages` are what the assistant says and the
      token that ends its turn. This holds for any chat template, with or without generation markers.
    - Rows longer than `max_length` lose text at their end. A row that would lose part of an image is an error.
    - Image placeholders are no labels, and a batch without any label is an error, unless `needs_labels` is false.
    - A row's `tools` and `chat_template_kwargs` go into the chat template, as in TRL's pipeline for text.
    - Images may be paths. A file that cannot be read is an error that names its sample. With `skip_broken_images` it
      is a warning: the sample then has neither labels nor scored image positions, and `is_skipped` of shape (B,) marks
      it.
    - With `padding_free`, the samples of a batch lie one after another, see [`lay_out`]. An example may be a list of
      samples, as of [`PackedRows`].
    """

    assistant_only_loss: bool = True
    skip_broken_images: bool = False
    needs_labels: bool = True
    padding_free: bool = False

    def __post_init__(self) -> None:
        processor: Any = self.processor
        self.image_marker: str = processor.image_token
        self.image_token_id = processor.tokenizer.convert_tokens_to_ids(self.image_marker)
        # TRL would cut through images and refuse templates without generation markers. The two fields are hidden from
        # it, because this class does both itself
        self.max_row_length, self.max_length = self.max_length, None
        self.assistant_turns_only, self.assistant_only_loss = self.assistant_only_loss, False

    @functools.cached_property
    def training_template(self) -> str:
        """The chat template, with generation markers if TRL knows a version of it that has them."""
        template = self.chat_template or self.processor.chat_template
        if isinstance(template, dict):
            template = template["default"]
        if template is None:
            raise ValueError("the processor has no chat template to render messages with")
        if has_generation_markers(template):
            return template
        tokenizer = copy.copy(self.processor.tokenizer)
        tokenizer.chat_template = template.removeprefix(IMAGE_PARTS)
        try:
            marked = get_training_chat_template(tokenizer) or tokenizer.chat_template
        except ValueError:  # TRL does not know it, so `_render` finds the turns by rendering them one by one
            return template
        return template.replace(tokenizer.chat_template, marked)

    @functools.cached_property
    def patches_of_an_image(self) -> int:
        """The number of placeholders of an image."""
        processor: Any = self.processor
        images = [PIL.Image.new("RGB", (32, 32))]
        return processor(images=images, text=[self.image_marker])["input_ids"][0].count(self.image_token_id)

    def token_count(self, example: dict[str, Any]) -> int:
        """The length of an example's row, before `max_length` cuts it. Its images are counted, not opened."""
        name = _sample_name(example)
        example, images = self._placed(example, name)
        example, texts = self._written(example, images, name)
        tokenizer: Any = self.processor.tokenizer  # type: ignore[attr-defined]
        adds_bos_token = "messages" in example and self._lacks_bos_token(texts[0])
        tokens = sum(len(tokenizer(text, add_special_tokens=adds_bos_token)["input_ids"]) for text in texts)
        return tokens + len(images) * (self.patches_of_an_image - 1)

    def torch_call(self, examples: list[Any]) -> dict[str, Any]:
        examples = [sample for row in examples for sample in (row if isinstance(row, list) else [row])]
        examples = [_numbered_by_worker(example) for example in examples]
        names = [_sample_name(example) for example in examples]
        examples = [self._prepare(example, name) for example, name in zip(examples, names, strict=True)]
        if not self.padding_free:
            return self._collate(examples, names)
        is_skipped = torch.tensor([example["is_skipped"] for example in examples])
        kept = [(example, name) for example, name in zip(examples, names, strict=True) if not example["is_skipped"]]
        tokenizer = self.processor.tokenizer  # type: ignore[attr-defined]
        if kept:
            batch = self._collate(*map(list, zip(*kept, strict=True)))
        else:  # two tokens, because a row of one token is taken for one that was generated
            ids = torch.full((1, 2), tokenizer.pad_token_id)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
        batch = lay_out(batch, tokenizer.pad_token_id, self.pad_to_multiple_of)
        return {**batch, "is_skipped": is_skipped} if self.skip_broken_images else batch

    def _collate(self, examples: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
        """The batch of examples that are ready, a row each, with padding."""
        batch = super().torch_call(examples)
        batch["labels"][batch["input_ids"] == self.image_token_id] = -100
        if self.max_row_length is not None:
            self._truncate(batch, names)
        if self.skip_broken_images:
            batch["is_skipped"] = torch.tensor([example["is_skipped"] for example in examples])
            batch["labels"][batch["is_skipped"]] = -100
            # Padding alone leaves no position to score. One token stays: some attention fails on a row without any
            batch["attention_mask"][batch["is_skipped"], :-1] = 0
            batch["attention_mask"][batch["is_skipped"], -1] = 1
            if batch["is_skipped"].all():
                return batch
        if self.needs_labels and not (batch["labels"][:, 1:] != -100).any():
            raise ValueError(f"no token of the batch is a label, nothing can be learnt from: {', '.join(names)}")
        return batch

    def _prepare(self, example: dict[str, Any], name: str) -> dict[str, Any]:
        """The example with its images opened and its conversation rendered."""
        example, images = self._placed(example, name)
        example["is_skipped"] = False
        try:
            images = open_images({**example, "images": images})
        except ValueError as error:
            if not self.skip_broken_images:
                raise
            logger.warning(f"skipped: {error}")
            example["is_skipped"] = True
            images = [PIL.Image.new("RGB", (32, 32)) for _ in images]
        return self._written(example, images, name)[0]

    def _placed(self, example: dict[str, Any], name: str) -> tuple[dict[str, Any], list[Any]]:
        """The example with a bare part for each of its images, and the images in that order."""
        example = dict(example)
        images = [example.pop("image")] if "image" in example else example.get("images") or []
        images = [image for image in images if image is not None]
        conversation = "messages" if "messages" in example else "prompt" if is_conversational(example) else None
        if conversation is not None:
            try:
                example[conversation], images = gather_images(example[conversation], images, self.image_marker)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return example, images

    def _written(self, example: dict[str, Any], images: list[Any], name: str) -> tuple[dict[str, Any], list[str]]:
        """The example with these images and its conversation rendered, and the texts that its row is made of."""
        example = {**example, "images": images}
        is_text = self.dataset_text_field in example  # which TRL reads, whatever else there is
        fields = (self.dataset_text_field,) if is_text else ("prompt", "completion")
        texts = [example.get(field) for field in fields]
        try:
            if "messages" in example:
                with rendering():
                    example["rendered"] = self._render(example)
                texts = [example["rendered"][0]]
            elif is_conversational(example):
                prompt = prepare_multimodal_messages(example["prompt"], images=example["images"])
                completion = prepare_multimodal_messages(example["completion"])
                with rendering():
                    rendered = apply_chat_template(
                        {"prompt": prompt, "completion": completion}, self.processor, **_template_variables(example)
                    )
                if self._adds_bos_token(rendered["prompt"]):
                    rendered["prompt"] = self.processor.tokenizer.bos_token + rendered["prompt"]
                example.update(rendered)
                texts = list(rendered.values())
        except (ValueError, TemplateError) as error:
            raise ValueError(f"{name}: {error}") from error
        count = len(images)
        texts = [text for text in texts if isinstance(text, str)]
        markers = sum(text.count(self.image_marker) for text in texts)
        if markers != count:
            raise ValueError(f"{name} has {count} image(s), but {markers} {self.image_marker} markers")
        return example, texts

    def _lacks_bos_token(self, text: str) -> bool:
        bos_token = self.processor.tokenizer.bos_token  # type: ignore[attr-defined]
        return bos_token is None or not text.startswith(bos_token)

    def _adds_bos_token(self, text: str) -> bool:
        """Whether the tokenizer is to add a beginning-of-sequence token, because the template wrote none."""
        tokenizer = self.processor.tokenizer
        if tokenizer.bos_token is None or not self._lacks_bos_token(text):
            return False
        return tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def _truncate(self, batch: dict[str, Any], names: list[str]) -> None:
        limit = self.max_row_length
        for name, ids, mask in zip(names, batch["input_ids"], batch["attention_mask"], strict=True):
            is_image = ids == self.image_token_id
            if is_image[limit:].any():
                raise ValueError(
                    f"{name} has {mask.sum()} tokens, {is_image.sum()} of them image placeholders that end at token "
                    f"{is_image.nonzero().max() + 1}: its images do not fit max_length {limit}"
                )
        is_label = batch["labels"] != -100
        for row in (is_label.any(1) & ~is_label[:, :limit].any(1)).nonzero().flatten().tolist():
            length = int(batch["attention_mask"][row].sum())
            logger.warning(f"{names[row]} has {length} tokens: max_length {limit} cuts off all that is scored of it")
        for key in ("input_ids", "attention_mask", "labels"):
            batch[key] = batch[key][:, :limit]

    def _collate_language_modeling(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "messages" not in examples[0]:
            return super()._collate_language_modeling(examples)
        texts, spans = zip(*(example["rendered"] for example in examples), strict=True)
        images = [example["images"] for example in examples]
        batch = self.processor(
            images=images if any(images) else None,
            text=list(texts),
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            # The published templates lack a beginning-of-sequence token, so the tokenizer has to add it
            add_special_tokens=self._lacks_bos_token(texts[0]),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_tensors=self.return_tensors,
        )
        offsets = batch.pop("offset_mapping").numpy()  # (B, T, 2), in characters of the expanded text
        replacements = batch.pop("text_replacement_offsets") or [[]] * len(texts)
        is_label = np.zeros(offsets.shape[:2], dtype=bool)
        for row, row_spans in enumerate(spans):
            for span in row_spans:
                start, end = (_expanded(place, replacements[row]) for place in span)
                is_label[row] |= (offsets[row, :, 0] < end) & (offsets[row, :, 1] > start)
        if not self.assistant_turns_only:
            is_label = batch["attention_mask"].numpy().astype(bool)
        batch["labels"] = batch["input_ids"].masked_fill(~torch.from_numpy(is_label), -100)
        return batch

    def _render(self, example: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the spans (start, end) in characters of what the assistant says in it."""
        messages = prepare_multimodal_messages(example["messages"], images=example["images"])
        variables = {**self.processor.tokenizer.special_tokens_map, **_template_variables(example)}
        variables["chat_template"] = self.training_template
        if has_generation_markers(self.training_template):
            rendered: Any = render_jinja_template([messages], return_assistant_tokens_mask=True, **variables)
            texts, turns = rendered
            return texts[0], turns[0]

        def render(messages: list[dict[str, Any]], **kwargs) -> str:
            return render_jinja_template([messages], **kwargs, **variables)[0][0]

        text = render(messages)
        spans: list[tuple[int, int]] = []
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                before = render(messages[:turn], add_generation_prompt=True)
                through = render(messages[: turn + 1])
                if not (through.startswith(before) and text.startswith(through)):
                    raise ValueError(
                        "the chat template renders a turn differently when others follow it, so that what the "
                        "assistant says cannot be told from the rest: mark it with {% generation %} in the template"
                    )
                spans.append((len(before), len(through)))
        return text, spans


@dataclass
class OtherCollator:
    """Another collator, which gets images that are open, as those of TRL and of users expect, not files.

    Its batches lose the labels of image placeholders: TRL's own masks nothing but padding.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    image_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator([_with_open_images(example) for example in examples])
        if "labels" in batch and "input_ids" in batch:
            batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == self.image_token_id, -100)
        return batch


def _with_open_images(example: dict[str, Any]) -> dict[str, Any]:
    """The example with images where `datasets` left files, as [`load_conversations`] makes it do."""
    opened = {}
    for name, value in example.items():
        images = value if isinstance(value, list) else [value]
        if images and all(isinstance(image, dict) and image.keys() == {"bytes", "path"} for image in images):
            found = open_images({**example, "images": images})
            opened[name] = found if isinstance(value, list) else found[0]
    return {**example, **opened} if opened else example


def _template_variables(example: dict[str, Any]) -> dict[str, Any]:
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    # Arrow fills up what other rows have with None
    given = {name: value for name, value in (example.get("chat_template_kwargs") or {}).items() if value is not None}
    return {"tools": tools or None, **given}


def _expanded(place: int, replacements: list[dict[str, Any]]) -> int:
    """Where a place in a text lies after the images before it were replaced with their placeholders."""
    return place + sum(
        len(replaced["replacement"]) - len(replaced["text"])
        for replaced in replacements
        if replaced["span"][1] <= place
    )


def _numbered_by_worker(example: dict[str, Any]) -> dict[str, Any]:
    """An example of a stream with the worker in its number: each of several workers counts its own share."""
    worker: Any = torch.utils.data.get_worker_info()
    is_share = worker and worker.num_workers > 1 and isinstance(worker.dataset, torch.utils.data.IterableDataset)
    if not is_share or "sample_index" not in example:
        return example
    return {**example, "sample_index": f"{example['sample_index']} of worker {worker.id}"}


def _sample_name(example: dict[str, Any]) -> str:
    name = f"sample {example['sample_index']}" if "sample_index" in example else "a sample"
    return f"{name} (id {example['id']})" if example.get("id") is not None else name
