"""`vwlmm generate`: answers a question about images."""

from .errors import Parser
from .shared import load, open_pictures


SUMMARY = "answer a question about images"
EXAMPLE = 'vwlmm generate runs/quickstart/joint cat.png --prompt "what is this?"'


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="vwlmm generate",
        description="Answer a question about images. The answer is printed word by word.",
        epilog=f"example: {EXAMPLE}",
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument(
        "images", nargs="+", metavar="image", help="image files, in the order that the model reads them"
    )
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="the longest answer (default: 256)")
    arguments = parser.parse_args(argv)

    from transformers import TextStreamer

    from ..processing import question_about

    images = open_pictures(arguments.images)
    model, processor = load(arguments.model)
    inputs = question_about(processor, images, arguments.prompt)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs.to(model.device, model.dtype),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
