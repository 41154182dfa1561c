"""Tells a checkpoint that is as it was written from one that was damaged or changed since."""

import os
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..files import hash_of, read_json_object, write_json


CONTENTS_NAME = "checkpoint_contents.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What a run needs to go on as if it had not stopped, beside the weights: the names of files or folders, and what it is
_STATE = {
    r"optimizer.*|global_step\d+|pytorch_model_fsdp.*": "the optimizer's averages",
    r"scheduler\.pt": "the learning rate's schedule",
    r"rng_state.*\.pth": "the random numbers",
}


def write_contents(checkpoint: str | os.PathLike, data: dict[str, Any] | None) -> None:
    """Write down the sizes of a checkpoint's files, and the fingerprint of the data, see [`data_fingerprint`]."""
    folder = Path(checkpoint)
    files = {name: {"size": (folder / name).stat().st_size} for name in _files(folder)}
    write_json(folder / CONTENTS_NAME, {"files": files, "data": data})


def add_hashes(checkpoint: str | os.PathLike) -> None:
    """Add the hashes of the files to what [`write_contents`] wrote."""
    folder = Path(checkpoint)
    try:
        contents = read_contents(folder)
        for name, about in contents["files"].items():
            about["xxh3_128"] = hash_of(folder / name)
        write_json(folder / CONTENTS_NAME, contents)
    except OSError:  # the folder was removed meanwhile
        return


def read_contents(checkpoint: str | os.PathLike) -> dict[str, Any]:
    """What [`write_contents`] wrote; no files and no data if the checkpoint is not of this package."""
    path = Path(checkpoint) / CONTENTS_NAME
    contents = read_json_object(path) if path.is_file() else {}
    return {"files": contents.get("files") or {}, "data": contents.get("data")}


def check_whole(checkpoint: str | os.PathLike) -> None:
    """`ValueError` if a file of a checkpoint is missing or is not as it was written."""
    folder = Path(checkpoint)
    if not (folder / TRAINER_STATE_NAME).is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {TRAINER_STATE_NAME}{_before(folder)}")
    for name, about in read_contents(folder)["files"].items():
        path = folder / name
        problem = None
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != about["size"]:
            problem = f"has {path.stat().st_size:,} bytes, but {about['size']:,} were written"
        elif about.get("xxh3_128") not in (None, hash_of(path)):
            problem = "is not as it was written"
        if problem is not None:
            raise ValueError(f"{path} {problem}, so that {folder.name} is damaged{_before(folder)}")


def what_is_missing(checkpoint: str | os.PathLike) -> list[str]:
    """What starts anew if a run goes on from this checkpoint."""
    names = os.listdir(checkpoint)
    return [what for pattern, what in _STATE.items() if not any(re.fullmatch(pattern, name) for name in names)]


def _before(folder: Path) -> str:
    """The end of an error message: where else a run can go on."""
    found = _CHECKPOINT.fullmatch(folder.name)
    steps = [_CHECKPOINT.fullmatch(path.name) for path in folder.absolute().parent.iterdir() if path.is_dir()]
    earlier = [int(step[1]) for step in steps if step and found and int(step[1]) < int(found[1])]
    if not earlier:
        return "; there is no checkpoint before it"
    before = folder.parent / f"checkpoint-{max(earlier)}"
    return f"; the one before it is {before}: remove {folder} to go on from there"


def _files(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != CONTENTS_NAME)
    return sorted(path.relative_to(folder).as_posix() for path in files)
