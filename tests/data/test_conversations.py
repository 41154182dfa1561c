import io
import json
import os
import re
from pathlib import Path

import jinja2
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template
from trl.data_utils import prepare_multimodal_messages

from modeling_vwlmm.data import easy_vqa, load_conversations, open_images
from modeling_vwlmm.data.easy_vqa import kind_of
from modeling_vwlmm.processing import read_chat_template


PUBLISHED = json.loads((Path(__file__).parent / "data" / "templates.json").read_text(encoding="utf-8"))
VICUNA_SYSTEM = PUBLISHED[0]["rendered"].split(" USER:")[0]
IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def turns(*values, speakers=("human", "gpt")):
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


def render(template, messages, **kwargs):
    return render_jinja_template([messages], chat_template=read_chat_template(template), **kwargs)[0][0]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.png", "sub/c.png")):
        PILImage.new("RGB", (4 + i, 3), (10 * i, 20, 30)).save(folder / name)
    return folder


@pytest.fixture
def load(tmp_path, images):
    """Writes records as a data file and loads it."""

    def load(records, name="data.json"):
        content = records
        if not isinstance(records, str):
            content = "\n".join(map(json.dumps, records)) if name.endswith(".jsonl") else json.dumps(records)
        (tmp_path / name).write_text(content, encoding="utf-8")
        return load_conversations(tmp_path / name, images)

    return load


def without_none(messages):
    """Arrow fills the missing text of image parts with None."""
    return [
        {**message, "content": [{k: v for k, v in part.items() if v is not None} for part in message["content"]]}
        for message in messages
    ]


RECORDS = [
    {"id": "x", "image": "a.png", "conversations": turns("<image>\nWhat is this?", "A cat.", "Sure?", "Yes.")},
    {"image": ["sub/c.png", "b.png"], "conversations": turns("<image><image>\nCompare.", "No.")},
    {"id": 0, "conversations": turns("Hello", "Hi")},
    {"id": None, "image": None, "conversations": [{"from": "system", "value": "Be brief."}, *turns("Hello", "Hi")]},
]


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


TALK = turns("Hello", "Hi")


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


@pytest.mark.parametrize(
    "name, problem",
    [
        ("../secret.png", "which leads out of the folder"),
        ("sub/../../secret.png", "which leads out of the folder"),
        ("../missing.png", "which leads out of the folder"),
        ("../images-of-others/a.png", "which leads out of the folder"),
        ("{absolute}", "which leads out of the folder"),
        ("link.png", "which leads out of the folder"),
        ("folder_link/secret.png", "which leads out of the folder"),
        ("none.png", "which does not exist or is no file"),
        ("nowhere/a.png", "which does not exist or is no file"),
        ("sub", "which does not exist or is no file"),
        ("", "which does not exist or is no file"),
        ("a\0.png", "which does not exist or is no file"),
        ("loop.png", "which does not exist or is no file"),
        ("x" * 5000, "which does not exist or is no file"),
    ],
)
def test_images_outside_of_the_folder_or_missing(load, tmp_path, images, name, problem):
    (tmp_path / "images-of-others").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "images-of-others" / "a.png"):
        PILImage.new("RGB", (2, 2)).save(path)
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "folder_link").symlink_to(tmp_path)
    (images / "loop.png").symlink_to(images / "loop.png")
    name = name.format(absolute=images / "a.png")
    with pytest.raises(ValueError) as error:
        load([{"conversations": TALK}, {"image": name, "conversations": turns("<image>", "Hi")}])
    message, found = str(error.value), repr(name) if len(repr(name)) <= 80 else repr(name)[:77] + "..."
    assert message.startswith(f"{tmp_path / 'data.json'}: sample 1: image: found {found}, {problem}, expected "), (
        message
    )
    assert message.endswith(f" below {images}")


def test_links_inside_of_the_folder(load, images):
    (images / "link.png").symlink_to(images / "sub" / "c.png")
    (images / "other").symlink_to(images / "sub")
    names = ["link.png", "other/c.png", "sub/../sub/c.png"]
    row = load([{"image": names, "conversations": turns("<image>" * 3, "Hi")}])[0]
    assert {image["path"] for image in row["images"]} == {os.path.realpath(images / "sub" / "c.png")}


def test_images_are_not_read_before_they_are_opened(load, images):
    (images / "a.png").write_text("no image")
    row = load(RECORDS[:1])[0]
    with pytest.raises(ValueError, match=r"^sample x: image .*/a\.png: UnidentifiedImageError: .*expected a whole"):
        open_images(row)
    with pytest.raises(ValueError, match=r"^sample 12: image .*/a\.png: "):
        open_images({**row, "sample_index": 12})
    os.remove(images / "a.png")
    with pytest.raises(ValueError, match=r"^sample x: image .*/a\.png: FileNotFoundError: "):
        open_images(row)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_truncated_image(tmp_path, format):
    path = tmp_path / "image"
    PILImage.effect_noise((64, 64), 50).save(path, format)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"^sample 3: image {re.escape(str(path))}: OSError: .*truncated"):
        open_images({"sample_index": 3, "images": [{"path": str(path), "bytes": None}]})
    with pytest.raises(ValueError, match=r"^sample 3: image \(in memory\): OSError: .*truncated"):
        open_images({"sample_index": 3, "images": [{"path": None, "bytes": path.read_bytes()}]})
    with pytest.raises(ValueError, match=r"^sample 3: image \(in memory\): OSError: .*truncated"):
        open_images({"sample_index": 3, "images": [PILImage.open(io.BytesIO(path.read_bytes()))]})


@pytest.mark.parametrize("limit, error", [(10, "DecompressionBombWarning"), (7, "DecompressionBombError")])
def test_decompression_bomb(images, monkeypatch, limit, error):
    path = str(images / "b.png")  # 15 pixels
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"^sample 0: image {re.escape(path)}: {error}: .*decompression bomb"):
        open_images({"sample_index": 0, "images": [{"path": path, "bytes": None}]})
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 15)
    assert len(open_images({"sample_index": 0, "images": [{"path": path, "bytes": None}]})) == 1


def test_images_open_as_in_llava(tmp_path):
    """Every mode becomes RGB as `Image.open(file).convert("RGB")` makes it."""
    color = PILImage.effect_noise((9, 7), 90).convert("RGB")
    palette = color.quantize(8)
    palette.info["transparency"] = 0
    exif = PILImage.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    saved = {
        "rgba.png": (PILImage.merge("RGBA", [*color.split(), PILImage.effect_noise((9, 7), 90)]), {}),
        "palette.png": (palette, {"transparency": 0}),
        "cmyk.jpg": (color.convert("CMYK"), {}),
        "grey16.png": (PILImage.new("I;16", (9, 7), 300), {}),
        "bilevel.png": (color.convert("1"), {}),
        "turned.jpg": (color, {"exif": exif}),
    }
    for name, (image, options) in saved.items():
        image.save(tmp_path / name, **options)
        path = str(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        expected = PILImage.open(io.BytesIO(data)).convert("RGB")
        stored = [{"path": path, "bytes": None}, {"path": "gone.png", "bytes": data}, PILImage.open(io.BytesIO(data))]
        opened = open_images({"images": stored})
        assert [(i.mode, i.size, i.tobytes()) for i in opened] == [("RGB", (9, 7), expected.tobytes())] * 3, name


def test_open_images_of_other_datasets(images):
    features = Features({"images": List(Image())})
    row = Dataset.from_dict({"images": [[str(images / "a.png"), str(images / "b.png")]]}, features=features)[0]
    assert [image.size for image in open_images(row)] == [(4, 3), (5, 3)]
    assert open_images({"images": []}) == []


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: entry["template"])
@pytest.mark.parametrize("form", ["strings", "parts", "parts_without_newline"])
def test_templates_render_what_is_published(entry, form):
    messages = [message for message in entry["messages"] if message["content"] is not None]
    assert messages == entry["messages"][: len(messages)] and len(entry["messages"]) - len(messages) <= 1
    if form != "strings":
        newline = "" if form == "parts" else "\n"
        messages = [
            {
                **message,
                "content": [
                    IMAGE if piece == "<image>" else text(piece.removeprefix(newline))
                    for piece in re.split("(<image>)", message["content"])
                    if piece
                ],
            }
            for message in messages
        ]
    is_prompt = len(messages) < len(entry["messages"])
    assert render(entry["template"], messages, add_generation_prompt=is_prompt) == entry["rendered"]


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "plain"])
def test_templates_with_images(template):
    content = [IMAGE, IMAGE, text("Compare "), IMAGE, text(""), text("and this.")]
    rendered = render(template, [{"role": "user", "content": content}])
    around = {"vicuna_v1": f"{VICUNA_SYSTEM} USER: {{}} ", "mistral": "[INST] {} [/INST]", "plain": "{}\n"}
    assert rendered == around[template].format("<image><image>\nCompare <image>and this.")


@pytest.mark.parametrize("content", ["Be brief.", [text("Be brief.")]])
def test_templates_with_a_system_message(content):
    messages = [
        {"role": "system", "content": content},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    assert render("vicuna_v1", messages, add_generation_prompt=True) == (
        "Be brief. USER: Hello ASSISTANT: Hi</s>USER: Bye ASSISTANT:"
    )
    assert render("mistral", messages) == "[INST] Be brief.\n\nHello [/INST]Hi</s>[INST] Bye [/INST]"
    with pytest.raises(jinja2.TemplateError, match="found a message of system, expected one of user"):
        render("plain", messages)


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "plain"])
@pytest.mark.parametrize(
    "roles, found, expected",
    [
        (["assistant"], "assistant", "user"),
        (["user", "user"], "user", "assistant"),
        (["user", "assistant", "assistant"], "assistant", "user"),
        (["user", "system"], "system", "assistant"),
        (["user", "tool"], "tool", "assistant"),
    ],
)
def test_templates_refuse_roles_that_do_not_alternate(template, roles, found, expected):
    with pytest.raises(jinja2.TemplateError, match=f"found a message of {found}, expected one of {expected}: "):
        render(template, [{"role": role, "content": "Hello"} for role in roles])


@pytest.mark.parametrize("template", ["vicuna_v1", "mistral", "plain"])
def test_templates_refuse_other_parts(template):
    with pytest.raises(jinja2.TemplateError, match="found a content part of type video, expected image or text"):
        render(template, [{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize(
    "template, splitter",
    [(template, splitter) for template in ("vicuna_v1", "mistral", "plain") for splitter in ("characters", "words")]
    + [("vicuna_v1", "metaspace")],
)
def test_templates_mask_what_the_assistant_says(template, splitter):
    messages = [
        {"role": "user", "content": [IMAGE, text("What is this?")]},
        {"role": "assistant", "content": [text("A red circle.")]},
        {"role": "user", "content": "ASSISTANT: Red?"},
        {"role": "assistant", "content": " Red.\n"},
    ]
    end = "\n" if template == "plain" else "</s>"
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    pattern = {"characters": r"[\s\S]", "words": r"\s|\w+|[^\w\s]"}
    if splitter == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern[splitter]), "isolated")
    rendered = render(template, messages)
    tokenizer.train_from_iterator(
        [rendered], trainers.WordLevelTrainer(special_tokens=["<unk>", "<image>", "</s>"], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = read_chat_template(template)
    output = tokenizer.apply_chat_template(
        [messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    said, previous = [], 0
    for is_said, (start, stop) in zip(output["assistant_masks"][0], output["offset_mapping"][0], strict=True):
        if is_said:
            said += [""] * (not previous)
            said[-1] += rendered[start:stop]
        previous = is_said
    expected = [f"A red circle.{end}", f" Red.\n{end}"]
    if splitter == "metaspace":  # a token holds the space before its word
        said, expected = [s.strip() for s in said], [e.strip() for e in expected]
    assert said == expected


def test_read_chat_template_of_an_unknown_name():
    for name in ("chatml", "../vicuna_v1", ""):
        with pytest.raises(ValueError, match="expected one of mistral, plain, vicuna_v1$") as error:
            read_chat_template(name)
        assert f"found chat template {name!r}" in str(error.value)


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
