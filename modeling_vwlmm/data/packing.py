"""Rows without padding: samples that lie one after another, and which of them share a row."""

from collections import defaultdict
from typing import Any

import numpy as np
from datasets import Dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def lay_out(batch: dict[str, Any], pad_token_id: int, pad_to_multiple_of: int | None = None) -> dict[str, Any]:
    """The rows of a padded batch as one, (1, total), as TRL lays out texts.

    Positions start anew at each sample, whose first token is no label. There is no attention mask: transformers tells
    samples apart by their positions, and flash-attention by `cu_seq_lens_q` and its like, which are there too.

    Args:
        batch: of `input_ids`, `attention_mask` and `labels`, (B, T), and what else there is, which stays as it is.
        pad_token_id, pad_to_multiple_of: of what fills up the row, if it is to have a multiple of so many tokens.
    """
    fields = ("input_ids", "labels")
    masks = batch["attention_mask"].bool()
    rows = [{field: batch[field][i, mask].tolist() for field in fields} for i, mask in enumerate(masks)]
    collator = DataCollatorForLanguageModeling(pad_token_id, padding_free=True, pad_to_multiple_of=pad_to_multiple_of)
    return {**{name: value for name, value in batch.items() if name != "attention_mask"}, **collator(rows)}


def best_fit(lengths: np.ndarray, max_length: int, seed: int) -> list[list[int]]:
    """Which samples share a row: the longest first, each in the fullest row that it fits into.

    Args:
        lengths: of the samples, in tokens. A longer one than `max_length` counts as one of that length.
        max_length: of a row.
        seed: of the order of samples that are equally long.

    Returns:
        The numbers of the samples of each row, every sample once.
    """
    lengths = np.minimum(lengths, max_length)
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    rows_with: dict[int, list[list[int]]] = defaultdict(list)  # so much space left
    spaces = 0  # the keys of the above as bits of one number, of which the lowest is found at once
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces ^= 1 << space
        else:
            space, row = max_length, []
            rows.append(row)
        row.append(sample)
        if left := space - length:
            rows_with[left].append(row)
            spaces |= 1 << left
    return rows


class PackedRows:
    """A dataset whose items are the samples of a row, a list of them for each list of their numbers."""

    def __init__(self, dataset: Dataset, rows: list[list[int]]):
        self.dataset, self.rows = dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return self.dataset.__getitems__(self.rows[index])
