"""How fast an evaluation is beside a bare loop over `generate`, on easy-VQA's test questions.

python benchmarks/evaluation.py [MODEL]        needs easy-vqa
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

import modeling_vwlmm  # noqa: F401
from modeling_vwlmm.data import easy_vqa
from modeling_vwlmm.evaluation.evaluate import evaluate
from modeling_vwlmm.evaluation.questions import questions_of


NEW_TOKENS = 3


@torch.no_grad()
def bare_loop(model, processor, dataset, batch_size):
    """What one would write by hand: it reads images, renders prompts, generates and decodes, and measures nothing."""
    rows, answers = dataset.to_list(), []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        images = [Image.open(row["images"][0]["path"]).convert("RGB") for row in batch]
        texts = [processor.apply_chat_template(row["messages"][:1], add_generation_prompt=True) for row in batch]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt").to(model.device)
        found = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers += processor.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def evaluation(model, processor, dataset, batch_size):
    """All that `vwlmm evaluate` does with the same questions: figures, intervals and the file of answers too."""
    with tempfile.TemporaryDirectory() as folder:
        return evaluate(
            model,
            processor,
            questions_of(dataset),
            by=["kind"],
            batch_size=batch_size,
            answers_path=Path(folder) / "answers.jsonl",
            max_new_tokens=NEW_TOKENS,
        ).answers


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="hub_card/vwlmm-nano", help="folder (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    dataset = easy_vqa("test", "question")
    dataset = dataset.select(range(min(arguments.questions, len(dataset))))
    seconds = {bare_loop: [], evaluation: []}
    answers = {}
    for turn in range(arguments.rounds + 1):  # the first warms up
        for run, found in seconds.items():
            started = time.perf_counter()
            answers[run] = run(model, processor, dataset, arguments.batch_size)
            found += [time.perf_counter() - started] if turn else []
    bare, ours = (statistics.median(found) for found in seconds.values())
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"{len(dataset):,} questions, {arguments.batch_size} at a time, on {device}; medians of {arguments.rounds}")
    print(f"{'bare loop over generate':26}{len(dataset) / bare:8.0f} questions a second")
    print(
        f"{'evaluate':26}{len(dataset) / ours:8.0f} questions a second, {bare / ours:.2f} of it; {same:,} same answers"
    )


if __name__ == "__main__":
    main()
