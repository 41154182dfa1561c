"""Batches: which tokens are labels, what does not fit."""

from pathlib import Path

import datasets
import pytest
import trl
from tokenizers import processors

from helpers.conversations import ANSWERS, IMAGES, PLAIN_TEMPLATE, conversations, picture, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import batch_of, sft_config, trainer_of
from modeling_vwlmm.data import collator
from modeling_vwlmm.processing import read_chat_template
from modeling_vwlmm.trainer import VWLmmSFTTrainer


def labelled_text(trainer):
    batch = batch_of(trainer)
    assert not (batch["labels"] == trainer.model.config.image_token_id).any()
    assert ((batch["labels"] == batch["input_ids"]) | (batch["labels"] == -100)).all()
    tokenizer = trainer.processing_class.tokenizer
    return sorted(tokenizer.decode(labels[labels != -100]) for labels in batch["labels"])


MARKED_TEMPLATE = PLAIN_TEMPLATE.replace(
    "{{ message.content[0].text }}{{ eos_token }}",
    "{% generation %}{{ message.content[0].text }}{{ eos_token }}{% endgeneration %}",
)


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE, read_chat_template("vicuna_v1")])
def test_labels_are_the_assistant_turns(tmp_path, template):
    said = [f"{answer}</s>" for answer in ANSWERS]
    expected = sorted([said[0], 2 * said[1], said[2], 2 * said[3]])
    found = labelled_text(trainer_of(tmp_path, template=template.replace("</s>", " </s> ")))
    assert [text.replace(" ", "") for text in found] == [text.replace(" ", "") for text in expected]


def test_all_text_is_labelled_without_assistant_only_loss(tmp_path):
    assert all(text.startswith("<s>") for text in labelled_text(trainer_of(tmp_path, assistant_only_loss=False)))


def test_text_without_an_image_column_trains(tmp_path):
    dataset = conversations().remove_columns("images")
    trainer = trainer_of(tmp_path, dataset=dataset)
    trainer.train()
    assert trainer.state.log_history[0]["lm_loss"] > 0 and trainer.state.log_history[0]["vw_loss"] == 0


def test_images_that_do_not_fit_are_an_error_and_text_is_cut(tmp_path):
    trainer = trainer_of(tmp_path, max_length=8)  # the sample of two images needs 1 + 2 * 4
    with pytest.raises(
        ValueError, match=r"sample 2 has 18 tokens, 8 of them image placeholders that end at token 9: .* max_length 8"
    ):
        batch_of(trainer)
    assert batch_of(trainer_of(tmp_path, max_length=9))["input_ids"].shape == (4, 9)


def test_a_row_whose_answers_are_all_cut_off_is_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(collator.logger, "warning", said.append)
    rows = [
        {"images": [], "messages": [{"role": "user", "content": "w20 " * n}, {"role": "assistant", "content": "w7"}]}
        for n in (2, 9)
    ]
    batch = batch_of(trainer_of(tmp_path, dataset=datasets.Dataset.from_list(rows), max_length=8))
    assert (batch["labels"] != -100).any(1).sum() == 1
    assert said == ["sample 1 has 13 tokens: max_length 8 cuts off all that is scored of it"]


def test_bad_batches_are_named(tmp_path):
    nobody_answers = conversations().map(lambda row: {"messages": row["messages"][:1]})
    with pytest.raises(ValueError, match=r"no token of the batch is a label.*sample 0"):
        batch_of(trainer_of(tmp_path, dataset=nobody_answers))


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path):
    template = PLAIN_TEMPLATE.replace("w97 {{ message", "w97 {% if loop.last %}w96 {% endif %}{{ message")
    with pytest.raises(ValueError, match="mark it with {% generation %}"):
        batch_of(trainer_of(tmp_path, template=template))


TRLS_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen2_5"])
def test_an_llms_own_template_takes_images_and_labels_every_turn(tmp_path, name):
    template = (TRLS_TEMPLATES / f"{name}.jinja").read_text()
    trainer = trainer_of(tmp_path, template=template)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w5"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "w6"}]},
    ]
    text = trainer.processing_class.apply_chat_template(messages)
    plain = [{"role": "user", "content": "<image>\nw5"}, {"role": "assistant", "content": "w6"}]
    assert text == trainer.processing_class.tokenizer.apply_chat_template(
        plain, chat_template=template, tokenize=False
    )

    collator = trainer.data_collator
    for example in trainer.train_dataset:
        text, spans = collator._render({**example, "images": example["images"]})
        said = [text[start:end] for start, end in spans]
        answers = [m["content"] for m in example["messages"] if m["role"] == "assistant"]
        assert len(said) == len(answers)
        for span, answer in zip(said, answers, strict=True):
            assert answer in span and "w20" not in span


def test_a_new_chat_template_is_the_one_that_is_trained_on(tmp_path):
    (tmp_path / "new.jinja").write_text(PLAIN_TEMPLATE.replace("w97", "w96"))
    trainer = trainer_of(tmp_path, chat_template_path=str(tmp_path / "new.jinja"))
    ids = batch_of(trainer)["input_ids"]
    assert (ids == 96).any() and not (ids == 97).any()


@pytest.mark.parametrize("form", ["messages", "all text", "prompt-completion"])
def test_sequences_begin_as_the_tokenizer_begins_them(tmp_path, form):
    model = tiny_model()
    template = PLAIN_TEMPLATE.replace("{{ bos_token }}", "")
    processor = tiny_processor(model.config, template)
    processor.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    dataset = conversations(images=(1, 1, 2, 1))
    if form == "prompt-completion":
        dataset = dataset.map(
            lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:2]}, remove_columns="messages"
        )
    trainer = VWLmmSFTTrainer(
        model,
        sft_config(tmp_path, assistant_only_loss=False if form == "all text" else None),
        train_dataset=dataset,
        processing_class=processor,
    )
    ids = batch_of(trainer)["input_ids"]
    assert (ids[:, 0] == 1).all() and (ids == 1).sum() == 4


def test_rows_without_images_may_hold_null(tmp_path):
    rows = [{**row, "images": row["images"] or None} for row in conversations()]
    trainer = trainer_of(tmp_path, dataset=datasets.Dataset.from_list(rows).cast_column("images", IMAGES))
    assert len(batch_of(trainer)["pixel_values"]) == 4


def test_an_image_in_an_answer_keeps_the_labels_around_it(tmp_path):
    part = {"type": "text"}
    answer = [{**part, "text": "w5"}, {"type": "image"}, {**part, "text": "w6 w7"}]
    messages = [{"role": "user", "content": [{**part, "text": "w8"}]}, {"role": "assistant", "content": answer}]
    template = PLAIN_TEMPLATE.replace(
        "{{ message.content[0].text }}",
        "{% for part in message.content %} {{ '<image>' if part.type == 'image' else part.text }}{% endfor %} ",
    )
    trainer = trainer_of(tmp_path, template=template)
    batch = trainer.data_collator([{"messages": messages, "images": [picture(0)]}])
    labels = batch["labels"][0]
    assert labels[labels != -100].tolist() == [5, 6, 7, 2]


def test_a_column_of_texts_trains_with_images(tmp_path):
    dataset = conversations().map(
        lambda row: {"text": " ".join(["<image>"] * len(row["images"]) + ["w5"])}, remove_columns="messages"
    )
    batch = batch_of(trainer_of(tmp_path, dataset=dataset))
    assert batch["pixel_values"].shape[0] == 4 and (batch["labels"] == 5).sum() == 4


def test_images_that_do_not_match_their_markers_name_the_sample(tmp_path):
    dataset = conversations().map(lambda row: {"text": "<image> w5 <image>"}, remove_columns="messages")
    with pytest.raises(ValueError, match=r"sample \d has [01] image\(s\), but 2 <image> markers"):
        batch_of(trainer_of(tmp_path, dataset=dataset))


def test_a_conversation_that_the_template_refuses_names_the_sample(tmp_path):
    def turn_round(row, index):
        return {"messages": row["messages"][::-1] if index == 2 else row["messages"]}

    dataset = conversations().map(turn_round, with_indices=True)
    with pytest.raises(ValueError, match="sample 2: found a message of assistant, expected one of user"):
        batch_of(trainer_of(tmp_path, dataset=dataset, template=read_chat_template("mistral")))


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, MARKED_TEMPLATE])
def test_tools_and_variables_of_the_template_are_rendered(tmp_path, template):
    added = "{{ tools[0].name if tools }}{{ ' w41 ' if mood }}{{ ' none' if other is defined }}"
    dataset = conversations().add_column("tools", ['[{"name": "w40"}]', None, None, "[]"])
    dataset = dataset.add_column(
        "chat_template_kwargs", [{"mood": 1, "other": None}, *3 * [{"mood": None, "other": None}]]
    )
    trainer = trainer_of(tmp_path, dataset=dataset, template=added + template)
    texts = trainer.processing_class.batch_decode(batch_of(trainer)["input_ids"])
    assert sum("w40" in text and "w41" in text for text in texts) == 1
    assert sum("w40" in text or "w41" in text or "none" in text for text in texts) == 1


def test_another_collator_gets_open_images_and_its_own_columns(tmp_path):
    """Also from data whose images `datasets` leaves alone, such as `load_conversations` returns."""
    model = tiny_model()
    processor = tiny_processor(model.config)
    dataset = conversations().cast_column("images", datasets.List(datasets.Image(decode=False)))
    theirs = trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling(processor)
    ours = batch_of(trainer_of(tmp_path, assistant_only_loss=False))
    trainer = VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path),
        data_collator=theirs,
        train_dataset=dataset,
        processing_class=processor,
    )
    assert batch_of(trainer)["pixel_values"].equal(ours["pixel_values"])


def test_texts_that_a_function_makes_have_no_turns(tmp_path):
    dataset = conversations((0, 0, 0, 0)).remove_columns("images")
    model = tiny_model()
    trainer = VWLmmSFTTrainer(
        model=model,
        args=sft_config(tmp_path),
        train_dataset=dataset,
        formatting_func=lambda row: row["messages"][0]["content"],
        processing_class=tiny_processor(model.config),
    )
    assert (batch_of(trainer)["labels"] != -100).all(1).any()
