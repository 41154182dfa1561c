"""`vwlmm generate`: an answer to a question about images."""

import argparse

from .shared import load, open_pictures


def generate(argv):
    parser = argparse.ArgumentParser(
        prog="vwlmm generate",
        description="Answer a question about images, word by word.",
        epilog='example: vwlmm generate runs/quickstart/joint cat.png --prompt "what is this?"',
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("images", nargs="+", metavar="image")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    arguments = parser.parse_args(argv)

    from transformers import TextStreamer

    images = open_pictures(arguments.images)
    model, processor = load(arguments.model)
    content = [{"type": "image", "image": image} for image in images]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, {"type": "text", "text": arguments.prompt}]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(
        **inputs.to(model.device, model.dtype),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        streamer=streamer,
    )
