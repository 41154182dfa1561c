"""Chat templates render what LLaVA's code does."""

import json
import re

import jinja2
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from helpers import ROOT
from helpers.messages import IMAGE, render, text
from modeling_vwlmm.processing import read_chat_template


PUBLISHED = json.loads((ROOT / "tests" / "fixtures" / "templates.json").read_text(encoding="utf-8"))
VICUNA_SYSTEM = PUBLISHED[0]["rendered"].split(" USER:")[0]


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


def test_photos_are_asked_about_as_in_training():
    """Whose conversations have a line break after the image; what is asked from the command line has none."""
    template = (ROOT / "recipes" / "photos" / "chat_template.jinja").read_text(encoding="utf-8")
    chats = [[{"role": "user", "content": [IMAGE, text(asked)]}] for asked in ("\nWhat is this?", "What is this?")]
    rendered, _ = render_jinja_template(chats, chat_template=template)
    assert rendered == ["<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"] * 2


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
