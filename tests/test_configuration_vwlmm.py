"""The config: its defaults, what it refuses."""

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import Gemma2Config, ResNetConfig

from helpers.tiny import VOCAB_SIZE, llm_config, tiny_config, tower_config
from modeling_vwlmm import VWLmmConfig


@pytest.mark.parametrize(
    "config,message",
    [
        ({"visual_vocab_size": VOCAB_SIZE + 1}, "visual_vocab_size is 100, .* 99"),
        ({"visual_vocab_size": 0}, "visual_vocab_size is 0"),
        ({"visual_word_loss_weight": -1.0}, "visual_word_loss_weight is -1"),
        ({"visual_word_target": "image"}, "visual_word_target"),
        ({"image_aspect_ratio": "stretch"}, "image_aspect_ratio"),
        ({"vision_config": ResNetConfig(hidden_sizes=[8], depths=[1])}, 'type "resnet" has no image_size'),
    ],
)
def test_config_errors(config, message):
    config = {"vision_config": tower_config(), "text_config": llm_config(), **config}
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):
        VWLmmConfig(**config)


def test_config_defaults():
    config = VWLmmConfig(vision_config=tower_config(), text_config=llm_config())
    assert config.visual_vocab_size == VOCAB_SIZE and config.image_seq_length == 4
    assert config.visual_word_loss_weight == 1.0 and config.visual_word_target == "visual_words"
    assert not config.detach_visual_words and not config.pseudo_image_features
    assert config.image_token_id == config.image_token_index and config.image_aspect_ratio == "pad"
    assert tiny_config(image_seq_length=7).image_seq_length == 7
    assert VWLmmConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_llms_whose_head_is_not_a_linear_map_are_refused():
    with pytest.raises(ValueError, match="text_config has final_logit_softcapping"):
        VWLmmConfig(
            vision_config=tower_config(),
            text_config=Gemma2Config(vocab_size=99, num_hidden_layers=1),
            image_token_index=99,
        )


def test_a_tower_without_end_and_an_image_token_without_an_id_are_refused():
    tower = {**tower_config().to_dict(), "num_hidden_layers": 1_000_000}
    with pytest.raises(ValueError, match=r"vision_config.num_hidden_layers is 1,000,000, expected at most 1,000"):
        VWLmmConfig(vision_config=tower, text_config=llm_config())
    with pytest.raises(ValueError, match="image_token_index is -1, expected the id of a token"):
        tiny_config(image_token_index=-1)
