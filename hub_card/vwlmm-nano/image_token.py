"""What an image token takes whose id lies beyond the LLM's vocabulary: an embedding, and a place while generating.

Such a token has no row in the weights, so that the LLM's logits, its losses and the files of its weights are what they
were before there were images. But transformers, PEFT and others look up every id of a prompt in the embeddings, and
some of generation's parts look them up in the logits. Here is what they find.
"""

from typing import Any

import torch
from torch import nn

from .compatibility import (
    AssistedCandidateGenerator,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PromptLookupCandidateGenerator,
)


# The embedding has this number everywhere, as no trained one has, so that it can be found among other embeddings
EMBEDDING_VALUE = 0.02


class _WithImageToken:
    image_token_id: int
    num_embeddings: int

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        look_up: Any = super().forward  # type: ignore[misc]  # of the embeddings
        if self.image_token_id < self.num_embeddings:
            return look_up(input_ids)
        is_image = input_ids == self.image_token_id
        return look_up(input_ids.masked_fill(is_image, 0)).masked_fill(is_image.unsqueeze(-1), EMBEDDING_VALUE)


class ImageTokenEmbedding(_WithImageToken, nn.Embedding):
    """Embeddings that have one for the image token too, wherever its id lies. Other ids beyond are an `IndexError`."""

    plain_forward = nn.Embedding.forward  # all other embeddings are rows of the weight, as `embedding_rows` takes them


def add_image_token(embeddings: Any, image_token_id: int) -> None:
    """Make an LLM's input embeddings know the image token. Their weights and the names of these stay as they are."""
    own = type(embeddings)
    # An LLM's own class, one that scales embeddings say, stays what it is
    is_plain = own is nn.Embedding
    embeddings.__class__ = ImageTokenEmbedding if is_plain else type(own.__name__, (_WithImageToken, own), {})
    embeddings.image_token_id = image_token_id


class _ImageTokenScores(LogitsProcessor):
    """Another processor, which looks up every id of the prompt in the scores: for it they have the image token's."""

    def __init__(self, processor: LogitsProcessor, image_token_id: int):
        self.processor, self.image_token_id = processor, image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        missing = max(0, self.image_token_id + 1 - scores.shape[-1])
        padded: Any = nn.functional.pad(scores, (0, missing), value=-torch.inf)
        return self.processor(input_ids, padded)[..., : scores.shape[-1]]  # type: ignore[return-value]  # a slice


class ImageTokenGenerationMixin(PreTrainedModel, GenerationMixin):
    """Generation and new tokens where the image token lies beyond the vocabulary; an assistant sees the images."""

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> Any:
        """As in transformers, but a tokenizer whose last token is the image token asks for no row for it.

        With one, which would start at random, the LLM's logits would no longer be what they were.
        """
        image_token_id = self.config.image_token_id
        if new_num_tokens == image_token_id + 1 > self.get_input_embeddings().num_embeddings:
            new_num_tokens = image_token_id
        embeddings = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        if not hasattr(embeddings, "image_token_id"):
            add_image_token(embeddings, image_token_id)
        return embeddings

    def prepare_inputs_for_generation(  # type: ignore[override]  # named by transformers, passed on here
        self, input_ids: Any, inputs_embeds: Any = None, is_first_iteration: bool | None = False, **kwargs
    ) -> dict:
        cache = kwargs.get("past_key_values", kwargs.get("cache"))
        # transformers leaves the images out for an assistant, whose first iteration is not that of the generation. A
        # cache that is never filled, as under activation checkpointing, is no first iteration: the prompt is cut off
        is_whole = (kwargs.get("next_sequence_length") or input_ids.shape[1]) >= input_ids.shape[1]
        is_first_iteration = is_first_iteration or (cache is not None and cache.get_seq_length() == 0 and is_whole)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]  # its self has a type of its own
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        by_prompt = (EncoderRepetitionPenaltyLogitsProcessor, EncoderNoRepeatNGramLogitsProcessor)
        return LogitsProcessorList(
            _ImageTokenScores(processor, self.config.image_token_id) if isinstance(processor, by_prompt) else processor
            for processor in super()._get_logits_processor(*args, **kwargs)  # type: ignore[misc]  # typed in a protocol
        )

    def _get_candidate_generator(self, *args, **kwargs) -> Any:
        generator: Any = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]  # as above
        image_token_id = self.config.image_token_id
        is_lookup = isinstance(generator, PromptLookupCandidateGenerator)
        if is_lookup:
            generator.vocab_size = max(generator.vocab_size, image_token_id + 1)
        elif type(generator) is not AssistedCandidateGenerator or _knows(generator.assistant_model, image_token_id):
            return generator
        propose = generator.get_candidates

        def get_candidates(input_ids: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
            # An assistant that knows no image token reads some other one
            read = input_ids if is_lookup else input_ids.masked_fill(input_ids == image_token_id, 0)
            candidates, scores = propose(read, **kwargs)
            new = candidates[:, input_ids.shape[1] :].to(input_ids.device)
            if is_lookup:  # what is found in the prompt ends before an image
                new = new[:, : ((new == image_token_id).cumsum(1) == 0).sum()]
            return torch.cat([input_ids, new], dim=1), scores

        generator.get_candidates = get_candidates
        return generator


def _knows(assistant: Any, image_token_id: int) -> bool:
    embeddings = assistant.get_input_embeddings()
    return hasattr(embeddings, "image_token_id") or embeddings.num_embeddings > image_token_id
