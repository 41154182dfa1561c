"""Answers in a file, a JSON line each, to which an interrupted evaluation goes back."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .questions import Question


class AnswerFile:
    """The answers that a file has, and those that are added to it.

    A line is `{"index", "id", "question", "images", "answer", "references", "run"}`, in the order in which answers
    came. `run` is a hash of what the answers depend on; a line that a kill has cut in two is left out and overwritten.

    Args:
        path: the file; it is made with the first answer.
        run: what the answers depend on beside the questions, as JSON has it: the model's weights, settings.

    Raises:
        ValueError: the file has answers of another run, or to other questions.
    """

    def __init__(self, path: str | os.PathLike, questions: Sequence[Question], run: dict[str, Any]):
        self.path, self.questions = Path(path), questions
        self.run = hashlib.sha256(json.dumps(run, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.answers: dict[int, str] = {}
        self._whole = 0  # bytes of whole lines
        if self.path.exists():
            self._read()

    def missing(self) -> list[int]:
        """The places of the questions that have no answer yet."""
        return [i for i in range(len(self.questions)) if i not in self.answers]

    def write(self, answers: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Append answers as they come, and pass them on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.truncate(self._whole)
            file.seek(self._whole)
            for index, answer in answers:
                question = self.questions[index]
                line = {
                    "index": index,
                    **_asked(question),
                    "images": [image.get("path") for image in question.images if isinstance(image, dict)],
                    "answer": answer,
                    "run": self.run,
                }
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                self.answers[index] = answer
                yield index, answer

    def _read(self) -> None:
        remedy = f"remove the file, or give another --output, to answer anew ({self.path})"
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                index, answer, run = record["index"], record["answer"], record["run"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path}: line {number} is no answer of an evaluation: {remedy}") from error
            if run != self.run:
                raise ValueError(f"there are answers of another model or other settings already: {remedy}")
            self._whole += len(line)
            if index < len(self.questions):
                if {key: record.get(key) for key in ("id", "question", "references")} != _asked(self.questions[index]):
                    raise ValueError(f"there are answers to other questions already: {remedy}")
                self.answers[index] = answer


def _asked(question: Question) -> dict[str, Any]:
    return {"id": question.id, "question": question.text, "references": question.answers}
