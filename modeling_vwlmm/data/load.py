"""Data sets by the names that recipes give them, made ready for a trainer."""

import copy
import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, LargeList, List, config, load_from_disk
from datasets import load_dataset as load_from_hub
from huggingface_hub import constants

from .conversations import load_conversations
from .easy_vqa import easy_vqa
from .paths import check_paths


def load_dataset(name: str, image_folder: str | os.PathLike | None = None, split: str = "train") -> Dataset:
    """Load the dataset that a recipe names.

    Args:
        name: one of `easy-vqa/TASK`, a data file of LLaVA's (.json, .jsonl), a folder of `save_to_disk`, or a
            repository.
        image_folder: the folder of the images, for a data file, or for a folder that holds their paths alone.
        split: the part of the data set that is loaded. A data file has none.

    Raises:
        ValueError: the name needs a package, an image folder or a split that is missing, or rows name images of other
            places.
    """
    if name.startswith("easy-vqa/"):
        try:
            return easy_vqa(split, name.removeprefix("easy-vqa/"))
        except ImportError as error:
            raise ValueError(f"dataset {name} needs the package easy-vqa: pip install easy-vqa") from error
    if name.endswith((".json", ".jsonl")):
        if image_folder is None:
            raise ValueError(f"dataset {name} is a data file, so image_folder must say where its images are")
        return load_conversations(name, image_folder)

    if Path(name).is_dir():
        dataset = load_from_disk(name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f'dataset {name} has no split "{split}", but {", ".join(dataset)}')
            dataset = dataset[split]
        check_paths(dataset, name, [name, *([image_folder] if image_folder is not None else [])])
        return dataset
    dataset = load_from_hub(name, split=split)
    check_paths(dataset, name, [config.HF_CACHE_HOME, config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE])
    return dataset


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
        dataset = _with_closed_images(dataset)
    if not {"messages", "prompt", "image", "images"} & set(columns) or "sample_index" in columns:
        return dataset
    without_images = not {"image", "images"} & set(columns)
    if isinstance(dataset, Dataset):
        return _numbered(dataset, without_images)
    # A lambda could not be sent to workers
    return dataset.map(functools.partial(_number, without_images=without_images), with_indices=True)


def _has_transform(dataset: Dataset | IterableDataset) -> bool:
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


def _with_closed_images(dataset: Any) -> Any:
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


def _numbered(dataset: Dataset, without_images: bool) -> Dataset:
    numbers = np.arange(len(dataset))
    order = dataset._indices
    if order is not None:
        # `add_column` would write a dataset that was shuffled or selected anew, so the columns go below its order
        places = order.column(0).to_numpy()
        numbers = np.zeros(dataset.data.num_rows, dtype=np.int64)
        numbers[places[::-1]] = np.arange(len(dataset))[::-1]
        dataset = Dataset(dataset.data, info=dataset.info, split=dataset.split)
    if without_images:
        dataset = dataset.add_column("images", [[] for _ in range(len(numbers))])
    dataset = dataset.add_column("sample_index", numbers)
    return Dataset(dataset.data, info=dataset.info, split=dataset.split, indices_table=order)


def _number(example: dict[str, Any], index: int, without_images: bool) -> dict[str, Any]:
    added: dict[str, Any] = {"images": []} if without_images else {}
    return {**example, **added, "sample_index": index}
