"""transformers' own tests of models, configurations and generation, with a tester like LLaVA's.

`run.py` runs it, with transformers' `tests` in the path. All classes run the same tests.
"""

import unittest

import torch
from models import BEYOND, PATCHES, TEXT, VISION, WITHIN, small_config
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.auto import modeling_auto

from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM, VWLmmModel


# The tests look up by the name of a class what it computes
modeling_auto.MODEL_MAPPING_NAMES["vwlmm"] = "VWLmmModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["vwlmm"] = "VWLmmForCausalLM"


class BatchTester:
    """A batch of three rows, each of an image and seven tokens, and what the tests ask of a tester."""

    batch_size, text_length, is_training = 3, 7, True
    seq_length = encoder_seq_length = PATCHES + text_length
    text_config, vision_config = TEXT, VISION
    vocab_size, hidden_size, pad_token_id = TEXT["vocab_size"], TEXT["hidden_size"], TEXT["pad_token_id"]
    num_hidden_layers, num_attention_heads = TEXT["num_hidden_layers"], TEXT["num_attention_heads"]

    def __init__(self, config_class, image_token_id):
        self.config_class, self.image_token_id = config_class, image_token_id

    def get_config(self):
        return small_config(self.config_class, self.image_token_id)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - WITHIN - 1) + WITHIN + 1
        input_ids[:, :PATCHES] = self.image_token_id
        side = VISION["image_size"]
        return self.get_config(), {
            "pixel_values": floats_tensor([self.batch_size, VISION["num_channels"], side, side]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


class Llava(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    config_class, all_model_classes = LlavaConfig, (LlavaModel, LlavaForConditionalGeneration)
    image_token_id = WITHIN
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # so that it runs for a file without a year

    def setUp(self):
        self.model_tester = BatchTester(self.config_class, self.image_token_id)
        self.config_tester = ConfigTester(
            self,
            config_class=self.config_class,
            has_text_modality=False,
            common_properties=["image_token_index", "vision_feature_layer", "image_seq_length"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class Ours(Llava):
    config_class, all_model_classes = VWLmmConfig, (VWLmmModel, VWLmmForCausalLM)


class OursBeyond(Ours):
    image_token_id = BEYOND
