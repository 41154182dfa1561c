"""Tables that took long to make, kept in the cache of `datasets` for the next start."""

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from datasets import (
    ArrowBasedBuilder,
    Dataset,
    DatasetInfo,
    Features,
    SplitGenerator,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.exceptions import DatasetGenerationError


class KeptTables(ArrowBasedBuilder):
    """Writes the tables of a function to the cache, from where they are mapped into memory as they are read.

    Args:
        make: yields the tables. It is called if the cache has none under this key.
        features: the columns of the tables.
        key: stands for all that the tables depend on.
    """

    def __init__(self, make: Callable[[], Iterator[pa.Table]], features: Features, key: str):
        self.make, self.columns, self.is_new = make, features, False
        own: Any = {"dataset_name": "vwlmm_conversations", "config_id": key}
        try:
            super().__init__(**own)
        except Exception:  # what describes the tables is damaged
            shutil.rmtree(self.cache_dir)
            super().__init__(**own)

    def _info(self) -> DatasetInfo:
        return DatasetInfo(features=self.columns)

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        return [SplitGenerator(name="train", gen_kwargs={})]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:  # type: ignore[override]
        self.is_new = True
        yield from enumerate(self.make())

    def load(self, anew: bool = False) -> Dataset:
        """The tables as a `Dataset`; whatever `make` raises. `is_new` says whether they were made for it.

        Args:
            anew: whether they are made even if the cache has some, as those are that cannot be read.
        """
        try:
            with bars_on_terminals():
                self.download_and_prepare(download_mode="force_redownload" if anew else None)
        except DatasetGenerationError as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and cause.filename is None:  # no space is left
                cause.filename = self.cache_dir
            raise cause from None
        try:
            return self.as_dataset("train")  # type: ignore[return-value]
        except (pa.ArrowException, OSError):
            if self.is_new:
                raise
            return self.load(anew=True)


@contextlib.contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Hide the progress bars of `datasets` where nobody watches them."""
    hides = not (sys.stderr.isatty() or are_progress_bars_disabled())
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()
