"""Models and adapters whose weights do not fit are refused, where transformers and PEFT warn at most."""

import copy
import importlib
import os
import re
from typing import Any, TypeVar

from .compatibility import LlavaPreTrainedModel
from .configuration_vwlmm import VWLmmConfig


_Model = TypeVar("_Model", bound="VWLmmPreTrainedModel")
# The losses read the weights of both
_HEADS = ["lm_head", "vm_head"]
# PEFT names the adapter in the name of each of its weights
_ADAPTER_WEIGHT = re.compile(r"\.(?:lora_\w+|modules_to_save)\.(\w+)(?:\.|$)")
# What transformers does not find by itself: DoRA's magnitudes, and ranks that AdaLoRA has changed
_LEFT_TO_PEFT = re.compile(r"\.(?:lora_magnitude_vector|ranknum)\.")
_HUB = {"revision", "token", "cache_dir", "subfolder", "local_files_only"}
# PEFT puts a module that gets an adapter into another one
_WRAPPED = re.compile(r"\.(?:base_layer|original_module)\.")


def _refuse(what: str | os.PathLike, problems: dict[str, Any]) -> None:
    found = [f"{problem}: {', '.join(sorted(keys))}" for problem, keys in problems.items() if keys]
    if found:
        raise ValueError(f"the weights in {what} do not fit: {'; '.join(found)}")


def refuse_other_adapters(model, state_dict, prefix, *args):
    """Raise a `ValueError` if an adapter that PEFT loads does not fit: PEFT itself warns at most."""
    adapters = {match[1] for match in map(_ADAPTER_WEIGHT.search, state_dict) if match}
    if adapters:
        own = {f"{prefix}{name}" for name in model.state_dict()}
        expected = {name for name in own if (match := _ADAPTER_WEIGHT.search(name)) and match[1] in adapters}
        _refuse("the adapter", {"missing": expected - state_dict.keys(), "unexpected": state_dict.keys() - own})


class VWLmmPreTrainedModel(LlavaPreTrainedModel):
    config: VWLmmConfig

    @classmethod
    def from_pretrained(  # type: ignore[override]  # named by transformers, passed on here
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike,
        *args,
        output_loading_info: bool = False,
        **kwargs,
    ) -> _Model:
        """As in transformers, but weights that are missing, unexpected or of another shape are a `ValueError`.

        Three callers ask for a model that is new in part: one that loads what the model without a head saved, which
        then gets a new head, one that gives an empty `state_dict`, and one that wants to be told, with
        `output_loading_info=True`, what is missing or unexpected.

        A bitsandbytes config that names no `llm_int8_skip_modules` leaves both heads as they are.
        """
        quantization_config = kwargs.get("quantization_config")
        if isinstance(quantization_config, dict):
            by_bits = any(quantization_config.get(f"load_in_{bits}bit") for bits in (4, 8))
            if by_bits and quantization_config.get("llm_int8_skip_modules") is None:
                kwargs["quantization_config"] = {**quantization_config, "llm_int8_skip_modules": list(_HEADS)}
        elif getattr(quantization_config, "llm_int8_skip_modules", _HEADS) is None:
            kwargs["quantization_config"] = copy.copy(quantization_config)
            kwargs["quantization_config"].llm_int8_skip_modules = list(_HEADS)
        # transformers' own error for a tensor of another shape does not name the checkpoint, so the one below does
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
        if output_loading_info or kwargs.get("state_dict") == {}:
            problems = {}
        elif model.config.architectures == [type(model.base_model).__name__]:
            problems["missing"] = {name for name in info["missing_keys"] if not name.startswith("lm_head.")}
        if not ignore_mismatched_sizes:
            problems["of another shape than the config says"] = [
                f"{name} {tuple(found)} instead of {tuple(expected)}"
                for name, found, expected in info["mismatched_keys"]
            ]
        _refuse(pretrained_model_name_or_path or "the state_dict", problems)
        return (model, info) if output_loading_info else model  # type: ignore[return-value]  # as in transformers

    def load_adapter(  # type: ignore[override]  # named by transformers, passed on here
        self, peft_model_id: str | None = None, adapter_name: str | None = None, **kwargs
    ) -> Any:
        """As in transformers, but adapter weights that are missing or unexpected are a `ValueError`."""
        before = set(self.state_dict())
        info = super().load_adapter(peft_model_id, adapter_name, **kwargs)
        # transformers takes any weight for the adapter's whose name has the adapter's in it, such as "head"
        missing = {name for name in info.missing_keys if _WRAPPED.sub(".", name) not in before}
        if peft_model_id and any(_LEFT_TO_PEFT.search(name) for name in missing):
            name = adapter_name or "default"
            config: Any = self.peft_config[name]
            if config.peft_type == "ADALORA" and config.rank_pattern:
                raise ValueError(f"AdaLoRA changed ranks in {peft_model_id}: load it with PeftModel.from_pretrained")
            hub = {**getattr(kwargs.get("load_config"), "download_kwargs", {}), **(kwargs.get("adapter_kwargs") or {})}
            peft = importlib.import_module("peft")  # which code from a repository does without
            weights = peft.load_peft_weights(peft_model_id, **{key: hub[key] for key in _HUB & hub.keys()})
            weights = {key.removeprefix("base_model.model."): tensor for key, tensor in weights.items()}
            peft.set_peft_model_state_dict(self, weights, name)  # refuses what does not fit
            for names in (missing, info.missing_keys, info.unexpected_keys):
                names.difference_update([name for name in names if _LEFT_TO_PEFT.search(name)])
        _refuse("the adapter", {"missing": missing, "unexpected": info.unexpected_keys})
        return info
