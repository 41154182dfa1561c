"""`vwlmm convert`: another checkpoint becomes a VW-LMM model, or a VW-LMM model a LLaVA one."""

import argparse

from .shared import quiet


def convert(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm convert",
        description="Make a VW-LMM model of a published VW-LMM checkpoint, of a LLaVA checkpoint (the original's or "
        "transformers'), or of an LLM and a vision tower; or, with --to llava, a LLaVA checkpoint of a VW-LMM model.",
        epilog="example: vwlmm convert MYTH-Lab/VW-LMM-Vicuna-7b vw-lmm-vicuna-7b",
    )
    parser.add_argument("source", nargs="?", help="folder or repository of the checkpoint")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--to", choices=["vwlmm", "llava"], default="vwlmm")
    parser.add_argument("--language-model", help="folder or repository of an LLM, or a GGUF file, to start anew from")
    parser.add_argument(
        "--vision-tower",
        help="folder or repository of a vision tower: to start anew from, or instead of the one that a published "
        "checkpoint names",
    )
    parser.add_argument(
        "--variant", help="vicuna, mistral or vicuna-pif: what a published checkpoint is, if its config does not say"
    )
    parser.add_argument(
        "--vm-head",
        choices=["random", "lm_head"],
        help="how a new VM head starts: at random (default) or as a copy of the LLM's own head",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what starts at random")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the checkpoint's if not given")
    arguments = parser.parse_intermixed_args(argv)
    is_new = arguments.language_model is not None
    if is_new == (arguments.source is not None) or (is_new and not arguments.vision_tower):
        parser.error("expected SRC DST, or --language-model X --vision-tower Y DST")
    if (is_new and arguments.variant) or (arguments.to == "llava" and (is_new or arguments.vision_tower)):
        parser.error("--variant is for published checkpoints; --to llava takes SRC DST alone")

    import torch

    from ..conversion.convert import combine, convert
    from ..conversion.llava import convert_to_llava

    quiet()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    start = {"vm_head": arguments.vm_head or "random", "seed": arguments.seed, "dtype": dtype}
    if is_new:
        combine(arguments.language_model, arguments.vision_tower, arguments.destination, **start)
    elif arguments.to == "llava":
        convert_to_llava(arguments.source, arguments.destination, dtype=dtype)
    else:
        convert(arguments.source, arguments.destination, arguments.vision_tower, arguments.variant, **start)
