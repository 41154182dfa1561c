"""What a quickstart model has learnt: answers to the test questions, and what its visual words name."""

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_vwlmm.data import easy_vqa, open_images
from modeling_vwlmm.hub.card import LIMITS_TASK
from modeling_vwlmm.hub.card_facts import EVAL_RESULTS_NAME
from modeling_vwlmm.words import seen_image, top_words


def answer(model, processor, rows):
    """Greedy answers to rows of easy-VQA questions, a word each."""
    inputs = processor(
        images=[open_images(row) for row in rows],
        text=[processor.apply_chat_template(row["messages"], add_generation_prompt=True) for row in rows],
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def pair_questions():
    """The test questions of "pair-conversation", one at a time."""
    rows = []
    for row in easy_vqa("test", "pair-conversation").to_list():
        (image, *_), texts = row["messages"][0]["content"], [m["content"][-1]["text"] for m in row["messages"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            messages = [{"role": "user", "content": [image, {"type": "text", "text": "\n" + question.strip()}]}]
            rows.append({**row, "messages": messages, "answer": answer, "kind": "pair"})
    return Dataset.from_list(rows)


def accuracy(model, processor, questions=None, batch_size=256):
    """Share of right answers to test questions (easy-VQA's if not given), by kind and "overall"; and all answers."""
    questions = easy_vqa("test", "question") if questions is None else questions
    right, answered = defaultdict(list), []
    for start in tqdm(range(0, len(questions), batch_size), desc="test questions"):
        rows = questions.select(range(start, min(start + batch_size, len(questions)))).to_list()
        for row, found in zip(rows, answer(model, processor, rows), strict=True):
            for kind in ("overall", row["kind"]):
                right[kind].append(found.strip() == row["answer"])
            answered.append((row, found.strip()))
    return {kind: np.mean(values) for kind, values in right.items()}, answered


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


@torch.no_grad()
def limits(model, processor, split):
    """Figures of the visual words of a split's images, by what they are: how much they say, and how much they lose."""
    images = [open_images(row)[0] for row in easy_vqa(split, "caption")]
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    words = model.visual_words(pixel_values)
    mass = words.topk(3).values
    features = model.model.project_images(pixel_values).image_hidden_states
    distance = (model.model.pseudo_image_features(features) - features).norm(dim=-1) / features.norm(dim=-1)
    (first, shuffled_first, patches), (three, shuffled, _) = (naming_share(model, processor, k, split) for k in (1, 3))
    return len(images), {
        "patches that the object mostly covers": patches,
        "of these, its colour or shape is the most probable word": first,
        "the same with the names of another image": shuffled_first,
        "of these, its colour or shape is among the three most probable words": three,
        "the same with the names of another image, among three": shuffled,
        "perplexity of a visual word": torch.special.entr(words).sum(-1).exp().mean(),
        "mass of its most probable word": mass[..., 0].mean(),
        "mass of its three most probable words": mass.sum(-1).mean(),
        f"words of {words.shape[-1]} that are ever the most probable": len(words.argmax(-1).unique()),
        "distance of pseudo image features from the features, relative to their norm": distance.mean(),
    }


def shuffled_images(questions):
    """Questions, each about the image after its own."""
    rows = questions.to_list()
    images = {row["id"].split("-")[0]: row["images"] for row in rows}
    following = dict(zip(images, [*list(images)[1:], next(iter(images))], strict=True))
    return Dataset.from_list([{**row, "images": images[following[row["id"].split("-")[0]]]} for row in rows])


def evaluate(model, processor):
    """All of it on test images, and in part on training images, as the fields of `huggingface_hub.EvalResult`."""
    results = []

    def add(task, split, count, figures):
        for name, value in figures.items():
            results.append(
                {
                    "task_type": task,
                    "dataset_type": "easy-vqa",
                    "dataset_name": "easy-VQA",
                    "dataset_split": split,
                    "dataset_args": count,
                    "metric_type": "accuracy" if name.startswith("right answers") else re.sub(r"\W+", "_", name),
                    "metric_name": name,
                    "metric_value": value if isinstance(value, int) else round(float(value), 4),
                }
            )

    for split, step in (("test", 1), ("train", 4)):
        questions = easy_vqa(split, "question")
        questions = questions.select(range(0, len(questions), step))
        right = accuracy(model, processor, questions)[0]
        figures = {"right answers" + (f", {kind}" if kind != "overall" else ""): right[kind] for kind in right}
        if split == "test":
            other = shuffled_images(questions)
            figures["right answers, images of others"] = accuracy(model, processor, other)[0]["overall"]
            was = model.config.pseudo_image_features
            model.config.pseudo_image_features = True
            right = accuracy(model, processor, questions)[0]
            figures["right answers, pseudo image features"] = right["overall"]
            model.config.pseudo_image_features = was
        add("visual-question-answering", split, {"questions": len(questions)}, figures)
    for split in ("test", "train"):
        images, figures = limits(model, processor, split)
        add(LIMITS_TASK, split, {"images": images}, figures)
    return results


def main(argv=None):
    parser = argparse.ArgumentParser(description="Measure a quickstart model.")
    parser.add_argument("model", help="its folder")
    parser.add_argument("--save", action="store_true", help=f"measure more, and write it into its {EVAL_RESULTS_NAME}")
    parser.add_argument("--pairs", action="store_true", help="ask for a colour and a shape at once too")
    arguments = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
    if arguments.save:
        results = evaluate(model, processor)
        for result in results:
            print(f"{result['metric_name']} ({result['dataset_split']}): {result['metric_value']}")
        path = Path(arguments.model) / EVAL_RESULTS_NAME
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
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
