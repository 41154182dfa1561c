"""`vwlmm export`: writes a model as other runtimes read it."""

from .errors import Parser
from .shared import quiet


SUMMARY = "write a model as other runtimes read it"
EXAMPLE = "vwlmm export vw-lmm-vicuna-7b llava --to llava"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm export",
        description="Write a VW-LMM model as a checkpoint of transformers' LLaVA, without its VM head, for runtimes "
        "that read LLaVA; or with the code that computes it, for transformers without this package.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or, for llava, repository of the model")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--to", choices=["llava", "remote-code"], required=True, help="what to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of llava's weights (default: the model's)"
    )
    arguments = parser.parse_args(argv)
    if arguments.to == "remote-code" and arguments.dtype:
        parser.error("--dtype is for --to llava: remote-code copies the weights as they are")

    import torch

    from ..conversion.llava import convert_to_llava
    from ..hub.repository import export_with_code

    quiet()
    if arguments.to == "llava":
        dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
        convert_to_llava(arguments.model, arguments.destination, dtype=dtype)
    else:
        export_with_code(arguments.model, arguments.destination)
