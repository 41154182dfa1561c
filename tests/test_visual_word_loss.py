import pytest
import torch
from tiny import IMAGE, ROWS, gradients, tiny_batch, tiny_model
from torch.testing import assert_close

from modeling_vwlmm import modeling_vwlmm
from modeling_vwlmm.visual_word_loss import scored_positions, visual_word_loss


# Target, whether it is detached
DIRECTIONS = [("visual_words", False), ("visual_words", True), ("language_model", False)]
SHAPES = [(41, 1271), (1, 1271), (7, 2), (401, 41)]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-6}


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


def close(found, expected, tolerance):
    expected = expected.to(torch.float64)
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("target,detach", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape, target, detach, dtype):
    generator = torch.Generator().manual_seed(0)
    (n, vocab_size), d = shape, 13
    logits, vm_head, features = (
        (scale * torch.randn(*size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for scale, size in [(2, (n, vocab_size)), (0.5, (vocab_size, d)), (1, (n, d))]
    )
    leaves = [logits, vm_head, features]
    expected = naive_loss(logits.double(), features.double() @ vm_head.double().T, target, detach)
    expected_grads = torch.autograd.grad(expected, leaves, allow_unused=True, materialize_grads=True)
    loss = visual_word_loss(logits, features @ vm_head.T, target, detach)
    assert loss.shape == () and loss.dtype == dtype
    close(loss, expected, TOLERANCES[dtype])
    for found, wanted in zip(
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True), expected_grads, strict=True
    ):
        close(found, wanted, TOLERANCES[dtype])
    # What the target is, and so what gets no gradient
    assert expected_grads[0].any() == (target == "visual_words")
    assert expected_grads[1].any() == expected_grads[2].any() == (not detach)


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_zero_where_both_agree(target):
    logits = torch.randn(5, 7, dtype=torch.float64)
    assert_close(visual_word_loss(logits, logits + 3, target), torch.tensor(0.0).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_no_rows(target, detach):
    logits, words = (torch.randn(0, 11, requires_grad=True) for _ in range(2))
    weight = torch.randn(11, 11, requires_grad=True)
    loss = visual_word_loss(logits, words @ weight, target, detach)
    assert loss == 0 and loss.requires_grad
    grads = torch.autograd.grad(loss, [logits, weight], allow_unused=True, materialize_grads=True)
    assert not any(grad.any() for grad in grads) and grads[1].shape == (11, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target,detach", DIRECTIONS)
def test_extreme_logits(target, detach, dtype):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype).requires_grad_()
    words = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    loss = visual_word_loss(logits, words, target, detach)
    assert loss.dtype == torch.float32 and loss.isfinite()
    close(loss, naive_loss(logits, words, target, detach), 1e-6)
    grads = torch.autograd.grad(loss, [logits, words], allow_unused=True, materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)


def test_bfloat16_logits_are_compared_in_float32():
    logits, words = (4 * torch.randn(41, 401, generator=torch.Generator().manual_seed(i)) for i in range(2))
    logits, words = logits.bfloat16(), words.bfloat16()
    close(visual_word_loss(logits, words), naive_loss(logits, words, "visual_words", False), 1e-6)


def test_unknown_target():
    with pytest.raises(ValueError, match='"pixels", expected "visual_words" or "language_model"'):
        visual_word_loss(torch.zeros(1, 3), torch.zeros(1, 3), target="pixels")


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


@pytest.mark.parametrize("target", ["visual_words", "language_model"])
def test_chunks_of_positions_add_up_to_the_whole(monkeypatch, target):
    model = tiny_model(visual_word_target=target)
    batch = tiny_batch(model.config)
    whole = model(**batch).vw_loss
    calls = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: calls.append(output.shape[:-1].numel()))
    expected = gradients(whole, model)
    monkeypatch.setattr(modeling_vwlmm, "_CHUNK", 5)
    chunked = model(**batch).vw_loss
    found = gradients(chunked, model)
    assert max(calls[1:]) == 5 and len(calls) > 4
    assert_close(chunked, whole, rtol=1e-6, atol=0)
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
