"""What a stage did to the LLM's other abilities: its answers to questions without an image, and how well it reads."""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoProcessor

import modeling_vwlmm  # noqa: F401  registers the model


PROMPTS = [
    "What is the capital of France?",
    "What is 7 + 5?",
    "Name three colors.",
    "Write one sentence about the sea.",
    "Translate to Spanish: good morning.",
    "Why is the sky blue?",
]


@torch.no_grad()
def perplexity(model, tokenizer, text, length=512):
    """exp of the mean cross-entropy of a text's tokens, in pieces of that many."""
    ids = torch.tensor(tokenizer.encode(text))
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=piece[None]).logits[0, :-1], piece[1:], reduction="none")
        for piece in ids.split(length)
        if len(piece) > 1
    ]
    return torch.cat(losses).mean().exp().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="their folders")
    parser.add_argument("--text", default="CONTRIBUTING.md", help="a file to read")
    arguments = parser.parse_args(argv)
    for folder in arguments.models:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        processor = AutoProcessor.from_pretrained(folder)
        text = Path(arguments.text).read_text(encoding="utf-8")
        print(f"{folder}: perplexity of {arguments.text} {perplexity(model, processor.tokenizer, text):.2f}")
        for prompt in PROMPTS:
            rendered = processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            ids = torch.tensor([processor.tokenizer.encode(rendered)])
            generated = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
            print(f"  {prompt} {processor.tokenizer.decode(generated, skip_special_tokens=True)!r}", flush=True)


if __name__ == "__main__":
    main()
