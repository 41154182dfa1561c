"""The files that a data set of others names: none but those below a folder that its user has named."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset


# Fields of rows and of messages that may hold the path of an image
_HOLD_PATHS = {"image", "images", "path", "url"}


def check_paths(dataset: Dataset, name: str, folders: Sequence[str | os.PathLike]) -> None:
    """`ValueError` if a data set of paths names a file outside of these folders, which training would read."""
    for column in dataset.data.column_names:
        _check(_paths_in(dataset.data.column(column), column), f"{name}: column {column}", folders)


def check_row(row: dict[str, Any], index: int, name: str, folders: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """The row of a stream as it is; `ValueError` as of [`check_paths`]."""
    for column, value in row.items():
        _check(_paths_in_value(value, column), f"{name}: sample {index}: column {column}", folders)
    return row


def _check(paths: Iterator[str], where: str, folders: Sequence[str | os.PathLike]) -> None:
    roots = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    for path in paths:
        if path.startswith(("http://", "https://", "data:")):
            continue
        if not os.path.realpath(os.path.expanduser(path)).startswith(roots):
            raise ValueError(
                f"{where}: found the image {path}, which leads out of {folders[0]}: name the folder of its images as "
                "image_folder"
            )


def _paths_in_value(value: Any, name: str) -> Iterator[str]:
    """As `_paths_in`, of what a row holds under a name."""
    if isinstance(value, list):
        for item in value:
            yield from _paths_in_value(item, name)
    elif isinstance(value, dict):
        if value.keys() == {"bytes", "path"}:
            value = {} if value["bytes"] is not None else {"path": value["path"]}
        for part, item in value.items():
            yield from _paths_in_value(item, part)
    elif name in _HOLD_PATHS and isinstance(value, str) and value:
        yield value


def _paths_in(values: Any, name: str) -> Iterator[str]:
    """The paths in an Arrow array of images, of texts under one of the names, or of lists and structs of these."""
    if isinstance(values, pa.ChunkedArray):
        for chunk in values.chunks:
            yield from _paths_in(chunk, name)
        return
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _paths_in(values.flatten(), name)
    elif pa.types.is_struct(kind):
        names = [kind.field(i).name for i in range(kind.num_fields)]
        if set(names) == {"bytes", "path"}:  # an image: with bytes, its path is a mere name
            values = values.filter(values.field("bytes").is_null())
            names = ["path"]
        for part in names:
            yield from _paths_in(values.field(part), part)
    elif name in _HOLD_PATHS and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        yield from (path for path in values.to_pylist() if path)
