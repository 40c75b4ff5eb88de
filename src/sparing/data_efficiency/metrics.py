"""How difficult a sample is: a number for each, and what is counted over a corpus to work it out.

Li et al. 2022, arXiv:2212.03597, section 3.1. A batch is what a dataset's items collate to, or a slice of an array:
token numbers (B, S), or a mapping with a field of them and one that is 0 where there is padding.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Integer, Num, Shaped

from sparing.core.errors import DataError, InvalidValue, shown
from sparing.core.fingerprint import fingerprint
from sparing.data_efficiency.settings import whole_number

LARGEST = np.iinfo(np.int64).max
PIECE = 1 << 14
"""Tokens that are looked up at a time: their numbers stay in a core's cache, and in memory that is used again."""


class TokenFields:
    """Where token numbers and padding are in a batch.

    Args:
        tokens: the field of token numbers, when a batch is a mapping.
        mask: the field that is 1 for a token and 0 for padding, when a batch is a mapping; None: there is none.
        pad_id: the number that is padding, in place of a mask.
    """

    def __init__(self, tokens: str = "input_ids", mask: str | None = "attention_mask", pad_id: int | None = None):
        self.tokens, self.mask, self.pad_id = tokens, mask, pad_id

    def config(self) -> dict[str, Any]:
        """The fields."""
        return {"tokens": self.tokens, "mask": None if self.pad_id is not None else self.mask, "pad_id": self.pad_id}

    def tokens_of(self, batch: Any) -> Integer[np.ndarray, "b s"]:
        """Token numbers (B, S)."""
        tokens = np.asarray(self._field(batch, self.tokens) if isinstance(batch, Mapping) else batch)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise DataError(f"token numbers {tokens.shape} of type {tokens.dtype}; whole numbers (B, S) are expected")
        return tokens

    def real_of(self, batch: Any) -> Bool[np.ndarray, "b s"] | None:
        """True for tokens and False for padding (B, S), or None when nothing tells them apart."""
        if self.pad_id is not None:
            return self.tokens_of(batch) != self.pad_id
        if self.mask is None or not isinstance(batch, Mapping):
            return None
        mask = np.asarray(self._field(batch, self.mask))
        if mask.ndim != 2 or mask.dtype.kind not in "biu" or (mask.size and not 0 <= mask.min() <= mask.max() <= 1):
            raise DataError(
                f"the field {self.mask!r} is {mask.shape} of type {mask.dtype}; 0 and 1 (B, S) are expected"
            )
        return mask.astype(bool, copy=False)

    @staticmethod
    def _field(batch: Mapping[str, Any], name: str) -> Any:
        if name not in batch:
            raise DataError(f"a batch has no field {name!r}; it has {', '.join(map(str, batch))}")
        return batch[name]


class CorpusStatistic(ABC):
    """An array that is summed over all batches of a corpus; the reference's "accumulate" metrics."""

    name: str

    @abstractmethod
    def __call__(self, batch: Any) -> Num[np.ndarray, "..."]:
        """What one batch adds; the same shape for every batch."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything its values depend on, as plain values."""


class VocabularyFrequency(CorpusStatistic):
    """How often each token occurs, padding left out: n (V + 1,), the last for an unused number V.

    Args:
        vocab_size: V.
        fields: where tokens and padding are.
        name: of its folder.
    """

    def __init__(self, vocab_size: int, fields: TokenFields | None = None, name: str = "total_vocab_freq") -> None:
        self.vocab_size = whole_number("vocab_size", vocab_size, 1)
        self.fields, self.name = fields or TokenFields(), name

    def __call__(self, batch: Any) -> Integer[np.ndarray, " v"]:
        """Counts of one batch (V + 1,)."""
        tokens, real = self.fields.tokens_of(batch), self.fields.real_of(batch)
        used = tokens.reshape(-1) if real is None else tokens[real]
        in_vocabulary(used, self.vocab_size)
        return np.bincount(used, minlength=self.vocab_size + 1)

    def config(self) -> dict[str, Any]:
        """Kind, V and fields."""
        return {"kind": "VocabularyFrequency", "vocab_size": self.vocab_size, **self.fields.config()}


class SummedFunction(CorpusStatistic):
    """A function of your own from a batch to an array, summed over the corpus.

    Args:
        name: of its folder.
        function: batch → array.
        version: what tells it from other functions of this name; None: its code.
    """

    def __init__(self, name: str, function: Callable[[Any], Any], version: str | None = None) -> None:
        self.name, self.function, self.version = name, function, version

    def __call__(self, batch: Any) -> Num[np.ndarray, "..."]:
        """The function's array."""
        return np.asarray(self.function(batch))

    def config(self) -> dict[str, Any]:
        """Kind and version."""
        return {"kind": "SummedFunction", "version": self.version or fingerprint(self.function)}


class DifficultyMetric(ABC):
    """A number for each sample of a batch; the reference's "single_value_per_sample" metrics."""

    name: str

    def first_pass(self) -> CorpusStatistic | None:
        """What has to be counted over the whole corpus before :meth:`values` can be asked; None: nothing."""
        return None

    def fitted(self, statistic: np.ndarray) -> DifficultyMetric:
        """This metric with the result of its :meth:`first_pass`."""
        raise InvalidValue(f"the metric {self.name!r} has no first pass")

    @abstractmethod
    def values(self, batch: Any) -> Num[np.ndarray, " b"]:
        """Whole or real numbers (B,)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything its values depend on besides the data, as plain values."""

    def bound(self, width: int) -> float:
        """No value of a sample ``width`` tokens wide is greater; needed where it breaks ties in :class:`Composed`."""
        raise InvalidValue(f"the metric {self.name!r} knows no greatest value, so it cannot break another's ties")


class SequenceLength(DifficultyMetric):
    """Tokens that are no padding: Σₖ mₖ.

    Pointless for packed data of one length; without a mask or a padding number it raises :class:`DataError`.

    Args:
        fields: where tokens and padding are.
        name: of its folder.
    """

    def __init__(self, fields: TokenFields | None = None, name: str = "seqlen") -> None:
        self.fields, self.name = fields or TokenFields(), name

    def values(self, batch: Any) -> Integer[np.ndarray, " b"]:
        """Lengths (B,)."""
        real = self.fields.real_of(batch)
        if real is None:
            raise DataError(
                "nothing tells tokens from padding: give a mask field or a pad_id. Without padding all samples have "
                "one length, and there is nothing to order by it"
            )
        return np.count_nonzero(real, axis=1)

    def bound(self, width: int) -> float:
        """The width itself."""
        return width

    def config(self) -> dict[str, Any]:
        """Kind and fields."""
        return {"kind": "SequenceLength", **self.fields.config()}


class VocabularyRarity(DifficultyMetric):
    """trunc Σₖ mₖ a[xₖ] with a = :func:`negative_log_frequency`: a sum, so longer samples are rarer.

    Args:
        vocab_size: V; token numbers are 0 … V.
        fields: where tokens and padding are.
        counts: n (V + 1,), how often each token occurs; None: an analysis counts them first.
        name: of its folder.
    """

    def __init__(
        self,
        vocab_size: int,
        fields: TokenFields | None = None,
        counts: Integer[np.ndarray, " v"] | None = None,
        name: str = "vocab_rarity",
    ) -> None:
        self.vocab_size = whole_number("vocab_size", vocab_size, 1)
        self.fields, self.name = fields or TokenFields(), name
        self.counts = None if counts is None else np.asarray(counts)
        if self.counts is not None and self.counts.shape != (self.vocab_size + 1,):
            raise InvalidValue(f"counts {self.counts.shape}; ({self.vocab_size + 1},), vocab_size + 1, are expected")
        self.surprisal = None if self.counts is None else negative_log_frequency(self.counts)
        self._pad_costs_nothing: np.ndarray | None = None
        if self.surprisal is not None and (pad := self.fields.pad_id) is not None and 0 <= pad <= self.vocab_size:
            self._pad_costs_nothing = self.surprisal.copy()
            self._pad_costs_nothing[pad] = 0.0

    def first_pass(self) -> CorpusStatistic | None:
        """:class:`VocabularyFrequency`, unless counts were given."""
        return VocabularyFrequency(self.vocab_size, self.fields) if self.counts is None else None

    def fitted(self, statistic: np.ndarray) -> VocabularyRarity:
        """With these counts."""
        return VocabularyRarity(self.vocab_size, self.fields, statistic, self.name)

    def values(self, batch: Any) -> Integer[np.ndarray, " b"]:
        """Rarities (B,)."""
        tokens, table = self.fields.tokens_of(batch), self._surprisal()
        if self._pad_costs_nothing is not None:
            table, real = self._pad_costs_nothing, None
        else:
            real = self.fields.real_of(batch)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() <= self.vocab_size:
            in_vocabulary(tokens if real is None else tokens[real], self.vocab_size)  # padding may be any number
            tokens = tokens if real is None else np.where(real, tokens, 0)
        rarities = np.empty(len(tokens), np.int64)
        rows = max(1, PIECE // max(1, tokens.shape[1]))
        for start in range(0, len(tokens), rows):
            piece = slice(start, start + rows)
            terms = table.take(tokens[piece])
            if real is not None:
                np.copyto(terms, 0.0, where=~real[piece])
            rarities[piece] = terms.sum(1)
        return rarities

    def bound(self, width: int) -> float:
        """S · max a."""
        return width * float(self._surprisal().max())

    def config(self) -> dict[str, Any]:
        """Kind, V, fields and given counts."""
        counts = None if self.counts is None else fingerprint(self.counts)
        return {"kind": "VocabularyRarity", "vocab_size": self.vocab_size, **self.fields.config(), "counts": counts}

    def _surprisal(self) -> np.ndarray:
        if self.surprisal is None:
            raise InvalidValue(f"{self.name!r} has no counts yet; give them, or let a DataAnalyzer count")
        return self.surprisal


class Composed(DifficultyMetric):
    """Lexicographic: by the first metric, ties by the second and so on: ((v₁ · C₂ + v₂) · C₃ + v₃) …

    C = :func:`tie_factor` of a metric's greatest value at ``width``, a power of ten above it.

    Args:
        metrics: at least two; at most one that needs a first pass. All but the first must know a greatest value.
        width: S, of the padded token array. The same for all batches.
        name: of its folder; None: the names of the metrics, joined.
    """

    def __init__(self, metrics: Sequence[DifficultyMetric], width: int, name: str | None = None) -> None:
        if len(metrics) < 2:
            raise InvalidValue(f"{len(metrics)} metrics; at least two are needed")
        self.metrics, self.width = list(metrics), whole_number("width", width, 1)
        self.name = "_".join(metric.name for metric in metrics) if name is None else name
        if sum(metric.first_pass() is not None for metric in metrics) > 1:
            raise InvalidValue("more than one of the metrics needs a first pass; give counts to all but one")

    def first_pass(self) -> CorpusStatistic | None:
        """That of the one metric which has one."""
        return next((found for metric in self.metrics if (found := metric.first_pass()) is not None), None)

    def fitted(self, statistic: np.ndarray) -> Composed:
        """With the result of the first pass."""
        fitted = [metric if metric.first_pass() is None else metric.fitted(statistic) for metric in self.metrics]
        return Composed(fitted, self.width, self.name)

    def values(self, batch: Any) -> Integer[np.ndarray, " b"]:
        """Composed values (B,)."""
        total: np.ndarray | None = None
        for metric in self.metrics:
            values = np.asarray(metric.values(batch))
            if values.dtype.kind not in "iu":
                raise DataError(f"{metric.name!r} gives {values.dtype}; only whole numbers can be composed")
            values = values.astype(np.int64)
            if total is None:
                total = values
                continue
            factor = tie_factor(metric.bound(self.width))
            if values.size and not 0 <= values.min() <= values.max() < factor:
                raise DataError(
                    f"{metric.name!r} gives {values.min()} … {values.max()}; 0 … {factor - 1} is possible at width = "
                    f"{self.width}. Are samples wider than that?"
                )
            if total.size and int(np.abs(total).max()) > (LARGEST - factor) // factor:
                raise DataError(f"{self.name!r}: {int(np.abs(total).max())} · {factor} does not fit into 64 bits")
            total = total * factor + values
        assert total is not None
        return total

    def bound(self, width: int) -> float:
        """The greatest composed value."""
        total = self.metrics[0].bound(width)
        for metric in self.metrics[1:]:
            total = total * tie_factor(metric.bound(self.width)) + metric.bound(self.width)
        return total

    def config(self) -> dict[str, Any]:
        """Kind, width and the metrics'."""
        return {"kind": "Composed", "width": self.width, "metrics": [metric.config() for metric in self.metrics]}


class FunctionMetric(DifficultyMetric):
    """A function of your own from a batch to whole or real numbers (B,).

    Args:
        name: of its folder.
        function: batch → (B,).
        version: what tells it from other functions of this name; None: its code.
    """

    def __init__(self, name: str, function: Callable[[Any], Any], version: str | None = None) -> None:
        self.name, self.function, self.version = name, function, version

    def values(self, batch: Any) -> Shaped[np.ndarray, "..."]:
        """The function's numbers."""
        return np.asarray(self.function(batch))

    def config(self) -> dict[str, Any]:
        """Kind and version."""
        return {"kind": "FunctionMetric", "version": self.version or fingerprint(self.function)}


def negative_log_frequency(counts: Integer[np.ndarray, " v"]) -> np.ndarray:
    """a[v] = −ln(max(n_v, 1) / Σᵤ max(n_u, 1)), float64: a token that never occurs counts as one that did once."""
    seen = np.maximum(counts, 1)
    return -np.log(seen / seen.sum())


def tie_factor(bound: float) -> int:
    """C = 10^(⌈log₁₀ bound⌉ + 1): values up to ``bound`` fit below it, with a digit to spare."""
    return 10 ** (math.ceil(math.log10(bound)) + 1) if bound > 0 else 10


def in_vocabulary(tokens: Integer[np.ndarray, "..."], vocab_size: int) -> None:
    """Raise :class:`DataError` for a token number outside 0 … V."""
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= vocab_size:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(
            f"token number {shown(int(worst))}; 0 … {vocab_size} is possible with vocab_size = {vocab_size}"
        )
