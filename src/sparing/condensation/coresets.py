"""Core sets: a few of the real samples, chosen at random, by herding or by k-center. What condensing has to beat.

Herding is Welling's (2009, "Herding dynamical weights to learn"), k-center the greedy form (Sener and Savarese 2018,
arXiv:1708.00489), both as the papers on condensation use them: class by class, on embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from sparing.core.errors import InvalidValue
from sparing.core.randomness import derive_seed

Strategy = Literal["random", "herding", "kcenter"]


def herding(embeddings: Float[np.ndarray, "n d"], count: int) -> Int[np.ndarray, " count"]:
    """The rows whose running mean stays closest to the mean of all, in the order in which they are chosen.

    In step i, counted from 0, the row not yet chosen that is closest to (i + 1) · mean − Σ chosen (Euclidean, ties to
    the lower row).

    Raises:
        InvalidValue: a count that is negative or more than there are rows, or embeddings that are not finite.
    """
    rows = _checked(embeddings, count)
    mean, total = rows.mean(0), np.zeros(rows.shape[1])
    left, chosen = np.ones(len(rows), bool), []
    for step in range(count):
        distance = np.square((step + 1) * mean - total - rows).sum(1)
        chosen.append(int(np.where(left, distance, np.inf).argmin()))
        left[chosen[-1]] = False
        total += rows[chosen[-1]]
    return np.array(chosen, np.int64)


def k_center(embeddings: Float[np.ndarray, "n d"], count: int) -> Int[np.ndarray, " count"]:
    """Rows that lie far from each other, in the order in which they are chosen.

    First the row nearest the mean, then again and again the row with the largest distance to its nearest chosen row
    (Euclidean, ties to the lower row).

    Raises:
        InvalidValue: a count that is negative or more than there are rows, or embeddings that are not finite.
    """
    rows = _checked(embeddings, count)
    if count == 0:
        return np.zeros(0, np.int64)
    chosen = [int(np.square(rows - rows.mean(0)).sum(1).argmin())]
    nearest = np.full(len(rows), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, np.square(rows - rows[chosen[-1]]).sum(1))
        nearest[chosen[-1]] = -1.0  # also where rows are equal none is chosen twice
        chosen.append(int(nearest.argmax()))
    return np.array(chosen, np.int64)


def _checked(embeddings: np.ndarray, count: int) -> np.ndarray:
    rows = np.asarray(embeddings, np.float64)
    if rows.ndim != 2 or not 0 <= count <= len(rows):
        raise InvalidValue(f"{count} rows of embeddings {rows.shape}; (n, d) with n of at least {count} is expected")
    if not np.isfinite(rows).all():
        raise InvalidValue(f"the embedding of row {int(np.flatnonzero(~np.isfinite(rows).all(1))[0])} is not finite")
    return rows


class CoresetSelector:
    """Chooses so many samples of each class.

    Args:
        strategy: "random" (uniform, without replacement), "herding" or "kcenter".
        n_per_class: how many of each class; or one number for each class 0 … C−1.
        embed: samples → embeddings (n, d), for the two strategies that compare samples. It is called once, with all
            candidates. None: the samples are arrays, flattened.
        random_state: seed of "random".
    """

    indices_: Int[np.ndarray, " m"]
    """Rows of what was given to :meth:`fit`, class after class, in each in the order of choice."""

    def __init__(
        self,
        strategy: Strategy = "herding",
        n_per_class: int | Sequence[int] = 10,
        embed: Callable[[Any], Any] | None = None,
        random_state: int = 0,
    ) -> None:
        if strategy not in ("random", "herding", "kcenter"):
            raise InvalidValue(f'strategy = {strategy!r}; "random", "herding" or "kcenter" is expected')
        counts = [n_per_class] if isinstance(n_per_class, int) else list(n_per_class)
        if not counts or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0 for n in counts):
            raise InvalidValue(f"n_per_class = {n_per_class!r}; a whole number, or one for each class, is expected")
        if sum(counts) == 0:
            raise InvalidValue(f"n_per_class = {n_per_class!r} chooses nothing")
        self.strategy, self.n_per_class, self.embed, self.random_state = strategy, n_per_class, embed, random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Choose from samples ``X`` (any sequence that ``embed`` takes) with labels ``y`` (n,), whole numbers 0 … C−1.

        Raises:
            InvalidValue: labels that are no such numbers, or as many as samples; a class with fewer samples than are
                wanted of it; embeddings that are not one finite row for each sample.
        """
        labels = class_labels(y, len(X))
        classes = int(labels.max()) + 1
        counts = [self.n_per_class] * classes if isinstance(self.n_per_class, int) else list(self.n_per_class)
        if len(counts) != classes:
            raise InvalidValue(f"n_per_class has {len(counts)} entries; the labels name {classes} classes")
        found = np.bincount(labels, minlength=classes)
        for c, (wanted, there) in enumerate(zip(counts, found, strict=True)):
            if there < wanted:
                raise InvalidValue(f"{wanted} samples of class {c} are wanted, but there are {there}")
        rows = self._embedded(X, len(labels)) if self.strategy != "random" else None
        chosen = []
        for c, count in enumerate(counts):
            members = np.flatnonzero(labels == c)
            if rows is None:
                generator = np.random.default_rng(derive_seed("coreset", self.random_state, c))
                order = generator.permutation(len(members))[:count]
            else:
                order = (herding if self.strategy == "herding" else k_center)(rows[members], count)
            chosen.append(members[order])
        self.indices_ = np.concatenate(chosen)
        return self

    def fit_resample(self, X: Any, y: Any) -> tuple[Any, np.ndarray]:
        """:meth:`fit`, and (the chosen samples, their labels); samples of a list come as a list."""
        self.fit(X, y)
        kept = X[self.indices_] if isinstance(X, np.ndarray | Tensor) else [X[int(i)] for i in self.indices_]
        return kept, class_labels(y, len(X))[self.indices_]

    def _embedded(self, X: Any, count: int) -> np.ndarray:
        found = X if self.embed is None else self.embed(X)
        if isinstance(found, Tensor):
            found = found.detach().cpu().numpy()
        rows = np.asarray(found, np.float64)
        if len(rows) != count:
            raise InvalidValue(f"embed gave {len(rows)} rows for {count} samples; one for each is expected")
        return rows.reshape(count, -1)


def class_labels(y: Any, count: int) -> Int[np.ndarray, " n"]:
    """Labels as int64 (n,).

    Raises:
        InvalidValue: no samples, another number of labels than samples, or labels that are not whole numbers from 0.
    """
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if count == 0 or labels.shape != (count,):
        raise InvalidValue(f"{count} samples and labels {labels.shape}; one label for each sample is expected")
    if labels.dtype.kind not in "iu":
        raise InvalidValue(f"labels of type {labels.dtype}; whole numbers 0 … C−1 are expected")
    if labels.min() < 0:
        at = int(labels.argmin())
        raise InvalidValue(f"label {labels[at]} of sample {at}; whole numbers 0 … C−1 are expected")
    return labels.astype(np.int64)
