"""What visual words keep, name and favour: each measure a pure function."""

import re
from collections.abc import Sequence

import numpy as np
import torch

from ..data.reading import STOP_WORDS


def cosine(features: torch.Tensor, pseudo_features: torch.Tensor) -> torch.Tensor:
    """The cosine between pseudo image features and features, (..., d) and (..., d) to (...)."""
    return torch.nn.functional.cosine_similarity(features.double(), pseudo_features.double(), dim=-1)


def relative_error(features: torch.Tensor, pseudo_features: torch.Tensor) -> torch.Tensor:
    """The distance of pseudo image features from features, over these' norm: |f' - f| / |f|; (..., d) to (...)."""
    features, pseudo_features = features.double(), pseudo_features.double()
    return (pseudo_features - features).norm(dim=-1) / features.norm(dim=-1)


def perplexity(words: torch.Tensor) -> torch.Tensor:
    """The number of equally probable words that a visual word is as undecided as: exp of its entropy; (..., V) to
    (...)."""
    return torch.special.entr(words).sum(-1).exp()


def top_mass(words: torch.Tensor, k: int) -> torch.Tensor:
    """The probability of the k most probable words, (..., V) to (...)."""
    return words.topk(min(k, words.shape[-1]), dim=-1).values.sum(-1)


def words_in(texts: Sequence[str]) -> set[str]:
    """The words in captions or answers that may name something: of three letters or more, no `STOP_WORDS`."""
    return {word for text in texts for word in re.findall(r"[^\W\d_]{3,}", text.lower())} - STOP_WORDS


def name_matrix(vocabulary: Sequence[str], names: Sequence[set[str]]) -> np.ndarray:
    """Which entries of the vocabulary name which image, in the singular or plural.

    Args:
        vocabulary: the text of every entry.
        names: the names of each image.

    Returns:
        Booleans of shape (images, V).
    """
    entries: dict[str, list[int]] = {}
    for index, text in enumerate(vocabulary):
        entries.setdefault(_singular(text), []).append(index)
    found = np.zeros((len(names), len(vocabulary)), dtype=bool)
    for image, own in enumerate(names):
        for name in own:
            found[image, entries.get(_singular(name), [])] = True
    return found


def _singular(word: str) -> str:
    return word.strip().lower().rstrip("s")


def naming(top: np.ndarray, is_name: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether a word is a name of its own image, and of how many of the other images it would be one.

    A word that is everywhere gains nothing: it fits other images as well as its own.

    Args:
        top (`(images, groups, k)`): entries of the vocabulary, such as the k most probable ones of each patch.
        is_name (`(images, V)`): of [`name_matrix`].

    Returns:
        Two arrays of shape (images, groups): 1 where one of a group's words names its own image, else 0; and the share
        of the other images that one of them names, 0 if there are none.
    """
    own, others = np.zeros(top.shape[:2]), np.zeros(top.shape[:2])
    for image, groups in enumerate(top):
        fits: np.ndarray = np.any(is_name[:, groups], axis=-1)  # (images, groups)
        own[image] = fits[image]
        others[image] = (fits.sum(0) - fits[image]) / max(len(top) - 1, 1)
    return own, others


def vocabulary_used(first: np.ndarray) -> int:
    """How many words are the most probable one of some patch, of an array of entries."""
    return len(np.unique(first))


def most_used(mean: torch.Tensor, k: int = 10) -> list[tuple[int, float]]:
    """The k entries that are the most probable on average with their probabilities, (V,) to k pairs."""
    values, entries = mean.topk(min(k, len(mean)))
    return list(zip(entries.tolist(), values.tolist(), strict=True))


def mass_of_most_used(mean: torch.Tensor, k: int = 10) -> float:
    """The probability of the k words that are the most probable on average, (V,) to a number."""
    return sum(mass for _, mass in most_used(mean, k))


def mass_of(mean: torch.Tensor, entries: Sequence[int]) -> float:
    """The probability of some entries, such as special tokens, on average; those beyond V have none."""
    return float(mean[[entry for entry in entries if entry < len(mean)]].sum())
