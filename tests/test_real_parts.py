"""What stood in the way of real parts: an LLM of a GGUF file, a head that is copied, 16 bits, a tower's last layer."""

import json

import pytest
import torch
from tiny import VOCAB_SIZE, llm_config, randomize, tiny_batch, tiny_config, tiny_model, tower_config
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, CLIPImageProcessorPil, CLIPVisionModel, PreTrainedTokenizerFast
from trl.trainer import utils as trl_utils
from trl.trainer.utils import add_fused_lm_head

from modeling_vwlmm import convert as conversion
from modeling_vwlmm.cli import main as vwlmm
from modeling_vwlmm.fused_head import add_visual_word_loss
from modeling_vwlmm.modeling_vwlmm import VWLmmForCausalLM


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
    monkeypatch.setattr(conversion.AutoTokenizer, "from_pretrained", lambda folder, gguf_file: read(llm))
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


def test_pseudo_image_features_train_in_16_bits():
    model = tiny_model("llama-tied", pseudo_image_features=True).train()
    batch = tiny_batch(tiny_config())
    losses = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses[enabled] = model(**batch).loss
    losses[True].backward()
    assert model.model.vm_head.weight.grad.abs().sum() > 0
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(losses[True].float(), losses[False], rtol=2**-5, atol=0)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_text_loss_takes_the_head_of_labelled_positions_alone(monkeypatch, weight):
    """Also where the visual-word loss is off, as in stages 1 and 2: TRL scores every position on a CPU."""
    model, rows = tiny_model(visual_word_loss_weight=weight), []
    add_fused_lm_head(model, outputs=("log_probs",))
    add_visual_word_loss(model)
    apply = trl_utils._ChunkedLogProbFunction.apply

    def counting_apply(hidden_states, *args):
        rows.append(len(hidden_states))
        return apply(hidden_states, *args)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", counting_apply)
    batch = tiny_batch(model.config)
    found = model(**batch, fused_lm_head=True)
    assert rows == [(batch["labels"][:, 1:] != -100).sum()]
    torch.testing.assert_close(-found.log_probs[found.label_mask].mean(), model(**batch).lm_loss)
