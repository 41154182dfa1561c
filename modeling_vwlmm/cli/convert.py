"""`vwlmm convert`: turns another checkpoint into a VW-LMM model, or a VW-LMM model into a LLaVA one."""

from .errors import Parser
from .shared import quiet


SUMMARY = "turn another checkpoint into a VW-LMM model, or a VW-LMM model into a LLaVA one"
EXAMPLE = "vwlmm convert MYTH-Lab/VW-LMM-Vicuna-7b vw-lmm-vicuna-7b"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm convert",
        description="Make a VW-LMM model out of a published VW-LMM checkpoint, a LLaVA checkpoint (in the original's "
        "layout or transformers'), or an LLM and a vision tower. With --to llava, make a LLaVA checkpoint out of a "
        "VW-LMM model.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("source", nargs="?", help="folder or repository of the checkpoint")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--to", choices=["vwlmm", "llava"], default="vwlmm", help="what to make (default: vwlmm)")
    parser.add_argument("--language-model", help="folder or repository of an LLM, or a GGUF file, for a new model")
    parser.add_argument(
        "--vision-tower",
        help="folder or repository of a vision tower, for a new model or in place of the one that a published "
        "checkpoint names",
    )
    parser.add_argument(
        "--variant", help="which published checkpoint it is, if its config does not say: vicuna, mistral or vicuna-pif"
    )
    parser.add_argument(
        "--vm-head",
        choices=["random", "lm_head"],
        help="how a new VM head starts: at random (the default), or as a copy of the LLM's own head",
    )
    parser.add_argument(
        "--vision-feature-layer",
        type=int,
        action="append",
        metavar="N",
        help="which layer of a new model's tower becomes patches: -1 the last, -2 the one before it (the default); "
        "given several times, layers are put side by side",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights that start at random (default: 0)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the checkpoint's")
    arguments = parser.parse_intermixed_args(argv)
    is_new = arguments.language_model is not None
    if is_new == (arguments.source is not None) or (is_new and not arguments.vision_tower):
        parser.error("expected SRC DST, or --language-model X --vision-tower Y DST")
    if (is_new and arguments.variant) or (arguments.to == "llava" and (is_new or arguments.vision_tower)):
        parser.error("--variant is for published checkpoints; --to llava takes SRC DST alone")
    if arguments.vision_feature_layer and not is_new:
        parser.error("--vision-feature-layer is for a new model: the config of a checkpoint says which it reads")

    import torch

    from ..conversion.convert import combine, convert
    from ..conversion.llava import convert_to_llava

    quiet()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    start = {"vm_head": arguments.vm_head or "random", "seed": arguments.seed, "dtype": dtype}
    if is_new:
        if layers := arguments.vision_feature_layer:
            start["vision_feature_layer"] = layers[0] if len(layers) == 1 else layers
        combine(arguments.language_model, arguments.vision_tower, arguments.destination, **start)
    elif arguments.to == "llava":
        convert_to_llava(arguments.source, arguments.destination, dtype=dtype)
    else:
        convert(arguments.source, arguments.destination, arguments.vision_tower, arguments.variant, **start)
