"""Batches of conversations with images."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from .data import open_images
from .processing import IMAGE_PARTS


@dataclass
class VWLmmDataCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator for images and text, of which it takes every format, with four differences.

    - With `assistant_only_loss` (the default here), the labels of `messages` are what the assistant says and the
      token that ends its turn, for any chat template, with or without generation markers.
    - Rows longer than `max_length` lose text at their end, but never part of an image: that is an error.
    - Image placeholders are no labels, and a batch without any label is an error.
    - Images may still be paths; one that cannot be read is named with its sample.
    """

    assistant_only_loss: bool = True

    def __post_init__(self):
        self.image_token_id = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        # TRL truncates blindly and wants generation markers, so it must not know
        self.max_row_length, self.max_length = self.max_length, None
        self.assistant_turns_only, self.assistant_only_loss = self.assistant_only_loss, False
        template = self.chat_template or self.processor.chat_template
        self.training_template = template["default"] if isinstance(template, dict) else template
        if template is not None and not has_generation_markers(template):
            # TRL knows the templates of many LLMs, and has versions of them with markers
            tokenizer = copy.copy(self.processor.tokenizer)
            tokenizer.chat_template = self.training_template.removeprefix(IMAGE_PARTS)
            try:
                marked = get_training_chat_template(tokenizer) or tokenizer.chat_template
            except ValueError:
                marked = tokenizer.chat_template
            self.training_template = self.training_template.replace(tokenizer.chat_template, marked)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        names = [_sample_name(example) for example in examples]
        examples = [_with_images(example) for example in examples]
        batch = super().torch_call(examples)
        batch["labels"][batch["input_ids"] == self.image_token_id] = -100
        if self.max_row_length is not None:
            self._truncate(batch, names)
        if not (batch["labels"][:, 1:] != -100).any():
            raise ValueError(f"no token of the batch is a label, nothing can be learnt from: {', '.join(names)}")
        return batch

    def _truncate(self, batch, names):
        limit = self.max_row_length
        for name, ids, mask in zip(names, batch["input_ids"], batch["attention_mask"], strict=True):
            is_image = ids == self.image_token_id
            if is_image[limit:].any():
                raise ValueError(
                    f"{name} has {mask.sum()} tokens, {is_image.sum()} of them image placeholders that end at token "
                    f"{is_image.nonzero().max() + 1}: its images do not fit max_length {limit}"
                )
        for key in ("input_ids", "attention_mask", "labels"):
            batch[key] = batch[key][:, :limit]

    def _collate_language_modeling(self, examples):
        if "messages" not in examples[0] or not self.assistant_turns_only:
            return super()._collate_language_modeling(examples)
        texts, spans = zip(*(self._render(example) for example in examples), strict=True)
        images = [example["images"] for example in examples]
        bos_token = self.processor.tokenizer.bos_token
        batch = self.processor(
            images=images if any(images) else None,
            text=list(texts),
            padding=True,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
            # Published templates leave the beginning-of-sequence token to the tokenizer
            add_special_tokens=bos_token is None or not texts[0].startswith(bos_token),
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            return_tensors=self.return_tensors,
        )
        offsets = batch.pop("offset_mapping").numpy()  # (B, T, 2), in characters of the expanded text
        replacements = batch.pop("text_replacement_offsets") or [[]] * len(texts)
        is_label = np.zeros(offsets.shape[:2], dtype=bool)
        for row, row_spans in enumerate(spans):
            for start, end in row_spans:
                gained = sum(
                    len(replaced["replacement"]) - len(replaced["text"])
                    for replaced in replacements[row]
                    if replaced["span"][1] <= start
                )
                is_label[row] |= (offsets[row, :, 0] < end + gained) & (offsets[row, :, 1] > start + gained)
        batch["labels"] = batch["input_ids"].masked_fill(~torch.from_numpy(is_label), -100)
        return batch

    def _render(self, example):
        """The text of a conversation, and the spans (start, end) in characters of what the assistant says in it."""
        messages = prepare_multimodal_messages(example["messages"], images=example["images"])
        variables = {"chat_template": self.training_template, **self.processor.tokenizer.special_tokens_map}
        if has_generation_markers(self.training_template):
            texts, spans = render_jinja_template([messages], return_assistant_tokens_mask=True, **variables)
            return texts[0], spans[0]

        def render(messages, **kwargs):
            return render_jinja_template([messages], **kwargs, **variables)[0][0]

        text, spans = render(messages), []
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


def _with_images(example):
    example = dict(example)
    if "image" in example:
        example["images"] = [example.pop("image")]
    return {**example, "images": open_images(example)}


def _sample_name(example):
    name = f"sample {example['sample_index']}" if "sample_index" in example else "a sample"
    return f"{name} (id {example['id']})" if example.get("id") is not None else name
