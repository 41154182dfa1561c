"""What several verbs share."""

import sys


def quiet():
    from transformers.utils import logging

    # What does not load is told in one line, not in a table
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load(folder):
    import torch
    from transformers import AutoProcessor

    from ..modeling_vwlmm import VWLmmForCausalLM

    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VWLmmForCausalLM.from_pretrained(folder).to(device).eval()
    return model, AutoProcessor.from_pretrained(folder)


def open_pictures(paths):
    from ..data.images import open_images

    return open_images({"images": [{"path": path, "bytes": None} for path in paths]})
