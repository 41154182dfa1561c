"""Loads a model folder in a process of its own, as those who pull it will: `python load_check.py FOLDER OUTPUT`.

With `--bare` as those do who have transformers and torch and nothing else; `--base FOLDER` for an adapter whose base
model is not where its config says. OUTPUT gets the last logits and the last visual word of a test picture.
"""

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path


def hide_all_but(distributions):
    """Leave nothing to import but these distributions, what they require and the standard library."""
    needed, queue = set(), list(distributions)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in needed:
            continue
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        needed.add(name)
        queue += [re.match(r"[\w.-]+", line)[0] for line in requirements if "extra ==" not in line]
    for module, owners in metadata.packages_distributions().items():
        if not needed & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}:
            sys.modules[module] = None  # Python's import refuses such a module, and find_spec finds none
    sys.modules["modeling_vwlmm"] = None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--base")
    parser.add_argument("--bare", nargs="*", metavar="DISTRIBUTION", help="transformers, torch and these alone")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]  # its modules belong to a package
    if arguments.bare is None:
        sys.path.append(str(here.parent.parent))
        import modeling_vwlmm  # noqa: F401
    else:
        hide_all_but(["torch", "transformers", *arguments.bare])

    import torch
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trust = {} if arguments.bare is None else {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(arguments.base or arguments.folder, dtype="auto", **trust).eval()
    if arguments.base:
        model.load_adapter(arguments.folder)
    processor = AutoProcessor.from_pretrained(arguments.folder, **trust)
    picture = Image.linear_gradient("L").convert("RGB")
    inputs = processor(images=picture, text=processor.image_token, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1].float()
        visual_word = model.visual_words(inputs["pixel_values"])[0, -1]
    for name, tensor in (("logits", logits), ("visual words", visual_word)):
        if not tensor.isfinite().all():
            raise ValueError(f"its {name} are not finite")
    save_file({"logits": logits, "visual_word": visual_word}, arguments.output)


if __name__ == "__main__":
    try:
        main()
    except (Exception, SystemExit) as error:
        if not isinstance(error, SystemExit) or error.code:
            print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)
