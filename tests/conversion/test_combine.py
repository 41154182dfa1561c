"""A new model of an LLM and a vision tower."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionModel, PreTrainedTokenizerFast

from helpers.tiny import VOCAB_SIZE, llm_config, randomize, tower_config
from modeling_vwlmm import VWLmmForCausalLM
from modeling_vwlmm.cli import main as vwlmm
from modeling_vwlmm.conversion import convert as conversion


@pytest.fixture
def tower(tmp_path):
    CLIPVisionModel(tower_config()).save_pretrained(tmp_path / "tower")
    CLIPImageProcessorPil().save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


@pytest.fixture
def llm(tmp_path):
    randomize(AutoModelForCausalLM.from_config(llm_config("llama-tied"))).save_pretrained(tmp_path / "llm")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2").save_pretrained(
        tmp_path / "llm"
    )
    return tmp_path / "llm"


def test_an_llm_of_a_gguf_file_can_train(tmp_path, monkeypatch, tower, llm):
    """Its weights are no longer quantized, whatever its config says: transformers trains no quantized model."""
    load = AutoModelForCausalLM.from_pretrained

    def load_gguf(folder, gguf_file, **kwargs):
        model = load(llm, **kwargs)
        model.config.quantization_config = {"quant_method": "gguf"}
        return model

    monkeypatch.setattr(conversion.AutoModelForCausalLM, "from_pretrained", load_gguf)
    read = conversion.AutoTokenizer.from_pretrained
    monkeypatch.setattr(conversion.AutoTokenizer, "from_pretrained", lambda folder, gguf_file, **kwargs: read(llm))
    vwlmm(["convert", "--language-model", "llm.gguf", "--vision-tower", str(tower), str(tmp_path / "ours")])
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "quantization_config" not in config and "quantization_config" not in config["text_config"]


def test_a_vm_head_can_be_a_copy_of_a_tied_head(tmp_path, tower, llm):
    arguments = ["--language-model", str(llm), "--vision-tower", str(tower), "--vm-head", "lm_head"]
    vwlmm(["convert", *arguments, str(tmp_path / "ours")])
    model = VWLmmForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.tie_word_embeddings
    assert torch.equal(model.model.vm_head.weight, model.lm_head.weight[: model.config.visual_vocab_size])


@pytest.mark.parametrize("layers, read", [([], -2), ([-1], -1), ([-2, -1], [-2, -1])])
def test_which_layers_of_the_tower_are_read(tmp_path, tower, llm, layers, read):
    arguments = ["--language-model", str(llm), "--vision-tower", str(tower)]
    for layer in layers:
        arguments += ["--vision-feature-layer", str(layer)]
    vwlmm(["convert", *arguments, str(tmp_path / "ours")])
    model = VWLmmForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.vision_feature_layer == read
    channels = tower_config().hidden_size * max(1, len(layers))
    assert model.model.multi_modal_projector.linear_1.in_features == channels


def test_an_llm_whose_tokenizer_has_no_content_is_refused(tmp_path, tower, llm):
    (llm / "tokenizer.json").write_bytes(b"")
    with pytest.raises(ValueError, match="llm/tokenizer.json is empty"):
        conversion.combine(llm, tower, tmp_path / "made")
