"""easy-VQA, a data set of images of one coloured shape, as conversations."""

import random
import re
from collections.abc import Iterator

from datasets import Dataset, Features, Value

from ..processing import IMAGE_MARKER
from .conversations import FEATURES, ROLES, message_parts, to_dataset


COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
# easy-VQA asks in these words for a colour or a shape; here they ask for both at once
PAIR_WORDINGS = [
    "is there a {}?",
    "is there not a {}?",
    "is there a {} in the image?",
    "is there not a {} in the image?",
    "does the image contain a {}?",
    "does the image not contain a {}?",
    "is a {} present?",
    "is no {} present?",
]


def easy_vqa(split: str, task: str) -> Dataset:
    """Load the easy-VQA data set (4,000 + 1,000 images of one coloured shape) from the PyPI package `easy_vqa`.

    Args:
        split: "train" or "test".
        task: what a row is.
            "caption": an image and its description, like "a blue triangle". 422 training and 112 test images are left
                out, because their questions tell neither colour nor shape.
            "conversation": an image and all of its questions with their answers.
            "shuffled-conversation": the same, with each image four times and its questions in four random orders. The
                first questions of 4,000 conversations alone teach a model too little to answer single questions.
            "pair-conversation": an image of those in "caption" and four questions that easy-VQA does not ask, with
                their answers. They ask about a colour and a shape at once, like "is there a red circle?".
            "question": an image and one question, whose answer is not in `messages` but in `answer`.

    Returns:
        A `Dataset` with the columns that `conversations` describes, sorted by image. "question" adds the columns
        `answer` and `kind` (see `kind_of`).

    Raises:
        ImportError: the package `easy_vqa` is not installed.
        ValueError: an unknown split or task.
    """
    import easy_vqa as source

    splits = {
        "train": (source.get_train_questions, source.get_train_image_paths),
        "test": (source.get_test_questions, source.get_test_image_paths),
    }
    tasks = {
        "caption": _caption_rows,
        "conversation": _conversation_rows,
        "shuffled-conversation": _shuffled_conversation_rows,
        "pair-conversation": _pair_conversation_rows,
        "question": _question_rows,
    }
    if split not in splits:
        raise ValueError(f"easy_vqa: found split {split!r}, expected one of {', '.join(splits)}")
    if task not in tasks:
        raise ValueError(f"easy_vqa: found task {task!r}, expected one of {', '.join(tasks)}")
    get_questions, get_paths = splits[split]
    questions: dict[int, list[tuple[str, str]]] = {image: [] for image in sorted(get_paths())}
    for question, answer, image in zip(*get_questions(), strict=True):
        questions[image].append((question, answer))
    extra = {"answer": Value("string"), "kind": Value("string")} if task == "question" else {}
    return to_dataset(tasks[task](questions, get_paths()), Features({**FEATURES, **extra}))


def kind_of(question: str) -> str:
    """The kind of an easy-VQA question: "color", "shape" or "yes/no"; `ValueError` for any other question."""
    if re.match(r"(is|does)\b", question):
        return "yes/no"
    # The colour comes first, because "what color is the shape?" names both and asks for the colour
    for kind in ("color", "shape"):
        if re.match(rf"what\b.*\b{kind}\b", question):
            return kind
    raise ValueError(f"found question {question!r}, expected one of easy-VQA's")


def _row(sample_id: str, path: str, turns: list[tuple[str, str]]) -> dict:
    messages = [{"role": ROLES[speaker], "content": message_parts(text)} for speaker, text in turns]
    return {"id": sample_id, "images": [{"path": path}], "messages": messages}


def _caption_rows(questions: dict[int, list[tuple[str, str]]], paths: dict[int, str]) -> Iterator[dict]:
    for image, answered in questions.items():
        colors, shapes = set(COLORS), set(SHAPES)
        for question, answer in answered:
            words = set(re.findall(r"\w+", question))
            is_yes_no = kind_of(question) == "yes/no"
            # All other questions name only what is true: "what color is the circle?" takes a circle for granted
            holds = (answer == "yes") != bool(words & {"no", "not"}) if is_yes_no else True
            for candidates, names in ((colors, COLORS), (shapes, SHAPES)):
                if named := (words | {answer}) & names:
                    candidates -= names - named if holds else named
        if len(colors) == len(shapes) == 1:
            yield _row(str(image), paths[image], [("human", IMAGE_MARKER), ("gpt", f"a {min(colors)} {min(shapes)}")])


def _conversation_rows(questions: dict[int, list[tuple[str, str]]], paths: dict[int, str]) -> Iterator[dict]:
    for image, answered in questions.items():
        turns = [turn for question, answer in answered for turn in (("human", question), ("gpt", answer))]
        turns[0] = ("human", f"{IMAGE_MARKER}\n{turns[0][1]}")
        yield _row(str(image), paths[image], turns)


def _shuffled_conversation_rows(questions: dict[int, list[tuple[str, str]]], paths: dict[int, str]) -> Iterator[dict]:
    order = random.Random(0)
    for image, answered in questions.items():
        for i in range(4):
            row = next(_conversation_rows({image: order.sample(answered, len(answered))}, paths))
            yield {**row, "id": f"{image}-{i}"}


def _pair_conversation_rows(questions: dict[int, list[tuple[str, str]]], paths: dict[int, str]) -> Iterator[dict]:
    asked = random.Random(0)
    for row in _caption_rows(questions, paths):
        _, color, shape = row["messages"][-1]["content"][0]["text"].split()
        other_color, other_shape = asked.choice(sorted(COLORS - {color})), asked.choice(sorted(SHAPES - {shape}))
        wrong = [(other_color, shape), (color, other_shape), (other_color, other_shape)]
        turns = []
        for wording in asked.sample(PAIR_WORDINGS, 4):
            is_there = asked.random() < 0.5
            pair = (color, shape) if is_there else asked.choice(wrong)
            is_negated = re.search(r"\b(no|not)\b", wording) is not None
            turns += [("human", wording.format(" ".join(pair))), ("gpt", "yes" if is_there != is_negated else "no")]
        turns[0] = ("human", f"{IMAGE_MARKER}\n{turns[0][1]}")
        yield _row(row["id"], paths[int(row["id"])], turns)


def _question_rows(questions: dict[int, list[tuple[str, str]]], paths: dict[int, str]) -> Iterator[dict]:
    for image, answered in questions.items():
        for i, (question, answer) in enumerate(answered):
            row = _row(f"{image}-{i}", paths[image], [("human", f"{IMAGE_MARKER}\n{question}")])
            yield {**row, "answer": answer, "kind": kind_of(question)}
