"""How far the answers of another runtime are from those of `generate`, and how fast it is: recipes/serve.md.

python benchmarks/served.py MODEL http://127.0.0.1:8000/v1        a server of OpenAI's chat API, needs openai
python benchmarks/served.py MODEL GRAPHS                          what vwlmm export --to onnx or openvino wrote

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
from transformers import AutoProcessor, DynamicCache
from transformers.exporters import ExportedModel

from modeling_vwlmm import VWLmmForCausalLM


# With the newline that a template puts after an image: llama.cpp drops it
QUESTION = {"type": "text", "text": "\nWhat can be seen here?"}
MESSAGES = [{"role": "user", "content": [{"type": "image"}, QUESTION]}]


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


def ask_model(model, processor, images, tokens):
    text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    inputs = processor(images=images, text=[text] * len(images), return_tensors="pt", padding=True)
    return model.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, output_scores=True, return_dict_in_generate=True
    ), inputs["input_ids"].shape[1]


class Graphs:
    """Answers of exported graphs, one after another."""

    def __init__(self, folder):
        exported = ExportedModel.from_pretrained(folder)
        # OpenVINO computes in bfloat16 where the processor can, unless it is told otherwise
        options = {"config": {"INFERENCE_PRECISION_HINT": "f32"}} if exported.export_format == "openvino" else {}
        self.run, self.config = exported.to(**options).runners, exported.config

    def answer(self, processor, image, tokens):
        """The text of an answer and the log-probability of its first token."""
        text = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        is_image = inputs["input_ids"] == self.config.image_token_id
        read = self.run["embed_tokens"](input_ids=inputs["input_ids"].masked_fill(is_image, 0))["inputs_embeds"]
        features = self.run["image_encoder"](pixel_values=inputs["pixel_values"])["read_by_the_llm"]
        read = read.masked_scatter(is_image[..., None], features.to(read.dtype))
        llm, mask, ids, first = self.config.text_config, inputs["attention_mask"], [], None
        cache = DynamicCache(config=llm)
        for layer in range(llm.num_hidden_layers):
            empty = torch.zeros(1, llm.num_key_value_heads, 0, llm.head_dim, dtype=read.dtype)
            cache.update(empty, empty, layer)
        while len(ids) < tokens:
            output = self.run["language_model"](inputs_embeds=read, attention_mask=mask, past_key_values=cache)
            scores = output["logits"][0, -1].float().log_softmax(-1)
            ids.append(scores.argmax().item())
            first = scores.max().item() if first is None else first
            if ids[-1] == processor.tokenizer.eos_token_id:
                break
            read = self.run["embed_tokens"](input_ids=torch.tensor([ids[-1:]]))["inputs_embeds"]
            mask, cache = torch.cat([mask, mask.new_ones(1, 1)], 1), output["past_key_values"]
        return processor.decode(ids, skip_special_tokens=True), f"{first:.4f}"


class Server:
    """Answers of a server of OpenAI's chat API."""

    def __init__(self, url, name):
        self.client = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
        self.name = name or self.client.models.list().data[0].id

    def ask(self, image, tokens, **options):
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, QUESTION]
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(
            model=self.name, messages=messages, max_tokens=tokens, temperature=0, **options
        )

    def answer(self, processor, image, tokens):
        """The text of an answer and the log-probability of its first token."""
        choice = self.ask(image, tokens, logprobs=True, top_logprobs=1).choices[0]
        scored = choice.logprobs and choice.logprobs.content
        return choice.message.content or "", f"{scored[0].logprob:.4f}" if scored else "not given"


def compare(model, processor, other, side, tokens):
    print(f"{'image':20} {'answers':>9} {'tokens equal':>13} {'first log-probability, ours and theirs':>46}")
    for kind, image in pictures(side).items():
        output, start = ask_model(model, processor, [image], tokens)
        ids = output.sequences[0, start:]
        text = processor.decode(ids, skip_special_tokens=True)
        served, found = other.answer(processor, image, tokens)
        first = output.scores[0][0].float().log_softmax(-1)[ids[0]].item()
        ours = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = processor.tokenizer(served, add_special_tokens=False)["input_ids"]
        same = [a == b for a, b in zip(ours, theirs, strict=False)]
        equal = same.index(False) if False in same else len(same)
        said = "equal" if served.strip() == text.strip() else "differ"
        print(f"{kind:20} {said:>9} {equal:>6} of {len(ours):>3} {first:>30.4f} {found:>15}")


def speed(model, processor, server, side, tokens):
    print(f"\n{'at once':>7} {'generate':>10} {'server':>10}   tokens a second")
    images = list(pictures(side).values())[:3]
    for batch in (1, 16):
        asked = [images[i % len(images)] for i in range(batch)]
        start = time.perf_counter()
        output, prompt = ask_model(model, processor, asked, tokens)
        ours = batch * (output.sequences.shape[1] - prompt) / (time.perf_counter() - start)
        start = time.perf_counter()
        with ThreadPoolExecutor(batch) as pool:
            served = list(pool.map(lambda image: server.ask(image, tokens), asked))
        theirs = sum(answer.usage.completion_tokens for answer in served) / (time.perf_counter() - start)
        print(f"{batch:>7} {ours:>10.1f} {theirs:>10.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder")
    parser.add_argument("other", help="URL of a server, ending in /v1, or folder of graphs")
    parser.add_argument("--name", help="of the model at the server (default: the first that it lists)")
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default: 24)")
    parser.add_argument("--no-speed", action="store_true", help="compare answers alone")
    arguments = parser.parse_args()
    is_server = "://" in arguments.other
    other = Server(arguments.other, arguments.name) if is_server else Graphs(arguments.other)
    model = VWLmmForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    side = model.config.vision_config.image_size
    compare(model, processor, other, side, arguments.tokens)
    if is_server and not arguments.no_speed:
        speed(model, processor, other, side, arguments.tokens)


if __name__ == "__main__":
    main()
