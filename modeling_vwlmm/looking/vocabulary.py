"""Words that people type, as entries of a vocabulary."""

import difflib
from collections.abc import Sequence


def texts_of(tokenizer, size: int) -> list[str]:
    """The text of each of the first `size` tokens, without blanks around it and in lower case."""
    return [tokenizer.decode([i]).strip().lower() for i in range(size)]


def entries_of(word: str, texts: Sequence[str]) -> list[int]:
    """The entries of a vocabulary that are written like a word, with a blank before it or in capitals too.

    Raises:
        ValueError: there are none; it names the nearest words.
    """
    wanted = word.strip().lower()
    found = [i for i, text in enumerate(texts) if text == wanted]
    if not wanted or not found:
        near = difflib.get_close_matches(wanted, sorted({text for text in texts if text}), n=3, cutoff=0.5)
        hint = f", near it are {', '.join(near)}" if near else ""
        raise ValueError(f'the vocabulary has no single word "{word}"{hint}')
    return found
