"""transformers' own tests of models, with LLaVA's tester: once for VW-LMM, and once for LLaVA as the control.

`run.py` runs it, with transformers' `tests` in the path. Both classes run the same tests on the same text and tower.
"""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM, VWLmmModel


TEXT = {
    "model_type": "llama",
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 580,
    "initializer_range": 0.02,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
VISION = {
    "model_type": "clip_vision_model",
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "initializer_range": 0.02,
}
PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2


# The tests look up by its name what a class of transformers computes
modeling_auto.MODEL_MAPPING_NAMES["vwlmm"] = "VWLmmModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vwlmm"] = "VWLmmForCausalLM"


class Tester:
    """A batch of three rows, each of an image and seven tokens, and what the tests ask of a tester."""

    batch_size, text_length, is_training = 3, 7, True
    seq_length = encoder_seq_length = text_length + PATCHES
    text_config, vision_config = TEXT, VISION
    vocab_size, hidden_size = TEXT["vocab_size"], TEXT["hidden_size"]
    num_hidden_layers, num_attention_heads = TEXT["num_hidden_layers"], TEXT["num_attention_heads"]
    pad_token_id = TEXT["pad_token_id"]

    def __init__(self, config_class, image_token_id):
        self.config_class, self.image_token_id = config_class, image_token_id

    def get_config(self):
        return self.config_class(
            text_config=dict(TEXT),
            vision_config=dict(VISION),
            image_token_index=self.image_token_id,
            image_seq_length=PATCHES,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        input_ids[input_ids == self.image_token_id] = self.pad_token_id
        input_ids[:, :PATCHES] = self.image_token_id
        side = VISION["image_size"]
        return config, {
            "pixel_values": floats_tensor([self.batch_size, VISION["num_channels"], side, side]),
            "input_ids": input_ids,
            "attention_mask": torch.ones(input_ids.shape, dtype=torch.long, device=torch_device),
        }


class _Suite(ModelTesterMixin, GenerationTesterMixin):
    _is_composite = True
    config_class, image_token_id = None, 4

    def setUp(self):
        self.model_tester = Tester(self.config_class, self.image_token_id)
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=["image_token_index", "vision_feature_layer", "image_seq_length"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class Stock(_Suite, unittest.TestCase):
    config_class, all_model_classes = LlavaConfig, (LlavaModel, LlavaForConditionalGeneration)


class Ours(_Suite, unittest.TestCase):
    config_class, all_model_classes = VWLmmConfig, (VWLmmModel, VWLmmForCausalLM)


class OursBeyond(Ours):
    """The image token has no row in the embeddings, as after `vwlmm convert`."""

    image_token_id = TEXT["vocab_size"]


del _Suite
