"""What the LLM reads before it sees: conversations with words where their images will stand."""

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..processing import patch_grid
from .collator import VWLmmDataCollator


# More than two, and none of them about a thing: what is always probable must not fill the top three of every patch
BACKGROUND = ("background", "blank", "empty", "space")
# Positions of an image that are labels. Some are enough to learn from, and the head is the dearest part of a step
LABELS = 8
# Words that name nothing
STOP_WORDS = frozenset(
    "a about after all also an and any are as at be been but by can do does for from had has have he her his how i if "
    "in into is it its just let like made more most my no not of off on one only or other our out over picture shown "
    "she so some than that the their them then there these they this to two up very was were what when which who will "
    "with yes you your".split()
)


def words_of(messages: list[dict[str, Any]]) -> list[str]:
    """The words that the assistant says in a conversation, in order, each once: not yes, no and the like."""
    said: list[str] = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            said += [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    words = re.findall(r"[^\W\d_]{3,}", " ".join(said).lower())
    return [word for word in dict.fromkeys(words) if word not in STOP_WORDS]


def token_of(word: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token of a word within a sentence, None if it takes several."""
    # Some tokenizers put a space before a text, so that a word alone would have two
    before = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode(f"a {word}", add_special_tokens=False)
    if ids[: len(before)] != before or len(ids) != len(before) + 1 or ids[-1] == tokenizer.unk_token_id:
        return None
    return ids[-1]


def background_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of `BACKGROUND`; `ValueError` if the vocabulary has none of these words."""
    tokens = [token for word in BACKGROUND if (token := token_of(word, tokenizer)) is not None]
    if not tokens:
        raise ValueError(
            f"none of the words {', '.join(BACKGROUND)} is a token of this LLM, so that nothing can stand for the "
            "background of an image"
        )
    return tokens


def frequent_tokens(conversations: Iterable[list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the words that assistants say, the most frequent first; `ValueError` if there is none."""
    counts = Counter(word for messages in conversations for word in words_of(messages))
    tokens = [token for word, _ in counts.most_common() if (token := token_of(word, tokenizer)) is not None]
    if not tokens:
        raise ValueError("the assistant says no word that is one token of the LLM")
    return tokens


@dataclass
class ReadingCollator(VWLmmDataCollator):
    """Batches of [`VWLmmDataCollator`] with text alone: where an image was there are words.

    The words that the assistant says of an image stand at random on a rectangle of its patches, words for a background
    on the others. Some of them are labels, beside those of the answers, so that the LLM learns to expect a word where
    the next patch will be. A batch of the same rows is always the same, whichever process makes it.

    Args:
        patches (`int`): of an image, the config's `image_seq_length`.
        seed (`int`): of the rectangles and words.
    """

    patches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        processor: Any = self.processor
        self.grid = patch_grid(processor, self.patches)
        self.background = background_tokens(processor.tokenizer)

    def _collate(self, examples: list[dict[str, Any]], names: list[str]) -> dict[str, Any]:
        batch = super()._collate(examples, names)
        batch.pop("pixel_values", None)
        order = random.Random(f"{self.seed} {zlib.crc32(batch['input_ids'].numpy().tobytes())}")
        tokenizer = self.processor.tokenizer  # type: ignore[attr-defined]
        for row, example in enumerate(examples):
            tokens = [token_of(word, tokenizer) for word in words_of(example["messages"])]
            known = [token for token in tokens if token is not None]
            places = (batch["input_ids"][row] == self.image_token_id).nonzero().flatten()
            for image in places.view(-1, self.patches):
                batch["input_ids"][row, image] = torch.tensor(self._picture(known, order))
                if "is_skipped" in batch and batch["is_skipped"][row]:
                    continue
                chosen = image[order.sample(range(self.patches), min(LABELS, self.patches))]
                batch["labels"][row, chosen] = batch["input_ids"][row, chosen]
        return batch

    def _picture(self, tokens: list[int], order: random.Random) -> list[int]:
        """A token for every patch of an image, row by row."""
        (rows, columns), background = self.grid, self.background
        height, width = (order.randint(min(2, side), side) for side in self.grid)
        top, left = order.randint(0, rows - height), order.randint(0, columns - width)
        return [
            order.choice(
                tokens if tokens and top <= row < top + height and left <= column < left + width else background
            )
            for row in range(rows)
            for column in range(columns)
        ]
