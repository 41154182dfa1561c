"""`vwlmm merge`: merges an adapter into its base model."""

from .errors import Parser
from .shared import quiet


SUMMARY = "merge an adapter into the model that it was trained on"
EXAMPLE = "vwlmm merge runs/7b/lora runs/7b/merged"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm merge",
        description="Merge an adapter into the model that it was trained on. The merged model needs no PEFT.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("adapter", help="folder or repository")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the base model's")
    arguments = parser.parse_args(argv)

    import torch

    from ..conversion.merge import merge

    quiet()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else "auto"
    merge(arguments.adapter, arguments.destination, dtype)
