"""What a batch is made of: the collator of a run, and which samples share a batch or a row."""

import functools
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..configuration_vwlmm import VWLmmConfig
from ..data.collator import VWLmmDataCollator
from ..data.lengths import token_counts
from ..data.packing import PackedRows, best_fit
from ..data.reading import ReadingCollator
from ..files import describe
from .sft_config import VWLmmSFTConfig


logger = logging.get_logger(__name__)

BY_LENGTH = "group_by_length"


def collator_of(args: VWLmmSFTConfig, processor: Any, columns: list[str], config: VWLmmConfig) -> VWLmmDataCollator:
    """The collator of a run whose data have these columns, images among them.

    Raises:
        ValueError: the vocabulary lacks the `pad_token`, or the columns are not what the stage takes.
    """
    tokenizer = processor.tokenizer
    if args.pad_token is not None and args.pad_token not in tokenizer.get_vocab():
        raise ValueError(
            f'pad_token is "{args.pad_token}", expected a token of the vocabulary of {type(processor).__name__}'
        )
    tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    kind: Any = VWLmmDataCollator
    own: dict[str, int] = {}
    if args.stage == "read":
        if "messages" not in columns:
            raise ValueError(f'stage "read" takes conversations, a column messages: found {", ".join(columns)}')
        kind, own = ReadingCollator, {"patches": config.image_seq_length, "seed": args.seed}
    return kind(
        **own,
        processor=processor,
        max_length=args.max_length,
        completion_only_loss="prompt" in columns and args.completion_only_loss is not False,
        pad_to_multiple_of=args.pad_to_multiple_of,
        dataset_text_field=args.dataset_text_field,
        assistant_only_loss=args.assistant_only_loss,
        skip_broken_images=args.skip_broken_images,
        padding_free=args.packing or args.padding_free,
    )


def check_batches(args: VWLmmSFTConfig, dataset: Any, collator: Any, peft_config: Any) -> None:
    """`ValueError` if samples with images cannot be grouped, packed or laid out as `args` say."""
    by_length = args.train_sampling_strategy in (BY_LENGTH, "batch_rebalance")
    if by_length and isinstance(dataset, IterableDataset):  # transformers would leave it out without a word
        raise ValueError(
            f"train_sampling_strategy is {args.train_sampling_strategy}, which chooses among all samples, and a "
            "stream does not have them: use padding_free"
        )
    makes_own = args.packing or args.padding_free
    if not (makes_own or getattr(collator, "padding_free", False)):
        return
    name = "packing" if args.packing else "padding_free"
    if makes_own and collator is not None:
        raise ValueError(f"{name} makes its own batches: leave out data_collator, or {name}")
    if getattr(peft_config, "is_prompt_learning", False):
        raise ValueError(
            f"{peft_config.peft_type.value} puts tokens before a row, but {name} has several samples in one: leave it "
            "out"
        )
    if not args.packing:
        return
    if isinstance(dataset, IterableDataset):
        raise ValueError("packing chooses among all samples, which a stream does not have: use padding_free")
    if args.packing_strategy != "bfd":
        raise ValueError(f'packing_strategy is "{args.packing_strategy}", which cuts samples: expected "bfd"')
    if args.eval_packing:
        raise ValueError("eval_packing is for texts: samples with images are evaluated without padding instead")
    if by_length:
        raise ValueError(
            f"train_sampling_strategy is {args.train_sampling_strategy}, but packed rows are about equally long: "
            "leave it out"
        )


class PackedBatches(Trainer):
    """A [`~transformers.Trainer`] that knows how many tokens the samples of a [`VWLmmDataCollator`] have.

    With `packs_rows`, samples share rows of `args.max_length` tokens, the same throughout a run and when it goes on.
    Which row comes when is shuffled as samples are otherwise.
    """

    packs_rows = False
    args: VWLmmSFTConfig
    _by_length: "_GroupedByLength | None" = None

    @functools.cached_property
    def token_counts(self) -> np.ndarray:
        """The tokens of each sample of the training data, as its row has them: no more than `max_length`."""
        collator: Any = self.data_collator
        with self.args.main_process_first(desc="counting tokens"):
            counts = token_counts(self.train_dataset, collator, self.args.dataset_num_proc)
        limit = self.args.max_length
        if limit is not None and (too_long := int((counts > limit).sum())):
            logger.warning(
                f"{too_long:,} of {len(counts):,} samples have more than max_length {limit} tokens, and lose text at "
                f"their end: the longest is sample {int(counts.argmax())} with {int(counts.max()):,}"
            )
            counts = np.minimum(counts, limit)
        return counts

    @functools.cached_property
    def packed_rows(self) -> list[list[int]]:
        """The numbers of the samples that share a row, a list for each row."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return best_fit(self.token_counts, self.args.max_length, seed)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        dataset = self.train_dataset
        if self.packs_rows:
            self.train_dataset = PackedRows(self._remove_unused_columns(dataset), self.packed_rows)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = dataset

    def _groups_by_length(self, dataset: Any) -> bool:
        is_ours = isinstance(self.data_collator, VWLmmDataCollator) and isinstance(dataset, Dataset)
        return is_ours and self.args.train_sampling_strategy == BY_LENGTH

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset
        if not self._groups_by_length(dataset):
            return super()._get_train_sampler(train_dataset)
        name = self.args.length_column_name
        lengths = list(dataset[name]) if name in dataset.column_names else self.token_counts.tolist()
        if wrong := [length for length in lengths if not isinstance(length, int)][:1]:
            raise ValueError(f"column {name}: found {describe(wrong[0])}, expected the tokens of each sample")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        self._by_length = _GroupedByLength(batch_size, lengths, seed)
        return self._by_length

    def _run_epoch(self, **kwargs) -> None:  # type: ignore[override]  # passes on what transformers names
        # On several processes, accelerate does not reach the sampler of an epoch that goes on from its middle
        if self._by_length is not None:
            self._by_length.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # Groups would change the order of predictions
        return None if self._groups_by_length(eval_dataset) else super()._get_eval_sampler(eval_dataset)


class _GroupedByLength(LengthGroupedSampler):
    """transformers' sampler with an order that depends on the seed and the epoch alone, so that runs can go on."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
