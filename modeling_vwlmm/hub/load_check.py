"""Loads a model's folder the way that those who pull it will: `python load_check.py FOLDER OUTPUT`.

With `--bare` the script hides this package and every other that transformers and torch do not require. With
`--base FOLDER` it loads an adapter on the base model in that folder, whatever the adapter's config names. Into OUTPUT
it writes the last logits and the last visual word of a test picture.
"""

import argparse
import re
import sys
from importlib import metadata
from pathlib import Path


def hide_all_but(distributions: list[str]) -> None:
    """Hide every package from import but these distributions, what they require, and the standard library."""
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
        queue += [re.split(r"[^\w.-]", line)[0] for line in requirements if "extra ==" not in line]
    hidden = {"modeling_vwlmm"} | {
        module
        for module, owners in metadata.packages_distributions().items()
        if not needed & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}
    }
    # Python refuses to import a module that is None here, and find_spec does not find it
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("--base")
    parser.add_argument("--bare", nargs="*", metavar="DISTRIBUTION", help="hide all but transformers, torch and these")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]  # Python puts the script's folder there
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
