"""The import brings nothing heavy, and the Auto classes know the model whatever is imported first.

Orders of imports need processes of their own, which take as long as the libraries' imports.
"""

import subprocess
import sys

import pytest

from helpers import ROOT


FOUND = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
config = AutoConfig.from_pretrained("hub_card/vwlmm-nano")
from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM
assert type(config) is VWLmmConfig
for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
    assert type(auto.from_config(config)) is VWLmmForCausalLM
AutoProcessor.from_pretrained("hub_card/vwlmm-nano")
"""


@pytest.mark.parametrize(
    "first",
    [
        "import modeling_vwlmm",
        "import modeling_vwlmm; from transformers import LlavaForConditionalGeneration",
        "from modeling_vwlmm.configuration_vwlmm import VWLmmConfig",
        "from transformers import AutoModelForCausalLM; import modeling_vwlmm",
    ],
)
def test_the_auto_classes_know_the_model(first):
    subprocess.run([sys.executable, "-c", f"{first}\n{FOUND}"], check=True, cwd=ROOT)


def test_an_unknown_name():
    import modeling_vwlmm

    assert {"VWLmmConfig", "VWLmmForCausalLM"} <= set(dir(modeling_vwlmm))
    with pytest.raises(AttributeError, match="no attribute 'VWLmmModell'"):
        _ = modeling_vwlmm.VWLmmModell
