"""What VW-LMM takes from transformers, and what differs between the releases of transformers that it runs on."""

import operator
import re
from dataclasses import dataclass

import torch
import transformers


WORKS_WITH = "transformers 5.16 to 5.24"
RELEASE = tuple(map(int, re.findall(r"\d+", transformers.__version__)[:2]))

if RELEASE < (5, 16):
    raise ImportError(f"VW-LMM works with {WORKS_WITH}, found {transformers.__version__}: pip install -U transformers")
try:
    from transformers import (  # noqa: F401
        AutoConfig,
        AutoModel,
        Cache,
        EncoderNoRepeatNGramLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor,
        GenerationMixin,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaModel,
        LlavaPreTrainedModel,
        LogitsProcessor,
        LogitsProcessorList,
        PreTrainedModel,
    )
    from transformers.activations import ACT2FN  # noqa: F401
    from transformers.generation import AssistedCandidateGenerator, PromptLookupCandidateGenerator  # noqa: F401
    from transformers.modeling_outputs import (
        BaseModelOutputWithPast,
        BaseModelOutputWithPooling,
        CausalLMOutputWithPast,
    )
    from transformers.processing_utils import Unpack  # noqa: F401
    from transformers.utils import TransformersKwargs, can_return_tuple, logging, torch_compilable_check  # noqa: F401
except ImportError as error:
    raise ImportError(f"VW-LMM works with {WORKS_WITH}, found {transformers.__version__}: {error}") from None

# From 5.23 on, `output_hidden_states` may be the index of a layer, or a list of them, and the others are not kept
LAYERS_CAN_BE_SELECTED = RELEASE >= (5, 23)
# The argument, and the field of outputs, that hold past keys and values are called `cache` from 5.24 on
CACHE, OTHER_CACHE = ("cache", "past_key_values") if RELEASE >= (5, 24) else ("past_key_values", "cache")


def name_cache(kwargs: dict) -> dict:
    """Keyword arguments with the cache under this release's name for it, whichever of the two it was given under."""
    other = kwargs.pop(OTHER_CACHE, None)
    return kwargs if other is None else {**kwargs, CACHE: other}


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The hidden states (B, T, d) whose logits are wanted, as in LLaVA from 5.23 on.

    Args:
        logits_to_keep:
            The number of last positions, of which 0 keeps all; positions (K,), or a row of them for each row (B, K),
            which give (B, K, d); or a boolean mask (B, T), which gives (positions, d).
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:]
    if logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
        return hidden_states[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return hidden_states.take_along_dim(logits_to_keep.unsqueeze(-1), dim=1)
    return hidden_states[:, logits_to_keep]


def _cache_by_both_names(output_class):
    setattr(output_class, OTHER_CACHE, property(operator.attrgetter(CACHE)))
    return output_class


@dataclass
class VWLmmImageOutput(BaseModelOutputWithPooling):
    """The vision tower's output with what becomes of it.

    pooler_output: what the LLM reads, (images, patches, d): the projected features, or the pseudo image features.
    image_hidden_states: the projected features f, (images, patches, d).
    """

    image_hidden_states: torch.Tensor | None = None


@_cache_by_both_names
@dataclass
class VWLmmModelOutputWithPast(BaseModelOutputWithPast):
    """An LLM's output, with

    image_hidden_states: the projected features f, (images, patches, d), also with pseudo image features.
    """

    image_hidden_states: torch.Tensor | None = None


@_cache_by_both_names
@dataclass
class VWLmmCausalLMOutputWithPast(CausalLMOutputWithPast):
    """An LLM's output, where `loss = lm_loss + config.visual_word_loss_weight * vw_loss`.

    image_hidden_states: the projected features f, (images, patches, d), also with pseudo image features.
    lm_loss: cross-entropy of the text labels, mean over the labelled tokens.
    vw_loss: visual-word loss, mean over the scored image positions, in nats; None where no position is scored or the
        weight is 0.

    The past keys and values are called `past_key_values` and `cache` under every release of transformers.
    """

    image_hidden_states: torch.Tensor | None = None
    lm_loss: torch.Tensor | None = None
    vw_loss: torch.Tensor | None = None
