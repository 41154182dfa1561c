"""`vwlmm words`: draws visual words over images."""

import json
import os
import sys

from .errors import Parser
from .shared import load, open_pictures


SUMMARY = "draw visual words over images"
EXAMPLE = "vwlmm words runs/quickstart/joint a.png b.png --output words.png"
BLANK = 0.9  # the share of patches that one word may have without a warning


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm words",
        description="Lay the most probable visual word of every patch over the images.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("images", nargs="+", metavar="image", help="image files")
    parser.add_argument(
        "--heatmap", nargs="+", metavar="WORD", help="colour where each of these words is, instead of writing words"
    )
    parser.add_argument("--output", help="the picture to write; this or --json is needed")
    parser.add_argument("--json", action="store_true", help="print the words and probabilities of every patch")
    parser.add_argument("--top", type=int, default=3, help="words of a patch in the JSON (default: 3)")
    parser.add_argument(
        "--relative",
        action="store_true",
        help="the words that say most about a patch: more probable on it than on the average patch of these images",
    )
    arguments = parser.parse_args(argv)
    if not (arguments.output or arguments.json):
        parser.error("nothing to do: give --output FILE.png, --json or both")

    if arguments.heatmap and (arguments.json or arguments.relative):
        parser.error("--heatmap draws a picture of its own: --json and --relative are not for it")

    from ..files import replacing
    from ..words import draw_words, most_frequent_word, top_words

    if arguments.output and os.path.exists(arguments.output):
        for path in arguments.images:
            if os.path.exists(path) and os.path.samefile(path, arguments.output):
                parser.error(f"--output {arguments.output} is the image {path}, which it would replace")
    images = open_pictures(arguments.images)
    model, processor = load(arguments.model)
    if arguments.heatmap:
        from ..looking.heatmaps import draw_heatmaps, word_probabilities

        probabilities = word_probabilities(model, processor, images, arguments.heatmap)
        with replacing(arguments.output) as beside:
            draw_heatmaps(processor, images, arguments.heatmap, probabilities).save(beside)
        return
    found = top_words(model, processor, images, k=arguments.top, relative=arguments.relative)
    word, share = most_frequent_word(found)
    if share > BLANK and not arguments.relative:
        print(
            f'vwlmm words: "{word}" is the most probable word of {share:.0%} of the patches, so that the picture says '
            "little: --relative shows what is special about each",
            file=sys.stderr,
        )
    if arguments.output:
        with replacing(arguments.output) as beside:
            draw_words(processor, images, found).save(beside)
    if arguments.json:
        print(
            json.dumps(
                [{"image": path, "patches": patches} for path, patches in zip(arguments.images, found, strict=True)]
            )
        )
