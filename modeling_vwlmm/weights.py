"""Checkpoints tensor by tensor, so that converting a model takes the memory of one shard."""

import functools
import json
import os
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from .files import read_json


MAX_SHARD_SIZE = "2GB"


@dataclass
class StoredTensor:
    """A tensor that is read when it is needed.

    meta: a tensor on the meta device that has its shape and dtype.
    read: reads the tensor itself.
    source: the name of its file, folder or repository, for error messages.
    """

    meta: torch.Tensor
    read: Callable[[], torch.Tensor]
    source: str


def stored(state_dict: dict[str, torch.Tensor], source: str) -> dict[str, StoredTensor]:
    """Tensors in memory, in the form of those that are read from a folder."""
    return {
        name: StoredTensor(tensor.to("meta"), functools.partial(_in_memory, tensor), source)
        for name, tensor in state_dict.items()
    }


def _in_memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def read_weights(folder: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint in safetensors or `.bin`, in one file or shards. Only tensors are unpickled.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is truncated or holds something else, or an index names tensors that its shards lack.
    """
    folder = Path(folder)
    for file_name, index_name, read in (
        (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, _read_safetensors),
        (WEIGHTS_NAME, WEIGHTS_INDEX_NAME, _read_bin),
    ):
        if (folder / index_name).is_file():
            return _read_shards(folder / index_name, read)
        if (folder / file_name).is_file():
            return read(folder / file_name)
    raise FileNotFoundError(
        f"{folder} has no weights, expected {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, or shards with an index"
    )


def check_shards(folder: str | os.PathLike) -> None:
    """Refuse a folder whose index names shards outside of it, which transformers would read, or that are missing.

    Args:
        folder: of a model. What is no folder is the name of a repository, which is not looked at.
    """
    if any((Path(folder) / name).is_file() for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)):
        read_weights(folder)


def _read_shards(index: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    try:
        weight_map = read_json(index)["weight_map"]
        shards = sorted({os.fspath(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index} is no index of shards: expected a JSON object with a "weight_map"') from error
    tensors = {}
    for shard in shards:
        if os.path.basename(shard) != shard or not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard}: no such shard, though {index.name} names it")
        found = read(index.parent / shard)
        absent = [name for name, file in weight_map.items() if file == shard and name not in found]
        if absent:
            raise ValueError(f"{index.parent / shard} lacks tensors that {index.name} names: {name_some(absent)}")
        tensors.update(found)
    return tensors


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    def read(name: str) -> torch.Tensor:
        # The file is opened anew for each tensor, because an open file keeps in memory what it has read
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: StoredTensor(
                    torch.empty(header.get_shape(), dtype=_dtype_of(header), device="meta"),
                    functools.partial(read, name),
                    path.name,
                )
                for name, header in headers.items()
            }
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _dtype_of(tensor_slice: Any) -> torch.dtype:
    # transformers names no dtype of less than 8 bits. These are quantized weights, and check_weights refuses them as
    # it does integers
    return str_to_torch_dtype.get(tensor_slice.get_dtype(), torch.uint8)


def _read_bin(path: Path) -> dict[str, StoredTensor]:
    expectation = "expected a whole file that holds tensors by name and nothing else"
    try:
        try:
            tensors, is_mapped = torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
        except RuntimeError:  # torch before 1.6 wrote no zip archive, which alone can be mapped
            tensors, is_mapped = torch.load(path, map_location="cpu", weights_only=True), False
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read, {expectation}: {reason}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, {expectation}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f'{path} holds a {type(tensor).__name__} under "{name}", {expectation}')
    found = stored(tensors, path.name)
    if is_mapped:
        for name, stored_tensor in found.items():
            stored_tensor.read = functools.partial(_read_mapped, path, name)
    return found


def _read_mapped(path: Path, name: str) -> torch.Tensor:
    # The file is mapped anew for each tensor, because a mapped file keeps in memory what was read of it
    return torch.load(path, weights_only=True, mmap=True)[name].clone()


def name_some(names: Iterable[str]) -> str:
    """The first few of many names, for an error message of one line."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_weights(
    tensors: dict[str, StoredTensor], expected: dict[str, torch.Tensor], folder: str | os.PathLike
) -> None:
    """Compare names, shapes and kinds of dtype with a model's `state_dict()`; `ValueError` if they differ."""
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    problems = [
        f"{what}: {name_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    if problems:
        raise ValueError(f"the weights in {folder} do not fit the config: {'; '.join(problems)}")
    for name, tensor in tensors.items():
        if tensor.meta.shape != expected[name].shape:
            raise ValueError(
                f"{tensor.source} in {folder}: {name} has the shape {tuple(tensor.meta.shape)}, the config says "
                f"{tuple(expected[name].shape)}"
            )
        if tensor.meta.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(
                f"{tensor.source} in {folder}: {name} holds {tensor.meta.dtype}, expected {expected[name].dtype} or "
                "another of its kind: quantized weights are not supported"
            )


def write_weights(folder: Path, tensors: dict[str, StoredTensor], dtype: torch.dtype | None = None) -> None:
    """Write safetensors shards as `save_pretrained` does, with one shard at a time in memory."""

    def stored_as(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    split = split_state_dict_into_shards_factory(
        {name: stored_as(tensor.meta) for name, tensor in tensors.items()},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=SAFE_WEIGHTS_NAME.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=MAX_SHARD_SIZE,
    )
    for file_name, names in tqdm(split.filename_to_tensors.items(), desc="Writing shards"):
        shard = {name: stored_as(tensors[name].read()).contiguous() for name in names}
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
