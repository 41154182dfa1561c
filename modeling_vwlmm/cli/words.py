"""`vwlmm words`: draws visual words over images."""

import json
import sys

from .errors import Parser
from .shared import check_picture, load, open_pictures, save_picture


SUMMARY = "draw visual words over images"
EXAMPLE = "vwlmm words runs/quickstart/joint a.png b.png --output words.png"
BLANK = 0.9  # the share of patches that one word may have without a warning


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm words",
        description="Lay the most probable visual word of every patch over the images. Neighbours with the same word "
        "have it once.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("images", nargs="+", metavar="image", help="image files")
    parser.add_argument(
        "--heatmap",
        nargs="+",
        metavar="WORD",
        help="colour where each of these words is, instead of writing words; above each picture stands the "
        "probability of its brightest patch, and colours mean the same for all images",
    )
    parser.add_argument("--output", help="the picture to write, .png, .pdf, .svg, ...; this or --json is needed")
    parser.add_argument("--json", action="store_true", help="print the words and probabilities of every patch")
    parser.add_argument("--top", type=int, default=3, help="words of a patch in the JSON (default: 3)")
    parser.add_argument(
        "--expected",
        action="store_true",
        help="in the JSON also what the LLM expected at every patch, p, and the divergence KL(w || p) of its word w",
    )
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
    if arguments.expected and not arguments.json:
        parser.error("--expected is for --json")

    from ..words import draw_words, most_frequent_word, top_words

    check_picture(parser, arguments.output, arguments.images)
    images = open_pictures(arguments.images)
    model, processor = load(arguments.model)
    if arguments.heatmap:
        from ..looking.heatmaps import draw_heatmaps, word_probabilities

        probabilities = word_probabilities(model, processor, images, arguments.heatmap)
        save_picture(draw_heatmaps(processor, images, arguments.heatmap, probabilities), arguments.output)
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
        save_picture(draw_words(processor, images, found), arguments.output)
    if arguments.json:
        printed = [{"image": path, "patches": patches} for path, patches in zip(arguments.images, found, strict=True)]
        if arguments.expected:
            from ..looking.patches import read_patches

            for record, image in zip(printed, images, strict=True):
                patches = read_patches(model, processor, image, arguments.top)
                record |= {"expected": [patch.expected for patch in patches], "kl": [patch.kl for patch in patches]}
        print(json.dumps(printed))
