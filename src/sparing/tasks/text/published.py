"""Tasks on published sets of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sparing.core.errors import InvalidValue
from sparing.data.text import (
    AG_NEWS_LABELS,
    SST2_LABELS,
    TREC_FINE_LABELS,
    TREC_LABELS,
    Labelled,
    read_ag_news,
    read_sst2,
    read_trec,
)
from sparing.tasks.text.base import PIECES, VOCABULARY
from sparing.tasks.text.classification import ClassifiedTexts


class _Published(ClassifiedTexts):
    def __init__(
        self,
        train_limit: int | None,
        test_limit: int | None,
        length: int,
        vocabulary: str | Sequence[str] | None,
        vocab_size: int,
        lowercase: bool,
    ) -> None:
        super().__init__(length, vocabulary, vocab_size, lowercase)
        self.train_limit = self._limit("train_limit", train_limit)
        self.test_limit = self._limit("test_limit", test_limit)

    def _limited(self, train: Labelled, test: Labelled) -> dict[str, Labelled]:
        parts = {"train": (train, self.train_limit), "test": (test, self.test_limit)}
        return {name: Labelled(part.texts[:limit], part.labels[:limit]) for name, (part, limit) in parts.items()}

    def definition(self) -> dict[str, Any]:
        """With the limits."""
        return {**super().definition(), "limits": [self.train_limit, self.test_limit]}


class SST2(_Published):
    """SST-2: phrases of film reviews, negative or positive (Socher et al. 2013, in the form of GLUE).

    Read from ``sst2/`` under the data root: 60,614 training phrases (8 % of each class are for validation, 2 % for
    calibration), 6,735 more phrases held out of the original training set, and the 872 sentences of the official
    development set. Those 872 and the 6,735 are the test split. Phrases are parts of sentences, and parts of one
    sentence are among training and held-out phrases; the official sentences share nothing with them.

    Args:
        train_limit: use the first so many training texts (validation and calibration are cut from them); None: all.
        test_limit: use the first so many test texts, the official ones first; None: all.
        length: most word pieces of an input; longer texts are cut.
        test: the "official" sentences, the "held_out" phrases, or "both".
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or ``tokenizer.json``; None: the training texts.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
    """

    name = "sst2"
    labels = SST2_LABELS

    def __init__(
        self,
        train_limit: int | None = None,
        test_limit: int | None = None,
        length: int = 32,
        test: Literal["both", "official", "held_out"] = "both",
        vocabulary: str | Sequence[str] | None = VOCABULARY,
        vocab_size: int = PIECES,
        lowercase: bool = True,
    ) -> None:
        super().__init__(train_limit, test_limit, length, vocabulary, vocab_size, lowercase)
        if test not in ("both", "official", "held_out"):
            raise InvalidValue(f'sst2: test = {test!r}; "both", "official" or "held_out" is expected')
        self.test = test

    def read(self, root: Path) -> Mapping[str, Labelled]:
        """Training and test part, the latter as ``test`` says."""
        parts = [read_sst2(root, part) for part in ("official", "held_out") if self.test in ("both", part)]
        texts = [text for part in parts for text in part.texts]
        test = Labelled(texts, np.concatenate([part.labels for part in parts]))
        if not test.texts:
            raise InvalidValue(f"sst2: test = {self.test!r}; {root / 'sst2'} has no such part, only an official one")
        return self._limited(read_sst2(root, "train"), test)

    def definition(self) -> dict[str, Any]:
        """With the choice of the test split."""
        return {**super().definition(), "test": self.test}


class AGNews(_Published):
    """AG News: articles on four topics, World, Sports, Business or Sci/Tech (Zhang, Zhao and LeCun 2015).

    Read from ``ag_news/`` under the data root: 10,001 training articles (``train10k.tsv.gz``; 8 % of each class are for
    validation, 2 % for calibration) and the 7,600 official test articles, or the published ``train.csv`` and
    ``test.csv``.

    Args:
        train_limit: use the first so many training texts (validation and calibration are cut from them); None: all.
        test_limit: use the first so many test texts; None: all.
        length: most word pieces of an input; longer texts are cut.
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or ``tokenizer.json``; None: the training texts.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
    """

    name = "ag_news"
    labels = AG_NEWS_LABELS

    def __init__(
        self,
        train_limit: int | None = None,
        test_limit: int | None = None,
        length: int = 64,
        vocabulary: str | Sequence[str] | None = VOCABULARY,
        vocab_size: int = PIECES,
        lowercase: bool = True,
    ) -> None:
        super().__init__(train_limit, test_limit, length, vocabulary, vocab_size, lowercase)

    def read(self, root: Path) -> Mapping[str, Labelled]:
        """Training and official test part."""
        return self._limited(read_ag_news(root, "train"), read_ag_news(root, "test"))


class TREC(_Published):
    """TREC: questions by what they ask for, 6 coarse classes or 50 fine ones (Li and Roth 2002).

    Read from ``trec/`` under the data root: 5,452 training questions (8 % of each class are for validation, 2 % for
    calibration) and 500 test questions, a few of which are among the training questions, as published. A fine class
    needs three training questions to take part in every split.

    Args:
        train_limit: use the first so many training texts (validation and calibration are cut from them); None: all.
        test_limit: use the first so many test texts; None: all.
        length: most word pieces of an input; longer texts are cut.
        fine: 50 classes instead of 6.
        vocabulary: names of corpora, or the path of a ``vocab.txt`` or ``tokenizer.json``; None: the training texts.
        vocab_size: pieces of a vocabulary that is made.
        lowercase: whether letters are made small and lose their accents first.
    """

    name = "trec"

    def __init__(
        self,
        train_limit: int | None = None,
        test_limit: int | None = None,
        length: int = 32,
        fine: bool = False,
        vocabulary: str | Sequence[str] | None = VOCABULARY,
        vocab_size: int = PIECES,
        lowercase: bool = True,
    ) -> None:
        super().__init__(train_limit, test_limit, length, vocabulary, vocab_size, lowercase)
        if not isinstance(fine, bool):
            raise InvalidValue(f"trec: fine = {fine!r}; true or false is expected")
        self.fine = fine
        self.labels = TREC_FINE_LABELS if fine else TREC_LABELS

    def read(self, root: Path) -> Mapping[str, Labelled]:
        """Training and test part."""
        return self._limited(read_trec(root, "train", self.fine), read_trec(root, "test", self.fine))

    def definition(self) -> dict[str, Any]:
        """With the kind of classes."""
        return {**super().definition(), "fine": self.fine}
