"""`vwlmm search`: finds images by words."""

from .errors import Parser


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

    import os

    from ..files import replacing
    from ..looking.search import draw_results, load_index, search

    index = load_index(arguments.index)
    if arguments.output and os.path.exists(arguments.output):
        for path in index.paths:
            if os.path.exists(path) and os.path.samefile(path, arguments.output):
                parser.error(f"--output {arguments.output} is the image {path}, which it would replace")
    results = search(index, arguments.text, arguments.top)
    for path, score in results:
        print(f"{score:8.4f}  {path}")
    if arguments.output:
        with replacing(arguments.output) as beside:
            draw_results(results).save(beside)
