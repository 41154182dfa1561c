"""Conversations about images, as TRL reads them: LLaVA's JSON files, easy-VQA and the published chat templates.

Every data set has the columns
    id: string
    images: list of `{"path", "bytes"}`, any number a row; files stay closed until `open_images`
    messages: list of `{"role", "content"}`, a content being a list of `{"type": "image"}` and
        `{"type": "text", "text"}` parts with one image part for each of `images`, in their order
"""

import functools
import io
import itertools
import json
import os
import random
import re
import stat
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import PIL.Image
import pyarrow as pa
from datasets import Dataset, Features, Image, List, Value


IMAGE_MARKER = "<image>"
COLORS = {"black", "blue", "brown", "gray", "green", "red", "teal", "yellow"}
SHAPES = {"circle", "rectangle", "triangle"}
# easy-VQA's own wordings, which ask for one of the two
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
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
CHAT_TEMPLATES = Path(__file__).parent / "chat_templates"
FEATURES = Features(
    {
        "id": Value("string"),
        # datasets' own decoding names no sample in its errors and, unlike LLaVA, turns images by their EXIF tag
        "images": List(Image(decode=False)),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
    }
)


def load_conversations(data_path: str | os.PathLike, image_folder: str | os.PathLike) -> Dataset:
    """LLaVA's training data: a .json file with a list of records, or a .jsonl file with a record a line.

    A record is `{"id": ..., "image": "a.jpg" | ["a.jpg", ...], "conversations": [{"from": ..., "value": ...}, ...]}`,
    `id` and `image` being optional, with the speakers human, gpt and system. As in LLaVA-1.5 the marker of a turn with
    one `<image>` moves to its front, on a line of its own, and a turn of gpt before the first human one is dropped. In
    a turn with several markers they stay where they are.

    Args:
        data_path: the file.
        image_folder: the folder that image paths are relative to. Images are looked for, not read.

    Returns:
        A `Dataset` with the columns of this module, a row for each record in the order of the file. `id` is the
        record's place in the file, from 0, where it has none.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the file or a record is not as above, a number of markers is not the number of images, an image
            is missing or lies outside of the folder.
    """
    data_path, image_folder = os.fspath(data_path), os.fspath(image_folder)
    if not os.path.isfile(data_path):
        raise FileNotFoundError(f"{data_path}: no such data file")
    if not os.path.isdir(image_folder):
        raise FileNotFoundError(f"{image_folder}: no such image folder (of {data_path})")
    folder = _ImageFolder(image_folder)
    dataset = _to_dataset(_read_record(r, i, data_path, folder) for i, r in enumerate(_read_records(data_path)))
    if len(dataset) == 0:
        raise ValueError(f"{data_path}: found no records, expected at least one")
    return dataset


def open_images(example: dict) -> list[PIL.Image.Image]:
    """Opens the images of a row in RGB, as LLaVA does: no turning by EXIF, transparency dropped.

    Args:
        example: `images` holds `{"path", "bytes"}` or PIL images; `sample_index` and `id` (optional) name the row.

    Raises:
        ValueError: a file is missing, broken, no image, or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """
    return [_open_image(image, example) for image in example["images"]]


def easy_vqa(split: str, task: str) -> Dataset:
    """The easy-VQA data set (4,000 + 1,000 images of one coloured shape), from the PyPI package `easy_vqa`.

    Args:
        split: "train" or "test".
        task: what a row is.
            "caption": an image and its description, like "a blue triangle". The questions tell neither colour nor
                shape of 422 training and 112 test images, which are left out.
            "conversation": an image and all of its questions with their answers.
            "shuffled-conversation": the same, each image four times, with its questions in four random orders. A model
                that will be asked one question at a time learns too little from the first ones of 4,000 conversations.
            "pair-conversation": an image and four questions that easy-VQA does not ask, with their answers: about a
                colour and a shape at once, like "is there a red circle?". Of the images that "caption" has.
            "question": an image and one question, not answered in `messages` but in `answer`.

    Returns:
        A `Dataset` with the columns of this module, sorted by image; "question" adds `answer` and `kind` (`kind_of`).

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
    questions = {image: [] for image in sorted(get_paths())}
    for question, answer, image in zip(*get_questions(), strict=True):
        questions[image].append((question, answer))
    extra = {"answer": Value("string"), "kind": Value("string")} if task == "question" else {}
    return _to_dataset(tasks[task](questions, get_paths()), Features({**FEATURES, **extra}))


def kind_of(question: str) -> str:
    """The kind of an easy-VQA question: "color", "shape" or "yes/no"; `ValueError` for any other question."""
    if re.match(r"(is|does)\b", question):
        return "yes/no"
    # "what color is the shape?" asks for the colour
    for kind in ("color", "shape"):
        if re.match(rf"what\b.*\b{kind}\b", question):
            return kind
    raise ValueError(f"found question {question!r}, expected one of easy-VQA's")


def read_chat_template(name: str) -> str:
    """A chat template in Jinja: "vicuna_v1", "mistral" or "plain" (no roles); `ValueError` for any other name.

    They render what the published code feeds, without the beginning-of-sequence token, which its tokenizer adds, and
    mark with `{% generation %}` what the assistant says and the end of its turn.
    """
    names = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja"))
    if name not in names:
        raise ValueError(f"found chat template {name!r}, expected one of {', '.join(names)}")
    return (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _to_dataset(rows: Iterable[dict], features: Features = FEATURES) -> Dataset:
    # Straight into Arrow, in pieces: Dataset.from_list takes 20 times as long, from_generator would cache by file name
    rows, schema = iter(rows), features.arrow_schema
    tables = [schema.empty_table()]
    while piece := list(itertools.islice(rows, 1000)):
        tables.append(pa.Table.from_pylist(piece, schema=schema))
    return Dataset(pa.concat_tables(tables))


def _read_records(data_path: str) -> Iterator:
    is_lines, where = data_path.endswith(".jsonl"), data_path
    with open(data_path, "rb") as file:
        try:
            if is_lines:
                for number, line in enumerate(file, start=1):
                    where = f"{data_path}: line {number}"
                    if line.strip():
                        yield json.loads(line)
                return
            content = file.read()
            records = json.loads(content) if content.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: found no valid JSON ({error}), expected records of conversations") from error
    if not isinstance(records, list):
        raise ValueError(f"{data_path}: found {_describe(records)}, expected a list of records")
    yield from records


def _read_record(record, index: int, data_path: str, folder: "_ImageFolder") -> dict:
    where = f"{data_path}: sample {index}"
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found {_describe(record)}, expected a record with 'conversations'")
    messages = _read_turns(record.get("conversations"), where)
    names = record.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    markers = sum(part["type"] == "image" for message in messages for part in message["content"])
    if markers != len(names):
        raise ValueError(
            f"{where}: conversations: found {markers} {IMAGE_MARKER} markers, expected {len(names)}, one an image"
        )
    sample_id = record.get("id")
    return {
        "id": str(index if sample_id is None else sample_id),
        "images": [{"path": folder.find(name, where)} for name in names],
        "messages": messages,
    }


def _read_turns(turns, where: str) -> list[dict]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{where}: conversations: found {_describe(turns)}, expected a list of turns")
    messages, expected = [], "human"
    for i, turn in enumerate(turns):
        field = f"{where}: conversations[{i}]"
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            found = f"the fields {sorted(turn)}" if isinstance(turn, dict) else _describe(turn)
            raise ValueError(f"{field}: found {found}, expected the fields 'from' and 'value'")
        speaker, value = turn["from"], turn["value"]
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise ValueError(f"{field}.from: found {_describe(speaker)}, expected one of {', '.join(ROLES)}")
        if not isinstance(value, str):
            raise ValueError(f"{field}.value: found {_describe(value)}, expected text")
        if re.search("[\ud800-\udfff]", value):  # JSON can hold it, Arrow cannot
            raise ValueError(f"{field}.value: found half of a surrogate pair, expected text in UTF-8")
        if speaker == "gpt" and not any(message["role"] == "user" for message in messages):
            continue
        if speaker != "system" or i > 0:
            if speaker != expected:
                raise ValueError(f"{field}.from: found {speaker!r}, expected {expected!r}: speakers take turns")
            expected = "gpt" if speaker == "human" else "human"
        messages.append({"role": ROLES[speaker], "content": _parts(value)})
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{where}: conversations: found no turn of human, expected at least one")
    return messages


def _parts(text: str) -> list[dict]:
    """The parts of a turn, with a single marker in front as LLaVA-1.5's preprocess_multimodal has it."""
    if text.count(IMAGE_MARKER) == 1:
        text = f"{IMAGE_MARKER}\n{text.replace(IMAGE_MARKER, '').strip()}".strip()
    pieces = [piece for piece in re.split(f"({IMAGE_MARKER})", text) if piece]
    return [{"type": "image"} if piece == IMAGE_MARKER else {"type": "text", "text": piece} for piece in pieces]


def _describe(value) -> str:
    if value is None or value == []:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a record" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _ImageFolder:
    """Finds images below a folder with one or two calls of the file system for each."""

    def __init__(self, path: str):
        self.path = path
        self.root = os.path.realpath(path)
        self.realpath = functools.cache(os.path.realpath)  # of folders, which are few

    def find(self, name, where: str) -> str:
        """The absolute path of an image, links resolved; `ValueError` if it is outside of the folder or missing."""
        if not isinstance(name, str):
            raise ValueError(f"{where}: image: found {_describe(name)}, expected a path")
        found = f"{where}: image: found {_describe(name)}"
        try:
            parent, base = os.path.split(name)
            path = os.path.join(self.realpath(os.path.join(self.root, parent)), base)
            if os.path.islink(path):
                path = os.path.realpath(path)
            is_inside = path.startswith(os.path.join(self.root, "")) and not os.path.isabs(name)
            is_file = is_inside and stat.S_ISREG(os.stat(path).st_mode)
        except (OSError, ValueError):  # ValueError: a name that no file can have
            is_inside, is_file = True, False
        if not is_inside:
            raise ValueError(f"{found}, which leads out of the folder, expected a path below {self.path}")
        if not is_file:
            raise ValueError(f"{found}, which does not exist or is no file, expected a file below {self.path}")
        return path


def _open_image(image: dict | PIL.Image.Image, example: dict) -> PIL.Image.Image:
    in_memory = isinstance(image, PIL.Image.Image)
    try:
        with warnings.catch_warnings():
            # Twice as many pixels are an error already
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            if in_memory:
                return image.convert("RGB")
            source = image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"])
            with PIL.Image.open(source) as opened:
                return opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on broken data
        sample = example.get("sample_index", example.get("id"))
        where = "" if sample is None else f"sample {sample}: "
        name = image.get("path") if isinstance(image, dict) else None
        raise ValueError(
            f"{where}image {name or '(in memory)'}: {type(error).__name__}: {error}, expected a whole image"
        ) from error


def _row(sample_id: str, path: str, turns: list[tuple[str, str]]) -> dict:
    messages = [{"role": ROLES[speaker], "content": _parts(text)} for speaker, text in turns]
    return {"id": sample_id, "images": [{"path": path}], "messages": messages}


def _caption_rows(questions: dict[int, list[tuple[str, str]]], paths: dict[int, str]) -> Iterator[dict]:
    for image, answered in questions.items():
        colors, shapes = set(COLORS), set(SHAPES)
        for question, answer in answered:
            words = set(re.findall(r"\w+", question))
            is_yes_no = kind_of(question) == "yes/no"
            # What a question takes for granted ("what color is the circle?") and its answer hold both
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
