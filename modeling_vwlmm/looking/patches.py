"""What is said of a patch: its visual word w, and what the LLM expected there, p."""

from typing import NamedTuple

import torch
from PIL import Image
from transformers import LlavaProcessor

from ..modeling_vwlmm import VWLmmForCausalLM
from ..processing import question_about
from ..visual_word_loss import scored_positions
from ..words import readable


ROWS = 64  # patches whose distributions exist at once


class Patch(NamedTuple):
    """The k most probable (word, probability) of w and of p, and KL(w || p) in nats.

    `expected` and `kl` are None for a patch that nothing precedes, which the visual-word loss does not score either.
    """

    words: list[tuple[str, float]]
    expected: list[tuple[str, float]] | None
    kl: float | None


@torch.no_grad()
def read_patches(model: VWLmmForCausalLM, processor: LlavaProcessor, image: Image.Image, k: int = 10) -> list[Patch]:
    """What is said of every patch of an image that begins a conversation, row by row.

    Args:
        model, processor: a pair.
        image: of any size.
        k: words a patch, or all if there are fewer.
    """
    inputs = question_about(processor, [image], "").to(model.device, model.dtype)
    outputs = model.model(**inputs)
    image_mask = inputs["input_ids"] == model.config.image_token_id
    visual_words = model.model.visual_words(outputs.image_hidden_states[0])  # (patches, V)
    scored = scored_positions(image_mask, inputs.get("attention_mask"))[image_mask].tolist()
    # Position t is predicted from t - 1. What stands before the first one does not matter, as it is not scored
    before = outputs.last_hidden_state.roll(1, dims=1)[image_mask.to(outputs.last_hidden_state.device)]
    k = min(k, visual_words.shape[-1])
    texts: dict[int, str] = {}

    def most_probable(distributions: torch.Tensor) -> list[list[tuple[str, float]]]:
        values, indices = (found.tolist() for found in distributions.topk(k, dim=-1))
        for index in {index for own in indices for index in own} - texts.keys():
            texts[index] = readable(processor.tokenizer, index)
        return [[(texts[i], p) for i, p in zip(*own, strict=True)] for own in zip(indices, values, strict=True)]

    patches: list[Patch] = []
    for w, hidden in zip(visual_words.split(ROWS), before.split(ROWS), strict=True):
        log_p = model.lm_head(hidden)[:, : w.shape[-1]].float().log_softmax(-1).to(w.device)
        kl = (torch.special.xlogy(w, w) - w * log_p).sum(-1).tolist()
        for own in zip(most_probable(w), most_probable(log_p.exp()), kl, strict=True):
            patches.append(Patch(*own) if scored[len(patches)] else Patch(own[0], None, None))
    return patches
