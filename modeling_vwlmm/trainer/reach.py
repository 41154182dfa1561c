"""How far an adapter reaches: into the LLM, and outside of it into what its config names."""

import re
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model

from ..stages import PARTS


LLM = PARTS["language_model"][0]
_OUTSIDE = [name for names in PARTS.values() for name in names if name != LLM]


def keep_within_llm(peft_config: Any, model: torch.nn.Module) -> None:
    """Limit what a config of PEFT selects, in place, to the LLM and to what it names outside of the LLM.

    PEFT compares ends of names, which towers and LLMs share (`q_proj`, `norm`). A regular expression, or an entry of a
    list, reaches the vision tower, the projector or a head only if it has its name in it: `vision_tower`,
    `multi_modal_projector`, `vm_head` or `lm_head`.

    Args:
        peft_config: `target_modules`, `exclude_modules`, `target_parameters` and `modules_to_save` of it are read,
            where it has them.
        model: the [`VWLmmForCausalLM`] that gets the adapter.

    Raises:
        ValueError: an entry of a list matches something outside of the LLM alone, and does not name it.
    """
    modules, parameters = ([name for name, _ in found] for found in (model.named_modules(), model.named_parameters()))
    targets = getattr(peft_config, "target_modules", None)
    if targets is not None:
        excluded = getattr(peft_config, "exclude_modules", None) or []
        if not isinstance(excluded, str):
            excluded = "|".join(rf"(.*\.)?{re.escape(name)}" for name in sorted(excluded))
        peft_config.exclude_modules = "|".join(filter(None, [_excluded(targets), excluded]))
        if not isinstance(targets, str):
            _narrowed("target_modules", targets, modules, _is_end)  # which refuses what would be left out
    if chosen := getattr(peft_config, "target_parameters", None):
        peft_config.target_parameters = _narrowed("target_parameters", chosen, parameters, _is_end)
    if chosen := getattr(peft_config, "modules_to_save", None):
        peft_config.modules_to_save = _narrowed("modules_to_save", chosen, modules, str.endswith)


def freeze_biases_outside(model: Any, peft_config: Any) -> None:
    """Freeze what `bias="all"` lets train outside of the LLM, in parts that the config does not name."""
    if not is_peft_model(model) or getattr(peft_config, "bias", "none") != "all":
        return
    targets = peft_config.target_modules or []
    named = _named_in(" ".join([targets] if isinstance(targets, str) else targets))
    for name, parameter in model.get_base_model().named_parameters():
        if name.startswith(tuple(f"{part}." for part in _OUTSIDE if part not in named)):
            if ".modules_to_save." not in name:
                parameter.requires_grad_(False)


def _is_end(name: str, entry: str) -> bool:
    return f".{name}".endswith(f".{entry}")


def _named_in(pattern: str) -> list[str]:
    return [part for part in _OUTSIDE if part.rpartition(".")[2] in pattern]


def _excluded(targets: str | list[str] | set[str]) -> str:
    """A pattern of what lies outside of the LLM and is not named."""
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules is {targets!r}, expected a regular expression: {error}") from error
        reached = [rf"{re.escape(part)}(\.|$)" for part in _named_in(targets)]
    else:
        reached = [rf"(.*\.)?{re.escape(entry)}$" for entry in sorted(targets) if _named_in(entry)]
    return rf"(?!{'|'.join([re.escape(LLM) + '[.]', *reached])}).*"


def _narrowed(field: str, entries: Any, names: list[str], matches: Callable[[str, str], bool]) -> list[str]:
    """The entries, with the full names in the LLM for one that also matches what lies outside."""
    narrowed: list[str] = []
    for entry in entries:
        found = [name for name in names if matches(name, entry)]
        inside = [name for name in found if name.startswith(f"{LLM}.")]
        if found and not inside and not _named_in(entry):
            raise ValueError(
                f"found {entry!r} in {field}, which matches nothing in the LLM: to reach further, name the part, "
                f"as in {found[0]!r}"
            )
        is_wide = len(inside) < len(found) and not _named_in(entry)
        narrowed += inside if is_wide else [entry]
    return narrowed
