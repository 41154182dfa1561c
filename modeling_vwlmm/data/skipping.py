"""What a run that goes on in a stream does with the batches before its checkpoint: nothing."""

from collections.abc import Callable
from typing import Any

import torch


class SkippingCollator:
    """A collator that leaves the first batches of a loader empty, so that no image of theirs is opened.

    Whoever skips these batches still counts them. Workers take turns, but for one that has no more rows: the batches
    of the others then come earlier than their turn says, so that a few too many are made, and never one too few.

    Args:
        collator: makes the other batches.
        count: how many are skipped, over all workers.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], count: int):
        self.collator, self.count, self.seen = collator, count, 0

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        worker = torch.utils.data.get_worker_info()
        turn = self.seen if worker is None else self.seen * worker.num_workers + worker.id
        self.seen += 1
        return {} if turn < self.count else self.collator(examples)
