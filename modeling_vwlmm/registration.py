"""Registers the classes with transformers' Auto classes when these are first imported, not before.

The classes need torch and most of transformers. `vwlmm --help` needs neither.
"""

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


# Whatever imports an Auto class imports this
_AUTO = "transformers.models.auto.configuration_auto"
# Modules of these two import each other: our classes can be imported when none of them is half imported
_WATCHED = ("transformers.", f"{__package__}.")


def register_when_needed() -> None:
    """Register at once if the Auto classes are there already, or else at the end of the import that brings them."""
    if _AUTO in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())  # type: ignore[arg-type]  # a finder by its method


class _RegisterAfterImport:
    """Finds modules as Python does, and registers at the end of the outermost import that has brought `_AUTO`."""

    def __init__(self) -> None:
        self.thread = threading.local()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name.startswith(_WATCHED) else None
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(  # type: ignore[method-assign]
                self._exec_module, spec.loader.exec_module
            )
        return spec

    def _exec_module(self, exec_module: Callable[[ModuleType], None], module: ModuleType) -> None:
        self.thread.depth = getattr(self.thread, "depth", 0) + 1
        try:
            exec_module(module)
        finally:
            self.thread.depth -= 1
        if self.thread.depth == 0 and _AUTO in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            _register()


def _register() -> None:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
        LlavaProcessor,
    )

    from .configuration_vwlmm import VWLmmConfig
    from .modeling_vwlmm import VWLmmForCausalLM, VWLmmModel

    AutoConfig.register("vwlmm", VWLmmConfig)
    AutoModel.register(VWLmmConfig, VWLmmModel)
    AutoModelForCausalLM.register(VWLmmConfig, VWLmmForCausalLM)
    AutoModelForImageTextToText.register(VWLmmConfig, VWLmmForCausalLM)
    AutoModelForMultimodalLM.register(VWLmmConfig, VWLmmForCausalLM)
    AutoProcessor.register(VWLmmConfig, LlavaProcessor)
