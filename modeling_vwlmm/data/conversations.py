"""LLaVA's JSON files as data sets of conversations, in the form that TRL reads.

Every data set of this package has the columns
    id: string
    images: list of `{"path", "bytes"}`, any number a row. Files stay closed until `open_images`
    messages: list of `{"role", "content"}`, where a content is a list of `{"type": "image"}` and
        `{"type": "text", "text"}` parts, with one image part for each of `images`, in their order
"""

import contextlib
import gc
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from datasets import Dataset, Features, Image, List, Value

from ..files import describe, hash_of
from ..processing import IMAGE_MARKER
from .images import ImageFolder
from .kept import KeptTables
from .records import read_records


# We read images alone. A record with other media is refused: its answers are about what the model cannot see
OTHER_MEDIA = {"audio", "audios", "video", "videos"}
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
FEATURES = Features(
    {
        "id": Value("string"),
        # `datasets` must not decode: its errors name no sample
        "images": List(Image(decode=False)),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)
# A second start looks for the images again, by the names that the file has for them
_KEPT = Features({**FEATURES, "names": List(Value("string"))})


def load_conversations(data_path: str | os.PathLike, image_folder: str | os.PathLike) -> Dataset:
    """Load LLaVA's training data: a .json file with a list of records, or a .jsonl file with a record a line.

    A record is `{"id": ..., "image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": ..., "value": ...}, ...]}`.
    `id` and `image` are optional, and the speakers are human, gpt and system. As in LLaVA-1.5, a turn with one
    `<image>` gets it moved to its front, on a line of its own, and a turn of gpt before the first human one is
    dropped. Several markers in a turn stay where they are.

    Args:
        data_path: the file.
        image_folder: the folder that image paths are relative to. Images are looked for, not read.

    Returns:
        A `Dataset` with the columns of this module and a row for each record, in the order of the file. The `id` of a
        record without one is its place in the file, from 0. It is mapped from the cache of `datasets`, which the next
        call with a file of this content reads in place of the file.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file or a record is not as above, a record has more or fewer markers than images, or an image
            is missing or lies outside of the folder.
    """
    data_path, image_folder = os.fspath(data_path), os.fspath(image_folder)
    if not os.path.isfile(data_path):
        raise FileNotFoundError(f"{data_path}: no such data file")
    if not os.path.isdir(image_folder):
        raise FileNotFoundError(f"{image_folder}: no such image folder (of {data_path})")
    folder = ImageFolder(image_folder)

    def tables() -> Iterator[pa.Table]:
        records, table = enumerate(read_records(data_path)), None
        for table in to_tables((_read_record(record, i, data_path, folder) for i, record in records), _KEPT):
            yield table
        if table is None:
            raise ValueError(f"{data_path}: found no records, expected at least one")

    kept = KeptTables(tables, _KEPT, _key_of(data_path, folder))
    with _no_garbage_collection():
        dataset = kept.load()
        if not kept.is_new and _moved(dataset, folder):
            dataset = kept.load(anew=True)  # which says of the first image that is missing where it is named
    return dataset.remove_columns("names")


def _key_of(data_path: str, folder: ImageFolder) -> str:
    """What tells two readings apart: the content and the kind of the file, the folder, and the code that reads."""
    key = xxhash.xxh3_128(f"{hash_of(data_path)} {data_path.endswith('.jsonl')} {folder.root}".encode())
    for name in ("conversations.py", "images.py", "records.py"):
        key.update(hash_of(Path(__file__).with_name(name)).encode())
    return key.hexdigest()


def _moved(dataset: Dataset, folder: ImageFolder) -> bool:
    """Whether an image is not where it was when the data were read."""
    arrow: Any = dataset.select_columns(["names", "images"]).with_format("arrow")
    for table in arrow.iter(batch_size=1000):
        names = table["names"].combine_chunks().flatten().to_pylist()
        paths = table["images"].combine_chunks().flatten().field("path").to_pylist()
        try:
            if [folder.find(name, "") for name in names] != paths:
                return True
        except ValueError:
            return True
    return False


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of records without a cycle would be looked through again and again, for most of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def to_dataset(rows: Iterable[dict], features: Features = FEATURES) -> Dataset:
    """A `Dataset` in memory, of rows that may come one at a time."""
    return Dataset(pa.concat_tables([features.arrow_schema.empty_table(), *to_tables(rows, features)]))


def to_tables(rows: Iterable[dict], features: Features) -> Iterator[pa.Table]:
    """Arrow tables of up to 1,000 rows, which `datasets` itself would take 20 times as long to make."""
    rows = iter(rows)
    while piece := list(itertools.islice(rows, 1000)):
        yield pa.Table.from_pylist(piece, schema=features.arrow_schema)


def _read_record(record: Any, index: int, data_path: str, folder: ImageFolder) -> dict:
    where = f"{data_path}: sample {index}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {describe(record)}, expected a record with 'conversations'")
    messages = _read_turns(record.get("conversations"), where)
    media = sorted(name for name in OTHER_MEDIA & record.keys() if record[name])
    if media:
        raise ValueError(f"{where}: found the field {media[0]!r}, expected images alone")
    image, images = record.get("image"), record.get("images")
    if image is not None and images is not None:
        raise ValueError(f"{where}: found the fields 'image' and 'images', expected one of them")
    names = images if image is None else image
    names = [] if names is None else names if isinstance(names, list) else [names]
    markers = [part["type"] for message in messages for part in message["content"]].count("image")
    if markers != len(names):
        raise ValueError(
            f"{where}: conversations: found {markers} {IMAGE_MARKER} markers, expected {len(names)}, one an image"
        )
    sample_id = str(index if record.get("id") is None else record["id"])
    _check_text(sample_id, f"{where}: id")
    return {
        "id": sample_id,
        "images": [{"path": folder.find(name, where)} for name in names],
        "messages": messages,
        "names": names,
    }


def _read_turns(turns: Any, where: str) -> list[dict]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: conversations: found {describe(turns)}, expected a list of turns")
    messages: list[dict] = []
    expected, has_human = "human", False
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            found = f"the fields {sorted(turn)}" if isinstance(turn, dict) else describe(turn)
            raise ValueError(f"{where}: conversations[{i}]: found {found}, expected the fields 'from' and 'value'")
        speaker, value = turn["from"], turn["value"]
        if not isinstance(speaker, str) or speaker not in ROLES:
            field = f"{where}: conversations[{i}].from"
            raise ValueError(f"{field}: found {describe(speaker)}, expected one of {', '.join(ROLES)}")
        if not isinstance(value, str):
            raise ValueError(f"{where}: conversations[{i}].value: found {describe(value)}, expected text")
        _check_text(value, f"{where}: conversations[{i}].value")
        if speaker == "gpt" and not has_human:
            continue
        if speaker != "system" or i > 0:
            if speaker != expected:
                raise ValueError(
                    f"{where}: conversations[{i}].from: found {speaker!r}, expected {expected!r}: speakers take turns"
                )
            expected = "gpt" if speaker == "human" else "human"
        has_human = has_human or speaker == "human"
        messages.append({"role": ROLES[speaker], "content": message_parts(value)})
    if not has_human:
        raise ValueError(f"{where}: conversations: found no turn of human, expected at least one")
    return messages


def _check_text(text: str, where: str) -> None:
    if not text.isascii() and re.search("[\ud800-\udfff]", text):  # JSON can hold it, Arrow cannot
        raise ValueError(f"{where}: found half of a surrogate pair, expected text in UTF-8")


def message_parts(text: str) -> list[dict]:
    """The parts of a turn. A single marker moves to the front, as in LLaVA-1.5's preprocess_multimodal."""
    if IMAGE_MARKER not in text:  # nearly all turns
        # An empty turn is one empty text: templates print an empty list as []
        return [{"type": "text", "text": text}]
    if text.count(IMAGE_MARKER) == 1:
        text = f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()
    pieces = [piece for piece in re.split(f"({IMAGE_MARKER})", text) if piece]
    return [{"type": "image"} if piece == IMAGE_MARKER else {"type": "text", "text": piece} for piece in pieces]
