"""What a quickstart model has learnt: answers to the test questions, and what its visual words name."""

import re
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

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


def accuracy(model, processor, batch_size=256):
    """Share of right answers to easy-VQA's test questions by kind, "overall" too, and the answered questions."""
    questions = easy_vqa("test", "question")
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


def naming_share(model, processor):
    """Of the patches that an object mostly covers, the share of which a word among the three most probable is its
    colour or its shape; the same where every image is given the next one's colour and shape; and their number."""
    rows = easy_vqa("test", "caption").to_list()
    images = [open_images(row)[0] for row in rows]
    names = [set(re.findall(r"\w+", row["messages"][-1]["content"][0]["text"])) - {"a"} for row in rows]
    side = round(model.config.image_seq_length**0.5)
    words = top_words(model, processor, images)
    hits = {0: [], 1: []}
    for i, (image, patches) in enumerate(zip(images, words, strict=True)):
        for share, patch in zip(object_share(seen_image(processor, image), side), patches, strict=True):
            if share > 0.5:
                for shift, found in hits.items():
                    found.append(not names[(i + shift) % len(names)].isdisjoint(word for word, _ in patch))
    return np.mean(hits[0]), np.mean(hits[1]), len(hits[0])
