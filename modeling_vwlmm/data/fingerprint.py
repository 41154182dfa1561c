"""What tells whether a data set has changed since a run was started on it."""

import os
from typing import Any

import pyarrow as pa
import xxhash
from datasets import Dataset, Image, List


SAMPLED = 256  # rows at most, evenly spaced, whose images are read


def data_fingerprint(dataset: Any) -> dict[str, Any] | None:
    """Hashes of a data set: of all that is no image, and of the images of up to 256 rows, whatever their paths.

    Returns:
        `{"rows", "values", "images": {row: hash}}`, or None for a stream, which cannot be read twice.
    """
    if not isinstance(dataset, Dataset):
        return None
    pictures = image_columns(dataset)
    images = {}
    if pictures:
        arrow: Any = dataset.with_format("arrow").select_columns(pictures)
        for row in range(0, len(dataset), -(-len(dataset) // SAMPLED)):
            images[str(row)] = _hash_of_images(arrow[row].to_pylist()[0].values())
    return {"rows": len(dataset), "values": hash_of_values(dataset), "images": images}


def hash_of_values(dataset: Dataset) -> str:
    """A hash of all of a data set that is no image."""
    values, arrow = xxhash.xxh3_128(), dataset.with_format("arrow").remove_columns(image_columns(dataset))
    for table in arrow.iter(batch_size=1000):
        for batch in table.combine_chunks().to_batches():
            values.update(pa.RecordBatch.from_arrays(batch.columns, names=batch.schema.names).serialize())
    return values.hexdigest()


def image_columns(dataset: Dataset) -> list[str]:
    """The names of the columns that hold an image or a list of them."""
    return [name for name, feature in dataset.features.items() if _is_image(feature)]


def what_changed(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs between two fingerprints, None if nothing does."""
    if before["rows"] != now["rows"]:
        return f"there were {before['rows']:,} samples, there are {now['rows']:,}"
    if before["values"] != now["values"]:
        return "the texts of its samples are others"
    rows = [row for row, found in before["images"].items() if now["images"].get(row) != found]
    return f"an image of sample {rows[0]} is another" if rows else None


def _is_image(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, List) and isinstance(feature.feature, Image))


def _hash_of_images(columns: Any) -> str:
    found = xxhash.xxh3_64()
    for column in columns:
        for image in column if isinstance(column, list) else [column]:
            if image is None:
                continue
            if image["bytes"] is not None:
                found.update(image["bytes"])
            elif os.path.isfile(image["path"]):  # one that is missing is refused where it is opened
                with open(image["path"], "rb") as file:
                    found.update(file.read())
    return found.hexdigest()
