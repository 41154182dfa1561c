"""Data sets in LLaVA's and TRL's formats as questions."""

import datasets
import pytest

from helpers.conversations import picture
from modeling_vwlmm.evaluation.questions import column_of, questions_of


def rows(*rows):
    dataset = datasets.Dataset.from_list(list(rows))
    if "images" in dataset.column_names:
        dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    return dataset


def turn(role, text, images=0):
    return {"role": role, "content": [{"type": "image", "text": None}] * images + [{"type": "text", "text": text}]}


def test_each_turn_is_asked_by_itself_about_the_images_so_far():
    messages = [
        turn("user", "\nwhat?", 1),
        turn("assistant", "cat"),
        turn("user", "and?", 1),
        turn("assistant", "dog"),
    ]
    first, second = questions_of(rows({"id": "x", "images": [picture(0), picture(1)], "messages": messages}))
    assert (first.id, first.text, first.answers) == ("x#0", "what?", ["cat"])
    assert first.prompt == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]}]
    assert (second.id, second.text, second.answers) == ("x#1", "and?", ["dog"])
    assert second.prompt[0]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\nand?"}]
    assert len(first.images) == 1 and len(second.images) == 2 and first.image_key != second.image_key


def test_with_history_the_turns_before_and_their_answers_come_first():
    messages = [turn("system", "s"), turn("user", "what?", 1), turn("assistant", "cat"), turn("user", "color?")]
    dataset = rows({"images": [picture(0)], "messages": messages, "answer": "red"})
    first, second = questions_of(dataset, with_history=True)
    assert [message["role"] for message in second.prompt] == ["system", "user", "assistant", "user"]
    assert first.answers == ["cat"] and second.answers == ["red"] and first.image_key == second.image_key
    alone = questions_of(dataset)[1]
    assert [message["role"] for message in alone.prompt] == ["system", "user"]
    assert alone.prompt[1]["content"][0] == {"type": "image"}


@pytest.mark.parametrize("answers", [["red", "dark red"], [{"answer": "red"}, {"answer": "dark red"}]])
def test_several_answers(answers):
    (question,) = questions_of(rows({"images": [picture(0)], "messages": [turn("user", "?", 1)], "answers": answers}))
    assert question.answers == ["red", "dark red"]


def test_prompt_and_completion():
    said = [{"role": "user", "content": "what?"}], [{"role": "assistant", "content": "cat"}]
    conversational = {"prompt": said[0], "completion": said[1]}
    (question,) = questions_of(rows({"images": [picture(0)], **conversational}))
    assert question.answers == ["cat"] and question.prompt[0]["content"][0] == {"type": "image"}
    (question,) = questions_of(rows({"images": [picture(0)], "prompt": "<image>\nUSER: what?", "completion": " cat"}))
    assert (question.prompt, question.text, question.answers) == ("<image>\nUSER: what?", "USER: what?", ["cat"])


def test_columns_and_limit():
    dataset = rows(*({"messages": [turn("user", str(i))], "answer": "1", "kind": f"k{i % 2}"} for i in range(5)))
    questions = questions_of(dataset, limit=3)
    assert column_of(questions, "kind") == ["k0", "k1", "k0"] and column_of(questions, "question") == ["0", "1", "2"]
    with pytest.raises(ValueError, match='no column "sort", expected one of answer, kind, question'):
        column_of(questions, "sort")


def test_rows_without_answers_or_with_other_images():
    with pytest.raises(ValueError, match="sample 0 has no answer to compare with, expected a turn of the assistant"):
        questions_of(rows({"messages": [turn("user", "what?")]}))
    with pytest.raises(ValueError, match="sample 0 has no turn of a user"):
        questions_of(rows({"messages": [turn("assistant", "what?")]}))
    messages = [turn("user", "what?", 2), turn("assistant", "cat")]
    with pytest.raises(ValueError, match="sample 0: "):
        questions_of(rows({"images": [picture(0)], "messages": messages}))
