"""What a quickstart model has learnt: answers to the test questions, and what its visual words name."""

import argparse
import re
from collections import Counter
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_vwlmm.data import easy_vqa, open_images
from modeling_vwlmm.evaluation.evaluate import evaluate, results_of
from modeling_vwlmm.evaluation.limits_page import results_of_limits, write_page
from modeling_vwlmm.evaluation.limits_report import report
from modeling_vwlmm.evaluation.questions import questions_of
from modeling_vwlmm.files import write_json
from modeling_vwlmm.hub.card import LIMITS_TASK
from modeling_vwlmm.hub.card_facts import EVAL_RESULTS_NAME
from modeling_vwlmm.words import seen_image, top_words


def pair_questions():
    """The test questions of "pair-conversation", one at a time."""
    rows = []
    for row in easy_vqa("test", "pair-conversation").to_list():
        (image, *_), texts = row["messages"][0]["content"], [m["content"][-1]["text"] for m in row["messages"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            messages = [{"role": "user", "content": [image, {"type": "text", "text": "\n" + question.strip()}]}]
            rows.append({**row, "messages": messages, "answer": answer, "kind": "pair"})
    return Dataset.from_list(rows)


def accuracy(model, processor, questions=None, batch_size=256, progress=True):
    """Share of right answers to test questions (easy-VQA's if not given), by kind and "overall"; and all answers."""
    rows = easy_vqa("test", "question") if questions is None else questions
    found = evaluate(
        model,
        processor,
        questions_of(rows),
        metrics=["exact_match"],
        by=["kind"],
        batch_size=batch_size,
        progress=progress,
        max_new_tokens=3,
    )
    figures = found.figures["exact_match"]
    return {kind: figure.mean for kind, figure in figures.items()}, list(zip(rows, found.answers, strict=True))


def object_share(image, side):
    """Share of every patch that the object covers, (side * side,): where it is not of the border's usual colour."""
    pixels = np.asarray(image).astype(int)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    background = np.array(Counter(map(tuple, border.tolist())).most_common(1)[0][0])
    is_object = np.abs(pixels - background).sum(-1) > 30
    cell = len(pixels) // side
    return is_object.reshape(side, cell, side, cell).mean((1, 3)).reshape(-1)


def naming_share(model, processor, k=3, split="test"):
    """Whether visual words name what their patches show.

    Of the patches that an object mostly covers, the share of which a word among the k most probable is its colour or
    its shape; the same where every image is given the next one's colour and shape, as a control; and their number.
    """
    rows = easy_vqa(split, "caption").to_list()
    images = [open_images(row)[0] for row in rows]
    names = [set(row["messages"][-1]["content"][0]["text"].split()[1:]) for row in rows]
    side = round(model.config.image_seq_length**0.5)
    own, shuffled = [], []
    for i, (image, patches) in enumerate(zip(images, top_words(model, processor, images, k), strict=True)):
        for share, patch in zip(object_share(seen_image(processor, image), side), patches, strict=True):
            if share > 0.5:
                words = {word for word, _ in patch}
                own.append(not words.isdisjoint(names[i]))
                shuffled.append(not words.isdisjoint(names[(i + 1) % len(names)]))
    return np.mean(own), np.mean(shuffled), len(own)


def measure(model, processor, folder):
    """All of it on test images, the limits on as many training questions too, for the card in the folder."""
    questions = {split: questions_of(easy_vqa(split, "question")) for split in ("test", "train")}
    questions["train"] = questions["train"][: len(questions["test"])]
    asked = {"metrics": ["exact_match"], "batch_size": 256, "max_new_tokens": 3, "progress": True}
    results = results_of(evaluate(model, processor, questions["test"], by=["kind"], **asked), "easy-VQA", "test")
    rows = report(model, processor, questions, **asked)
    write_page(rows, folder, "a model of easy-VQA")
    results += results_of_limits(rows, "easy-VQA")
    for split in questions:
        (first, shuffled_first, patches), (three, shuffled, _) = (
            naming_share(model, processor, k, split) for k in (1, 3)
        )
        figures = {
            "patches that the object mostly covers": patches,
            "of these, its colour or shape is the most probable word": first,
            "the same with the names of another image": shuffled_first,
            "of these, its colour or shape is among the three most probable words": three,
            "the same with the names of another image, among three": shuffled,
        }
        results += [
            {
                "task_type": LIMITS_TASK,
                "dataset_type": "easy-VQA",
                "dataset_name": "easy-VQA",
                "dataset_split": split,
                "metric_type": re.sub(r"\W+", "_", name),
                "metric_name": name,
                "metric_value": value if isinstance(value, int) else round(float(value), 4),
            }
            for name, value in figures.items()
        ]
    return sorted(results, key=lambda result: result["dataset_split"])  # as the card's metadata group them


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure a quickstart model.")
    parser.add_argument("model", help="its folder")
    parser.add_argument("--save", action="store_true", help=f"measure more, and write it into its {EVAL_RESULTS_NAME}")
    parser.add_argument("--pairs", action="store_true", help="ask for a colour and a shape at once too")
    arguments = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    if arguments.save:
        results = measure(model, processor, Path(arguments.model))
        for result in results:
            print(f"{result['metric_name']} ({result['dataset_split']}): {result['metric_value']}")
        write_json(Path(arguments.model) / EVAL_RESULTS_NAME, results)
        return
    if arguments.pairs:
        right, _ = accuracy(model, processor, pair_questions())
        print(f"right answers to questions about a colour and a shape at once, %: {100 * right['pair']:.2f}")
    right, _ = accuracy(model, processor)
    print("right answers, %:", ", ".join(f"{kind} {100 * share:.2f}" for kind, share in right.items()))
    for k in (1, 3):
        own, shuffled, patches = naming_share(model, processor, k)
        print(f"patches of {patches} named by the top {k}, %: {100 * own:.1f}, shuffled {100 * shuffled:.1f}")


if __name__ == "__main__":
    main()
