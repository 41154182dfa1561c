"""`vwlmm export`."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration

from helpers.adapters import train
from helpers.command_line import error_of
from helpers.tiny import tiny_batch, tiny_model, without_labels
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main


# Refuses this package, as where it is not installed
LOAD = """
import sys
sys.modules["modeling_vwlmm"] = None
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, sum(weight.double().sum().item() for weight in model.state_dict().values()))
"""


def test_llava_computes_the_same(model_folder, tmp_path):
    main(["export", str(model_folder), str(tmp_path / "llava"), "--to", "llava"])
    model = VWLmmForCausalLM.from_pretrained(model_folder)
    llava = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    batch = without_labels(tiny_batch(model.config))
    text = batch["input_ids"] != model.config.image_token_id
    vocab_size = model.config.text_config.vocab_size
    with torch.no_grad():
        found, expected = llava(**batch).logits[..., :vocab_size], model(**batch).logits
    torch.testing.assert_close(found[text], expected[text])


def test_remote_code_loads_without_this_package(model_folder, tmp_path):
    main(["export", str(model_folder), str(tmp_path / "remote"), "--to", "remote-code"])
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "remote")], env=environment, capture_output=True, text=True
    )
    weights = VWLmmForCausalLM.from_pretrained(model_folder).state_dict().values()
    assert run.stdout.split() == ["VWLmmForCausalLM", str(sum(weight.double().sum().item() for weight in weights))]
    copy, own = tmp_path / "remote/model.safetensors", model_folder / "model.safetensors"
    assert load_file(copy).keys() == load_file(own).keys() and not os.path.samefile(copy, own)


def test_what_cannot_be_exported_is_one_line(tmp_path, model_folder, capsys):
    train(tmp_path)
    for to, message in (("llava", "config.json"), ("remote-code", "is an adapter: vwlmm merge")):
        assert message in error_of(capsys, "export", str(tmp_path / "adapter"), str(tmp_path / "new"), "--to", to)
    tiny_model(pseudo_image_features=True).save_pretrained(tmp_path / "pif")
    said = error_of(capsys, "export", str(tmp_path / "pif"), str(tmp_path / "new"), "--to", "llava")
    assert "pseudo image features" in said
    assert "exists already" in error_of(capsys, "export", str(model_folder), str(tmp_path), "--to", "remote-code")
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(model_folder), str(tmp_path / "new"), "--to", "remote-code", "--dtype", "float16"])
