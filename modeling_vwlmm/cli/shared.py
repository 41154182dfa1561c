"""What several verbs share."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..files import reading, replacing
from .errors import Parser


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image
    from transformers import LlavaProcessor

    from ..modeling_vwlmm import VWLmmForCausalLM


WAIT = 30.0  # seconds for the Hub to answer


def limit_waiting() -> None:
    """Give requests to the Hub a timeout: huggingface_hub's own waits forever for a server that does not answer."""
    import httpx2
    from huggingface_hub import get_session, set_client_factory

    hooks = get_session().event_hooks
    set_client_factory(lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=WAIT))


def quiet() -> None:
    """Keep transformers' warnings off the terminal: our error, of one line, names the weights that do not fit."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def existing(name: str) -> str:
    """The name of a folder, with `~` spelt out, or of a repository; `ValueError` if it can be neither."""
    name = os.path.expanduser(name)
    if os.path.isfile(name):
        raise ValueError(f"{name} is a file, expected the folder or repository of a model")
    if not os.path.isdir(name) and (name.startswith(("/", ".")) or name.count("/") > 1):
        raise FileNotFoundError(f"{name}: no such folder")
    return name


def load(folder: str, adapter: str | None = None) -> tuple["VWLmmForCausalLM", "LlavaProcessor"]:
    """A model, on the GPU if there is one, with an adapter if one is given, and its processor."""
    import torch
    from transformers import AutoProcessor

    from ..known_fields import check_fields
    from ..modeling_vwlmm import VWLmmForCausalLM
    from ..processing import check_processor
    from ..template_check import check_template
    from ..weights import check_shards

    quiet()
    folder = existing(folder)
    check_shards(folder)
    check_fields(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"the model {folder}"):
        model = VWLmmForCausalLM.from_pretrained(folder)
    if adapter is not None:
        with reading(f"the adapter {adapter}"):
            model.load_adapter(adapter)
    model = model.to(device).eval()
    with reading(f"the processor of {folder}"):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        check_processor(processor, model.config)
    check_template(processor, folder)
    return model, processor


def open_pictures(paths: list[str]) -> "list[Image.Image]":
    from ..data.images import open_images

    return open_images({"images": [{"path": path, "bytes": None} for path in paths]})


def port(text: str) -> int:
    """A port that a server can listen on, for a parser: 0 is any that is free."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f'found "{text}", expected a number from 0 to 65535')
    return int(text)


def names_of(host: str) -> list[str]:
    """The names that requests may call a server by: a page that has its own name lead to this machine has another."""
    loopback = ["127.0.0.1", "localhost"]
    return loopback if host in loopback else ["*"]


def check_picture(parser: Parser, output: str | None, images: Iterable[str]) -> None:
    """End the command if a picture cannot be written: format or folder is unknown, or it would replace an image."""
    if output is None:
        return
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, formats = os.path.splitext(output)[1][1:], FigureCanvasBase.get_supported_filetypes()
    if suffix.lower() not in formats:
        parser.error(f"--output {output}: found no format of pictures in its name, expected .{', .'.join(formats)}")
    if not os.path.isdir(folder := os.path.dirname(output) or "."):
        parser.error(f"--output {output}: there is no folder {folder}")
    for path in images if os.path.exists(output) else ():
        if os.path.exists(path) and os.path.samefile(path, output):
            parser.error(f"--output {output} is the image {path}, which it would replace")


def save_picture(figure: "Figure", output: str) -> None:
    with replacing(output) as beside:
        figure.savefig(beside)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Let a process that is told to end leave nothing unfinished: no folder, no upload, no process of its own."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # the latter when a terminal is closed, not on Windows
            number = getattr(signal, name)
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
                before[number] = signal.signal(number, _exit)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: Any) -> None:
    sys.exit(128 + number)
