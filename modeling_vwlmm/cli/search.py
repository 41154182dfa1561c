"""`vwlmm search`: finds images by words."""

from .errors import Parser
from .shared import check_picture, save_picture


SUMMARY = "find the images of an index by words"
EXAMPLE = 'vwlmm search photos.index "red circle" --output found.png'


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm search",
        description="Print the images of an index that have most of the words, the best first, with their scores.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("index", help="the folder that `vwlmm index` wrote")
    parser.add_argument("text", help="one or more words of the model's vocabulary")
    parser.add_argument("--top", type=int, default=10, help="how many images (default: 10)")
    parser.add_argument("--output", help="a picture of them to write")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        parser.error(f"--top is {arguments.top}, expected 1 or more")

    from ..looking.search import draw_results, load_index, search

    index = load_index(arguments.index)
    check_picture(parser, arguments.output, index.paths)
    results = search(index, arguments.text, arguments.top)
    for path, score in results:
        print(f"{score:8.4f}  {path}")
    if arguments.output:
        save_picture(draw_results(results), arguments.output)
