"""What a quickstart model has learnt: answers to the test questions, and what its visual words name."""

import argparse
from collections import Counter, defaultdict

import numpy as np
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor

from modeling_vwlmm.data import easy_vqa, open_images
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


def naming_share(model, processor, k=3):
    """Whether visual words name what their patches show.

    Of the patches that an object mostly covers, the share of which a word among the k most probable is its colour or
    its shape; the same where every image is given the next one's colour and shape, as a control; and their number.
    """
    rows = easy_vqa("test", "caption").to_list()
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


def main():
    parser = argparse.ArgumentParser(description="Measure a quickstart model.")
    parser.add_argument("model", help="its folder")
    parser.add_argument("--pairs", action="store_true", help="ask for a colour and a shape at once too")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    processor = AutoProcessor.from_pretrained(arguments.model)
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
