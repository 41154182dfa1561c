"""The visual-word loss through models, whose heads take other forms."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from helpers import ROOT
from helpers.tiny import IMAGE, ROWS, gradients, tiny_batch, tiny_model
from modeling_vwlmm.naive import naive_divergence


# Target, whether it is detached
DIRECTIONS = [("visual_words", False), ("visual_words", True), ("language_model", False)]


def naive_loss(model, batch, out, target, detach):
    """A loop over rows and positions; the LLM's logits and the features are the model's."""
    logits, features = out.logits, list(out.image_hidden_states.flatten(0, 1))
    total, scored = 0, 0
    for i, row in enumerate(batch["input_ids"].tolist()):
        for t, token in enumerate(row):
            if token != model.config.image_token_id:
                continue
            visual_word_logits = model.model.vm_head.weight[: model.config.visual_vocab_size] @ features.pop(0)
            if t >= 1 and batch["attention_mask"][i, t - 1]:
                total = total + naive_divergence(logits[i, None, t - 1], visual_word_logits[None], target, detach)
                scored += 1
    assert not features
    return total / scored


@pytest.mark.parametrize("pseudo", [False, True], ids=["features", "pseudo"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_through_the_model(target, detach, padding, pseudo):
    model = tiny_model(
        "qwen3",
        visual_word_target=target,
        detach_visual_words=detach,
        pseudo_image_features=pseudo,
        visual_vocab_size=91,
    ).double()
    batch = tiny_batch(model.config, (*ROWS, (2, IMAGE, IMAGE, 1)), padding=padding)
    batch["pixel_values"] = batch["pixel_values"].double()
    out = model(**batch)
    expected = naive_loss(model, batch, model(**batch), target, detach)
    assert_close(out.vw_loss, expected, rtol=1e-10, atol=0)
    found = gradients(out.vw_loss, model)
    assert_close(found, gradients(expected, model), rtol=1e-8, atol=1e-10)
    # The LLM gets a gradient from the loss unless it is the target, the VM head unless it is a detached one
    assert found["lm_head.weight"].any() == (target == "visual_words")
    assert found["model.vm_head.weight"].any() == (not detach or pseudo)
    assert found["model.multi_modal_projector.linear_2.weight"].any()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_an_image_that_nothing_precedes(padding):
    model = tiny_model()
    batch = tiny_batch(model.config, [(IMAGE, 2), (IMAGE, 5)], padding=padding)
    outputs = model.model(**{name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")})
    image_mask = batch["input_ids"] == model.config.image_token_id
    _, positions = model.visual_word_loss(outputs, image_mask, batch["attention_mask"])
    assert positions == 2 * (model.config.image_seq_length - 1)


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_a_tied_head(target):
    model = tiny_model("llama-tied", visual_word_target=target).double()
    batch = tiny_batch(model.config)
    batch["pixel_values"] = batch["pixel_values"].double()
    out = model(**batch)
    expected = naive_loss(model, batch, model(**batch), target, detach=False)
    assert_close(gradients(out.vw_loss, model), gradients(expected, model), rtol=1e-8, atol=1e-10)


def test_compiled_in_one_graph():
    model = tiny_model("llama-tied")
    # Some images are preceded by nothing, or by padding, and some by text
    batch = tiny_batch(model.config, padding="left")
    expected = model(**batch)  # first, for transformers installs hooks then, which no graph can hold
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)
    for name in ("loss", "lm_loss", "vw_loss", "logits"):
        assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    assert_close(gradients(found.loss, model), gradients(expected.loss, model), rtol=1e-5, atol=1e-6)


class Quantized(nn.Module):
    """A head whose weight is no matrix of numbers that could be multiplied."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(len(linear.weight)))

    def forward(self, inputs):
        return inputs @ (self.weight * self.scale.to(inputs.dtype)).T + self.bias


@pytest.mark.parametrize("quantized", ["lm_head", "model.vm_head"])
def test_a_quantized_head(quantized):
    model, plain = tiny_model(), tiny_model()
    packed = Quantized(model.get_submodule(quantized))
    model.set_submodule(quantized, packed)
    linear = nn.Linear(16, 99)
    linear.weight.data, linear.bias.data = packed.weight * packed.scale.detach(), packed.bias.data
    plain.set_submodule(quantized, linear.requires_grad_(False))
    batch = tiny_batch(model.config)
    losses = [m(**batch).vw_loss for m in (model, plain)]
    assert_close(*losses, rtol=1e-6, atol=0)
    projector = [m.model.multi_modal_projector.linear_1.weight for m in (model, plain)]
    found, wanted = (torch.autograd.grad(*pair)[0] for pair in zip(losses, projector, strict=True))
    assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", ["lm_head", "vm_head"])
def test_a_head_with_an_adapter(head):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=[head], init_lora_weights=False))
    batch = tiny_batch(model.config)
    loss = model(**batch).vw_loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 2 and all(grad.any() for grad in found.values())
    assert_close(model.merge_and_unload()(**batch).vw_loss, loss, rtol=1e-5, atol=0)


SHARDED = """
import os, sys, torch
from torch.distributed import barrier, init_process_group
from torch.distributed.fsdp import fully_shard
from helpers.tiny import gradients, rows_of, tiny_batch, tiny_model
init_process_group("gloo", rank=int(sys.argv[1]), world_size=2, store=torch.distributed.FileStore(sys.argv[2], 2))
plain, model = tiny_model(), tiny_model()
rows = [row for row in rows_of(plain.config, tiny_batch(plain.config)) if "pixel_values" in row][:2]
for head in [model.lm_head, model.model.vm_head] if sys.argv[3] == "heads" else []:
    fully_shard(head)
fully_shard(model)
losses = [plain(**row).vw_loss for row in rows]
expected = gradients(sum(losses) / 2, plain)
loss = model(**rows[int(sys.argv[1])]).vw_loss
torch.testing.assert_close(loss, losses[int(sys.argv[1])])
loss.backward()
for name, parameter in model.named_parameters():
    found = torch.zeros_like(expected[name]) if parameter.grad is None else parameter.grad.full_tensor()
    torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-6)
barrier()
os._exit(0)  # threads of gloo that are still there abort an exit
"""


@pytest.mark.parametrize("sharded", ["model", "heads"])
def test_sharded_heads(tmp_path, sharded):
    """FSDP2 in two processes, the heads sharded with the model or each on its own."""
    arguments = [str(tmp_path / "store"), sharded]
    ranks = [
        subprocess.Popen([sys.executable, "-c", SHARDED, rank, *arguments], cwd=ROOT / "tests") for rank in ("0", "1")
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
