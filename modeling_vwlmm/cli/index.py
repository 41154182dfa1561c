"""`vwlmm index`: makes a folder of images searchable by their visual words."""

import sys

from .errors import Parser
from .shared import load


SUMMARY = "make a folder of images searchable by their visual words"
EXAMPLE = "vwlmm index photos photos.index --model runs/quickstart/joint"


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm index",
        description="Write an index of the images below a folder: how much of each word of the vocabulary an image "
        "has. Images that do not open are named and skipped.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("folder", help="folder of images")
    parser.add_argument("index", help="the folder to write")
    parser.add_argument("--model", required=True, help="folder or repository of the model that sees them")
    parser.add_argument(
        "--pooling", choices=["max", "sum"], default="max", help="the greatest probability on a patch, or log(1 + sum)"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time (default: 16)")
    arguments = parser.parse_args(argv)
    if arguments.batch_size < 1:
        parser.error(f"--batch-size is {arguments.batch_size}, expected 1 or more")

    from ..looking.search import find_images, make_index, save_index

    paths = find_images(arguments.folder)
    model, processor = load(arguments.model)
    index, skipped = make_index(model, processor, paths, arguments.pooling, arguments.batch_size)
    for line in skipped:
        print(f"vwlmm index: skipped: {line}", file=sys.stderr)
    save_index(index, arguments.index)
    print(f"{len(index.paths)} images in {arguments.index}" + (f", {len(skipped)} skipped" if skipped else ""))
