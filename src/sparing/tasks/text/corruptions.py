"""Three fixed corruptions of texts, for the robustness columns.

Noise of the kinds that Belinkov and Bisk 2018 ("Synthetic and Natural Noise Both Break Neural Machine Translation")
try on words, and words that are missing (Wei and Zou 2019). Each is a pure function of the text and its index in the
split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from sparing.data.text import TextCorruption

LETTERS = 0.2
"""Share of the words of at least four letters in which a letter is swapped or missing."""
WORDS = 0.15
"""Share of the words that are missing."""
_SEED = 20_180_430


def swapped_letters(text: str, index: int, share: float = LETTERS) -> str:
    """Two neighbouring, different letters inside a word change places, in ``share`` of the words that have such."""

    def swap(word: str, generator: np.random.Generator) -> str:
        places = [place for place in range(1, len(word) - 2) if word[place] != word[place + 1]]
        if not places:
            return word
        place = places[generator.integers(len(places))]
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return _in_words(text, index, share, swap)


def missing_letters(text: str, index: int, share: float = LETTERS) -> str:
    """A letter inside a word is missing, in ``share`` of the words of at least four letters."""

    def drop(word: str, generator: np.random.Generator) -> str:
        place = int(generator.integers(1, len(word) - 1))
        return word[:place] + word[place + 1 :]

    return _in_words(text, index, share, drop)


def missing_words(text: str, index: int, share: float = WORDS) -> str:
    """``share`` of the words are missing, at least one of two or more."""
    words = text.split()
    if len(words) < 2:
        return text
    lost = _generator(index).permutation(len(words))[: max(1, round(share * len(words)))]
    return " ".join(np.delete(np.array(words, dtype=object), lost))


def _in_words(text: str, index: int, share: float, change: Callable[[str, np.random.Generator], str]) -> str:
    words = text.split()
    long = [number for number, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long:
        return text
    generator = _generator(index)
    for number in generator.permutation(long)[: max(1, round(share * len(long)))]:
        words[number] = change(words[number], generator)
    return " ".join(words)


def _generator(index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=(_SEED << 32) + index))


CORRUPTIONS: Mapping[str, TextCorruption] = {
    "swapped_letters": partial(swapped_letters, share=LETTERS),
    "missing_letters": partial(missing_letters, share=LETTERS),
    "missing_words": partial(missing_words, share=WORDS),
}
