"""Texts as numbers of tokens for language modelling: characters, or byte pairs (Sennrich et al. 2016; as in GPT-2).

Byte pairs are merges of UTF-8 bytes, so that no text holds an unknown one. Cutting and counting are the library
``tokenizers``'; it is imported when first needed. The operations travel with a saved model and work without torch.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparing.core.errors import DataError, InvalidValue, shown
from sparing.core.predictor.preprocessing import Operation
from sparing.data.wordpiece import checked_text, tokenizers_library

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END = "<|endoftext|>"
"""The token between two texts; the first of a text where texts are samples. Inside a text its name means nothing."""
LONGEST = 1 << 16


class Tokens(Operation):
    """Texts → numbers of tokens, int64 (N, longest ≤ ``max_length``), padded behind with 0; what is longer is cut.

    A causal model needs no mask for padding behind: no token sees what follows it.
    """

    vocabulary: tuple[str, ...]
    max_length: int
    begin: bool

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> list[Int[ndarray, " _"]]:
        """Each text's tokens, whole, without the one that begins a text."""

    @property
    @abstractmethod
    def characters(self) -> Int[ndarray, " v"]:
        """How many characters of a text begin in each token (V,)."""

    @property
    def end_id(self) -> int:
        """Number of :data:`END`; :class:`InvalidValue` where the vocabulary has none."""
        if END not in self.vocabulary:
            raise InvalidValue(f"{self._name}: the vocabulary has no {END!r}")
        return self.vocabulary.index(END)

    def begun(self, texts: Sequence[str]) -> list[Int[ndarray, " _"]]:
        """Each text's tokens, whole, with :data:`END` first where texts begin with it, so that no text has none."""
        found = self.encode(texts)
        if self.begin:
            return [np.concatenate(([self.end_id], ids)) for ids in found]
        for index, ids in enumerate(found):
            if len(ids) == 0:
                raise DataError(f"text {index} is empty; at least one character is expected")
        return found

    def __call__(self, batch: Sequence[str]) -> Int[ndarray, "n t"]:
        """Texts → int64 (N, longest); :class:`DataError` names the index of what is no text."""
        if isinstance(batch, str | bytes):
            raise DataError(f"a sequence of texts is expected, not one {type(batch).__name__}; put it into a list")
        return padded([ids[: self.max_length] for ids in self.begun(batch)])

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        if (
            isinstance(self.max_length, bool)
            or not isinstance(self.max_length, int)
            or not 1 <= self.max_length <= LONGEST
        ):
            raise InvalidValue(
                f"{self._name}: max_length = {self.max_length!r}; a whole number in 1…{LONGEST} is expected"
            )
        if not self.vocabulary or not all(isinstance(token, str) and token for token in self.vocabulary):
            raise InvalidValue(f"{self._name}: vocabulary = {shown(self.vocabulary)}; texts are expected, at least one")
        if len(set(self.vocabulary)) < len(self.vocabulary):
            raise InvalidValue(f"{self._name}: a token is twice in the vocabulary of {len(self.vocabulary)}")
        if not isinstance(self.begin, bool):
            raise InvalidValue(f"{self._name}: begin = {self.begin!r}; true or false is expected")
        if self.begin and END not in self.vocabulary:
            raise InvalidValue(f"{self._name}: begin = True; {END!r} is missing from the vocabulary")


def padded(rows: Sequence[Int[ndarray, " _"]]) -> Int[ndarray, "n t"]:
    """Rows of numbers → int64 (N, longest), 0 behind the shorter ones."""
    filled = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
    for row, numbers in zip(filled, rows, strict=True):
        row[: len(numbers)] = numbers
    return filled


@dataclass(frozen=True)
class Characters(Tokens):
    """Texts → numbers of characters, int64 (N, longest), padded behind with 0."""

    vocabulary: tuple[str, ...]
    """The characters by number; :data:`END` may be among them."""
    max_length: int = 128
    """Most tokens of an input."""
    begin: bool = False
    """Whether a text begins with :data:`END`."""

    def __post_init__(self) -> None:
        self._check()
        if wrong := [token for token in self.vocabulary if len(token) != 1 and token != END]:
            raise InvalidValue(f"Characters: {shown(wrong[0])} in the vocabulary is not one character")

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.vocabulary)}

    def encode(self, texts: Sequence[str]) -> list[Int[ndarray, " _"]]:
        """Each text's characters; :class:`DataError` names one that the vocabulary lacks, and its place."""
        return [self._encoded(checked_text(text, f"text {index}"), index) for index, text in enumerate(texts)]

    def _encoded(self, text: str, index: int) -> Int[ndarray, " t"]:
        numbers = self._numbers
        try:
            return np.fromiter((numbers[character] for character in text), np.int64, len(text))
        except KeyError:
            place = next(place for place, character in enumerate(text) if character not in numbers)
            raise DataError(
                f"text {index}, character {place}: {shown(text[place])} is none of the {len(numbers)} characters that "
                "this vocabulary was made of"
            ) from None

    @property
    def characters(self) -> Int[ndarray, " v"]:
        """1 for each but :data:`END` (V,)."""
        return np.array([token != END for token in self.vocabulary], np.int64)


@dataclass(frozen=True)
class BytePairs(Tokens):
    """Texts → numbers of byte pairs, int64 (N, longest), padded behind with 0."""

    vocabulary: tuple[str, ...]
    """:data:`END`, the 256 bytes and what is merged of them, by number, in GPT-2's spelling of bytes."""
    merges: tuple[str, ...]
    """The two tokens of each merge with a space between, in the order of their ranks."""
    max_length: int = 128
    """Most tokens of an input."""
    begin: bool = False
    """Whether a text begins with :data:`END`."""

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "merges", tuple(self.merges))
        known = set(self.vocabulary)
        if missing := [sign for sign in _bytes() if sign not in known]:
            raise InvalidValue(f"BytePairs: the byte {missing[0]!r} is missing from the vocabulary")
        for merge in self.merges:
            parts = merge.split(" ") if isinstance(merge, str) else []
            if len(parts) != 2 or not {*parts, "".join(parts)} <= known:
                raise InvalidValue(
                    f"BytePairs: merge {shown(merge)}; two tokens of the vocabulary with a space between, which "
                    "together are one, are expected"
                )

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        merges = [tuple(merge.split(" ")) for merge in self.merges]
        numbers = {token: number for number, token in enumerate(self.vocabulary)}
        return _engine(tokenizers_library().models.BPE(numbers, merges))

    def encode(self, texts: Sequence[str]) -> list[Int[ndarray, " _"]]:
        """Each text's byte pairs."""
        checked = [checked_text(text, f"text {index}") for index, text in enumerate(texts)]
        found = self._tokenizer.encode_batch_fast(checked, add_special_tokens=False)
        return [np.array(one.ids, np.int64) for one in found]

    @cached_property
    def characters(self) -> Int[ndarray, " v"]:
        """Bytes of each token that begin a character (V,)."""
        begins = {sign for sign, byte in _bytes().items() if byte & 0xC0 != 0x80}
        return np.array([0 if token == END else sum(sign in begins for sign in token) for token in self.vocabulary])


def train_byte_pairs(texts: Iterable[str], size: int = 2000) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(vocabulary, merges) of at most ``size`` tokens for ``texts``: :data:`END`, 256 bytes, then the merges.

    Equal texts give an equal vocabulary. Raises :class:`InvalidValue` for a size that holds no merge, and
    :class:`DataError` for texts without a character.
    """
    tokenizers = tokenizers_library()
    if isinstance(size, bool) or not isinstance(size, int) or not 258 <= size <= 1 << 20:
        raise InvalidValue(f"size = {size!r}; a whole number of tokens in 258…{1 << 20} is expected")
    texts = [checked_text(text, f"text {index}") for index, text in enumerate(texts)]
    if not any(texts):
        raise DataError(f"{len(texts)} texts without a character; byte pairs cannot be made of them")
    engine = _engine(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=sorted(_bytes()), show_progress=False
    )
    engine.train_from_iterator(texts, trainer, length=len(texts))
    model = json.loads(engine.to_str())["model"]
    numbers: dict[str, int] = model["vocab"]
    return tuple(sorted(numbers, key=numbers.__getitem__)), tuple(" ".join(merge) for merge in model["merges"])


def _engine(model: Any) -> Tokenizer:
    """GPT-2's way of cutting before byte pairs are merged."""
    tokenizers = tokenizers_library()
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return made


@cache
def _bytes() -> dict[str, int]:
    """GPT-2's sign for each byte: printable ones of Latin-1 stand for themselves, the others follow from 256 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
