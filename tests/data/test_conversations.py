"""LLaVA's data files become conversations."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
from datasets import Features, Image, List, Value
from trl.data_utils import prepare_multimodal_messages

from helpers.messages import IMAGE, RECORDS, TALK, render, text, turns, without_none
from modeling_vwlmm.data import conversations as conversations_module
from modeling_vwlmm.data import load_conversations, open_images
from modeling_vwlmm.data import records as records_module


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_load_conversations(load, images, name):
    dataset = load(RECORDS, name)
    assert dataset.features == Features(
        {
            "id": Value("string"),
            "images": List(Image(decode=False)),
            "messages": List(
                {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
            ),
        }
    )
    assert dataset["id"][:] == ["x", "1", "0", "3"]
    root = os.path.realpath(images)
    paths = [[image["path"] for image in row] for row in dataset["images"]]
    assert paths == [[f"{root}/a.png"], [f"{root}/sub/c.png", f"{root}/b.png"], [], []]
    assert all(image["bytes"] is None for row in dataset["images"] for image in row)
    assert without_none(dataset[0]["messages"]) == [
        {"role": "user", "content": [IMAGE, text("\nWhat is this?")]},
        {"role": "assistant", "content": [text("A cat.")]},
        {"role": "user", "content": [text("Sure?")]},
        {"role": "assistant", "content": [text("Yes.")]},
    ]
    assert without_none(dataset[1]["messages"])[0]["content"] == [IMAGE, IMAGE, text("\nCompare.")]
    assert [message["role"] for message in dataset[3]["messages"]] == ["system", "user", "assistant"]


def test_load_conversations_in_pieces(load):
    """More rows than are written to Arrow at once."""
    dataset = load([{"image": "a.png", "conversations": turns("<image>", f"answer {i}")} for i in range(2345)])
    assert dataset["id"][:] == [str(i) for i in range(2345)]
    assert dataset[2344]["messages"][1]["content"][0]["text"] == "answer 2344"


def test_jsonl_with_byte_order_mark_and_blank_lines(load):
    line = json.dumps(RECORDS[2])
    assert len(load(f"\ufeff{line}\n\n{line}\n", "data.jsonl")) == 2


@pytest.mark.parametrize(
    "value, expected",
    [
        ("<image>\nWhat is this?", "<image>\nWhat is this?"),
        ("What is this?\n<image>", "<image>\nWhat is this?"),
        ("What <image> is this? ", "<image>\nWhat  is this?"),
        ("<image>What is this?", "<image>\nWhat is this?"),
        ("<image>\n", "<image>"),
        ("<image>", "<image>"),
        ("First: <image>\nSecond: <image>\nWhich?", "First: <image>\nSecond: <image>\nWhich?"),
        ("", ""),
        ("  no image\n", "  no image\n"),
    ],
)
def test_markers_become_what_llava_makes_of_them(load, value, expected):
    image = ["a.png", "b.png"][: value.count("<image>")]
    messages = load([{"image": image, "conversations": turns(value, "Yes.")}])[0]["messages"]
    assert render("mistral", messages) == f"[INST] {expected} [/INST]Yes.</s>"
    parts = [part["text"] or "" for part in messages[0]["content"]]
    assert all("<image>" not in part for part in parts)


def test_leading_turn_of_gpt_is_dropped(load):
    system = {"from": "system", "value": "Be brief."}
    for head in ([], [system]):
        row = load([{"conversations": head + turns("Welcome", "Hello", "Hi", speakers=("gpt", "human"))}])[0]
        assert [message["content"][0]["text"] for message in row["messages"]][len(head) :] == ["Hello", "Hi"]


def test_messages_pass_through_trl(load):
    for row in load(RECORDS):
        opened = open_images(row)
        prepared = prepare_multimodal_messages(row["messages"], images=opened)
        assert [message["role"] for message in prepared] == [message["role"] for message in row["messages"]]
        parts = [part for message in prepared for part in message["content"]]
        assert [part["image"] for part in parts if part["type"] == "image"] == opened
        for template in ("vicuna_v1", "mistral"):
            assert render(template, prepared) == render(template, row["messages"])


@pytest.mark.parametrize(
    "records, where, found, expected",
    [
        ("", "", "no records", "at least one"),
        ("[]", "", "no records", "at least one"),
        ("[{]", "", "no valid JSON (", "records of conversations"),
        ("[" * 200_000, "", "no valid JSON (", "records of conversations"),
        ('{"id": 1}', "", "a record", "a list of records"),
        ("3", "", "3", "a list of records"),
        ([{"conversations": TALK}, "x"], "sample 1: ", "'x'", "a record with 'conversations'"),
        ([{"id": 1}], "sample 0: conversations: ", "nothing", "a list of turns"),
        ([{"conversations": []}], "sample 0: conversations: ", "nothing", "a list of turns"),
        ([{"conversations": {"from": "human"}}], "sample 0: conversations: ", "a record", "a list of turns"),
        (
            [{"conversations": [*TALK, {"from": "human"}]}],
            "sample 0: conversations[2]: ",
            "the fields ['from']",
            "the fields 'from' and 'value'",
        ),
        (
            [{"conversations": [{"value": "Hello"}]}],
            "sample 0: conversations[0]: ",
            "the fields ['value']",
            "the fields 'from' and 'value'",
        ),
        (
            [{"conversations": ["Hello"]}],
            "sample 0: conversations[0]: ",
            "'Hello'",
            "the fields 'from' and 'value'",
        ),
        (
            [{"conversations": turns("Hello", speakers=("alice", "bob"))}],
            "sample 0: conversations[0].from: ",
            "'alice'",
            "one of human, gpt, system",
        ),
        (
            [{"conversations": [{"from": ["human"], "value": "Hello"}]}],
            "sample 0: conversations[0].from: ",
            "a list",
            "one of human, gpt, system",
        ),
        ([{"conversations": turns("Hello", 3)}], "sample 0: conversations[1].value: ", "3", "text"),
        ([{"conversations": turns("Hello", None)}], "sample 0: conversations[1].value: ", "nothing", "text"),
        (
            [{"conversations": turns("Hello", "\ud83d")}],
            "sample 0: conversations[1].value: ",
            "half of a surrogate pair",
            "text in UTF-8",
        ),
        (
            [{"id": "\ud800", "conversations": turns("Hi", "a")}],
            "sample 0: id: ",
            "half of a surrogate pair",
            "text in UTF-8",
        ),
        (
            [{"conversations": turns("Hello", "Hello", speakers=("human", "human"))}],
            "sample 0: conversations[1].from: ",
            "'human'",
            "'gpt': speakers take turns",
        ),
        (
            [{"conversations": [*TALK, {"from": "system", "value": "Be brief."}]}],
            "sample 0: conversations[2].from: ",
            "'system'",
            "'human': speakers take turns",
        ),
        (
            [{"conversations": turns("Hello", speakers=("gpt", "human"))}],
            "sample 0: conversations: ",
            "no turn of human",
            "at least one",
        ),
        (
            [{"image": "a.png", "conversations": TALK}],
            "sample 0: conversations: ",
            "0 <image> markers",
            "1, one an image",
        ),
        (
            [{"conversations": turns("<image>", "Hi")}],
            "sample 0: conversations: ",
            "1 <image> markers",
            "0, one an image",
        ),
        (
            [{"image": ["a.png", "b.png"], "conversations": turns("<image>\n<image>", "Hi", "<image>")}],
            "sample 0: conversations: ",
            "3 <image> markers",
            "2, one an image",
        ),
        ([{"image": 3, "conversations": turns("<image>", "Hi")}], "sample 0: image: ", "3", "a path"),
        ([{"video": "a.mp4", "conversations": TALK}], "sample 0: ", "the field 'video'", "images alone"),
        (
            [{"image": "a.png", "images": ["a.png"], "conversations": turns("<image>", "Hi")}],
            "sample 0: ",
            "the fields 'image' and 'images'",
            "one of them",
        ),
        ([{"image": [None], "conversations": turns("<image>", "Hi")}], "sample 0: image: ", "nothing", "a path"),
    ],
)
def test_errors_of_data_files(load, tmp_path, records, where, found, expected):
    with pytest.raises(ValueError) as error:
        load(records)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'data.json'}: {where}found {found}"), message
    assert message.endswith(f"expected {expected}"), message
    assert "\n" not in message


@pytest.mark.parametrize("bad", [b"{", b"\xff"])
def test_error_of_a_line(tmp_path, images, bad):
    (tmp_path / "data.jsonl").write_bytes(json.dumps(RECORDS[2]).encode() + b"\n\n" + bad + b"\n")
    with pytest.raises(ValueError, match=r"data\.jsonl: line 3: found no valid JSON \(.*\), expected records"):
        load_conversations(tmp_path / "data.jsonl", images)


def test_missing_file_or_folder(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="^" + re.escape(f"{tmp_path}/none.json: no such data file") + "$"):
        load_conversations(tmp_path / "none.json", images)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{images}: no such data file")):
        load_conversations(images, images)
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}/none: no such image folder")):
        load_conversations(tmp_path / "data.json", tmp_path / "none")


def test_the_field_images_is_read_as_image_is(load):
    names = ["a.png", "b.png"]
    rows = [
        load([{field: names, "conversations": turns("<image>\n<image>", "Hi")}])[0] for field in ("image", "images")
    ]
    assert rows[0] == rows[1] and len(rows[0]["images"]) == 2


def test_an_empty_turn_is_an_empty_text(load):
    messages = load([{"image": "a.png", "conversations": turns("<image>", "")}])[0]["messages"]
    assert messages[-1]["content"] == [{"type": "text", "text": ""}]


def test_what_was_read_is_read_once(load, monkeypatch):
    """Until the file is another, or an image of it is gone, or is reached by another link."""
    reads = []
    read = conversations_module.read_records
    monkeypatch.setattr(conversations_module, "read_records", lambda path: reads.append(path) or read(path))
    first = load(RECORDS)
    second = load(RECORDS)
    assert len(reads) == 1 and first[:] == second[:] and first.features == second.features
    assert second.cache_files
    edited = [*RECORDS[:3], {**RECORDS[3], "id": "edited"}]
    assert load(edited)["id"][-1] == "edited" and len(reads) == 2
    load(RECORDS)
    assert len(reads) == 2


@pytest.mark.parametrize("name", ["vwlmm_conversations-train.arrow", "dataset_info.json"])
@pytest.mark.parametrize("kept", [0, 10, -5, None])
def test_what_is_kept_and_damaged_is_read_again(load, name, kept):
    """A machine that stopped may leave any part of a file."""
    expected = load(RECORDS)[:]
    (arrow,) = {Path(file["filename"]) for file in load(RECORDS).cache_files}
    path = arrow.with_name(name)
    if kept is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:kept])
    assert load(RECORDS)[:] == expected
    assert load(RECORDS)[:] == expected


def test_a_full_disk_is_named(load, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(conversations_module, "to_tables", no_space)
    record = {"id": "not read before", "image": "a.png", "conversations": turns("<image>", "Hi")}
    with pytest.raises(OSError, match="No space left on device: '.*vwlmm_conversations"):
        load([record])


def test_images_are_looked_for_again(load, images):
    (images / "link.png").symlink_to(images / "a.png")
    record = {"image": "link.png", "conversations": turns("<image>", "Hi")}
    assert load([record])[0]["images"][0]["path"].endswith("/a.png")
    (images / "link.png").unlink()
    (images / "link.png").symlink_to(images / "b.png")
    assert load([record])[0]["images"][0]["path"].endswith("/b.png")
    (images / "b.png").unlink()
    with pytest.raises(ValueError, match="sample 0: image: found 'link.png', which does not exist"):
        load([record])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_list_is_read_piece_by_piece(tmp_path, monkeypatch, encoding):
    """Whatever the place at which a piece ends."""
    items = [{"a": "b,]\u00e9\U0001f600"}, 12345, "x", [], None, 1.5e3, {"c": [{"d": "}"}]}, -7]
    path = tmp_path / "data.json"
    for content in (json.dumps(items), json.dumps(items, indent=1, ensure_ascii=False) + "\n ", "[ ]", " "):
        path.write_text(content, encoding=encoding)
        for piece in range(1, 8):
            monkeypatch.setattr(records_module, "PIECE", piece)
            assert list(records_module.read_records(path)) == (items if len(content) > 5 else [])


@pytest.mark.parametrize("content", ["[1 2]", "[1,]", "[1] 2", "[1", "[,1]", "1]", "[1}", '["a]'])
def test_what_is_no_list_says_where_it_ends_to_be_one(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(content)
    with pytest.raises(ValueError, match=re.escape(f"{path}: found no valid JSON ({expected.value}), expected")):
        list(records_module.read_records(path))
