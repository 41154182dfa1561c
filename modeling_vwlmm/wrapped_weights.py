"""Weights of heads and embeddings, whatever wraps them: adapters, quantization, shards, or a place on a disk."""

from typing import Any

import torch
from torch import nn


def in_dtype_of(linear: nn.Linear, features: torch.Tensor) -> torch.Tensor:
    """Features in the dtype of the layer that reads them: a layer that trains may be in float32 beside 16-bit ones.

    A quantized layer has no dtype that features could take, so they stay as they are.
    """
    dtype = linear.weight.dtype
    return features.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else features


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes with its weight as it stands.

    Otherwise the layer has to be called: its weight may be in parts, quantized or on a disk, and PEFT and others wrap
    layers in modules of their own.
    """
    weight = getattr(layer, "weight", None)
    return (
        getattr(type(layer), "plain_forward", type(layer).forward) in (nn.Linear.forward, nn.Embedding.forward)
        and type(weight) in (torch.Tensor, nn.Parameter)  # sharded and quantized weights have types of their own
        and weight.is_floating_point()
        and weight.itemsize > 1
        and weight.device.type != "meta"  # where accelerate leaves what it loads for each call
    )


def weight_and_bias(head: nn.Linear, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight (V, d) and the bias (V,) of a head, None if it has no bias; `inputs` (..., d) are what it will read.

    A head that has no plain weight is called instead, on the d rows of the identity and a row of zeros, and its
    outputs are its linear map.
    """
    if _is_plain(head):
        return head.weight.to(inputs.device), head.bias
    size = inputs.shape[-1]
    rows = head(torch.eye(size + 1, size, dtype=inputs.dtype, device=inputs.device))  # the last row is 0
    return (rows[:size] - rows[size]).t(), rows[size]


def embedding_rows(embeddings: nn.Module, count: int, device: torch.device) -> torch.Tensor:
    """The embeddings of the first tokens, (count, d), on a device."""
    weight: Any = embeddings.weight
    if _is_plain(embeddings):
        return weight[:count].to(device)
    ids = torch.arange(count, device=device if weight.device.type == "meta" else weight.device)
    return embeddings(ids).to(device)
