"""Keeps a run out of folders that are another's."""

import os
from pathlib import Path
from typing import Any

from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..training_run import read_training_run
from .checkpoints import difference_of_recipes, last_checkpoint


def check_output_dir(output_dir: str | os.PathLike, sources: dict[str, str | None], recipe: dict[str, Any]) -> None:
    """Refuse a folder in which a run would replace something else.

    Args:
        sources: what the run reads, by the names of the fields that say it.
        recipe: the fields that were given, which the record of the run will hold.

    Raises:
        ValueError: it is one of the sources, or holds another model, or a run of another recipe.
    """
    folder = Path(output_dir)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"output_dir {folder} is a file, expected a folder")
        return
    for name, source in sources.items():
        if source and os.path.exists(source) and os.path.samefile(source, folder):
            raise ValueError(
                f"output_dir {folder} is the {name} too, which would be replaced: name another output_dir"
            )
    where = last_checkpoint(folder) or os.fspath(folder)
    stages = read_training_run(where)
    if stages:
        if difference := difference_of_recipes(stages[-1].get("recipe") or {}, recipe):
            raise ValueError(
                f"{where} is of another run ({difference}): name another output_dir or remove that one, or go on from "
                "a checkpoint all the same with --resume_from_checkpoint true"
            )
    elif where == os.fspath(folder) and any((folder / name).exists() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        raise ValueError(f"output_dir {folder} holds a model that no run trained: name another output_dir")
