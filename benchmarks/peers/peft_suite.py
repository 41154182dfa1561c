"""PEFT's own tests of decoder models, for every kind of adapter that they know, on folders of two models.

`run.py` runs it, with PEFT's `tests` in the path.
"""

import atexit
import shutil
import tempfile
from pathlib import Path

from models import BEYOND, WITHIN, small_config
from peft.utils import constants
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from helpers.conversations import tiny_processor
from helpers.tiny import randomize
from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM
from tests import test_decoder_models as suite
from tests import testing_utils


# PEFT has lists of what it adapts in a Llama: here the same is adapted
for mapping in list(vars(constants).values()):
    if isinstance(mapping, dict) and "llama" in mapping:
        mapping["llava"] = mapping["vwlmm"] = mapping["llama"]
# The tests give no images, so that an adapter of the vision tower would get no gradient
for config_class, kwargs in suite.ALL_CONFIGS:
    if hasattr(config_class, "exclude_modules"):
        kwargs["exclude_modules"] = ".*vision_tower.*"


def folder_of(model, name):
    folder = Path(tempfile.mkdtemp()) / name
    atexit.register(shutil.rmtree, folder.parent)
    randomize(model).save_pretrained(folder)  # weights on which adapters tell
    tiny_processor(small_config(VWLmmConfig, WITHIN)).save_pretrained(folder)
    testing_utils._HUB_MODEL_ACCESSES[str(folder)] = 1  # nothing of it is looked for on a hub
    return str(folder)


suite.PEFT_DECODER_MODELS_TO_TEST[:] = [
    folder_of(LlavaForConditionalGeneration(small_config(LlavaConfig, WITHIN)), "Llava"),
    folder_of(VWLmmForCausalLM(small_config(VWLmmConfig, WITHIN)), "Ours"),
    folder_of(VWLmmForCausalLM(small_config(VWLmmConfig, BEYOND)), "OursBeyond"),
]


class TestDecoders(suite.TestDecoderModels):
    transformers_class = AutoModelForImageTextToText
