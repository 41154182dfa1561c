"""How far a server's answers are from those of `generate`, and how fast it is beside it: recipes/serve.md.

python benchmarks/served.py MODEL http://127.0.0.1:8000/v1        needs openai

MODEL is the VW-LMM model itself, whichever export of it the server has loaded. The images are squares of the tower's
size, so that no way of resizing comes between, and one that is not.
"""

import argparse
import base64
import io
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from openai import OpenAI
from PIL import Image
from transformers import AutoProcessor

from modeling_vwlmm import VWLmmForCausalLM


QUESTION = "What can be seen here?"


def pictures(side):
    flat = Image.new("RGB", (side, side), (30, 90, 200))
    ramp = Image.linear_gradient("L").resize((side, side))
    smooth = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    sharp = Image.frombytes(
        "L", (side, side), bytes(255 * ((x // 5 + y // 7) % 2) for y in range(side) for x in range(side))
    )
    return {
        "flat": flat,
        "smooth": smooth,
        "sharp": sharp.convert("RGB"),
        "wide, to be padded": smooth.resize((2 * side, side), Image.Resampling.BICUBIC),
    }


def data_url(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def ask_server(client, name, image, tokens, **options):
    content = [
        {"type": "image_url", "image_url": {"url": data_url(image)}},
        {"type": "text", "text": f"\n{QUESTION}"},  # llama.cpp drops the newline that a template puts there
    ]
    return client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": content}], max_tokens=tokens, temperature=0, **options
    )


def ask_model(model, processor, images, tokens):
    content = [{"type": "image"}, {"type": "text", "text": f"\n{QUESTION}"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=images, text=[text] * len(images), return_tensors="pt", padding=True)
    return model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, output_scores=True, return_dict_in_generate=True
    ), inputs["input_ids"].shape[1]


def compare(model, processor, client, name, side, tokens):
    print(f"{'image':20} {'answers':>9} {'tokens equal':>13} {'first log-probability, ours and the server`s':>46}")
    for kind, image in pictures(side).items():
        output, start = ask_model(model, processor, [image], tokens)
        ids = output.sequences[0, start:]
        text = processor.decode(ids, skip_special_tokens=True)
        choice = ask_server(client, name, image, tokens, logprobs=True, top_logprobs=1).choices[0]
        served = choice.message.content or ""
        first = output.scores[0][0].float().log_softmax(-1)[ids[0]].item()
        scored = choice.logprobs and choice.logprobs.content
        found = f"{scored[0].logprob:.4f}" if scored else "not given"
        ours = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = processor.tokenizer(served, add_special_tokens=False)["input_ids"]
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        equal = same.index(False) if False in same else len(same)
        said = "equal" if served.strip() == text.strip() else "differ"
        print(f"{kind:20} {said:>9} {equal:>6} of {len(ours):>3} {first:>30.4f} {found:>15}")


def speed(model, processor, client, name, side, tokens):
    print(f"\n{'at once':>7} {'generate':>10} {'server':>10}   tokens a second")
    images = list(pictures(side).values())[:3]
    for batch in (1, 16):
        asked = [images[i % len(images)] for i in range(batch)]
        start = time.perf_counter()
        output, prompt = ask_model(model, processor, asked, tokens)
        ours = batch * (output.sequences.shape[1] - prompt) / (time.perf_counter() - start)
        start = time.perf_counter()
        with ThreadPoolExecutor(batch) as pool:
            served = list(pool.map(lambda image: ask_server(client, name, image, tokens), asked))
        theirs = sum(answer.usage.completion_tokens for answer in served) / (time.perf_counter() - start)
        print(f"{batch:>7} {ours:>10.1f} {theirs:>10.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder")
    parser.add_argument("url", help="of the server, ending in /v1")
    parser.add_argument("--name", help="of the model at the server (default: the first that it lists)")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default: 24)")
    parser.add_argument("--no-speed", action="store_true", help="compare answers alone")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none", max_retries=0, timeout=600)
    name = arguments.name or client.models.list().data[0].id
    model = VWLmmForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    processor.tokenizer.padding_side = "left"
    side = model.config.vision_config.image_size
    compare(model, processor, client, name, side, arguments.tokens)
    if not arguments.no_speed:
        speed(model, processor, client, name, side, arguments.tokens)


if __name__ == "__main__":
    main()
