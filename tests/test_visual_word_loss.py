"""The visual-word loss against a naive one, in float64."""

import pytest
import torch
from torch.testing import assert_close

from modeling_vwlmm import visual_word_loss as module
from modeling_vwlmm.naive import naive_divergence, naive_visual_word_loss
from modeling_vwlmm.visual_word_loss import scored_positions, visual_word_loss


# Target, whether it is detached
DIRECTIONS = [("visual_words", False), ("visual_words", True), ("language_model", False)]
# Rows and V
SHAPES = [(41, 1271), (1, 1271), (7, 2), (401, 41)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}
D = 13
EXTRA = 3  # tokens of the LLM beyond V
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


def reference(inputs, target, detach):
    """The loss and the gradients, in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    loss = naive_visual_word_loss(*inputs, target=target, detach_visual_words=detach)
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
@pytest.mark.parametrize("has_products", [True, False], ids=["products", "no products"])
def test_16_bits_are_no_worse_than_naive_16_bits(
    monkeypatch, has_products, target, detach, dtype, shape, leaves, device
):
    """On a CPU that multiplies in bfloat16, and on one that does not."""
    monkeypatch.setattr(module, "CPU_TILE_ROWS", 16)
    monkeypatch.setattr(module, "CPU_MULTIPLIES_BFLOAT16", has_products)
    inputs = tensors(*shape, dtype, bias=False, device=device)
    expected, expected_grads = reference(inputs, target, detach)
    if leaves == "autocast":
        inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]

    def losses():
        yield visual_word_loss(*inputs, target=target, detach_visual_words=detach)
        yield naive_visual_word_loss(*inputs, target=target, detach_visual_words=detach)

    with torch.autocast(device, dtype, enabled=leaves == "autocast"):
        ours, naive = losses()
    assert ours.dtype == torch.float32
    scale = 2**16 if dtype == torch.float16 else 1  # as a GradScaler begins
    # Products in bfloat16 are rounded where the naive ones are, and come out the same to single roundings
    slack = 1.001 if has_products and dtype == torch.bfloat16 else 1
    assert error(ours, expected) <= max(error(naive, expected), 1e-4)
    for found, theirs, wanted in zip(grads(ours, inputs), grads(naive * scale, inputs), expected_grads, strict=True):
        theirs = theirs.double() / scale
        assert found.dtype == inputs[0].dtype
        # Half a unit in the last place is the rounding of the gradient itself
        assert error(found, wanted) <= max(slack * error(theirs, wanted), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
@pytest.mark.parametrize("tile_rows", [16, 512])
def test_the_mean_of_bfloat16(monkeypatch, tile_rows, target):
    """A gradient takes the factor of a mean as it is: in bfloat16, 1 / 401 would be 0.26 % too small."""
    monkeypatch.setattr(module, "CPU_TILE_ROWS", tile_rows)
    monkeypatch.setattr(module, "CPU_MULTIPLIES_BFLOAT16", True)
    monkeypatch.setattr(module, "CPU_BLOCK_NUMBERS", 100)
    inputs = tensors(401, 99, torch.bfloat16)
    total, mean = (grads(visual_word_loss(*inputs, target=target) / count, inputs) for count in (1, 401))
    for whole, part in zip(total, mean, strict=True):
        if whole.any():
            whole, part = whole.double(), part.double()
            assert ((whole * part).sum() / whole.square().sum() * 401 - 1).abs() <= 5e-4


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
    assert error(loss, naive_divergence(logits.double(), words.double(), target, detach)) <= 1e-6
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


# i: image, t: text, .: padding; where the image positions that count are capitals
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
