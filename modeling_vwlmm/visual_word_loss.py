"""The visual-word loss of VW-LMM (arXiv 2403.07720), computed a tile of rows at a time."""

import itertools
import math
import re
from typing import Any

import torch


TARGETS = ("visual_words", "language_model")
# A row of a tile takes 2 V numbers (4 V on a GPU), so its rows must be few, but enough for matrix products to be fast.
# 288 rows are half an image of CLIP ViT-L/14 at 336 pixels
CPU_TILE_ROWS = 288
GPU_TILE_LOGITS = 2**24
# A CPU makes the gradients of a tile, and adds up products, in blocks that fit into its cache
CPU_BLOCK_LOGITS = 2**18
CPU_BLOCK_NUMBERS = 2**20
# oneDNN multiplies bfloat16 where the CPU has AVX-512. On others float32 is faster
CPU_MULTIPLIES_BFLOAT16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def check_loss_fields(visual_word_loss_weight: float | None = None, visual_word_target: str | None = None) -> None:
    """Raise a `ValueError` if a field of the loss has a value that it cannot have. None: the field is not given."""
    if visual_word_target not in (None, *TARGETS):
        expected = " or ".join(f'"{target}"' for target in TARGETS)
        raise ValueError(f'visual_word_target is "{visual_word_target}", expected {expected}')
    if visual_word_loss_weight is not None and not 0 <= visual_word_loss_weight < math.inf:
        raise ValueError(f"visual_word_loss_weight is {visual_word_loss_weight}, expected 0 or more")


def sample_starts(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Where the samples of a row without padding start, of shape (B, T) as `position_ids`, but not the first of a row.

    They lie one after another where there is no attention mask and positions do not go on by one, which is how
    transformers tells them apart. None where a row is one sample.
    """
    if position_ids is None or attention_mask is not None:
        return None
    return position_ids.diff(prepend=position_ids[:, :1] - 1) != 1


def scored_positions(
    image_mask: torch.Tensor, attention_mask: torch.Tensor | None = None, position_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """The image positions t that the visual-word loss scores: those that something of their sample precedes.

    Args:
        image_mask: of shape (B, T), true where a patch stands.
        attention_mask: of shape (B, T), 0 at padding, on either side.
        position_ids: of shape (B, T), anew from each sample on where a row has several, see [`sample_starts`].

    Returns:
        A boolean mask of shape (B, T). Position t is predicted from position t - 1.
    """
    preceded = torch.ones_like(image_mask) if attention_mask is None else attention_mask.bool().clone()
    preceded = preceded.roll(1, dims=1)
    preceded[:, 0] = False
    starts = sample_starts(position_ids, attention_mask)
    return image_mask & preceded if starts is None else image_mask & preceded & ~starts.to(preceded.device)


def select_scored(
    hidden_states: torch.Tensor, image_features: torch.Tensor, image_mask: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The rows that the loss compares, and which of them count, None if all.

    Args:
        hidden_states: of shape (B, T, d).
        image_features: of shape (image positions, d).
        image_mask, positions: of shape (B, T), true at image positions, and at those that are scored.

    Returns:
        Hidden states at t - 1 and features at t, (N, d) each, and which count, (N,).
    """
    if not torch.compiler.is_compiling():
        return hidden_states[:, :-1][positions[:, 1:]], image_features[positions[image_mask]], None
    # A compiler knows the number of image positions, and not of those that are scored
    at = image_mask.flatten().nonzero_static(size=len(image_features)).squeeze(-1)
    return hidden_states.flatten(0, 1)[at - 1], image_features, positions.flatten()[at]


def visual_word_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    image_features: torch.Tensor,
    vm_head_weight: torch.Tensor,
    lm_head_bias: torch.Tensor | None = None,
    vm_head_bias: torch.Tensor | None = None,
    target: str = "visual_words",
    detach_visual_words: bool = False,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over image positions t of the divergence between the visual word w_t and the LLM's prediction p_{t-1}.

    With p_{t-1} = softmax(W_lm h_{t-1}), of the first V rows of W_lm, and w_t = softmax(W_vm f_t),

    - `"visual_words"`, joint training: KL(w_t || p_{t-1}). The visual words are the target, and gradient reaches them
      too unless `detach_visual_words`;
    - `"language_model"`, VM-head training: KL(p_{t-1} || w_t) with p detached.

    Logits, distributions and their gradients exist for one tile of rows at a time. The gradients of the inputs are
    computed with the loss and kept until the backward pass, so that no logit is computed twice: a row takes one matrix
    product (2dV operations) for each head, and one for each input that needs a gradient.

    Args:
        hidden_states: h of shape (N, d), the LLM's last hidden states at t - 1, for the N scored t.
        lm_head_weight: W_lm of shape (V or more, d), of which the first V rows are used.
        image_features: f of shape (N, d), the projected features at t.
        vm_head_weight: W_vm of shape (V, d).
        lm_head_bias, vm_head_bias: of shape (V or more,), added to the logits.
        target: which of the two distributions is the target, see above.
        detach_visual_words: whether joint training stops the gradient through its target.
        keep: of shape (N,), false for rows that do not count. A compiler takes it in place of fewer rows.

    Returns:
        A scalar in float32 (float64 for float64 inputs), in nats. 0 where N is 0.
    """
    language_model = hidden_states, lm_head_weight, lm_head_bias
    visual_words = image_features, vm_head_weight, vm_head_bias
    check_loss_fields(visual_word_target=target)
    if target == "visual_words":
        target_head, predicting_head = visual_words, language_model
    else:
        target_head, predicting_head = language_model, visual_words
    if detach_visual_words or target == "language_model":
        inputs, weight, bias = target_head
        target_head = inputs.detach(), weight.detach(), None if bias is None else bias.detach()
    return _linear_kl([*target_head, *predicting_head], keep, vm_head_weight.shape[0])


def _linear_kl(tensors, keep, vocab_size):
    """Sum over rows of KL(softmax(a) || softmax(b)), where a and b are the logits of two linear maps.

    `tensors` are the inputs, the weight and the bias of the target's map, and then those of the predicting one.
    """
    device = tensors[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    needs_grad = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in tensors]
    if torch.compiler.is_compiling():
        return _linear_kl_op(*tensors, keep, vocab_size, needs_grad, dtype)[0]
    if keep is not None:
        tensors[0], tensors[3] = tensors[0][keep], tensors[3][keep]
    loss, gradients = _loss_and_gradients(tensors, vocab_size, needs_grad, dtype)
    for tensor, gradient in zip(itertools.compress(tensors, needs_grad), gradients, strict=True):
        loss = loss + _Gradient.apply(tensor, gradient)
    return loss


@torch.no_grad()
def _loss_and_gradients(tensors, vocab_size, needs_grad, autocast_dtype):
    """The loss, and the gradients of those tensors that need one."""
    target, predicting = (
        _Head(*tensors[i : i + 3], vocab_size, needs_grad[i : i + 3], autocast_dtype) for i in (0, 3)
    )
    count, device = len(target.inputs), target.inputs.device
    dtype = torch.promote_types(target.logits_dtype, predicting.logits_dtype)
    on_cpu = device.type == "cpu"
    most_rows = CPU_TILE_ROWS if on_cpu else max(1, GPU_TILE_LOGITS // vocab_size)
    if dtype.itemsize == 2:
        most_rows *= 2
    tile_rows = math.ceil(count / max(1, math.ceil(count / most_rows)))  # tiles of about the same size
    block_rows = max(1, CPU_BLOCK_LOGITS // vocab_size) if on_cpu else tile_rows
    for head in (target, predicting):
        head.make_gradients(tile_rows)
    tile = torch.empty(2, tile_rows, vocab_size, dtype=dtype, device=device)
    divergences = []
    for start in range(0, count, max(tile_rows, 1)):
        rows = slice(start, min(start + tile_rows, count))
        a, b = tile[:, : rows.stop - start]
        target.logits(rows, out=a)
        predicting.logits(rows, out=b)
        blocks = zip(a.split(block_rows), b.split(block_rows), strict=True)
        divergences += [_kl_and_gradients_(*block, bool(target.gradients)) for block in blocks]
        target.add_gradients(rows, a)
        predicting.add_gradients(rows, b)
    loss = torch.cat(divergences or [target.inputs.new_zeros(0, dtype=target.sum_dtype)]).sum()
    return loss, [*target.gradients.values(), *predicting.gradients.values()]


def _kl_and_gradients_(a, b, needs_target_grad):
    """KL(target || predicted) of every row, target = softmax(a) and predicted = softmax(b).

    The gradients overwrite the logits. With the gap g = a - b and its mean m = sum_v target[v] g[v], the divergence is
    m - logsumexp(a) + logsumexp(b). Its gradients are target (g - m) for a and predicted - target for b.
    """
    if a.dtype == torch.bfloat16:
        wide_a, wide_b = a.float(), b.float()
        divergences = _kl_and_gradients_(wide_a, wide_b, needs_target_grad)
        a.copy_(wide_a)
        b.copy_(wide_b)
        return divergences
    target, predicted = a.softmax(-1), b.softmax(-1)
    # The largest probability is exp(max - logsumexp), so logsumexp is max - log(largest probability)
    logsumexps = b.amax(-1) - a.amax(-1) + target.amax(-1).log_() - predicted.amax(-1).log_()
    mean_gap = a.sub_(b).mul_(target).sum(-1)
    if needs_target_grad:
        a.addcmul_(target, mean_gap.unsqueeze(-1), value=-1)
    torch.sub(predicted, target, out=b)
    return mean_gap + logsumexps


class _Head:
    """A linear map from rows to logits, which adds up the gradients of its inputs tile by tile."""

    def __init__(self, inputs, weight, bias, vocab_size, needs_grad, autocast_dtype):
        dtype = autocast_dtype or inputs.dtype
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        keeps_dtype = CPU_MULTIPLIES_BFLOAT16 and inputs.device.type == "cpu" and dtype == torch.bfloat16
        self.logits_dtype = dtype if keeps_dtype else self.sum_dtype
        # Most gradients of logits are too small for float16. None is large enough to overflow when scaled: those of a
        # prediction are below 1, those of a target hardly ever above 100
        self.scale = 256 if dtype == torch.float16 else 1
        self.inputs = inputs.detach().to(dtype)
        self.weight = weight.detach()[:vocab_size].to(dtype)
        self.bias = None if bias is None else bias.detach()[:vocab_size]
        named = {"inputs": inputs, "weight": weight, "bias": bias}
        self.gradients = {name: named[name] for name in itertools.compress(named, needs_grad)}

    def make_gradients(self, tile_rows):
        # The first tile overwrites whatever is in here, the others add to it
        new = torch.empty_like if len(self.inputs) else torch.zeros_like
        vocab_size = len(self.weight)
        for name, tensor in self.gradients.items():
            # A gradient that no tile adds to is rounded once, to the dtype that it ends in
            is_whole = name == "inputs" or len(self.inputs) <= tile_rows
            dtype = tensor.dtype if is_whole and tensor.dtype == self.logits_dtype else self.sum_dtype
            self.gradients[name] = new(tensor, dtype=dtype)
            if name != "inputs":
                self.gradients[name][vocab_size:] = 0

    def logits(self, rows, out):
        _add_product(out, self.inputs[rows], self.weight.t(), beta=0)
        if self.bias is not None:
            out.add_(self.bias)

    def add_gradients(self, rows, logits_grad):
        if not self.gradients:
            return
        scaled = logits_grad if self.scale == 1 else self.scale * logits_grad
        grad, vocab_size = scaled.to(self.weight.dtype), len(self.weight)
        if "inputs" in self.gradients:
            _add_product(self.gradients["inputs"][rows], grad, self.weight, beta=0, alpha=1 / self.scale)
        is_first = rows.start == 0
        if "weight" in self.gradients:
            total = self.gradients["weight"][:vocab_size]
            _add_product(total, grad.t(), self.inputs[rows], beta=0 if is_first else 1, alpha=1 / self.scale)
        if "bias" in self.gradients:
            total = self.gradients["bias"][:vocab_size]
            added = logits_grad.sum(0, dtype=total.dtype)
            total.copy_(added) if is_first else total.add_(added)


def _add_product(total, a, b, beta=1, alpha=1):
    """total = beta total + alpha a @ b, summed in float32 where a and b are in 16 bits."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, alpha=alpha, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=beta, alpha=alpha, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.bfloat16 and CPU_MULTIPLIES_BFLOAT16:
        # Each product is rounded to bfloat16, as any product of torch is. Blocks of it stay in the cache
        block_rows = max(1, CPU_BLOCK_NUMBERS // total.shape[1])
        for block, part in zip(total.split(block_rows), a.split(block_rows), strict=True):
            product = (part @ b).to(total.dtype)
            block.copy_(product) if beta == 0 else block.add_(product)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, alpha=alpha, out=total)


class _Gradient(torch.autograd.Function):
    """A zero that passes an already known gradient to one tensor.

    Each tensor gets a node of its own, which frees its gradient as soon as it is passed on.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = tensor.dtype
        # Its dtype is that of the factor that comes back, a mean's 1 / N for one
        return gradient.new_zeros((), dtype=torch.promote_types(gradient.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        # The gradient may be as large as the head, so it is copied only where another backward pass needs it again
        if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
            gradient = gradient * loss_grad
        else:
            gradient.mul_(loss_grad)
        return gradient.to(ctx.dtype), None


# A compiler sees one operation, for its tiles depend on how many positions are scored. The name of this module is part
# of the operation's, because the code of a repository may be loaded beside the package
@torch.library.custom_op(
    f"vwlmm::linear_kl_{re.sub('[^0-9a-zA-Z]', '_', __name__)}",
    mutates_args=(),
    schema="(Tensor inputs, Tensor weight, Tensor? bias, Tensor inputs2, Tensor weight2, Tensor? bias2, Tensor? keep, "
    "SymInt vocab_size, bool[] needs_grad, ScalarType? dtype) -> Tensor[]",
)
def _linear_kl_op(*arguments):
    """What [`_loss_and_gradients`] returns, with gradients of all rows, in the dtype of the sum."""
    *tensors, keep, vocab_size, needs_grad, dtype = arguments
    outputs = _empty_outputs(*arguments)
    kept = list(tensors) if keep is None else [t[keep] if i in (0, 3) else t for i, t in enumerate(tensors)]
    loss, gradients = _loss_and_gradients(kept, vocab_size, needs_grad, dtype)
    outputs[0].copy_(loss)
    for i, whole, gradient in zip(itertools.compress(range(6), needs_grad), outputs[1:], gradients, strict=True):
        if keep is not None and i in (0, 3):
            whole.zero_()[keep] = gradient.to(whole.dtype)
        else:
            whole.copy_(gradient)
    return outputs


@_linear_kl_op.register_fake
def _empty_outputs(*arguments):
    *tensors, _, _, needs_grad, dtype = arguments
    dtype = torch.promote_types(dtype or tensors[0].dtype, torch.float32)
    return [
        tensors[0].new_empty((), dtype=dtype),
        *(torch.empty_like(tensor, dtype=dtype) for tensor in itertools.compress(tensors, needs_grad)),
    ]


def _save_gradients(ctx, inputs, output):
    ctx.needs_grad, ctx.dtypes = inputs[8], [None if tensor is None else tensor.dtype for tensor in inputs[:6]]
    ctx.save_for_backward(*output[1:])


def _pass_gradients(ctx, output_grads):
    gradients = iter(ctx.saved_tensors)
    scaled = [
        (next(gradients) * output_grads[0]).to(dtype) if needs_grad else None
        for dtype, needs_grad in zip(ctx.dtypes, ctx.needs_grad, strict=True)
    ]
    return *scaled, None, None, None, None


_linear_kl_op.register_autograd(_pass_gradients, setup_context=_save_gradients)
