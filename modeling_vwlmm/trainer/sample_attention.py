"""Attention of torch within each sample of a row, instead of over a whole row with most of it masked."""

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ..modeling_vwlmm import VWLmmForCausalLM


SDPA_BY_SAMPLE = "sdpa_by_sample"
_sdpa: Any = AttentionInterface()["sdpa"]


def sdpa_by_sample(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `"sdpa"`, which takes the samples of a row without padding one after another.

    Args:
        module: the attention layer.
        query, key, value: of shape (B, heads, T, channels), where B is 1 if `cu_seq_lens_q` are given.
        attention_mask: of shape (B, 1, T, T), as transformers makes it of the positions.
        cu_seq_lens_q: where samples start, and T.

    Returns:
        The output (B, T, heads, channels), and no weights.
    """
    if cu_seq_lens_q is None or attention_mask is None:  # a row of one sample has no mask
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    for start, end in pairwise(cu_seq_lens_q.tolist()):
        q, k, v = (tensor[:, :, start:end] for tensor in (query, key, value))
        outputs.append(_sdpa(module, q, k, v, attention_mask[:, :, start:end, start:end], **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def attend_by_sample(model: VWLmmForCausalLM) -> None:
    """Have a model whose LLM uses `"sdpa"` use it a sample at a time, on rows without padding. Others stay as is."""
    language_model: Any = model.model.language_model
    if language_model.config._attn_implementation == "sdpa":
        language_model.set_attn_implementation(SDPA_BY_SAMPLE)


AttentionInterface.register(SDPA_BY_SAMPLE, sdpa_by_sample)
AttentionMaskInterface.register(SDPA_BY_SAMPLE, AttentionMaskInterface()["sdpa"])
