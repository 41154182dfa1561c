"""The visual-word loss of VW-LMM (arXiv 2403.07720)."""

import torch
from torch import nn


def scored_positions(image_mask, attention_mask=None):
    """The image positions t that the visual-word loss scores: those that something precedes.

    Args:
        image_mask (`torch.BoolTensor` of shape (B, T)): where a patch stands.
        attention_mask (`torch.Tensor` of shape (B, T), *optional*): 0 at padding, on either side.

    Returns:
        `torch.BoolTensor` of shape (B, T). Position t is predicted from position t - 1.
    """
    preceded = torch.ones_like(image_mask) if attention_mask is None else attention_mask.bool().clone()
    preceded = preceded.roll(1, dims=1)
    preceded[:, 0] = False
    return image_mask & preceded


def visual_word_loss(logits, visual_word_logits, target="visual_words", detach_visual_words=False):
    """Sum over image positions t of the divergence between the visual word w_t and the LLM's prediction p_{t-1}.

    `"visual_words"`, joint training: KL(w_t || p_{t-1}); the visual words are the target, and their gradient too is
    kept unless `detach_visual_words`. `"language_model"`, VM-head training: KL(p_{t-1} || w_t) with p detached.

    Args:
        logits (`torch.Tensor` of shape (N, V)): the LLM's logits at t - 1, for the N scored positions t.
        visual_word_logits (`torch.Tensor` of shape (N, V)): W_vm f_t, the VM head's output at t.
        target (`str`): which of the two distributions is the target, see above.
        detach_visual_words (`bool`): whether joint training stops the gradient through its target.

    Returns:
        `torch.Tensor`, a scalar in float32 (float64 for float64 inputs), in nats. 0 where N is 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if target == "visual_words":
        target_logits = visual_word_logits.detach() if detach_visual_words else visual_word_logits
        predicted_logits = logits
    elif target == "language_model":
        target_logits, predicted_logits = logits.detach(), visual_word_logits
    else:
        raise ValueError(f'visual_word_target is "{target}", expected "visual_words" or "language_model"')
    return nn.functional.kl_div(
        predicted_logits.to(dtype).log_softmax(-1),
        target_logits.to(dtype).log_softmax(-1),
        reduction="sum",
        log_target=True,
    )
