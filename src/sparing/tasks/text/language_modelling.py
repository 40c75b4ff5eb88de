"""Causal language modelling: predict each token of a text from those before it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from sparing.core.collation import items_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import log_softmax
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.task import IGNORED, Evaluation, Metric, Splits
from sparing.data.root import cut_shares, data_root
from sparing.data.sequences import (
    Sequences,
    cut_documents,
    cut_tail,
    pad_sequences,
    read_corpus_of,
    read_tiny_shakespeare,
    read_us_addresses,
)
from sparing.data.tokenizing import END, BytePairs, Characters, Tokens, padded, train_byte_pairs
from sparing.tasks.text.base import ReadTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 16


class LanguageModelling(ReadTask):
    """Causal language modelling on documents that a subclass reads.

    Scored by the loss in nats per token (the headline), perplexity and bits per character, all of them over every token
    of the split that has a token before it in its sample; each token is a unit.

    A batch is ``{"input_ids": (N, T + 1), "attention_mask": (N, T + 1)}``: inputs are ``[:, :-1]``, what is to be
    predicted ``[:, 1:]``, and padding, always behind, counts for nothing. So ``truncate_batch`` and ``reshape_batch``
    can cut it. A model maps token numbers (N, T) to logits (N, T, vocab_size).

    Args:
        length: T, most tokens of an input.
        level: what a token is: one of the "characters" of the corpus, or "byte_pairs" made of its training documents.
        vocab_size: tokens of a vocabulary of byte pairs.
        samples: "windows": documents one after the other, a token between them, in windows of one length; or one sample
            for each non-empty line ("lines") or document ("documents"), which begins with that token and is cut.
        stride: tokens from one training window to the next; None: ``length``, so that none is predicted twice.
        train_limit: use the first so many training samples; None: all.
        test_limit: use the first so many test samples; None: all.
    """

    unit: ClassVar[str] = "token"
    metrics: tuple[Metric, ...] = (
        Metric("loss", "lower", "nats"),
        Metric("perplexity", "lower"),
        Metric("bits_per_character", "lower", "bits"),
    )
    capabilities: frozenset[str] = frozenset({"causal_lm", "text"})

    def __init__(
        self,
        length: int,
        level: Literal["characters", "byte_pairs"],
        vocab_size: int,
        samples: Literal["windows", "lines", "documents"],
        stride: int | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__()
        self.length = self._whole("length", length, 4, 1 << 13)
        self.level = self._choice("level", level, ("characters", "byte_pairs"))
        self.samples = self._choice("samples", samples, ("windows", "lines", "documents"))
        self.vocab_size = self._whole("vocab_size", vocab_size, 258, 1 << 20)
        self.stride = None if stride is None else self._whole("stride", stride, 1, self.length)
        if stride is not None and samples != "windows":
            raise InvalidValue(f'{self.name}: stride = {stride} is for samples = "windows", not for {samples!r}')
        self.train_limit = self._limit("train_limit", train_limit)
        self.test_limit = self._limit("test_limit", test_limit)
        self._documents: dict[Path, dict[str, list[str]]] = {}
        self._tokens: dict[Path, Tokens] = {}

    def _choice(self, name: str, value: Any, choices: Sequence[str]) -> Any:
        if value not in choices:
            raise InvalidValue(f"{self.name}: {name} = {value!r}; one of {', '.join(choices)} is expected")
        return value

    @abstractmethod
    def read(self, root: Path) -> Mapping[str, list[str]]:
        """The documents of each of the four splits under ``root``."""

    def documents(self, root: Path) -> dict[str, list[str]]:
        """What :meth:`read` gives, read once; none of the splits is empty."""
        if root not in self._documents:
            found = {name: list(texts) for name, texts in self.read(root).items()}
            for name in ("train", "val", "calibration", "test"):
                if not any(text.strip() for text in found.get(name, ())):
                    raise DataError(f"{self.name}: no text is left for the split {name!r}; more or longer documents, "
                                    "or larger shares, are needed")  # fmt: skip
            self._documents[root] = found
        return self._documents[root]

    @property
    def tokens(self) -> Tokens:
        """What turns texts into numbers; made once for each data folder."""
        root = data_root(self._root)
        if root not in self._tokens:
            documents = self.documents(root)
            begin = self.samples != "windows"
            if self.level == "byte_pairs":
                self._tokens[root] = BytePairs(
                    *train_byte_pairs(documents["train"], self.vocab_size), self.length, begin
                )
            else:
                between = begin or any(len(texts) > 1 for texts in documents.values())
                known = sorted({character for texts in documents.values() for text in texts for character in text})
                self._tokens[root] = Characters((*([END] if between else []), *known), self.length, begin)
        return self._tokens[root]

    def make_splits(self, root: Path) -> Splits:
        """Documents are shared out first and made into samples then."""
        tokens, made = self.tokens, {}
        limits = {"train": self.train_limit, "test": self.test_limit}
        for name, texts in self.documents(root).items():
            if self.samples == "windows":
                stride = self.stride if name == "train" else None
                made[name] = Sequences.windows(self._stream(tokens, texts), self.length, stride)
            else:
                parts = texts if self.samples == "documents" else [line for text in texts for line in text.split("\n")]
                parts = [part for part in parts if part.strip()]
                made[name] = Sequences.rows(tokens.begun(parts), self.length)
            if len(made[name]) == 0:
                count = sum(map(len, tokens.encode(texts)))
                raise DataError(
                    f"{self.name}: the {count} tokens of the split {name!r} are fewer than a window of length + 1 = "
                    f"{self.length + 1}; a smaller length, longer texts or a larger share is needed"
                )
            made[name] = made[name].first(limits.get(name))
        return Splits(**made)

    @staticmethod
    def _stream(tokens: Tokens, texts: Sequence[str]) -> Int[ndarray, " t"]:
        """All texts one after the other, :data:`END` between them."""
        parts: list[np.ndarray] = []
        for ids in tokens.encode(texts):
            parts += [np.array([tokens.end_id]), ids] if parts else [ids]
        return np.concatenate(parts).astype(np.int32)

    collate = staticmethod(pad_sequences)

    @property
    def preprocessing(self) -> Preprocessing:  # type: ignore[override]
        """Texts → numbers of tokens."""
        return Preprocessing((self.tokens,))

    def raw_example(self) -> Sequence[Any]:
        """The beginning of the training texts, as long as fills the whole length; a short corpus is repeated."""
        tokens, text = self.tokens, "".join(self.documents(data_root(self._root))["train"])
        size = self.length
        while len(tokens.encode([text[:size]])[0]) < self.length:
            size *= 2
            text = text if size <= len(text) else text * 2
        return [text[:size]]

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Random tokens, the same on every call: (int64 (batch, length or one less),)."""
        import torch

        shape = (batch, self.length - (batch + 1) % 2)
        return (torch.from_numpy(np.random.RandomState(0).randint(0, len(self.tokens.vocabulary), shape)).long(),)

    def model_fields(self) -> Mapping[str, Any]:
        """``vocab_size`` and ``max_length``."""
        return {"vocab_size": len(self.tokens.vocabulary), "max_length": self.length}

    def default_model(self) -> nn.Module:
        """A "gpt" of six blocks of width 64."""
        from sparing.core.predictor import build_model

        return build_model("gpt", self)

    def outputs(self, model: nn.Module | Predictor, batch: Any) -> Any:
        """Logits of the token after each (N, T, vocab_size)."""
        return model(batch["input_ids"][:, :-1])

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (M, vocab_size), tokens (M,)) of the M tokens that count."""
        counts = batch["attention_mask"][:, 1:] != 0
        return outputs[counts], batch["input_ids"][:, 1:][counts]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy over the tokens that count."""
        from torch.nn.functional import cross_entropy

        targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, IGNORED)
        return cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Nats per token, perplexity and bits per character; samples of like length are answered together."""
        if len(split) == 0:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no sample")
        items = items_of(split, range(len(split)))
        order = sorted(range(len(items)), key=lambda index: len(items[index]))
        nats: list[np.ndarray] = [np.zeros(0)] * len(items)
        characters = 0
        for start in range(0, len(order), EVALUATION_BATCH):
            rows = order[start : start + EVALUATION_BATCH]
            batch = self.collate([items[row] for row in rows])
            counts, targets = (np.asarray(batch[name][:, 1:]) for name in ("attention_mask", "input_ids"))
            found = token_nats(np.asarray(self.outputs(predictor, batch)), targets, len(self.tokens.vocabulary))
            for row, real, each in zip(rows, counts != 0, found, strict=True):
                nats[row] = each[real]
            characters += int(self.tokens.characters[targets[counts != 0]].sum())
        each = np.concatenate(nats)
        if not np.isfinite(each).all():
            raise InvalidValue(f"{self.name}: the output for unit {int((~np.isfinite(each)).argmax())} is not finite")
        loss = float(each.mean())
        figures = {
            "loss": loss,
            "perplexity": float(np.exp(min(loss, 700.0))),
            "bits_per_character": float(each.sum()) / np.log(2) / max(1, characters),
        }
        return Evaluation(figures, each)

    def definition(self) -> dict[str, Any]:
        """With what makes tokens and samples."""
        own = [self.length, self.level, self.vocab_size, self.samples, self.stride, self.train_limit, self.test_limit]
        return {**super().definition(), "language": own}


def token_nats(logits: Float[ndarray, "..."], targets: Int[ndarray, "n t"], vocab_size: int) -> Float[ndarray, "n t"]:
    """−log softmax(logits)[target] of each token (N, T); :class:`InvalidValue` unless logits are (N, T, vocab_size)."""
    if logits.shape != (*targets.shape, vocab_size):
        raise InvalidValue(f"outputs of shape {logits.shape}; logits {(*targets.shape, vocab_size)} are expected")
    # row by row: a copy of all logits may be large
    return np.stack([-log_softmax(row)[np.arange(len(t)), t] for row, t in zip(logits, targets, strict=True)])


class TextScores(NamedTuple):
    """What :func:`score_texts` gives."""

    log_probability: Float[ndarray, " n"]
    """Of each text in nats, ≤ 0."""
    tokens: Int[ndarray, " n"]
    """Tokens of each text that it is the sum over."""


def score_texts(predictor: Predictor, texts: Sequence[str], batch_size: int = EVALUATION_BATCH) -> TextScores:
    """How probable a language model finds texts: log p = Σ log p(token | those before it). Needs no torch.

    Where texts are samples of their own (``samples`` other than "windows"), all tokens of a text count. Where a model
    was trained on windows its first token does not, as nothing is known before it. A text that is longer than the model
    is read in windows, each of which begins with the last token of the one before.

    Args:
        predictor: of a task of language modelling, also one that was saved and loaded again.
        texts: at least one.
        batch_size: windows that are answered together, at least 1.

    Raises:
        InvalidValue: a predictor of another kind of task.
        DataError: an empty text, or a character that the model's vocabulary lacks.
    """
    operations = () if predictor.preprocessing is None else predictor.preprocessing.operations
    if len(operations) != 1 or not isinstance(operations[0], Tokens):
        raise InvalidValue("score_texts: the predictor of a language model is needed; this one's preprocessing is "
                           f"{[type(operation).__name__ for operation in operations]}")  # fmt: skip
    tokens = operations[0]
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InvalidValue(f"score_texts: batch_size = {batch_size!r}; a whole number of at least 1 is expected")
    if isinstance(texts, str) or len(texts) == 0:
        raise InvalidValue(f"score_texts: texts = {texts!r}; a list of at least one text is expected")
    windows = [
        (number, ids[start : start + tokens.max_length + 1])
        for number, ids in enumerate(tokens.begun(texts))
        for start in range(0, len(ids) - 1, tokens.max_length)
    ]
    log_probability, counted = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        batch = padded([ids for _, ids in part])
        nats = token_nats(np.asarray(predictor(batch[:, :-1])), batch[:, 1:], len(tokens.vocabulary))
        for each, (number, ids) in zip(nats, part, strict=True):
            log_probability[number] -= each[: len(ids) - 1].sum()
            counted[number] += len(ids) - 1
    return TextScores(log_probability, counted)


class TinyShakespeare(LanguageModelling):
    """Tiny Shakespeare: characters of 40,000 lines of plays, one after the other (Karpathy 2015).

    Read from ``lm_text/tinyshakespeare.txt.gz`` under the data root. The last 10 % of the characters are the test
    split, as usual; the 4 % before them validate and the 1 % before these calibrate.

    Args:
        length: characters of an input.
        stride: characters from one training window to the next; None: ``length``.
        train_limit: use the first so many training windows; None: all.
        test_limit: use the first so many test windows; None: all.
    """

    name = "tiny_shakespeare"

    def __init__(
        self,
        length: int = 128,
        stride: int | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__(length, "characters", 258, "windows", stride, train_limit, test_limit)

    def read(self, root: Path) -> Mapping[str, list[str]]:
        """The whole text, cut at 85, 86 and 90 %."""
        return read_tiny_shakespeare(root)


class UsAddresses(LanguageModelling):
    """Addresses of US presidents: byte pairs of 124 documents since 1789, each line a sample of its own length.

    Read from ``lm_text/us_addresses.jsonl.gz`` under the data root. Every tenth document, from the first on, is for
    the test split, every tenth from the sixth on validates and every twentieth from the ninth on calibrates. No
    document is in two splits; a few lines, such as greetings, are in many documents. Lengths and vocabulary differ
    widely, so there is something for a curriculum to order.

    Args:
        length: most tokens of an input; longer lines are cut.
        vocab_size: byte pairs, made of the training documents.
        train_limit: use the first so many training lines; None: all.
        test_limit: use the first so many test lines; None: all.
    """

    name = "us_addresses"

    def __init__(
        self,
        length: int = 128,
        vocab_size: int = 2000,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__(length, "byte_pairs", vocab_size, "lines", None, train_limit, test_limit)

    def read(self, root: Path) -> Mapping[str, list[str]]:
        """By document."""
        return read_us_addresses(root)


class TextCorpus(LanguageModelling):
    """Your own corpus for language modelling: text files, or JSONL with the key "text", as characters or byte pairs.

    A document is a text file, or a line's ``text`` in a ``.jsonl`` file, gzipped or plain. A folder may hold ``train``,
    ``val`` and ``test`` files, or any text files. What a split lacks is cut from the training documents.

    Args:
        path: the file or folder; a relative one is looked for from the working folder, then from the data root.
        length: most tokens of an input.
        level: what a token is: one of the "characters" of the corpus, or "byte_pairs" made of its training documents.
        vocab_size: byte pairs of the vocabulary.
        samples: "windows" of one length over documents one after the other, or a sample for each of the "lines" or
            "documents", longer ones cut.
        stride: tokens from one training window to the next; None: ``length``.
        split: how splits are cut: by "documents", which are drawn, or the "tail" of all the text, one document after
            another; None: by documents where there are at least 20.
        test_share: share for the test split, when there is no test file.
        val_share: share for validation, when there is no val file.
        calibration_share: share for calibration.
        train_limit: use the first so many training samples; None: all.
        test_limit: use the first so many test samples; None: all.
    """

    name = "text_corpus"

    def __init__(
        self,
        path: str,
        length: int = 128,
        level: Literal["characters", "byte_pairs"] = "byte_pairs",
        vocab_size: int = 2000,
        samples: Literal["windows", "lines", "documents"] = "windows",
        stride: int | None = None,
        split: Literal["documents", "tail"] | None = None,
        test_share: float = 0.1,
        val_share: float = 0.05,
        calibration_share: float = 0.02,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__(length, level, vocab_size, samples, stride, train_limit, test_limit)
        if not isinstance(path, str | Path) or not str(path):
            raise InvalidValue(f"text_corpus: path = {path!r}; the path of a file or folder is expected")
        self.path = str(path)
        self.split = None if split is None else self._choice("split", split, ("documents", "tail"))
        self.shares = cut_shares(self.name, calibration=calibration_share, val=val_share, test=test_share)
        self.name = f"text_corpus:{Path(path).name}"

    def read(self, root: Path) -> Mapping[str, list[str]]:
        """The parts there are files of; the rest is cut from the training documents."""
        given = read_corpus_of("text_corpus", self.path, root)
        train, shares = given["train"], {name: s for name, s in self.shares.items() if name not in given}
        by_document = len(train) >= 20 if self.split is None else self.split == "documents"
        cut = cut_documents(train, shares) if by_document else cut_tail(train, shares)
        return {**given, **cut}

    def definition(self) -> dict[str, Any]:
        """With how splits are cut; the texts themselves are fingerprinted with the splits."""
        return {**super().definition(), "cut": [self.split, self.shares]}
