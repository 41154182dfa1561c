"""VW-LMM, multi-modal auto-regressive modeling via visual words (arXiv 2403.07720), for the Hugging Face libraries."""

import importlib
from typing import TYPE_CHECKING, Any

from .registration import register_when_needed


if TYPE_CHECKING:
    from .configuration_vwlmm import VWLmmConfig
    from .modeling_vwlmm import VWLmmForCausalLM, VWLmmModel
    from .strict_loading import VWLmmPreTrainedModel

__version__ = "0.1.0"

_MODULES = {
    "VWLmmConfig": ".configuration_vwlmm",
    "VWLmmForCausalLM": ".modeling_vwlmm",
    "VWLmmModel": ".modeling_vwlmm",
    "VWLmmPreTrainedModel": ".strict_loading",
}

register_when_needed()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = ["VWLmmConfig", "VWLmmForCausalLM", "VWLmmModel", "VWLmmPreTrainedModel"]
