"""The fused visual-word loss against a loop over rows, in float64."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import IMAGE, ROWS, gradients, tiny_batch, tiny_model
from torch import nn
from torch.testing import assert_close

from modeling_vwlmm import visual_word_loss as module
from modeling_vwlmm.visual_word_loss import scored_positions, visual_word_loss


# Target, whether it is detached
DIRECTIONS = [("visual_words", False), ("visual_words", True), ("language_model", False)]
# Rows and V
SHAPES = [(41, 1271), (1, 1271), (7, 2), (401, 41)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
D = 13
EXTRA = 3  # tokens of the LLM beyond V


def kl(target_logits, predicted_logits):
    """KL(target || predicted) of two vectors of logits, straight from its definition."""
    log_t = target_logits - torch.logsumexp(target_logits, 0)
    log_p = predicted_logits - torch.logsumexp(predicted_logits, 0)
    return (log_t.exp() * (log_t - log_p)).sum()


def naive_loss(logits, visual_word_logits, target, detach):
    """Row by row, in float64."""
    total = 0
    for z, u in zip(logits.double(), visual_word_logits.double(), strict=True):
        if target == "visual_words":
            total = total + kl(u.detach() if detach else u, z)
        else:
            total = total + kl(z.detach(), u)
    return total


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def tensors(rows, vocab_size, dtype=torch.float32, bias=True, seed=0, device="cpu"):
    """h, W_lm, f, W_vm and the biases."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, D), (vocab_size + EXTRA, D), (rows, D), (vocab_size, D)]
    if bias:
        shapes += [(vocab_size + EXTRA,), (vocab_size,)]
    scales = [1, 0.3, 1, 0.3, 0.3, 0.3]  # logits of about 1, which float32 rounds to 1e-7
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype).requires_grad_()
        for scale, shape in zip(scales, shapes, strict=False)
    ]


def logits_of(hidden_states, lm_head, features, vm_head, lm_bias=0, vm_bias=0):
    vocab_size = len(vm_head)
    return (hidden_states @ lm_head.T + lm_bias)[:, :vocab_size], features @ vm_head.T + vm_bias


def reference(inputs, target, detach):
    """The loss and the gradients, in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = naive_loss(*logits_of(*inputs), target, detach)
    return loss, torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def grads(loss, inputs):
    return torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)


def error(found, expected):
    """Relative to the whole tensor, in the Euclidean norm."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


@pytest.fixture(params=[256, 16], ids=["one tile", "tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(module, "CPU_TILE_ROWS", request.param)
    monkeypatch.setattr(module, "GPU_TILE_LOGITS", request.param * 1000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("target,detach", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(tiles, shape, target, detach, dtype, bias, device):
    inputs = tensors(*shape, dtype, bias, device=device)
    expected, expected_grads = reference(inputs, target, detach)
    loss = visual_word_loss(*inputs, target=target, detach_visual_words=detach)
    assert loss.shape == () and loss.dtype == dtype
    assert error(loss, expected) <= TOLERANCES[dtype]
    for found, wanted in zip(grads(loss, inputs), expected_grads, strict=True):
        assert found.dtype == dtype and error(found, wanted) <= TOLERANCES[dtype]
    # What the target is, and so what gets no gradient
    assert expected_grads[0].any() == expected_grads[1].any() == (target == "visual_words")
    assert expected_grads[2].any() == expected_grads[3].any() == (not detach)


@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_gradcheck(monkeypatch, target, detach):
    monkeypatch.setattr(module, "CPU_TILE_ROWS", 3)

    def loss(*inputs):
        return visual_word_loss(*inputs, target=target, detach_visual_words=detach)

    inputs = tensors(5, 11, torch.float64)
    # A detached target is a constant for us, not for finite differences
    if detach or target == "language_model":
        for i in (2, 3, 5) if detach else (0, 1, 4):
            inputs[i].requires_grad_(False)
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leaves", ["16 bits", "autocast"])
@pytest.mark.parametrize("shape", [(401, 41), (7, 50_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_16_bits_are_no_worse_than_naive_16_bits(monkeypatch, target, detach, dtype, shape, leaves, device):
    monkeypatch.setattr(module, "CPU_TILE_ROWS", 16)
    inputs = tensors(*shape, dtype, bias=False, device=device)
    expected, expected_grads = reference(inputs, target, detach)
    if leaves == "autocast":
        inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]

    def losses():
        yield visual_word_loss(*inputs, target=target, detach_visual_words=detach)
        z, u = (logits.float() for logits in logits_of(*inputs))
        t, q = (u, z) if target == "visual_words" else (z, u)
        t = t.detach() if detach or target == "language_model" else t
        yield nn.functional.kl_div(q.log_softmax(-1), t.log_softmax(-1), reduction="sum", log_target=True)

    with torch.autocast(device, dtype, enabled=leaves == "autocast"):
        ours, naive = losses()
    assert ours.dtype == torch.float32
    scale = 2**16 if dtype == torch.float16 else 1  # as a GradScaler begins
    assert error(ours, expected) <= max(error(naive, expected), 1e-4)
    for found, theirs, wanted in zip(grads(ours, inputs), grads(naive * scale, inputs), expected_grads, strict=True):
        theirs = theirs.double() / scale
        assert found.dtype == inputs[0].dtype
        # Half a unit in the last place is the rounding of the gradient itself
        assert error(found, wanted) <= max(error(theirs, wanted), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_zero_where_both_agree(target):
    h, lm_head, *_ = tensors(5, 7, torch.float64)
    loss = visual_word_loss(h, lm_head, h, lm_head, vm_head_bias=torch.full((10,), 3.0).double(), target=target)
    assert_close(loss, torch.tensor(0.0).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_no_rows(target, detach):
    inputs = tensors(0, 11)
    loss = visual_word_loss(*inputs, target=target, detach_visual_words=detach)
    assert loss == 0 and loss.requires_grad
    found = grads(loss, inputs)
    assert not any(grad.any() for grad in found) and found[3].shape == (11, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_extreme_logits(target, detach, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype).requires_grad_()
    words = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    eye = torch.eye(3, dtype=dtype)
    loss = visual_word_loss(logits, eye, words, eye, target=target, detach_visual_words=detach)
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert error(loss, naive_loss(logits, words, target, detach)) <= 1e-6
    assert all(grad.isfinite().all() for grad in grads(loss, [logits, words]))


def test_the_same_twice():
    inputs = tensors(401, 41)
    first, second = (visual_word_loss(*inputs) for _ in range(2))
    assert torch.equal(first, second)
    for one, other in zip(grads(first, inputs), grads(second, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_compiled(tiles, target, detach):
    def loss(*inputs):
        return visual_word_loss(*inputs, target=target, detach_visual_words=detach)

    inputs = tensors(41, 101)
    eager, compiled = loss(*inputs), torch.compile(loss, backend="aot_eager")(*inputs)
    assert_close(compiled, eager, rtol=1e-6, atol=0)
    for found, wanted in zip(grads(compiled, inputs), grads(eager, inputs), strict=True):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)


# Who needs a gradient (h, W_lm, f, W_vm), and the matrix products a tile then takes: two make the logits
PRODUCTS = [
    ("visual_words", False, [True, True, True, True], 6),
    ("visual_words", False, [True, False, True, False], 4),  # LoRA with a projector
    ("visual_words", True, [True, True, True, True], 4),
    ("language_model", False, [True, True, True, True], 4),
    ("language_model", False, [False, False, False, True], 3),  # stage 3
    ("visual_words", False, [False, False, False, False], 2),
]


@pytest.mark.parametrize("target,detach,needed,products", PRODUCTS)
def test_no_product_is_computed_in_vain(monkeypatch, target, detach, needed, products):
    inputs = [tensor.requires_grad_(need) for tensor, need in zip(tensors(5, 11, bias=False), needed, strict=True)]
    calls = []
    monkeypatch.setattr(module, "_add_product", lambda *args, **kwargs: calls.append(args))
    visual_word_loss(*inputs, target=target, detach_visual_words=detach)
    assert len(calls) == products
    with torch.no_grad():
        visual_word_loss(*inputs, target=target, detach_visual_words=detach)
    assert len(calls) == products + 2


def test_unknown_target():
    with pytest.raises(ValueError, match='"pixels", expected "visual_words" or "language_model"'):
        visual_word_loss(*tensors(1, 3), target="pixels")


# Which positions are scored. i: image, t: text, .: padding; where the image positions that count are capitals


@pytest.mark.parametrize(
    "row",
    [
        "ttIItt",
        "iIIttt",
        "iItII.",
        "...iIt",
        "..tIIt",
        "tIIII.",
        ".tIItI",
        ".iIItI",
        "tttttt",
        "iIIIII",
        ".....i",
        "i.....",
        "......",
    ],
)
def test_scored_positions(row):
    image_mask = torch.tensor([[c in "iI" for c in row]])
    attention_mask = torch.tensor([[int(c != ".") for c in row]])
    expected = [[c == "I" for c in row]]
    assert scored_positions(image_mask, attention_mask).tolist() == expected
    other_row = torch.ones(1, len(row), dtype=torch.bool)  # nothing leaks from one row into the next
    both = torch.cat([other_row, image_mask]), torch.cat([other_row.long(), attention_mask])
    assert scored_positions(*both)[1:].tolist() == expected
    if "." not in row:
        assert scored_positions(image_mask).tolist() == expected


# Through the model


def naive_visual_word_loss(model, batch, out, target, detach):
    """A loop over rows and positions; the LLM's logits and the features are the model's."""
    logits, features = out.logits, list(out.image_hidden_states.flatten(0, 1))
    total, scored = 0, 0
    for i, row in enumerate(batch["input_ids"].tolist()):
        for t, token in enumerate(row):
            if token != model.config.image_token_id:
                continue
            visual_word_logits = model.model.vm_head.weight[: model.config.visual_vocab_size] @ features.pop(0)
            if t >= 1 and batch["attention_mask"][i, t - 1]:
                p = logits[i, t - 1, : model.config.visual_vocab_size]
                total = total + naive_loss(p[None], visual_word_logits[None], target, detach)
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
    expected = naive_visual_word_loss(model, batch, model(**batch), target, detach)
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
    _, positions = model.visual_word_loss(outputs, batch["attention_mask"])
    assert positions == 2 * (model.config.image_seq_length - 1)


# Heads in other forms


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_a_tied_head(target):
    model = tiny_model("llama-tied", visual_word_target=target).double()
    batch = tiny_batch(model.config)
    batch["pixel_values"] = batch["pixel_values"].double()
    out = model(**batch)
    expected = naive_visual_word_loss(model, batch, model(**batch), target, detach=False)
    assert_close(gradients(out.vw_loss, model), gradients(expected, model), rtol=1e-8, atol=1e-10)


def test_a_compiled_model():
    model, compiled = tiny_model(), torch.compile(tiny_model(), backend="aot_eager")
    batch = tiny_batch(model.config)
    losses = [m(**batch).loss for m in (model, compiled)]
    assert_close(*losses, rtol=1e-5, atol=0)
    found, expected = gradients(losses[1], compiled._orig_mod), gradients(losses[0], model)
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


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
from tiny import gradients, rows_of, tiny_batch, tiny_model
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
        subprocess.Popen([sys.executable, "-c", SHARDED, rank, *arguments], cwd=__file__.rpartition("/")[0])
        for rank in ("0", "1")
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
