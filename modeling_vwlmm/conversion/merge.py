"""Merging of an adapter into its base model."""

import contextlib
import hashlib
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoProcessor

from ..files import new_folder, reading, remove_code
from ..modeling_vwlmm import VWLmmForCausalLM
from ..training_run import FROM_THE_HUB, TRAINED_WITH, fingerprint, read_training_run, write_training_run
from ..weights import check_shards
from .checkpoint import read_processor


def merge(adapter: str | os.PathLike, destination: str | os.PathLike, dtype: str | torch.dtype = "auto") -> None:
    """Add an adapter's weights to those of the base model that its config names, and save a model without PEFT.

    Args:
        adapter: folder or repository.
        destination: the folder to write, which must not exist.
        dtype: that the base model is loaded in. Its own if not given, even if the adapter was trained on a quantized
            one.

    Raises:
        ValueError: the adapter does not fit its base, is of a kind that cannot be merged, or changes nothing.
    """
    model = merged_model(adapter, dtype=dtype)
    processor = _processor_of(adapter, model.config.name_or_path)
    with new_folder(destination) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        remove_code(folder)
        write_training_run(folder, read_training_run(adapter))
        for name in ("trainer_state.json", "assets/losses.json"):  # of which the card draws the losses
            if (Path(adapter) / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(Path(adapter) / name, folder / name)


def _processor_of(adapter: str | os.PathLike, base: str) -> Any:
    """The processor of an adapter, or that of its base where it has none, as PEFT saves it by itself."""
    if os.path.isdir(adapter):
        if (processor := read_processor(Path(adapter))) is not None:
            return processor
    else:
        with contextlib.suppress(OSError, ValueError):
            return AutoProcessor.from_pretrained(adapter, trust_remote_code=False)
    with reading(f"the processor of {base}"):
        return AutoProcessor.from_pretrained(base, trust_remote_code=False)


def merged_model(adapter: str | os.PathLike, **kwargs: Any) -> VWLmmForCausalLM:
    """An adapter and its base model as one model, in memory.

    Args:
        adapter: folder or repository.
        kwargs: for `from_pretrained` of the base model, which is loaded in its own dtype and then becomes of `dtype`.
            `revision` is the adapter's.

    Raises:
        ValueError: the adapter does not fit its base, is of a kind that cannot be merged, or changes nothing.
    """
    hub = {key: value for key, value in kwargs.items() if key in FROM_THE_HUB}
    try:
        with reading(adapter):
            found = PeftConfig.from_pretrained(os.fspath(adapter), **hub)
            name = found.base_model_name_or_path
    except ValueError as error:
        raise ValueError(
            f"{adapter} is no adapter: expected a folder or repository with adapter_config.json"
        ) from error
    if str(getattr(found, "init_lora_weights", "")).startswith("pissa_niter"):
        # Training changed the base's weights too, by random numbers, which the adapter does not hold
        raise ValueError(f'{adapter} has init_lora_weights "{found.init_lora_weights}", and cannot be merged')
    dtype = kwargs.pop("dtype", "auto")
    kwargs["revision"] = found.revision  # of the base, as the adapter names it
    try:
        check_shards(name)
        with reading(f"{name}, the base model of {adapter},"):
            base = VWLmmForCausalLM.from_pretrained(name, dtype="auto", **kwargs)
    except OSError as error:
        raise FileNotFoundError(f"{name}, the base model of {adapter}, cannot be loaded: {error}") from error
    if base.config.to_dict().get("quantization_config"):
        raise ValueError(f"{name}, the base model of {adapter}, is quantized: name what it was made of in its config")
    run = (read_training_run(adapter, **hub) or [{}])[-1]
    if run.get("base_fingerprint") not in (None, fingerprint(base)):
        raise ValueError(f"{name} has changed since {adapter} was trained on it")
    if dtype != "auto":
        base.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    kind, before = getattr(found.peft_type, "value", found.peft_type), _digests(base)
    is_tied = base.lm_head.weight is base.get_input_embeddings().weight
    try:
        with reading(adapter), warnings.catch_warnings():
            # PEFT warns of tied weights, which are parted here before anything is added
            warnings.filterwarnings("ignore", message=r"Model (with|has) `tie_word_embeddings=True`")
            model: Any = PeftModel.from_pretrained(base, adapter, **hub)
            if merges := hasattr(model.base_model, "merge_and_unload"):
                if is_tied:
                    _untie(model)
                _take_saved_modules(model)
                model = model.merge_and_unload(safe_merge=True)
    except ValueError as error:  # a tensor is missing or has another shape
        raise ValueError(f"{adapter} does not fit {name}, its base model: {error}") from error
    if not merges:  # prompts, which are no weights of the model
        raise ValueError(f"{adapter} is of the kind {kind}, which cannot be merged: load it with PEFT")
    if is_tied:
        _tie_if_equal(model)
    if _digests(model) == before:
        raise ValueError(
            f"merging {adapter} into {name} changes nothing: its weights are zero, or too small for {model.dtype}"
        )
    for field in TRAINED_WITH:
        if field in run.get("config", {}):
            setattr(model.config, field, run["config"][field])
    return model


def _take_saved_modules(model: torch.nn.Module) -> None:
    """Put modules that trained whole in their places: most kinds of adapters fail on those without a `weight`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            merged = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            model.set_submodule(name, merged)


def _untie(model: torch.nn.Module) -> None:
    """Give every layer a weight of its own: an adapter on the embeddings would be merged into a tied head as well."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(parameter)


def _tie_if_equal(model: VWLmmForCausalLM) -> None:
    """Tie head and embeddings again, or record that they differ from now on."""
    embeddings: Any = model.get_input_embeddings()
    is_equal = torch.equal(model.lm_head.weight, embeddings.weight)
    if is_equal:
        model.lm_head.weight = embeddings.weight
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = is_equal


def _digests(model: torch.nn.Module) -> dict[str, bytes]:
    weights = model.state_dict().items()
    return {
        name: hashlib.blake2b(weight.cpu().reshape(-1).view(torch.uint8).numpy()).digest() for name, weight in weights
    }


__all__ = ["merge", "merged_model"]
