"""The words of the training captions, to report words of a prompt that a built-in text encoder has never seen."""

import re
from collections.abc import Collection, Iterable, Sequence

MOST_WORDS = 2000
"""Captions of more different words are open text: the list would be long, and a missing word would say little."""

MOST_LETTERS = 100
"""A longer word is no word of a language either. `formats.DATA` has both limits."""

_SHOWN = 6
# Scripts without spaces between words: each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|(?:(?![\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])\w)+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in order, with their case, because bytes have one too."""
    return _WORD.findall(text)


def vocabulary(captions: Iterable[str]) -> list[str] | None:
    """Return the sorted words of all captions; None if there are none, too many or too long ones."""
    words: set[str] = set()
    for caption in captions:
        found = words_of(caption)
        words.update(found)
        if len(words) > MOST_WORDS or any(len(word) > MOST_LETTERS for word in found):
            return None
    return sorted(words) or None


def unknown_words_note(prompts: Sequence[str], known: Collection[str] | None) -> str | None:
    """Return a line with the words of prompts that no caption in `known` has; None if there are none."""
    if known is None:
        return None
    known = set(known)
    unknown = list(dict.fromkeys(word for prompt in prompts for word in words_of(prompt) if word not in known))
    if not unknown:
        return None
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    shown = ", ".join(repr(word[:MOST_LETTERS]) for word in unknown[:_SHOWN])
    return f"Note: the model does not know {shown}{more}: no caption of its training has such words."
