"""`vwlmm merge`: an adapter and its base model become one model."""

import argparse

from .shared import quiet


def merge(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm merge",
        description="Merge an adapter into the model that it was trained on: a model that needs no PEFT.",
        epilog="example: vwlmm merge runs/7b/lora runs/7b/merged",
    )
    parser.add_argument("adapter", help="folder or repository")
    parser.add_argument("destination", help="the folder to write")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="the base model's if not given")
    arguments = parser.parse_args(argv)

    import torch

    from ..conversion.merge import merge

    quiet()
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else "auto"
    merge(arguments.adapter, arguments.destination, dtype)
