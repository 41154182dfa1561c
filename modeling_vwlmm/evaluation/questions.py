"""What a held-out data set asks: its rows as questions, each with its right answers."""

import functools
import hashlib
import json
import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.load import load_dataset, number_samples
from ..data.message_images import gather_images
from ..data.records import read_records
from ..processing import IMAGE_MARKER


@dataclass
class Question:
    """A question about images, to be asked by itself.

    Args:
        id: the row's, or its place in the data set.
        images: those of [`open_images`], in the order of their places in the prompt.
        prompt: messages that end with a user's, or a text with `<image>` markers that is fed as it is.
        answers: the right ones, one or more; none where it is only asked.
        columns: the other columns of the row, and "question", its text.
        row_id: the id that all questions of its row share, if there are several.
    """

    id: str
    images: list[Any]
    prompt: list[dict[str, Any]] | str
    answers: list[str]
    columns: dict[str, Any] = field(default_factory=dict)
    row_id: str | None = None

    @property
    def text(self) -> str:
        return self.columns["question"]

    @functools.cached_property
    def image_key(self) -> Hashable:
        """What tells its images from others': paths, or hashes of what is in memory; without images, its row's id."""
        return tuple(map(_key_of, self.images)) or self.row_id or self.id

    def row(self) -> dict[str, Any]:
        """What [`open_images`] takes."""
        return {"images": self.images, "id": self.id}


def load_questions(
    name: str,
    image_folder: str | os.PathLike | None = None,
    split: str = "test",
    with_history: bool = False,
    limit: int | None = None,
) -> list[Question]:
    """The questions of a data set, see [`questions_of`]. A data file of LLaVA's may have further fields.

    Args:
        name, image_folder, split: as in [`load_dataset`].
        with_history: see [`questions_of`].
        limit: how many are asked at most, the first ones.

    Raises:
        ValueError: the data set or a row is not as expected, or there is no answer to compare with.
    """
    dataset = load_dataset(name, image_folder, split)
    extra: Iterable[Any] = ({} for _ in range(len(dataset)))
    if name.endswith((".json", ".jsonl")):
        extra = read_records(name)
    try:
        return questions_of(dataset, extra, with_history, limit)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def questions_of(
    dataset: Dataset,
    extra: Iterable[dict[str, Any]] | None = None,
    with_history: bool = False,
    limit: int | None = None,
) -> list[Question]:
    """The questions of rows in LLaVA's or TRL's format.

    A row has `messages`, or a `prompt` with a `completion`, and `images` or an `image`. Each turn of the assistant is
    the answer to a question, and each question is asked by itself, about all images that the row has shown until then.
    A last turn that nobody answers has its answers in a column `answer` or `answers`: a text, or a list of texts or of
    `{"answer": text}` as in VQAv2.

    Args:
        dataset: the rows.
        extra: further columns of each row.
        with_history: ask a question after the turns before it, with their right answers.
        limit: how many questions at most, the first ones.

    Raises:
        ValueError: a row asks nothing, or has no right answer.
    """
    dataset = number_samples(dataset)
    found: list[Question] = []
    for index, (row, more) in enumerate(zip(dataset, extra or ({} for _ in range(len(dataset))), strict=True)):
        where = f"sample {index}"
        columns = {name: value for name, value in {**more, **row}.items() if name not in _FORMAT}
        questions = _of_row(row, columns, where, with_history)
        if not any(question.answers for question in questions):
            raise ValueError(
                f"{where} has no answer to compare with, expected a turn of the assistant after a question, or a "
                'column called "answer" or "answers"'
            )
        for number, question in enumerate(questions):
            if len(questions) > 1:
                question.row_id, question.id = question.id, f"{question.id}#{number}"
            found.append(question)
            if limit is not None and len(found) == limit:
                return found
    return found


_FORMAT = {"image", "images", "messages", "prompt", "completion", "conversations", "sample_index"}


def _of_row(row: dict[str, Any], columns: dict[str, Any], where: str, with_history: bool) -> list[Question]:
    images = [image for image in [row.get("image"), *(row.get("images") or [])] if image is not None]
    name = str(row["id"] if row.get("id") is not None else row.get("sample_index", where))
    listed = columns.get("answers") if columns.get("answers") is not None else columns.get("answer")
    references = _texts(listed)
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        references = references or _texts(row.get("completion"))
        question = prompt.replace(IMAGE_MARKER, "").strip()
        return [Question(name, images, prompt, references, {**columns, "question": question})]
    messages = row.get("messages") or [*(prompt or []), *(row.get("completion") or [])]
    try:
        turns, images = gather_images(messages, images, IMAGE_MARKER)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    found = []
    for i, turn in enumerate(turns):
        if turn["role"] != "user":
            continue
        is_last = i == len(turns) - 1
        if not is_last and turns[i + 1]["role"] != "assistant":
            continue
        shown = sum(part["type"] == "image" for before in turns[: i + 1] for part in before["content"])
        asked = turns[: i + 1] if with_history else [*_system(turns), _alone(turn, shown)]
        said = references if is_last else [_text_of(turns[i + 1])]
        found.append(Question(name, images[:shown], asked, said, {**columns, "question": _text_of(turn)}))
    if not found:
        raise ValueError(f"{where} has no turn of a user, expected a question")
    return found


def _system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [turn for turn in turns[:1] if turn["role"] == "system"]


def _alone(turn: dict[str, Any], images: int) -> dict[str, Any]:
    """A turn with all images that were shown until then at its front, if it does not have them itself."""
    own = sum(part["type"] == "image" for part in turn["content"])
    if own == images:
        return turn
    places = [{"type": "image"} for _ in range(images)]
    return {**turn, "content": [*places, {"type": "text", "text": f"\n{_text_of(turn)}"}]}


def _text_of(turn: dict[str, Any]) -> str:
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text").strip()


def _texts(answers: Any) -> list[str]:
    """The texts in a column of answers."""
    if answers is None:
        return []
    listed = answers if isinstance(answers, (list, tuple)) else [answers]
    return [str(answer["answer"] if isinstance(answer, dict) else answer).strip() for answer in listed]


def _key_of(image: Any) -> str:
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    return hashlib.sha256(image if isinstance(image, bytes) else np.asarray(image).tobytes()).hexdigest()


def column_of(questions: list[Question], name: str) -> list[str]:
    """The values of a column as texts; `ValueError` if there is none of this name."""
    names = sorted({column for question in questions for column in question.columns})
    if name not in names:
        raise ValueError(f'the data have no column "{name}", expected one of {", ".join(names)}')
    return [_as_text(question.columns.get(name)) for question in questions]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
