"""What several verbs share."""

import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from PIL import Image
    from transformers import LlavaProcessor

    from ..modeling_vwlmm import VWLmmForCausalLM


def quiet() -> None:
    """Keep transformers' warnings off the terminal: our error, of one line, names the weights that do not fit."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load(folder: str) -> tuple["VWLmmForCausalLM", "LlavaProcessor"]:
    """A model, on the GPU if there is one, and its processor."""
    import torch
    from transformers import AutoProcessor

    from ..modeling_vwlmm import VWLmmForCausalLM

    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VWLmmForCausalLM.from_pretrained(folder).to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def open_pictures(paths: list[str]) -> "list[Image.Image]":
    from ..data.images import open_images

    return open_images({"images": [{"path": path, "bytes": None} for path in paths]})
