"""The stage before the four, and the projector that starts from words."""

import datasets
import pytest
import torch
from peft import LoraConfig

from helpers.conversations import picture
from helpers.reading import reading_processor, sample
from helpers.tiny import tiny_model
from helpers.training import sft_config
from modeling_vwlmm.data.reading import ReadingCollator
from modeling_vwlmm.trainer import VWLmmSFTTrainer
from modeling_vwlmm.trainer.model import doubts_about


ROWS = [sample("owl bird"), sample("cow animal", images=2), sample("owl animal"), sample("bird", images=0)]
ALIGN = {"stage": "align", "projector_from_words": True}


def trainer_of(folder, model=None, rows=ROWS, peft_config=None, formatting_func=None, **settings):
    model = model or tiny_model()
    return VWLmmSFTTrainer(
        model,
        sft_config(folder, **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=reading_processor(model.config),
        peft_config=peft_config,
        formatting_func=formatting_func,
    )


def test_the_llm_reads_and_the_rest_rests(tmp_path):
    trainer = trainer_of(tmp_path, stage="read", max_steps=60)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert isinstance(trainer.data_collator, ReadingCollator) and trainer.data_collator.patches == 4
    trainer.train()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(("model.vision", "model.multi", "model.vm")), name
    losses = [log["lm_loss"] for log in trainer.state.log_history if "lm_loss" in log]
    assert losses[-1] < losses[0] / 2 and trainer.stages[-1]["stage"] == "read"


def test_reading_through_lora_then_aligning_from_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    reading_processor(model.config).save_pretrained(tmp_path / "base")
    data = datasets.Dataset.from_list(ROWS)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    config = sft_config(tmp_path / "read", stage="read")
    trainer = VWLmmSFTTrainer(str(tmp_path / "base"), config, train_dataset=data, peft_config=lora)
    assert {name.split(".")[-3] for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    trainer.train()
    trainer.save_model()
    aligned = VWLmmSFTTrainer(str(tmp_path / "read"), sft_config(tmp_path / "align", **ALIGN), train_dataset=data)
    assert [record["stage"] for record in aligned.stages] == ["read", "align"]
    read = trainer.model.merge_and_unload().state_dict()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(aligned.model.state_dict()[name], read[name])
    assert not torch.equal(read[name], model.state_dict()[name])
    aligned.train()


def test_reading_goes_on_where_it_was_killed(tmp_path):
    whole, halves = tiny_model(), tiny_model()
    settings = {"stage": "read", "max_steps": 4, "per_device_train_batch_size": 2}
    trainer_of(tmp_path / "whole", whole, **settings).train()
    trainer_of(tmp_path / "halves", halves, **settings, save_strategy="steps", save_steps=2).train()
    again = tiny_model()
    trainer_of(tmp_path / "halves", again, **settings).train(str(tmp_path / "halves/checkpoint-2"))
    for model in (halves, again):
        for (name, expected), found in zip(whole.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(found, expected), name


def test_the_projector_starts_as_a_dictionary(tmp_path):
    model = tiny_model()
    projector = model.model.multi_modal_projector
    first = projector.linear_1.weight.clone()
    unused = projector.linear_2.weight[:, 4:].clone()
    embeddings = model.get_input_embeddings().weight
    trainer_of(tmp_path, model, **ALIGN)
    background = embeddings[34:38].mean(0)
    # owl, animal and bird twice, cow once
    for unit, token in enumerate([30, 31, 32, 33]):
        torch.testing.assert_close(background + projector.linear_2.weight[:, unit], embeddings[token])
    torch.testing.assert_close(projector.linear_2.bias, background)
    torch.testing.assert_close(projector.linear_1.weight, 0.1 * first)
    assert torch.equal(projector.linear_2.weight[:, 4:], unused)


@pytest.mark.parametrize("settings", [{"save_only_trained": True}, {}], ids=["alone", "whole"])
def test_the_projector_that_started_from_words_is_saved(tmp_path, settings):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    reading_processor(model.config).save_pretrained(tmp_path / "base")
    config = sft_config(tmp_path / "out", **ALIGN, **settings, learning_rate=0.0)
    trainer = VWLmmSFTTrainer(str(tmp_path / "base"), config, train_dataset=datasets.Dataset.from_list(ROWS))
    trainer.train()
    trainer.save_model()
    again = VWLmmSFTTrainer(
        str(tmp_path / "out"),
        sft_config(tmp_path / "next", stage="align"),
        train_dataset=datasets.Dataset.from_list(ROWS),
    )
    bias = again.model.model.multi_modal_projector.linear_2.bias
    torch.testing.assert_close(bias, model.get_input_embeddings().weight[34:38].mean(0))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"stage": "read", "formatting_func": str}, "makes its own batches"),
        ({"stage": "instruct", "trainable": ["language_model"], "projector_from_words": True}, "has to be among"),
        ({**ALIGN, "rows": [sample("heron")]}, "no word that is one token"),
        (
            {"stage": "read", "rows": [{"images": [picture(0)], "prompt": "<image>w20", "completion": "owl"}]},
            "messages",
        ),
    ],
    ids=["formatted", "projector-rests", "no-word", "no-messages"],
)
def test_what_cannot_be_read(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **settings)


def test_reading_after_seeing_is_doubted():
    args = sft_config("out", stage="read")
    (doubt,) = doubts_about(args, "base", [{"stage": "align"}, {"stage": "read"}], has_adapter=False)
    assert 'stage "read" comes before "align"' in doubt and "base" in doubt
    assert doubts_about(args, "base", [{"stage": "convert"}, {"stage": "read"}], has_adapter=False) == []
