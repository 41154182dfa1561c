"""The arguments of training."""

import pytest
from transformers import LlavaConfig, LlavaForConditionalGeneration
from trl import SFTConfig

from helpers.conversations import conversations, tiny_processor
from helpers.tiny import randomize, tiny_config, tiny_model
from helpers.training import sft_config, trainer_of
from modeling_vwlmm.trainer import VWLmmSFTTrainer


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="trainable is .*expected one or more of vision_tower"):
        sft_config(tmp_path, trainable=["head"])
    with pytest.raises(ValueError, match='stage is "stage5", expected one of align'):
        sft_config(tmp_path, stage="stage5")
    for weight in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="visual_word_loss_weight is .*, expected 0 or more"):
            sft_config(tmp_path, visual_word_loss_weight=weight)
    with pytest.raises(ValueError, match='visual_word_target is "words"'):
        sft_config(tmp_path, visual_word_target="words")
    with pytest.raises(ValueError, match="label_smoothing_factor and .* leave the visual-word loss out"):
        trainer_of(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(TypeError, match="VWLmmSFTConfig"):
        VWLmmSFTTrainer(tiny_model(), sft_config(tmp_path, SFTConfig), train_dataset=conversations())
    llava = randomize(LlavaForConditionalGeneration(LlavaConfig(**tiny_config().to_dict() | {"model_type": "llava"})))
    with pytest.raises(TypeError, match="must be a VWLmmForCausalLM, got a LlavaForConditionalGeneration"):
        VWLmmSFTTrainer(llava, sft_config(tmp_path), train_dataset=conversations())


def test_arguments_can_be_used_again(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    args = sft_config(tmp_path, stage="visual_words", model_init_kwargs={"pseudo_image_features": True})
    before = args.to_dict()
    for _ in range(2):
        trainer = VWLmmSFTTrainer(str(tmp_path / "model"), args, train_dataset=conversations())
        assert trainer.model.config.pseudo_image_features
    assert args.to_dict() == before


def test_a_trainer_without_steps_evaluates_but_does_not_train(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=0)
    assert trainer.evaluate(conversations())["eval_loss"] > 0
    with pytest.raises(ValueError, match="max_steps is 0"):
        trainer.train()
