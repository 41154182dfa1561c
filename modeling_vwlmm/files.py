"""Helpers for files that may be broken when they are read or interrupted when they are written."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; `ValueError` with its name if it is not JSON in UTF-8."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file; `ValueError` with the file's name if it holds anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {describe(content)}, expected a JSON object")
    return content


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a file that [`read_json`] reads, or leave the one that is there."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A name beside that of a file, for what takes its place once it is whole."""
    path = Path(path)
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def hash_of(path: str | os.PathLike) -> str:
    """A hash of what a file holds."""
    found, buffer = xxhash.xxh3_128(), bytearray(2**20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(memoryview(buffer)[:count])
    return found.hexdigest()


def describe(value: Any) -> str:
    """What an error message says was found in JSON: short, whatever it is."""
    if value is None or value == []:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a record" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def without_code(value: Any) -> Any:
    """A JSON value without any `auto_map`, which names code of strangers for transformers to load and run."""
    if isinstance(value, dict):
        return {name: without_code(item) for name, item in value.items() if name != "auto_map"}
    return [without_code(item) for item in value] if isinstance(value, list) else value


def remove_code(folder: str | os.PathLike) -> None:
    """Take every `auto_map` out of a folder's configs: a library saves it with what it has read it with."""
    for path in Path(folder).glob("*config.json"):
        if "auto_map" in path.read_text(encoding="utf-8"):
            write_json(path, without_code(read_json(path)))


def check_whole(path: str | os.PathLike) -> None:
    """`ValueError` if a file is empty, or what Git leaves in place of a file that Git LFS has not fetched."""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} is empty")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, expected the file itself, which git lfs pull fetches")


@contextlib.contextmanager
def reading(what: str | os.PathLike) -> Iterator[None]:
    """Raise what a library raises on a damaged file as a `ValueError` of one line that says what was read.

    Nearly every type of error comes out of a config with a field of a wrong type. Errors that are clear already pass.
    """
    try:
        yield
    except OSError as error:
        # transformers says that it could not connect, of a folder whose name is mistyped too
        cause = error.__cause__ or error.__context__
        if isinstance(error, FileNotFoundError) or isinstance(cause, GatedRepoError):
            raise
        if isinstance(cause, (LocalEntryNotFoundError, RepositoryNotFoundError)):
            raise FileNotFoundError(
                f"{str(what).rstrip(',')}: no such folder, and no repository that can be reached"
            ) from error
        raise
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(what) in str(error):
            raise
        name = "" if type(error) in (ValueError, Exception) else f"{type(error).__name__}: "
        raise ValueError(f"{what} cannot be read: {name}{error}") from error


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder that appears under its name once all of it is written, and never if anything fails.

    Raises:
        FileExistsError: something has that name already.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists already, expected the name of a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.unfinished-", dir=path.parent))
    try:
        yield unfinished
        unfinished.chmod(0o777 & ~_umask())
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
