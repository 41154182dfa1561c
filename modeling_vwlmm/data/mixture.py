"""Several data sets as one, in the shares that a recipe gives them, whole or as a stream."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets
from trl.data_utils import prepare_multimodal_messages

from ..arguments import MixedDataset
from ..files import describe
from .conversations import FEATURES
from .kept import bars_on_terminals
from .load import closed, load_dataset, numbered


LARGEST = 1e100  # fraction: their sum and quotients are finite
# What is read of a row, beside its `id`
_READ = ("messages", "prompt", "completion", "images", "image", "tools", "chat_template_kwargs")


def load_mixture(
    entries: Sequence[MixedDataset], streaming: bool = False, seed: int = 0, text_field: str = "text"
) -> Dataset | IterableDataset:
    """The data sets of a recipe as one.

    Whole data sets stand one after another, in the shares of their fractions as TRL's `get_dataset` cuts them: the
    first rows of each, and no row twice. Streams are interleaved: with fractions a row is drawn from each with this
    probability, and one that ends begins again until all have been read; without, they take turns until they end.

    A single data set comes as it is. The rows of several have columns of conversations, with `images` (none where a
    data set has no such column), and `sample_index` is a text with the name of the data set, for messages. Contents
    that are texts in one and lists of parts in another become lists of parts.

    Args:
        entries: where the data sets are, see [`load_dataset`], and their fractions.
        streaming: whether the rows are read as they are needed.
        seed: of the order in which streams are drawn from.
        text_field: the column of a data set of mere texts, which cannot be one of several.

    Raises:
        ValueError: fractions do not fit, or a data set has no conversations, or other columns than the others. The
            message says which.
    """
    _check_fractions(entries)
    parts = [_load(entry, streaming, text_field) for entry in entries]
    if len(parts) == 1:
        return parts[0]
    names = [entry.path for entry in entries]
    parts = _of_same_columns(parts, names)
    weights = [entry.fraction for entry in entries if entry.fraction is not None]
    if streaming:
        shares = [weight / sum(weights) for weight in weights] or None
        strategy: Any = "all_exhausted" if shares else "all_exhausted_without_replacement"
        return interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy=strategy)
    if weights:
        size = min(len(part) * sum(weights) / weight for part, weight in zip(parts, weights, strict=True))
        counts = [round(size * weight / sum(weights)) for weight in weights]
        for name, weight, count in zip(names, weights, counts, strict=True):
            if count == 0:
                raise ValueError(f"datasets: {name} has no row in a mixture of {size:.0f}: its fraction is {weight}")
        parts = [part.select(range(count)) for part, count in zip(parts, counts, strict=True)]
    return concatenate_datasets(parts)


def _check_fractions(entries: Sequence[MixedDataset]) -> None:
    given = [entry for entry in entries if entry.fraction is not None]
    for entry in given:
        if not (isinstance(entry.fraction, (int, float)) and 0 < entry.fraction < LARGEST):
            found = f"datasets: {entry.path} has the fraction {describe(entry.fraction)}"
            raise ValueError(f"{found}, expected more than 0 and less than {LARGEST:g}")
    if given and len(given) < len(entries):
        missing = next(entry.path for entry in entries if entry.fraction is None)
        raise ValueError(f"datasets: {missing} has no fraction, but {given[0].path} has: give one to all or to none")


def _load(entry: MixedDataset, streaming: bool, text_field: str) -> Any:
    options = {name: getattr(entry, name) for name in ("name", "data_dir", "data_files")}
    options = {name: value for name, value in options.items() if value is not None}
    dataset = load_dataset(entry.path, entry.image_folder, entry.split, streaming, **options)
    columns = dataset.column_names
    # No row of a whole data set is read: `datasets` would open its images, and name no sample of one that does not
    if len(dataset) == 0 if isinstance(dataset, Dataset) else next(iter(dataset), None) is None:
        raise ValueError(f"dataset {entry.path}: the dataset is empty")
    if entry.columns is not None:
        unknown = [name for name in entry.columns if name not in columns]
        if unknown:
            raise ValueError(f"dataset {entry.path} has no column {unknown[0]}, but {', '.join(columns)}")
        dataset, columns = dataset.select_columns(entry.columns), entry.columns
    if not {"messages", "prompt", "conversations", "input_ids", text_field} & set(columns):
        raise ValueError(
            f"dataset {entry.path} has the columns {', '.join(columns)}: expected messages, or prompt and completion"
        )
    return dataset


def _of_same_columns(parts: list[Any], names: list[str]) -> list[Any]:
    """The data sets with the columns that are read, `images` and `sample_index`."""
    has_ids = all("id" in part.features and part.features["id"] == Value("string") for part in parts)
    read = {*_READ, *(["id"] if has_ids else [])}
    made = []
    for part, name in zip(parts, names, strict=True):
        columns = [column for column in part.column_names if column in read]
        if not {"messages", "prompt"} & set(columns):
            found = ", ".join(part.column_names)
            raise ValueError(f"datasets: {name} has the columns {found}: expected messages, or prompt and completion")
        part = closed(part.select_columns(columns))
        made.append(numbered(part, not {"image", "images"} & set(columns), name))
    first, *others = [part.features.get("messages") for part in made]
    if any(_type(other) != _type(first) for other in others):
        made = [_in_parts(part) for part in made]
    features = made[0].features
    for part, name in zip(made, names, strict=True):
        for column in sorted(features.keys() ^ part.features.keys()):
            has, lacks = (names[0], name) if column in features else (name, names[0])
            raise ValueError(f"datasets: {has} has the column {column}, {lacks} has not: columns says which to read")
        for column, feature in part.features.items():
            if _type(feature) != _type(features[column]):
                raise ValueError(
                    f"datasets: the column {column} is {feature} in {name}, and {features[column]} in {names[0]}: "
                    "expected one type"
                )
    return made


def _type(feature: Any) -> Any:
    return None if feature is None else Features({"": feature}).arrow_schema.field(0).type


def _in_parts(dataset: Any) -> Any:
    """The data set with messages of LLaVA's type, if its own are texts, or parts that hold no images themselves."""
    message = getattr(dataset.features.get("messages"), "feature", None)
    content = message.get("content") if isinstance(message, dict) else None
    part = getattr(content, "feature", None)
    has_parts = isinstance(part, dict) and part.keys() <= {"type", "text", "index"}
    if not (content == Value("string") or has_parts):
        return dataset  # what differs is said of all columns alike
    if isinstance(dataset, IterableDataset):
        return dataset.map(_message_parts, features=Features({**dataset.features, "messages": FEATURES["messages"]}))
    # The images stay where they are: their number is all that is needed
    pictures = dataset.data.column("images" if "images" in dataset.column_names else "image")
    is_list = pa.types.is_list(pictures.type) or pa.types.is_large_list(pictures.type)
    counts = pc.fill_null(pc.list_value_length(pictures), 0) if is_list else pc.is_valid(pictures)
    texts = dataset.select_columns(["messages", "sample_index"]).add_column("count", counts.to_numpy())
    with bars_on_terminals():
        texts = texts.map(
            _message_parts,
            features=Features({"messages": FEATURES["messages"]}),
            remove_columns=["sample_index", "count"],
        )
    return concatenate_datasets([dataset.remove_columns("messages"), texts], axis=1)


def _message_parts(row: dict[str, Any]) -> dict[str, Any]:
    """The messages of a row with a part for each image and text, as TRL places images among texts."""
    images = row.get("images") or [image for image in [row.get("image")] if image is not None]
    try:
        messages = prepare_multimodal_messages(row["messages"], images=[{}] * int(row.get("count", len(images))))
    except ValueError as error:
        raise ValueError(f"sample {row['sample_index']}: {error}") from error
    made = []
    for message in messages:
        parts = [{"type": part["type"], "text": part.get("text")} for part in message.get("content") or []]
        made.append({"role": message["role"], "content": parts})
    return {"messages": made}
