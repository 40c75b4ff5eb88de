"""What tasks on texts have in common: a vocabulary, and how it is told to a model."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparing.core.errors import DataError, InvalidValue
from sparing.core.files import canonical_json
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import Splits, Task
from sparing.data.root import data_root
from sparing.data.text import read_corpus, vocabulary_of
from sparing.data.wordpiece import SPECIAL, WordPiece, read_vocabulary

if TYPE_CHECKING:
    from torch import Tensor, nn

VOCABULARY = ("sst2", "ag_news")
"""The corpora whose training texts make the vocabulary that the published tasks share."""
PIECES = 8000
POSITIONS = 64
"""A model has positions for at least so many pieces, so that tasks of different lengths share it."""
ORDINARY = (
    "the people of the city said that they will go to the house in the morning and talk about the news of the day "
)


class ReadTask(Task):
    """A task whose data are read from the data folder, once, and which is known by its :meth:`definition`."""

    def __init__(self) -> None:
        self._root: Path | None = None
        self._splits: dict[Path | None, Splits] = {}

    def _whole(self, name: str, value: Any, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise InvalidValue(f"{self.name}: {name} = {value!r}; a whole number in {least}…{most} is expected")
        return value

    def _limit(self, name: str, value: Any) -> int | None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InvalidValue(f"{self.name}: {name} = {value!r}; a whole number of at least 1 is expected, or none")
        return value

    @abstractmethod
    def make_splits(self, root: Path) -> Splits:
        """The datasets under the data folder ``root``."""

    def splits(self, root: Path | None = None) -> Splits:
        """Read once for each ``root`` and kept."""
        self._root = root
        if root not in self._splits:
            self._splits[root] = self.make_splits(data_root(root))
        return self._splits[root]

    def definition(self) -> dict[str, Any]:
        """What besides the source code decides this task's splits and figures, JSON-able."""
        return {
            "task": f"{type(self).__module__}.{type(self).__qualname__}",
            "metrics": [metric.name for metric in self.metrics],
        }

    def fingerprint(self) -> str:
        """Hash of :meth:`definition`; texts and vocabulary are looked at with the splits."""
        return hashlib.sha256(canonical_json(self.definition()).encode()).hexdigest()


class TextTask(ReadTask):
    """Texts as numbers of word pieces; a model takes them, int64 (N, T), padded behind to the longest of a batch.

    The vocabulary is made of the training texts of the corpora named, or read from a file. It is the same for all tasks
    that name the same corpora, so a model can go from one to another.

    Args:
        length: most pieces of an input; longer texts are cut.
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or a WordPiece ``tokenizer.json``; None: the
            task's own training texts.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
    """

    unit: ClassVar[str] = "text"

    def __init__(
        self, length: int, vocabulary: str | Sequence[str] | None, vocab_size: int = PIECES, lowercase: bool = True
    ) -> None:
        super().__init__()
        self.length = self._whole("length", length, 8, 1 << 13)
        self.vocab_size = self._whole("vocab_size", vocab_size, len(SPECIAL) + 2, 1 << 20)
        names = [vocabulary] if isinstance(vocabulary, str | Path) else vocabulary
        if names is not None and (not names or not all(isinstance(name, str | Path) for name in names)):
            raise InvalidValue(
                f"{self.name}: vocabulary = {vocabulary!r}; names of corpora, or one vocab.txt, are expected"
            )
        if not isinstance(lowercase, bool):
            raise InvalidValue(f"{self.name}: lowercase = {lowercase!r}; true or false is expected")
        self.vocabulary = None if names is None else [str(name) for name in names]
        self.lowercase = lowercase
        self._wordpieces: dict[Path, WordPiece] = {}

    @abstractmethod
    def training_texts(self, root: Path) -> Sequence[str]:
        """The texts this task trains on, of which a vocabulary of its own is made."""

    @property
    def wordpiece(self) -> WordPiece:
        """What turns texts into numbers; made once for each data folder."""
        root = data_root(self._root)
        if root not in self._wordpieces:
            self._wordpieces[root] = self._make_wordpiece(root)
        return self._wordpieces[root]

    def _make_wordpiece(self, root: Path) -> WordPiece:
        lowercase = self.lowercase
        if self.vocabulary is None:
            pieces = vocabulary_of(self.training_texts(root), self.vocab_size, lowercase)
            return WordPiece(pieces, self.length, lowercase)
        try:
            if len(self.vocabulary) == 1 and (file := self._vocabulary_file(root)) is not None:
                pieces, told = read_vocabulary(file)
                if told not in (None, lowercase):
                    raise InvalidValue(f"{self.name}: lowercase = {lowercase}; {file} says {told}")
                return WordPiece(pieces, self.length, lowercase)
            texts = [text for name in self.vocabulary for text in read_corpus(name, root)]
        except DataError as error:
            raise DataError(
                f"{error}\nThe vocabulary of {self.name!r} is made of: {', '.join(self.vocabulary)}. Give the field "
                "vocabulary other corpora, the path of a vocab.txt, or none for the task's own training texts"
            ) from error
        return WordPiece(vocabulary_of(texts, self.vocab_size, lowercase), self.length, lowercase)

    def _vocabulary_file(self, root: Path) -> Path | None:
        assert self.vocabulary is not None
        (name,) = self.vocabulary
        if not name.endswith(("vocab.txt", "tokenizer.json")):
            return None
        given = Path(name).expanduser()
        found = next((place for place in (given, root / given) if place.is_file()), None)
        if found is None:
            raise DataError(f"the vocabulary {name!r} is neither at {given.absolute()} nor at {root / given}")
        return found

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """Texts → numbers of pieces."""
        return Preprocessing((self.wordpiece,))

    def raw_example(self) -> Sequence[Any]:
        """A text that fills the task's whole length, of ordinary words."""
        return [ORDINARY * (self.length // 8)]

    def example_ids(self, batch: int) -> Tensor:
        """Random pieces, the same on every call: int64 (batch, length or one less), the rows of different lengths."""
        import torch

        wordpiece, length = self.wordpiece, self.length - (batch + 1) % 2
        special = [wordpiece.vocabulary.index(piece) for piece in SPECIAL]
        ordinary = np.setdiff1d(np.arange(len(wordpiece.vocabulary)), special)
        ids = np.random.RandomState(0).choice(ordinary, (batch, length))
        ids[:, 0] = wordpiece.cls_id
        for row, numbers in enumerate(ids):
            end = length - 7 * row % (length - 4)
            numbers[end - 1] = wordpiece.sep_id
            numbers[end:] = wordpiece.pad_id
        return torch.from_numpy(ids.astype(np.int64))

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Random pieces of texts of different lengths, T the task's or one less: (int64 (batch, T),)."""
        return (self.example_ids(batch),)

    head: ClassVar[str]
    """The head of a model for this task."""

    def model_fields(self) -> Mapping[str, Any]:
        """``vocab_size``, ``pad_id``, ``sep_id``, ``max_length`` and ``head``, and ``num_classes`` where there are."""
        wordpiece = self.wordpiece
        told = {
            "vocab_size": len(wordpiece.vocabulary),
            "pad_id": wordpiece.pad_id,
            "sep_id": wordpiece.sep_id,
            "max_length": max(POSITIONS, self.length),
            "head": self.head,
        }
        return told | ({"num_classes": len(self.labels)} if self.labels else {})

    def default_model(self) -> nn.Module:
        """A "bert" of four blocks of width 256."""
        from sparing.core.predictor import build_model

        return build_model("bert", self)

    def definition(self) -> dict[str, Any]:
        """With the length and what makes the vocabulary."""
        own = {"length": self.length, "vocabulary": [self.vocabulary, self.vocab_size, self.lowercase]}
        return {**super().definition(), **own}
