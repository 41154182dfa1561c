"""Data sets as a recipe names them, with what a trainer needs of them."""

from pathlib import Path

from datasets import Dataset, DatasetDict, Image, List, load_from_disk
from datasets import load_dataset as load_from_hub

from .conversations import load_conversations
from .easy_vqa import easy_vqa


def load_dataset(name, image_folder=None, split="train"):
    """The dataset that a recipe names, see [`TrainArguments`]."""
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


def columns_of(dataset):
    """Names of the columns of a dataset or a stream."""
    if dataset.column_names is not None:
        return dataset.column_names
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset is empty")
    return list(first)


def number_samples(dataset):
    """The dataset with a column `sample_index` for error messages, and a column of images if it holds only texts."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {name: number_samples(part) for name, part in dataset.items()}
    columns = columns_of(dataset)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("the dataset is empty")
    for column, feature in (dataset.features or {}).items():
        # datasets' own decoding names no sample in its errors
        if feature in (Image(), List(Image())):
            undecoded = Image(decode=False)
            dataset = dataset.cast_column(column, undecoded if feature == Image() else List(undecoded))
    if not {"messages", "prompt", "image", "images"} & set(columns) or "sample_index" in columns:
        return dataset
    without_images = not {"image", "images"} & set(columns)
    if isinstance(dataset, Dataset):
        if without_images:
            dataset = dataset.add_column("images", [[] for _ in range(len(dataset))])
        return dataset.add_column("sample_index", list(range(len(dataset))))
    added = {"images": []} if without_images else {}
    return dataset.map(lambda example, index: {**example, **added, "sample_index": index}, with_indices=True)
