"""Lenses: several ways to read a word off a patch, of which the VM head is one."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import LlavaProcessor

from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import question_about
from ..wrapped_weights import embedding_rows


VM_HEAD, EMBEDDING = "VM head", "nearest input embedding"
ROWS = 64  # patches whose scores exist at once


@torch.no_grad()
def lens_words(
    model: VWLmmForCausalLM, processor: LlavaProcessor, image: Image.Image, k: int = 3
) -> dict[str, np.ndarray]:
    """The k best entries of the LLM's vocabulary for every patch of an image, through each lens: (patches, k).

    - "VM head": the visual word.
    - "logit lens, layer l": what the LM head makes of the hidden state at the patch after layer l, through the LLM's
      last norm (nostalgebraist, 2020). Layer 0 is what the LLM reads.
    - "nearest input embedding": by the cosine with what the LLM reads.

    Raises:
        ValueError: the LLM's last norm is not called `norm`.
    """
    llm = model.model.language_model
    if not hasattr(llm, "norm"):
        raise ValueError(f"{type(llm).__name__} has no `norm`, which the logit lens reads hidden states through")
    inputs = question_about(processor, [image], "").to(model.device, model.dtype)
    outputs = model.model(**inputs, output_hidden_states=True)
    mask, count = inputs["input_ids"] == model.config.image_token_id, model.config.visual_vocab_size
    hidden = [state[mask.to(state.device)] for state in outputs.hidden_states]  # (patches, d) each
    embeddings = embedding_rows(model.get_input_embeddings(), count, hidden[0].device).float()
    embeddings = nn.functional.normalize(embeddings, dim=-1)

    def logits(state: torch.Tensor) -> torch.Tensor:
        return model.lm_head(llm.norm(state))

    def best(state: torch.Tensor, scores: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        found = [scores(rows)[:, :count].topk(k, dim=-1).indices.cpu() for rows in state.split(ROWS)]
        return torch.cat(found).numpy()

    lenses = {VM_HEAD: best(outputs.image_hidden_states[0], model.model.visual_words)}
    for layer, state in enumerate(hidden):
        is_last = layer == len(hidden) - 1  # which went through the norm already
        lenses[f"logit lens, layer {layer}"] = best(state, model.lm_head if is_last else logits)
    lenses[EMBEDDING] = best(hidden[0], lambda state: nn.functional.normalize(state.float(), dim=-1) @ embeddings.T)
    return lenses
