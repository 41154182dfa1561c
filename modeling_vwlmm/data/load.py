"""Data sets by the names that recipes give them, made ready for a trainer."""

import copy
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    LargeList,
    List,
    Value,
    config,
    load_from_disk,
)
from datasets import load_dataset as load_files
from huggingface_hub import constants

from ..files import reading
from .conversations import load_conversations
from .easy_vqa import easy_vqa
from .paths import check_paths, check_row


SHARDS = 64  # of a stream of Arrow, which the workers of a loader share
_STATE = config.DATASET_STATE_JSON_FILENAME


def load_dataset(
    name: str,
    image_folder: str | os.PathLike | None = None,
    split: str = "train",
    streaming: bool = False,
    **options: Any,
) -> Any:
    """Load the dataset that a recipe names.

    Args:
        name: one of `easy-vqa/TASK`, a data file of LLaVA's (.json, .jsonl), a folder of `save_to_disk` or of files
            that `datasets` reads (parquet for example), or a repository.
        image_folder: the folder of the images, for a data file, or for a folder that holds their paths alone.
        split: the part of the data set that is loaded. A data file has none.
        streaming: whether to return an `IterableDataset`, of whose rows none is read before it is needed. What is on
            this machine as Arrow already is checked as a whole before.
        options: more arguments of `datasets.load_dataset`, for files that it reads.

    Returns:
        A `Dataset`, or an `IterableDataset` if it is to be streamed.

    Raises:
        ValueError: the name needs a package, an image folder or a split that is missing, or rows name images of other
            places.
    """
    if not name.strip():
        raise ValueError("the name of the dataset is empty, expected a file, a folder or a repository")
    is_saved = any(Path(name, marker).is_file() for marker in (config.DATASETDICT_JSON_FILENAME, _STATE))
    is_ours = name.startswith("easy-vqa/") or name.endswith((".json", ".jsonl"))
    if options and (is_saved or is_ours):
        raise ValueError(f"dataset {name} takes no {' and no '.join(options)}")
    if not (is_saved or is_ours):
        return _load_files(name, image_folder, split, streaming, options)
    if is_saved:
        dataset = _load_saved(name, image_folder, split)
    elif name.startswith("easy-vqa/"):
        try:
            dataset = easy_vqa(split, name.removeprefix("easy-vqa/"))
        except ImportError as error:
            raise ValueError(f"dataset {name} needs the package easy-vqa: pip install easy-vqa") from error
    else:
        if image_folder is None:
            raise ValueError(f"dataset {name} is a data file, so image_folder must say where its images are")
        dataset = load_conversations(name, image_folder)
    return dataset.to_iterable_dataset(num_shards=min(SHARDS, len(dataset))) if streaming and len(dataset) else dataset


def _load_saved(name: str, image_folder: str | os.PathLike | None, split: str) -> Dataset:
    with reading(f"dataset {name}"):
        dataset = load_from_disk(name)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f'dataset {name} has no split "{split}", but {", ".join(dataset)}')
        dataset = dataset[split]
    check_paths(dataset, name, _folders_of(name, image_folder))
    return dataset


def _load_files(
    name: str, image_folder: str | os.PathLike | None, split: str, streaming: bool, options: dict[str, Any]
) -> Any:
    folders = _folders_of(name, image_folder)
    with reading(f"dataset {name}"):
        dataset = load_files(name, split=split, streaming=streaming, **options)
        if isinstance(dataset, Dataset):
            check_paths(dataset, name, folders)
            return dataset
        dataset = closed(dataset._resolve_features())
    return dataset.map(
        functools.partial(check_row, name=name, folders=folders), with_indices=True, features=dataset.features
    )


def _folders_of(name: str, image_folder: str | os.PathLike | None) -> list[str | os.PathLike]:
    """Where the images of a data set may be."""
    if not Path(name).is_dir():
        return [config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    return [name, *([image_folder] if image_folder is not None else [])]


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The names of the columns of a dataset or a stream, as its rows have them; `ValueError` if it is empty."""
    if dataset.column_names is not None and not _has_transform(dataset):
        return dataset.column_names
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset is empty")
    return list(first)


def number_samples(dataset: Any) -> Any:
    """A dataset with a column `sample_index` for error messages, and a column of images if it holds only texts.

    Nothing of it is copied. Where a row stands several times, `sample_index` is the first of its places.

    Args:
        dataset: a `Dataset`, an `IterableDataset` or a dict of these by name. Anything else is returned as it is.
    """
    if isinstance(dataset, dict):
        return {name: number_samples(part) for name, part in dataset.items()}
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("the dataset is empty")
    columns = columns_of(dataset)
    if _has_transform(dataset):  # which makes the rows of what it knows, and opens images by itself
        return dataset
    if dataset.features:
        dataset = closed(dataset)
    if not {"messages", "prompt", "image", "images"} & set(columns) or "sample_index" in columns:
        return dataset
    return numbered(dataset, without_images=not {"image", "images"} & set(columns))


def numbered(dataset: Any, without_images: bool, name: str | None = None) -> Any:
    """A dataset or stream with `sample_index`, in text with the name if one is given, and with empty `images`."""
    if isinstance(dataset, Dataset):
        return _numbered(dataset, without_images, name)
    features = None
    if dataset.features:
        added = {"images": List(Image(decode=False))} if without_images else {}
        features = Features({**dataset.features, **added, "sample_index": Value("string" if name else "int64")})
    # A lambda could not be sent to workers
    number = functools.partial(_number, without_images=without_images, name=name)
    return dataset.map(number, with_indices=True, features=features)


def _has_transform(dataset: Dataset | IterableDataset) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def closed(dataset: Any) -> Any:
    """The dataset with files for images: the collator opens them, because the errors of `datasets` name no sample."""
    features = {name: _closed(feature) for name, feature in dataset.features.items()}
    if features == dict(dataset.features):
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.cast(Features(features))
    # `cast_column` would write all of a column of lists anew, though only what is said about it changes
    dataset = copy.deepcopy(dataset)  # of its description: the data is shared
    dataset.info.features = Features(features)
    return dataset


def _closed(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_closed(feature.feature))
    if isinstance(feature, dict):
        return {name: _closed(part) for name, part in feature.items()}
    return feature


def _numbered(dataset: Dataset, without_images: bool, name: str | None) -> Dataset:
    numbers: Any = np.arange(len(dataset))
    order = dataset._indices
    if order is not None:
        # `add_column` would write a dataset that was shuffled or selected anew, so the columns go below its order
        places = order.column(0).to_numpy()
        numbers = np.zeros(dataset.data.num_rows, dtype=np.int64)
        numbers[places[::-1]] = np.arange(len(dataset))[::-1]
        dataset = Dataset(dataset.data, info=dataset.info, split=dataset.split)
    if without_images:
        dataset = dataset.add_column("images", [[] for _ in numbers], feature=List(Image(decode=False)))
    dataset = dataset.add_column("sample_index", [f"{i} of {name}" for i in numbers] if name else numbers)
    return Dataset(dataset.data, info=dataset.info, split=dataset.split, indices_table=order)


def _number(example: dict[str, Any], index: int, without_images: bool, name: str | None) -> dict[str, Any]:
    added: dict[str, Any] = {"images": []} if without_images else {}
    return {**example, **added, "sample_index": f"{index} of {name}" if name else index}
