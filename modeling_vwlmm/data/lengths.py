"""How many tokens the samples of a data set have, counted once."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import transformers
import trl
import xxhash
from datasets import Dataset, Features, Value, config

from ..files import hash_of
from .collator import VWLmmDataCollator
from .fingerprint import hash_of_values, image_columns


FOLDER = "vwlmm-lengths"  # in datasets' cache


def token_counts(dataset: Dataset, collator: VWLmmDataCollator, num_proc: int | None = None) -> np.ndarray:
    """The length of each sample's row, image placeholders included, before `max_length` cuts it.

    They are kept in the cache of `datasets`, under a hash of the texts, the number of their images, the tokenizer, the
    chat template and the code that makes the rows.

    Args:
        dataset: as the trainer has it.
        collator: of the trainer.
        num_proc: the number of processes that count.

    Raises:
        ValueError: a sample does not fit its images, or the dataset has a transform.
    """
    if dataset.format["type"] == "custom":
        raise ValueError("the dataset has a transform, whose samples are not the same each time they are read")
    # Images are counted where they lie: they may be most of the data
    pictures = sorted({"image", "images"} & set(image_columns(dataset)))[:1]
    images = np.concatenate([np.zeros(0, dtype=np.int64), *map(_images_of, _tables(dataset, pictures))])
    key = _key(dataset, images, collator)
    path = Path(config.HF_DATASETS_CACHE) / FOLDER / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = dataset.remove_columns(image_columns(dataset))
    count = functools.partial(
        texts.map,
        functools.partial(_count, images=images if pictures else None, collator=collator),
        with_indices=True,
        remove_columns=texts.column_names,
        features=Features({"length": Value("int32")}),
        cache_file_name=str(path),
        new_fingerprint=key,
        num_proc=num_proc,
        desc="Counting tokens",
    )
    try:
        counted = count()
    except (pa.ArrowException, OSError):  # what was kept is damaged
        counted = count(load_from_cache_file=False)
    return np.asarray(counted.with_format("numpy")["length"])


def _count(
    example: dict[str, Any], index: int, images: np.ndarray | None, collator: VWLmmDataCollator
) -> dict[str, int]:
    if images is not None:
        example = {**example, "images": [{"bytes": None, "path": ""}] * int(images[index])}
    return {"length": collator.token_count(example)}


def _tables(dataset: Dataset, columns: list[str]) -> Any:
    return dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000) if columns else []


def _images_of(table: pa.Table) -> np.ndarray:
    """The number of images of each row of a table of one column, of images or of lists of them."""
    column = table.column(0).combine_chunks()
    if not pa.types.is_struct(column.type):
        parents = pc.filter(pc.list_parent_indices(column), pc.is_valid(pc.list_flatten(column)))
        return np.bincount(parents.to_numpy(), minlength=len(column))
    return column.is_valid().to_numpy(zero_copy_only=False).astype(np.int64)


def _key(dataset: Dataset, images: np.ndarray, collator: VWLmmDataCollator) -> str:
    tokenizer: Any = collator.processor.tokenizer  # type: ignore[attr-defined]
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    for state in ("truncation", "padding"):  # of the call before
        backend.pop(state, None)
    settings = [
        hash_of_values(dataset),
        images.tobytes().hex(),
        backend,
        tokenizer.special_tokens_map,
        collator.chat_template or collator.processor.chat_template,  # type: ignore[attr-defined]
        collator.dataset_text_field,
        collator.patches_of_an_image,
        transformers.__version__,
        trl.__version__,
        [hash_of(Path(__file__).with_name(name)) for name in ("collator.py", "message_images.py")],
    ]
    return xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
