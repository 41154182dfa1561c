"""Tells bad input from a fault of ours, and says what is wrong with it in one line."""

import argparse
import os
import pickle
import sys
from typing import NoReturn

from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..hub.redaction import without_tokens
from ..requirements import named


_BAD_INPUT = (
    *(ValueError, OSError, ImportError, EOFError, MemoryError),
    *(pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)
# Of libraries that are not imported here: an error of theirs can only be met once they are
_BAD_INPUT_OF = {
    ("httpx2", "HTTPError"),
    ("jinja2", "TemplateError"),
    ("datasets.exceptions", "DatasetsError"),
    ("torch", "OutOfMemoryError"),
}


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong call with one line, without the usage, which is long."""

    def error(self, message: str) -> NoReturn:
        refuse(self.prog, f"{message} (see {self.prog} --help)")


def is_bad_input(error: BaseException) -> bool:
    """Whether an error says that the input is bad. Any other is a fault of ours, whose traceback helps to mend it.

    A `TypeError` or `KeyError` is ours: files of users are read under [`~modeling_vwlmm.files.reading`], which turns
    what libraries raise on them into a `ValueError`.
    """
    if isinstance(error, _BAD_INPUT) or type(error) is Exception:  # which the Rust of tokenizers raises
        return True
    if isinstance(error, RuntimeError) and "not enough memory" in str(error):  # torch on the CPU
        return True
    others = (getattr(sys.modules.get(module), name, None) for module, name in _BAD_INPUT_OF)
    return isinstance(error, tuple(other for other in others if other is not None))


def refuse(name: str, error: BaseException | str) -> NoReturn:
    """Print one line, without tokens, and end with status 2."""
    message = str(named(error) if isinstance(error, ImportError) else error)
    if "Original Traceback" in message:  # torch's DataLoader appends the error of its worker
        message = message.strip().splitlines()[-1]
    if isinstance(error, MemoryError) or not message.strip():
        message = f"{'not enough memory' if isinstance(error, MemoryError) else type(error).__name__}: {message}"
    line = " ".join(without_tokens(message, get_token()).split()).rstrip(": ")
    print(f"{name}: {line}", file=sys.stderr)
    sys.exit(2)


def check_texts(arguments: list[str]) -> None:
    """`ValueError` if an argument is no text: a path that is not UTF-8 would fail when it is written into a file."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{os.fsencode(argument)!r} is not UTF-8, which names of files must be here") from None
