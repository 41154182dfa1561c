"""Training modes of the model, text without images among its batches."""

import pytest
import torch
from torch.testing import assert_close
from transformers import ResNetConfig

from helpers.cases import PSEUDO, Calls
from helpers.tiny import IMAGE_BEYOND, TEXT_ROWS, TOWERS, gradients, llm_config, randomize, tiny_batch, tiny_model
from modeling_vwlmm import VWLmmConfig, VWLmmForCausalLM


def statistics(model):
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def test_a_frozen_tower_stays_in_eval_mode():
    model = tiny_model(tower="resnet")
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert model.training and model.model.language_model.training
    assert not any(module.training for module in model.model.vision_tower.modules())
    before, words = statistics(model), model.visual_words(tiny_batch(model.config)["pixel_values"])
    model(**tiny_batch(model.config)).loss.backward()
    assert before and all(map(torch.equal, before, statistics(model)))
    assert torch.equal(words, model.visual_words(tiny_batch(model.config)["pixel_values"]))


def test_an_unfrozen_tower_trains():
    model = tiny_model(tower="resnet").train()
    assert all(module.training for module in model.modules())
    before = statistics(model)
    model(**tiny_batch(model.config)).loss.backward()
    assert not any(map(torch.equal, before, statistics(model)))
    assert model.model.vision_tower.embedder.embedder.convolution.weight.grad.any()
    assert not any(module.training for module in model.eval().modules())


@PSEUDO
@pytest.mark.parametrize("trained", [("projector", "tower"), ("projector",), ("vm_head",)], ids="+".join)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_batch_of_text_alone_trains_nothing_but_backpropagates(tower, trained, pseudo):
    model = tiny_model(tower=tower, pseudo_image_features=pseudo)
    parts = {
        "projector": model.model.multi_modal_projector,
        "tower": model.model.vision_tower,
        "vm_head": model.model.vm_head,
    }
    model.requires_grad_(False)
    for part in trained:
        parts[part].requires_grad_(True)
    model.train()
    before, batch = statistics(model), tiny_batch(model.config, TEXT_ROWS)
    out = model(**batch)
    assert out.vw_loss is None
    out.loss.backward()
    for name, part in parts.items():
        grads = [parameter.grad for parameter in part.parameters()]
        unused = name == "tower"  # a layer beyond the one that is read
        assert (any if unused else all)(grad is not None for grad in grads) == (name in trained)
        assert not any(grad is not None and grad.count_nonzero() for grad in grads)
    assert all(map(torch.equal, before, statistics(model)))
    assert model.model.vision_tower.training == ("tower" in trained)
    assert_close(out.loss, model.eval()(**batch).loss)


def test_a_batch_of_text_alone_among_processes_that_train_together(monkeypatch):
    model = tiny_model().train()
    batch = tiny_batch(model.config, TEXT_ROWS)
    model(**batch).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model(**batch).loss.backward()
    for part in (model.model.multi_modal_projector, model.model.vm_head, model.model.vision_tower.embeddings):
        assert all(not parameter.grad.any() for parameter in part.parameters())


def test_a_batch_of_text_alone_with_a_tower_of_one_channel():
    tower = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], image_size=16)
    config = VWLmmConfig(
        vision_config=tower, text_config=llm_config(), image_token_index=IMAGE_BEYOND, vision_feature_layer=-1
    )
    model = randomize(VWLmmForCausalLM(config)).train()
    model.model.language_model.requires_grad_(False)
    model(**tiny_batch(config, TEXT_ROWS)).loss.backward()
    assert not model.model.multi_modal_projector.linear_1.weight.grad.any()


@PSEUDO
def test_gradient_checkpointing(pseudo):
    model = tiny_model(pseudo_image_features=pseudo).train()
    batch = tiny_batch(model.config)
    expected = gradients(model(**batch).loss, model)
    model.activation_checkpointing_enable()
    norm = Calls(model.model.language_model.layers[0].input_layernorm)
    out = model(**batch)
    assert len(norm.lengths) == 1
    assert_close(gradients(out.loss, model), expected, rtol=1e-6, atol=1e-6)
    assert len(norm.lengths) == 2  # computed anew


def test_pseudo_image_features_train_in_16_bits():
    model = tiny_model("llama-tied", pseudo_image_features=True).train()
    batch = tiny_batch(model.config)
    losses = {}
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses[enabled] = model(**batch).loss
    losses[True].backward()
    assert model.model.vm_head.weight.grad.abs().sum() > 0
    # bfloat16 keeps 8 bits
    torch.testing.assert_close(losses[True].float(), losses[False], rtol=2**-5, atol=0)
