"""easy-VQA's questions, captions, conversations."""

import re

import pytest

from helpers.messages import IMAGE, text, without_none
from modeling_vwlmm.data import easy_vqa, open_images
from modeling_vwlmm.data.easy_vqa import kind_of


@pytest.fixture(scope="module")
def questions():
    return easy_vqa("test", "question")


def test_easy_vqa_questions(questions):
    import easy_vqa as source

    texts, answers, _ = source.get_test_questions()
    row = questions[0]
    assert questions.column_names == ["id", "images", "messages", "answer", "kind"]
    assert row["id"] == "0-0"
    assert row["images"] == [{"path": source.get_test_image_paths()[0], "bytes": None}]
    assert without_none(row["messages"]) == [{"role": "user", "content": [IMAGE, text("\n" + texts[0])]}]
    assert row["answer"] == answers[0]
    assert open_images(row)[0].size == (64, 64)
    ids = [tuple(map(int, name.split("-"))) for name in questions["id"]]
    assert len(ids) == 9673 and ids == sorted(ids)
    kinds = questions["kind"][:]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"yes/no": 7136, "color": 1280, "shape": 1257}
    for kind, answer in zip(kinds, questions["answer"], strict=True):
        assert (kind == "yes/no") == (answer in ("yes", "no"))
        assert (kind == "shape") == (answer in ("circle", "rectangle", "triangle"))


def test_easy_vqa_conversations(questions):
    dataset = easy_vqa("test", "conversation")
    assert dataset.column_names == ["id", "images", "messages"]
    assert dataset["id"][:] == [str(i) for i in range(1000)]
    first = [row for row in questions.select(range(30)) if row["id"].startswith("0-")]
    expected = []
    for i, row in enumerate(first):
        question = without_none(row["messages"])[0]["content"]
        expected.append({"role": "user", "content": question if i == 0 else [text(question[1]["text"].strip())]})
        expected.append({"role": "assistant", "content": [text(row["answer"])]})
    assert without_none(dataset[0]["messages"]) == expected
    assert sum(len(messages) // 2 for messages in dataset["messages"]) == 9673


def test_easy_vqa_shuffled_conversations():
    def turns(row):
        texts = [message["content"][-1]["text"].strip() for message in row["messages"]]
        return list(zip(texts[::2], texts[1::2], strict=True))

    dataset = easy_vqa("test", "shuffled-conversation")
    assert len(dataset) == 4000 and dataset["id"][:5] == ["0-0", "0-1", "0-2", "0-3", "1-0"]
    reordered = 0
    for i, row in enumerate(easy_vqa("test", "conversation").select(range(100))):
        orders = [turns(dataset[4 * i + k]) for k in range(4)]
        assert all(sorted(order) == sorted(turns(row)) for order in orders)
        assert all(dataset[4 * i + k]["messages"][0]["content"][0]["type"] == "image" for k in range(4))
        reordered += len({tuple(order) for order in orders}) > 2
    assert reordered > 90


def test_questions_about_colour_and_shape_at_once():
    captions = {row["id"]: row["messages"][-1]["content"][0]["text"] for row in easy_vqa("test", "caption")}
    rows = easy_vqa("test", "pair-conversation").to_list()
    assert [row["id"] for row in rows] == list(captions)
    asked_before = {
        text for row in easy_vqa("test", "question") for text in [row["messages"][0]["content"][-1]["text"]]
    }
    answers = []
    for row in rows:
        texts = [message["content"][-1]["text"].strip() for message in row["messages"]]
        assert len(texts) == 8 and row["messages"][0]["content"][0]["type"] == "image"
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            assert question not in asked_before
            is_there = re.search(r"a? ?(\w+ (circle|rectangle|triangle))", question)[1] == captions[row["id"]][2:]
            assert answer == ("yes" if is_there != bool({"no", "not"} & set(question.split())) else "no")
            answers.append(answer)
    assert 0.45 < answers.count("yes") / len(answers) < 0.55


@pytest.mark.parametrize("split, images, left_out", [("train", 4000, 422), ("test", 1000, 112)])
def test_easy_vqa_captions(split, images, left_out):
    import easy_vqa as source

    dataset = easy_vqa(split, "caption")
    assert dataset.column_names == ["id", "images", "messages"]
    assert len(dataset) == images - left_out
    ids = [int(name) for name in dataset["id"]]
    assert ids == sorted(ids)
    captions = {}
    for row in dataset:
        user, assistant = without_none(row["messages"])
        assert user == {"role": "user", "content": [IMAGE]} and assistant["role"] == "assistant"
        captions[int(row["id"])] = assistant["content"][0]["text"]
    assert all(re.fullmatch(r"a [a-z]+ (circle|rectangle|triangle)", caption) for caption in captions.values())
    get_questions = source.get_train_questions if split == "train" else source.get_test_questions
    direct = 0
    for question, answer, image in zip(*get_questions(), strict=True):
        if image in captions and answer not in ("yes", "no"):
            direct += 1
            assert answer in captions[image].split()
        elif image in captions and question == f"is there a {captions[image].split()[1]} shape?":
            assert answer == "yes"
    assert direct > images


def test_easy_vqa_captions_agree_with_the_pixels():
    import collections

    names = collections.defaultdict(set)
    for row in easy_vqa("test", "caption"):
        colors = open_images(row)[0].getcolors()
        shape = sorted(colors)[-2][1]  # after the background
        names[row["messages"][1]["content"][0]["text"].split()[1]].add(max(range(3), key=lambda i, s=shape: s[i]))
    assert names["red"] == {0} and names["green"] == {1} and names["blue"] == {2}


def test_easy_vqa_refuses_other_names():
    with pytest.raises(ValueError, match="found split 'val', expected one of train, test"):
        easy_vqa("val", "caption")
    with pytest.raises(ValueError, match="found task 'vqa', expected one of caption, conversation, shuffled-"):
        easy_vqa("test", "vqa")


@pytest.mark.parametrize(
    "question, kind",
    [
        ("what color is the shape?", "color"),
        ("what is the color of the circle?", "color"),
        ("what is the blue shape?", "shape"),
        ("what shape does the image contain?", "shape"),
        ("is no red shape present?", "yes/no"),
        ("does the image not contain a circle?", "yes/no"),
    ],
)
def test_kind_of(question, kind):
    assert kind_of(question) == kind


def test_kind_of_another_question():
    with pytest.raises(ValueError, match="found question 'who is it\\?', expected one of easy-VQA's"):
        kind_of("who is it?")
