"""The limits report: what readers of the method ask of a model, on held-out and on training images."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaProcessor

from ..data.images import open_images
from ..modeling_vwlmm import VWLmmForCausalLM
from ..words import readable
from . import limits
from .evaluate import OVERALL, Evaluation, evaluate
from .intervals import Interval, interval
from .questions import Question


KEPT = 10  # words of a patch that are kept of its distribution
Value = Interval | float | list[tuple[str, float]]


@dataclass
class Measured:
    """Figures of the visual words of images, in one pass: (images, patches) each if nothing else is said.

    top: the `KEPT` most probable entries, (images, patches, KEPT). mass: of the 1, 3 and `KEPT` most probable, with
    one more axis. mean: of all visual words, (V,).
    """

    top: np.ndarray
    mass: np.ndarray
    perplexity: np.ndarray
    cosine: np.ndarray
    relative_error: np.ndarray
    mean: torch.Tensor


@torch.no_grad()
def measure_images(
    model: VWLmmForCausalLM, processor: LlavaProcessor, images: Iterator[Any], batch_size: int = 8
) -> Measured:
    """What the visual words of images are like, without ever holding more than a batch of them.

    Args:
        images: PIL images.
    """
    parts: dict[str, list[np.ndarray]] = {}
    total, patches = torch.zeros(()), 0
    batch: list[Any] = []

    def add() -> None:
        nonlocal total, patches
        pixel_values = processor.image_processor(batch, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(model.device, model.dtype)
        features = model.model.project_images(pixel_values).image_hidden_states
        pseudo = model.model.pseudo_image_features(features)
        words = model.model.visual_words(features)
        kept = min(KEPT, words.shape[-1])
        found = {
            "top": words.topk(kept, dim=-1).indices,
            "mass": torch.stack([limits.top_mass(words, k) for k in (1, 3, KEPT)], dim=-1),
            "perplexity": limits.perplexity(words),
            "cosine": limits.cosine(features, pseudo),
            "relative_error": limits.relative_error(features, pseudo),
        }
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu().numpy())
        total = total + words.double().sum((0, 1)).cpu()
        patches += words.shape[0] * words.shape[1]

    for image in images:
        batch.append(image)
        if len(batch) == batch_size:
            add()
            batch = []
    if batch:
        add()
    return Measured(mean=total / patches, **{name: np.concatenate(values) for name, values in parts.items()})


def of_other_images(questions: Sequence[Question]) -> list[Question]:
    """The questions, each about the images of the next one that has as many and others.

    Raises:
        ValueError: there is no other image.
    """
    groups: dict[int, dict[Any, list[Any]]] = {}
    for question in questions:
        groups.setdefault(len(question.images), {})[question.image_key] = question.images
    if not any(count and len(group) > 1 for count, group in groups.items()):
        raise ValueError("all questions are about the same image, expected several to exchange")
    following: dict[Any, list[Any]] = {}
    for group in groups.values():
        keys = list(group)
        following.update(zip(keys, [group[key] for key in [*keys[1:], keys[0]]], strict=True))
    return [replace(question, images=following[question.image_key]) for question in questions]


def names_of(questions: Sequence[Question]) -> dict[Any, set[str]]:
    """The words that count as naming each image: its column `names`, or the words of its answers."""
    names: dict[Any, set[str]] = {}
    for question in questions:
        if not question.images:
            continue
        own = question.columns.get("names")
        said = {str(name).lower() for name in own} if own else limits.words_in(question.answers)
        names.setdefault(question.image_key, set()).update(said)
    return names


@dataclass
class Row:
    """A figure of the report: a topic, what it is, and its value on every split.

    That is a number, an interval, or words with their probabilities.
    """

    topic: str
    name: str
    values: dict[str, Value]


def word_rows(
    measured: Measured, vocabulary: list[str], names: list[set[str]], special: list[int]
) -> dict[tuple[str, str], Value]:
    """The figures of a split that need no answers: (topic, name) to an interval over images or a number."""

    def over_images(values: np.ndarray) -> Interval:
        return interval(values.mean(1))

    found: dict[tuple[str, str], Value] = {
        ("information loss", "cosine of f' and f"): over_images(measured.cosine),
        ("information loss", "norm of f' - f over norm of f"): over_images(measured.relative_error),
    }
    named = [i for i, own in enumerate(names) if own]
    is_name = limits.name_matrix(vocabulary, [names[i] for i in named])
    named = [image for image, fits in zip(named, is_name, strict=True) if fits.any()]
    if named:  # of images whose names are words of the vocabulary
        is_name = is_name[is_name.any(1)]
        for k in (1, 3):
            top = measured.top[named, :, :k]
            for what, groups in (("patches", top), ("images", top.reshape(len(top), 1, -1))):
                own, others = limits.naming(groups, is_name)
                title = f"{what} named by " + (f"the top {k} of " if k > 1 else "the first word of ")
                title += "their patch" if what == "patches" else "some patch"
                found["semantic gap", title] = over_images(own)
                found["semantic gap", f"{title}, names of other images"] = over_images(others)
    mean = measured.mean
    found |= {
        ("bias", "words that are the most probable of some patch"): limits.vocabulary_used(measured.top[..., 0]),
        ("bias", "mass of the ten most used words"): limits.mass_of_most_used(mean),
        ("bias", "mass of special tokens"): limits.mass_of(mean, special),
        ("expressiveness", "perplexity of a visual word"): over_images(measured.perplexity),
    }
    for i, k in enumerate((1, 3, KEPT)):
        found["expressiveness", f"mass of its top {k}"] = over_images(measured.mass[..., i])
    return found


def report(
    model: VWLmmForCausalLM,
    processor: LlavaProcessor,
    splits: dict[str, list[Question]],
    retrained: VWLmmForCausalLM | None = None,
    most_images: int = 1000,
    answers_folder: str | os.PathLike | None = None,
    **arguments: Any,
) -> list[Row]:
    """All figures of a model on every split.

    Args:
        model, processor: a pair.
        splits: questions by the name of their split, such as "held out" and "training".
        retrained: a model that was trained to read pseudo image features, if there is one.
        most_images: of how many images of a split the visual words are looked at, the first ones.
        answers_folder: keeps the answers, so that an interrupted report goes on.
        arguments: of [`evaluate`].

    Raises:
        ValueError: a split has no images, or only one.
    """
    vocabulary = [processor.tokenizer.decode([i]).strip().lower() for i in range(model.config.visual_vocab_size)]
    special = list(processor.tokenizer.all_special_ids)
    rows: dict[tuple[str, str], Row] = {}

    def add(split: str, found: dict[tuple[str, str], Value]) -> None:
        for (topic, name), value in found.items():
            rows.setdefault((topic, name), Row(topic, name, {})).values[split] = value

    def answered_by(of: VWLmmForCausalLM, questions: list[Question], variant: str, pseudo: bool) -> Evaluation:
        was, of.config.pseudo_image_features = of.config.pseudo_image_features, pseudo
        path = None if answers_folder is None else Path(answers_folder) / f"answers-limits-{variant}.jsonl"
        try:
            return evaluate(of, processor, questions, answers_path=path, **arguments)
        finally:
            of.config.pseudo_image_features = was

    def accuracy(*asked: Any) -> Interval:
        return next(iter(answered_by(*asked).figures.values()))[OVERALL]

    for split, questions in splits.items():
        if not any(question.images for question in questions):
            raise ValueError(f"the {split} data have no images")
        is_pseudo = model.config.pseudo_image_features
        slug = split.replace(" ", "-")
        # Questions whose images do not open are found by asking: the rest of the report is about the others
        first = answered_by(model, questions, f"{slug}-f", False)
        if first.skipped:
            add(split, {("left out", "questions about images that do not open"): len(first.skipped)})
        questions = first.questions
        others = of_other_images(questions)
        answered: dict[tuple[str, str], Interval | float] = {
            ("information loss", "right answers, reading f"): next(iter(first.figures.values()))[OVERALL],
            ("information loss", "right answers, reading f'"): accuracy(model, questions, f"{slug}-pseudo", True),
        }
        if retrained is not None:
            name = "right answers of the model that was trained to read f'"
            answered["information loss", name] = accuracy(retrained, questions, f"{slug}-retrained", True)
        for pseudo, name in ((is_pseudo, "another image"), (True, "the visual words (f') of another image")):
            variant = f"{slug}-{'words-' if pseudo else ''}of-others"
            answered["alignment control", f"right answers, reading {name}"] = accuracy(model, others, variant, pseudo)
        firsts: dict[Any, Question] = {}
        for question in questions:
            if question.images:
                firsts.setdefault(question.image_key, question)
        shown = dict(list(firsts.items())[:most_images])
        # Of several images of a question the first stands for all
        images = (open_images({**question.row(), "images": question.images[:1]})[0] for question in shown.values())
        names = names_of(questions)
        measured = measure_images(model, processor, images)
        found = word_rows(measured, vocabulary, [names.get(key, set()) for key in shown], special)
        found["bias", "the ten most used words"] = [
            (readable(processor.tokenizer, entry), mass) for entry, mass in limits.most_used(measured.mean)
        ]
        losses = {key: value for key, value in found.items() if key[0] == "information loss"}
        add(split, {**losses, **answered, **found})
    topics = ["information loss", "semantic gap", "bias", "expressiveness", "alignment control", "left out"]
    return sorted(rows.values(), key=lambda row: topics.index(row.topic))
