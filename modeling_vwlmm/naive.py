"""The visual-word loss as its equations stand, on whole logits: the oracle of tests and benchmarks."""

import torch
from torch import nn


def naive_visual_word_loss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    image_features: torch.Tensor,
    vm_head_weight: torch.Tensor,
    lm_head_bias: torch.Tensor | float = 0.0,
    vm_head_bias: torch.Tensor | float = 0.0,
    target: str = "visual_words",
    detach_visual_words: bool = False,
) -> torch.Tensor:
    """The loss of two heads, with z = W_lm h + b_lm and u = W_vm f + b_vm: see `naive_divergence`.

    Arguments and result are those of `visual_word_loss.visual_word_loss`, which shares no code with this.

    Shape:
        h, f: (N, d). W_lm: (V or more, d). W_vm: (V, d). b_lm: (V or more,). b_vm: (V,). Result: a scalar.
    """
    z = hidden_states @ lm_head_weight.T + lm_head_bias  # (N, V or more)
    u = image_features @ vm_head_weight.T + vm_head_bias  # (N, V)
    return naive_divergence(z, u, target, detach_visual_words)


def naive_divergence(
    logits: torch.Tensor,
    visual_word_logits: torch.Tensor,
    target: str = "visual_words",
    detach_visual_words: bool = False,
) -> torch.Tensor:
    """Sum over N positions of KL(t || q) = sum_v t_v (log t_v - log q_v), in nats.

    With p = softmax(z) over the first V logits of the LLM and w = softmax(u), (t, q) is (w, p) for `"visual_words"`,
    where t keeps its gradient unless `detach_visual_words`, and (p, w) with p detached for `"language_model"`.

    Shape:
        z: (N, V or more). u: (N, V). Result: a scalar in float32, or in float64 for float64 logits.
    """
    dtype = torch.promote_types(visual_word_logits.dtype, torch.float32)
    log_p = logits[:, : visual_word_logits.shape[-1]].to(dtype).log_softmax(-1)
    log_w = visual_word_logits.to(dtype).log_softmax(-1)
    if target == "visual_words":
        log_t, log_q = log_w.detach() if detach_visual_words else log_w, log_p
    else:
        log_t, log_q = log_p.detach(), log_w
    return nn.functional.kl_div(log_q, log_t, reduction="sum", log_target=True)
