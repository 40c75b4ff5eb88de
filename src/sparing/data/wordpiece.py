"""WordPiece: words cut into the longest pieces that a vocabulary has (Schuster and Nakajima 2012; Devlin et al. 2019).

Tokenising, and counting pairs when a vocabulary is trained, are the library ``tokenizers``'; it is imported when first
needed. The operation :class:`WordPiece` travels with a saved model and works without torch.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import DataError, InvalidValue, MissingDependency, shown
from sparing.core.files import read_bytes
from sparing.core.predictor.preprocessing import Operation

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, UNK, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Numbers 0…4 of a vocabulary that is trained here."""
ALPHABET = 1000
"""Most characters a trained vocabulary knows: the most frequent ones."""
LONGEST_WORD = 100
"""A word of more characters is unknown, as in BERT."""

Text = str | tuple[str, str]
"""One text, or two that are read together, such as a question and the passage that answers it."""


def train_wordpiece(texts: Iterable[str], size: int = 8000, lowercase: bool = True) -> tuple[str, ...]:
    """A vocabulary of at most ``size`` pieces for ``texts``: the special ones, then characters, then merged pieces.

    Equal texts give an equal vocabulary. (The library's trainer numbers the characters inside words as its hash table
    gives them, and numbers break ties between pairs; here they are numbered in order before it begins.) Fewer pieces
    come out when the texts have no more. Raises :class:`InvalidValue` for a size that holds no piece, and
    :class:`DataError` for texts without a character.
    """
    tokenizers = tokenizers_library()
    least = len(SPECIAL) + 2
    if isinstance(size, bool) or not isinstance(size, int) or not least <= size <= 1 << 20:
        raise InvalidValue(f"size = {size!r}; a whole number of pieces in {least}…{1 << 20} is expected")
    texts = [checked_text(text, f"text {index}") for index, text in enumerate(texts)]
    engine = _engine(SPECIAL, lowercase)
    texts = [_without_long_words(engine, text) if _LONG.search(text) else text for text in texts]
    characters: Counter[str] = Counter()
    for start in range(0, len(texts), 1000):
        characters.update(engine.normalizer.normalize_str("\n".join(texts[start : start + 1000])))
    most = min(ALPHABET, (size - len(SPECIAL)) // 2)
    found = sorted((c for c in characters if not c.isspace()), key=lambda c: (-characters[c], c))[:most]
    if not found:
        raise DataError(
            f"{len(texts)} texts without a word of 1…{LONGEST_WORD} characters; a vocabulary cannot be made of them"
        )
    alphabet = sorted(found)
    # special for the trainer only, so that they have their numbers before it begins
    numbered = [*SPECIAL, *alphabet, *(f"##{c}" for c in alphabet)]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=numbered,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    engine.train_from_iterator(texts, trainer, length=len(texts))
    numbers = engine.get_vocab(with_added_tokens=True)
    return tuple(sorted(numbers, key=numbers.__getitem__))


_LONG = re.compile(rf"\S{{{LONGEST_WORD + 1}}}")


def _without_long_words(engine: Tokenizer, text: str) -> str:
    """``text`` without words that are unknown whatever the vocabulary; counting their pairs takes very long."""
    words = engine.pre_tokenizer.pre_tokenize_str(engine.normalizer.normalize_str(text))
    return " ".join(word for word, _ in words if len(word) <= LONGEST_WORD)


def read_vocabulary(path: Path) -> tuple[tuple[str, ...], bool | None]:
    """(pieces in order, lower-cased?) of a ``vocab.txt``, one piece a line, or of a WordPiece ``tokenizer.json``.

    A ``vocab.txt`` does not say whether texts are lower-cased: None. Raises :class:`DataError` naming file and place.
    """
    try:
        content = read_bytes(path).decode("utf8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; a vocabulary in UTF-8 is expected") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if path.suffix != ".json":
        pieces = tuple(content.removesuffix("\n").split("\n"))
        return _checked(tuple(piece.removesuffix("\r") for piece in pieces), str(path)), None
    try:
        found = json.loads(content)
        model, normalizer = found["model"], found.get("normalizer") or {}
        kinds = (model.get("type"), normalizer.get("type"))
        if kinds != ("WordPiece", "BertNormalizer"):
            raise DataError(f"{path}: model and normalizer are {kinds}; a WordPiece with a BertNormalizer is expected")
        lowercase = bool(normalizer["lowercase"])
        plain = normalizer.get("strip_accents") in (None, lowercase) and normalizer.get("handle_chinese_chars", True)
        if not plain or model.get("continuing_subword_prefix") != "##":
            raise DataError(f"{path}: its normalizer or prefix is not that of BERT, so texts would be cut differently")
        numbers = dict(model["vocab"])
        pieces = tuple(sorted(numbers, key=numbers.__getitem__))
        if [numbers[piece] for piece in pieces] != list(range(len(pieces))):
            raise DataError(f"{path}: the numbers of its {len(pieces)} pieces are not 0…{len(pieces) - 1}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: not the tokenizer.json of a WordPiece tokenizer: {error!r}") from error
    return _checked(pieces, str(path)), lowercase


def _checked(pieces: tuple[str, ...], where: str) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    for number, piece in enumerate(pieces):
        if not isinstance(piece, str) or not piece:
            raise DataError(f"{where}: piece {number} is {piece!r}; a text of at least one character is expected")
        if seen.setdefault(piece, number) != number:
            raise DataError(f"{where}: piece {number} is {shown(piece)}, as piece {seen[piece]} is already")
    if missing := [piece for piece in SPECIAL if piece not in seen]:
        raise DataError(
            f"{where}: {', '.join(missing)} is missing from {len(pieces)} pieces; all special ones are needed"
        )
    return pieces


def checked_text(text: Any, where: str) -> str:
    """``text``, or :class:`DataError` that begins with ``where`` for what is no text."""
    if not isinstance(text, str):
        raise DataError(f"{where} is a {type(text).__name__}; a str is expected")
    try:
        text.encode("utf8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start} is half of a surrogate pair, which no encoding of texts holds"
        ) from None
    return text


def tokenizers_library() -> Any:
    """The package ``tokenizers``; :class:`MissingDependency` without it."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingDependency("tokenizers", "text", "cutting texts into pieces") from error
    # Its threads would outnumber those a measurement was given, and do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return tokenizers


def _engine(vocabulary: Sequence[str], lowercase: bool) -> Tokenizer:
    """BERT's tokenizer without the special pieces around a text."""
    tokenizers = tokenizers_library()
    numbers = {piece: number for number, piece in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(numbers, unk_token=UNK, max_input_chars_per_word=LONGEST_WORD)
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return made


@dataclass(frozen=True)
class WordPiece(Operation):
    """Texts, or pairs of texts → numbers of word pieces, int64 (N, longest), padded behind.

    A text becomes ``[CLS] a [SEP]``, a pair ``[CLS] a [SEP] b [SEP]``. What is longer than ``max_length`` pieces is cut
    behind, of a pair the longer text first. Control characters (NUL among them) are left out, white space of any kind
    separates words, and what the vocabulary has no pieces for is ``[UNK]``. The names of special pieces have no meaning
    inside a text.
    """

    vocabulary: tuple[str, ...]
    """The pieces by number, the special ones among them; a piece inside a word begins with ``##``."""
    max_length: int = 64
    """Most pieces of an input, the special ones counted."""
    lowercase: bool = True
    """Whether letters are made small and lose their accents first."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", _checked(tuple(self.vocabulary), "wordpiece: vocabulary"))
        if (
            isinstance(self.max_length, bool)
            or not isinstance(self.max_length, int)
            or not 3 <= self.max_length <= 1 << 16
        ):
            raise InvalidValue(
                f"wordpiece: max_length = {self.max_length!r}; a whole number in 3…{1 << 16} is expected"
            )

    @cached_property
    def _special(self) -> dict[str, int]:
        return {piece: self.vocabulary.index(piece) for piece in SPECIAL}

    @property
    def pad_id(self) -> int:
        """Number of ``[PAD]``."""
        return self._special[PAD]

    @property
    def cls_id(self) -> int:
        """Number of ``[CLS]``."""
        return self._special[CLS]

    @property
    def sep_id(self) -> int:
        """Number of ``[SEP]``."""
        return self._special[SEP]

    @property
    def mask_id(self) -> int:
        """Number of ``[MASK]``."""
        return self._special[MASK]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return _engine(self.vocabulary, self.lowercase)

    def pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's pieces, whole and without special ones around it."""
        checked = [checked_text(text, f"text {index}") for index, text in enumerate(texts)]
        return [found.ids for found in self._tokenizer.encode_batch_fast(checked, add_special_tokens=False)]

    def words(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """One text's pieces, and for each the characters (begin, end) of the text it stands for."""
        found = self._tokenizer.encode(checked_text(text, "text"), add_special_tokens=False)
        return found.ids, found.offsets

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Each text's or pair's numbers, special pieces included, cut to ``max_length``."""
        first: list[str] = []
        second: dict[int, str] = {}
        for index, text in enumerate(texts):
            if isinstance(text, tuple | list):
                if len(text) != 2:
                    raise DataError(f"text {index} is a sequence of {len(text)}; a str or a pair of them is expected")
                second[index] = self._beginning(checked_text(text[1], f"text {index}, its second part,"))
                text = text[0]
            first.append(self._beginning(checked_text(text, f"text {index}")))
        ones = self.pieces(first)
        others = dict(zip(second, self.pieces(list(second.values())), strict=True))
        return [self._joined(one, others.get(index)) for index, one in enumerate(ones)]

    def _beginning(self, text: str) -> str:
        """As much of a very long text as makes more than ``max_length`` pieces, which are cut off; else all of it."""
        end = text.rfind(" ", 0, 64 * self.max_length) if len(text) > 1 << 16 else 0
        return text[:end] if end > 0 and len(self.pieces([text[:end]])[0]) > self.max_length else text

    def _joined(self, one: list[int], other: list[int] | None) -> list[int]:
        if other is None:
            return [self.cls_id, *one[: self.max_length - 2], self.sep_id]
        room = self.max_length - 3
        first, second = len(one), len(other)
        if first + second > room:  # the longer one is cut until both are equally long, then both in turn
            half = room // 2
            first, second = min(first, max(room - half, room - second)), min(second, max(half, room - first))
        return [self.cls_id, *one[:first], self.sep_id, *other[:second], self.sep_id]

    def __call__(self, batch: Sequence[Text]) -> np.ndarray:
        """Texts or pairs → int64 (N, longest); :class:`DataError` names the index of what is no text."""
        if isinstance(batch, str | bytes):
            raise DataError(f"a sequence of texts is expected, not one {type(batch).__name__}; put it into a list")
        rows = self.encode(batch)
        filled = np.full((len(rows), max(map(len, rows), default=0)), self.pad_id, np.int64)
        for row, numbers in zip(filled, rows, strict=True):
            row[: len(numbers)] = numbers
        return filled
