"""Adapters of PEFT that train the LLM of a VW-LMM model alone."""

import copy
from typing import Any

import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, TrainableTokensConfig
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import (
    DUMMY_TARGET_MODULES,
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING,
)

from ..stages import PARTS
from .reach import LLM, keep_within_llm


# Kinds of PEFT that compute what TRL's fused head does not, or more than an LLM's text
_REFUSED = {
    "PREFIX_TUNING": "it hands the LLM a cache, which TRL's trainer switches off",
    "CARTRIDGE": "it hands the LLM a cache, which TRL's trainer switches off",
    "CPT": "its loss takes the logits of all positions, which TRL's trainer does not make",
    "XLORA": "it takes hidden states of all layers, which TRL's trainer does not keep",
    "MULTITASK_PROMPT_TUNING": "it takes task_ids, which conversations have none of",
    "POLY": "it takes task_ids, which conversations have none of",
    "ADAPTION_PROMPT": "PEFT knows it for some LLMs alone, and not below a vision tower",
    "SHADOW": "it makes a model of its own from the config of an LLM alone",
}
_TARGETS = {
    "IA3": {
        "target_modules": TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
        "feedforward_modules": TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    },
    "LN_TUNING": {"target_modules": TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING},
}
# bitsandbytes must leave these as they are: they are small, and the losses read the weights of the two heads
NOT_QUANTIZED = [name for names in PARTS.values() for name in names if name != LLM]
# PEFT finds a module that trains whole by the end of its name
SAVED_WHOLE = {part: names[0].rpartition(".")[2] for part, names in PARTS.items() if part != "language_model"}


def for_language_model(peft_config: LoraConfig, parts: list[str] | None, model: Any) -> LoraConfig:
    """A copy of a LoRA config that puts adapters on layers of the LLM and on no others, unless it names them.

    Args:
        peft_config:
            If neither `target_modules` nor `target_parameters` are given, all linear layers of the LLM get an adapter.
            See [`keep_within_llm`] for what names reach.
        parts:
            The parts that the stage trains, keys of `PARTS`. All but the LLM train whole, unless `modules_to_save` is
            given. None if no stage says what trains.
        model: the [`VWLmmForCausalLM`] that gets the adapter.

    Raises:
        ValueError: `parts` leaves the LLM out, or the config is for rows of the LM head.
    """
    peft_config = copy.copy(peft_config)
    kind = getattr(peft_config.peft_type, "value", peft_config.peft_type)
    if kind in _REFUSED:
        raise ValueError(f"an adapter of the kind {kind} cannot be trained here: {_REFUSED[kind]}")
    _refuse_rows_of_the_head(peft_config, model)
    if str(getattr(peft_config, "init_lora_weights", "")).startswith("pissa_niter"):
        # The base's weights change by random numbers, which no adapter holds: what is loaded would be another model
        raise ValueError(f'init_lora_weights "{peft_config.init_lora_weights}" cannot be loaded again: use "pissa"')
    if getattr(peft_config, "init_lora_weights", "") == "loftq" and not torch.cuda.is_available():
        raise ValueError('init_lora_weights "loftq" takes a GPU, and none is here')
    if parts is not None and "language_model" not in parts:
        raise ValueError(
            f"an adapter trains the language_model, but what trains is {', '.join(parts)}: use no PEFT here"
        )
    # Without one, PEFT's Auto classes would import the class by its name, which they refuse for other packages
    peft_config.task_type = peft_config.task_type or "CAUSAL_LM"
    # PEFT lists what these kinds adapt in an LLM, and knows the LLM by the name of its model
    for field, lists in _TARGETS.get(kind, {}).items():
        if getattr(peft_config, field) is None:
            targets = lists.get(model.config.text_config.model_type)
            setattr(peft_config, field, None if targets is None else list(targets))
    # Prompts have no targets, and these three kinds do without
    choose = isinstance(peft_config, (IA3Config, LNTuningConfig, TrainableTokensConfig))
    has_targets = getattr(peft_config, "target_modules", ()) is not None
    if not (choose or has_targets or getattr(peft_config, "target_parameters", None)):
        peft_config.target_modules = "all-linear"
    if getattr(peft_config, "target_modules", None) == "all-linear" and not hasattr(peft_config, "exclude_modules"):
        # Without that field, what limits it to the LLM would be lost when the adapter is saved
        layers = model.get_submodule(LLM).named_modules(prefix=LLM)
        peft_config.target_modules = [name for name, layer in layers if isinstance(layer, torch.nn.Linear)]
    if getattr(peft_config, "modules_to_save", ()) is None and parts is not None:
        peft_config.modules_to_save = [SAVED_WHOLE[part] for part in parts if part != "language_model"] or None
    keep_within_llm(peft_config, model)
    return peft_config


def _refuse_rows_of_the_head(peft_config: Any, model: Any) -> None:
    """TRL reads the weight of the LM head without calling it, so new rows of it would not be read."""
    field = "token_indices" if isinstance(peft_config, TrainableTokensConfig) else "trainable_token_indices"
    rows, embeddings = getattr(peft_config, field, None), model.get_input_embeddings()
    has_head = isinstance(rows, dict) and any(name.endswith("lm_head") for name in rows)
    if rows and (has_head or model.lm_head.weight is embeddings.weight):
        name = next(name for name, module in model.named_modules() if module is embeddings).rpartition(".")[2]
        whole = 'modules_to_save=["lm_head"]' if has_head else f'modules_to_save=["{name}"], ensure_weight_tying=True'
        why = "" if has_head else ", whose weight is that of the embeddings"
        raise ValueError(f"{field} cannot train rows of the lm_head{why}: train all of them, with {whole}")


def parts_alone(parts: list[str]) -> LoraConfig:
    """An adapter that trains whole parts, keys of `PARTS`, and adapts no layer."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=[SAVED_WHOLE[part] for part in parts],
    )


def skip_small_parts(quantization_config: Any) -> Any:
    """A copy of a bitsandbytes config that leaves all but the LLM unquantized.

    A config of another kind, or one that names what it leaves, comes back as it is.
    """
    if getattr(quantization_config, "llm_int8_skip_modules", NOT_QUANTIZED) is None:
        quantization_config = copy.copy(quantization_config)
        quantization_config.llm_int8_skip_modules = NOT_QUANTIZED
    return quantization_config


def keep_precision(model: torch.nn.Module, has_autocast: bool) -> None:
    """Choose the dtype of the modules that a PEFT model trains whole.

    Small steps vanish in 16 bits, so under autocast they are in float32, as PEFT keeps adapters. Without autocast they
    have the dtype of the modules they replace.
    """
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            dtype = torch.float32 if has_autocast else next(module.original_module.parameters()).dtype
            module.modules_to_save.to(dtype)


__all__ = ["for_language_model"]
