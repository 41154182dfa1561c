"""Keeps a run's folder to one process."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


LOCK_NAME = ".lock"
PUSH_PREFIX = ".push-"


@contextlib.contextmanager
def locked(output_dir: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of a run's folder, and remove what a push left there that was killed.

    Raises:
        ValueError: another process is at work there.
    """
    os.makedirs(output_dir, exist_ok=True)
    # Of one process, a second lock on a folder is the same: the command and its trainer each take it
    lock = FileLock(os.path.join(output_dir, LOCK_NAME), timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process trains in {output_dir}: wait for it, or name another output_dir") from None
    try:
        if lock.lock_counter == 1:
            for left in Path(output_dir).glob(f"{PUSH_PREFIX}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()
