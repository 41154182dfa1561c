"""Weights that something else holds: they are on a disk, or PEFT has wrapped their layer. The results are the same."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from helpers.tiny import tiny_batch, tiny_model, without_labels
from modeling_vwlmm import VWLmmForCausalLM


PSEUDO = pytest.mark.parametrize("pseudo", [False, True], ids=["features", "pseudo"])
LLM = pytest.mark.parametrize("llm", ["llama", "llama-tied"])
PLACES = {
    "model.vision_tower": "cpu",
    "model.multi_modal_projector": "disk",
    "model.vm_head": "disk",
    "model.language_model": "disk",
    "lm_head": "disk",
}


def offloaded(where, model, folder):
    if where == "device_map":
        model.save_pretrained(folder / "model")
        return VWLmmForCausalLM.from_pretrained(
            folder / "model", device_map=PLACES, offload_folder=folder / "offloaded"
        )
    model = copy.deepcopy(model)
    if where == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, folder / "offloaded", execution_device="cpu")
    return model


@PSEUDO
@LLM
@pytest.mark.parametrize("where", ["cpu", "disk", "device_map"])
def test_offloaded(where, llm, pseudo, tmp_path):
    model = tiny_model(llm, pseudo_image_features=pseudo)
    batch = tiny_batch(model.config)
    expected = model(**batch)
    found = offloaded(where, model, tmp_path)
    assert found.model.vm_head.weight.is_meta and found.get_input_embeddings().weight.is_meta
    for _ in range(2):
        out = found(**batch)
        for name in ("logits", "lm_loss", "vw_loss", "image_hidden_states"):
            assert_close(out[name], expected[name], rtol=1e-5, atol=1e-5)
    pixel_values = batch["pixel_values"]
    assert_close(found.visual_words(pixel_values), model.visual_words(pixel_values), rtol=1e-5, atol=1e-7)
    generated = [m.generate(**without_labels(batch), max_new_tokens=3, do_sample=False) for m in (found, model)]
    assert torch.equal(*generated)


ADAPTERS = {
    "embeddings": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "dora": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


@PSEUDO
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapted(adapter, pseudo):
    """Logits, losses and gradients against a plain model whose two weights are what the wrapped modules compute."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_model(pseudo_image_features=pseudo), LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[adapter])
    ).eval()
    plain = tiny_model(pseudo_image_features=pseudo)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "q_proj" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
        embeddings = model.get_input_embeddings()(torch.arange(99))
        head = model.get_base_model().lm_head(torch.eye(16)).T
        plain.load_state_dict(copy.deepcopy(model).merge_and_unload().state_dict())
    assert_close(plain.get_input_embeddings().weight, embeddings, rtol=1e-5, atol=1e-6)
    assert_close(plain.lm_head.weight, head, rtol=1e-5, atol=1e-6)
    batch = tiny_batch(model.config)
    out, expected = model(**batch), plain(**batch)
    for name in ("logits", "lm_loss", "vw_loss"):
        assert_close(out[name], expected[name], rtol=1e-5, atol=2e-5)
    # A gradient that passes through both weights on its way
    bias = model.get_base_model().model.multi_modal_projector.linear_2.bias.requires_grad_(True)
    (found,) = torch.autograd.grad(model(**batch).loss, bias)
    (wanted,) = torch.autograd.grad(expected.loss, plain.model.multi_modal_projector.linear_2.bias)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_tied_embeddings():
    """PEFT wraps the head of tied embeddings in a module that has no bias to ask for."""
    model = get_peft_model(
        tiny_model("llama-tied"), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])
    )
    plain = tiny_model("llama-tied")
    with torch.no_grad():
        (rows,) = [parameter for name, parameter in model.named_parameters() if "trainable_tokens" in name]
        rows += 1
        plain.lm_head.weight[3] += 1
    batch = tiny_batch(plain.config)
    assert_close(model.eval()(**batch).vw_loss, plain(**batch).vw_loss, rtol=1e-5, atol=1e-6)


class Scaled(nn.Embedding):
    """As Gemma's: its weight is not what it gives."""

    def forward(self, input_ids):
        return 4 * super().forward(input_ids)


def test_scaled_embeddings():
    model, plain = (tiny_model(pseudo_image_features=True) for _ in range(2))
    scaled = Scaled(99, 16)
    scaled.weight.data = plain.get_input_embeddings().weight.data / 4
    model.set_input_embeddings(scaled)
    batch = tiny_batch(model.config)
    assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-5, atol=1e-5)
