"""Turns of LLaVA's data files, messages made of them."""

from transformers.utils.chat_template_utils import render_jinja_template

from modeling_vwlmm.processing import read_chat_template


IMAGE = {"type": "image"}


def text(value):
    return {"type": "text", "text": value}


def turns(*values, speakers=("human", "gpt")):
    return [{"from": speakers[i % 2], "value": value} for i, value in enumerate(values)]


def render(template, messages, **kwargs):
    return render_jinja_template([messages], chat_template=read_chat_template(template), **kwargs)[0][0]


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
TALK = turns("Hello", "Hi")
