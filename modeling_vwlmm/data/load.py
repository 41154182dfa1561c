"""Data sets by the names that recipes give them, made ready for a trainer."""

import os
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, IterableDataset, List, load_from_disk
from datasets import load_dataset as load_from_hub

from .conversations import load_conversations
from .easy_vqa import easy_vqa


def load_dataset(name: str, image_folder: str | os.PathLike | None = None, split: str = "train") -> Dataset:
    """Load the dataset that a recipe names.

    Args:
        name: one of `easy-vqa/TASK`, a data file of LLaVA's (.json, .jsonl), a folder of `save_to_disk`, or a
            repository.
        image_folder: the folder of the images, for a data file.
        split: the part of the data set that is loaded. A data file has none.

    Raises:
        ValueError: the name needs a package, an image folder or a split that is missing.
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
        return dataset
    return load_from_hub(name, split=split)


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """The names of the columns of a dataset or a stream; `ValueError` if it is empty."""
    if dataset.column_names is not None:
        return dataset.column_names
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset is empty")
    return list(first)


def number_samples(dataset: Any) -> Any:
    """A dataset with a column `sample_index` for error messages, and a column of images if it holds only texts.

    It may be a `Dataset`, an `IterableDataset`, a dict of these by name, or None.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: number_samples(part) for name, part in dataset.items()}
    columns = columns_of(dataset)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("the dataset is empty")
    for column, feature in (dataset.features or {}).items():
        # The collator opens the images, because the errors of `datasets` name no sample
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    if not {"messages", "prompt", "image", "images"} & set(columns) or "sample_index" in columns:
        return dataset
    without_images = not {"image", "images"} & set(columns)
    if isinstance(dataset, Dataset):
        if without_images:
            dataset = dataset.add_column("images", [[] for _ in range(len(dataset))])
        return dataset.add_column("sample_index", list(range(len(dataset))))
    added: dict[str, list] = {"images": []} if without_images else {}
    return dataset.map(lambda example, index: {**example, **added, "sample_index": index}, with_indices=True)
