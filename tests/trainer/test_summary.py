"""What is said before the first step."""

import pytest

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import tiny_model
from helpers.training import sft_config, trainer_of
from modeling_vwlmm.trainer import VWLmmSFTTrainer
from modeling_vwlmm.trainer.model import doubts_about
from modeling_vwlmm.trainer.summary import summary_of
from modeling_vwlmm.training_run import write_training_run


def test_the_summary(tmp_path):
    trainer = trainer_of(tmp_path, stage="joint", gradient_accumulation_steps=2)
    lines = summary_of(trainer).splitlines()
    projector = sum(parameter.numel() for parameter in trainer.model.model.multi_modal_projector.parameters())
    tokens = trainer.data_collator([dict(row) for row in trainer.train_dataset])["attention_mask"].sum().item()
    assert "1 process" in lines[0] and lines[0].endswith("float32")
    assert "clip_vision_model, layer -2: 4 patches an image; llama reads them" in lines[1]
    assert f"projector ({projector:,} weights), language_model (" in lines[2] and "vm_head" not in lines[2]
    assert lines[3].endswith("text + 1 KL(visual word || LLM)")
    assert f"4 samples, 8 a step, about {2 * tokens:,} tokens a step" in lines[4]


@pytest.mark.parametrize(
    "stage, before, doubt",
    [
        (None, [], "all of these train: vision_tower, projector, language_model, vm_head"),
        ("joint", [], None),  # no record, nothing known
        ("joint", ["align", "instruct"], 'comes after "visual_words", which base has not been through'),
        ("joint", ["align", "instruct", "visual_words"], None),
        ("instruct", ["convert"], 'comes after "align"'),
        ("align", ["convert"], None),
    ],
)
def test_a_recipe_that_is_probably_not_meant(tmp_path, stage, before, doubt):
    trainer = trainer_of(tmp_path, stage=stage)
    stages = [*({"stage": name} for name in before), trainer.stages[-1]]
    doubts = doubts_about(trainer.args, "base", stages, has_adapter=False)
    assert len(doubts) == (doubt is not None) and all(doubt in text for text in doubts)


def test_a_converted_llava_has_been_through_the_stages_before_it():
    record = [{"stage": "convert", "stages_before": ["align", "instruct"]}, {"stage": "visual_words", "trainable": []}]
    args = sft_config("out", stage="visual_words")
    assert doubts_about(args, "llava", record, has_adapter=False) == []


def test_the_record_of_a_folder_is_read(tmp_path, caplog, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    tiny_processor(model.config).save_pretrained(tmp_path / "base")
    write_training_run(tmp_path / "base", [{"stage": "align"}])
    said = []
    monkeypatch.setattr("modeling_vwlmm.trainer.sft_trainer.logger.warning", said.append)
    VWLmmSFTTrainer(str(tmp_path / "base"), sft_config(tmp_path / "out", stage="joint"), train_dataset=conversations())
    assert len(said) == 1 and 'comes after "visual_words"' in said[0]
