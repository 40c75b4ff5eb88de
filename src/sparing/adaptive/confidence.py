"""When an exit's answer is good enough to stop at (predictive_exit sheet, section 3). NumPy only.

Logits have their classes last. Exits are counted from 0 here, in arrays; "layer i" of the papers is exit i − 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from sparing.core.errors import InvalidValue

RuleKind = Literal["softmax", "activation", "entropy", "patience"]


def log_softmax(logits: Float[np.ndarray, "*samples classes"]) -> Float[np.ndarray, "*samples classes"]:
    """Logarithms of the probabilities, in float64."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def highest(logits: Float[np.ndarray, "*samples classes"]) -> Float[np.ndarray, " *samples"]:
    """The largest of :func:`log_softmax`, to the bit."""
    values = np.asarray(logits, dtype=np.float64)
    shifted = values - values.max(axis=-1, keepdims=True)
    return -np.log(np.exp(shifted).sum(axis=-1))


def entropy(logits: Float[np.ndarray, "*samples classes"]) -> Float[np.ndarray, " *samples"]:
    """Entropy of the probabilities in nats."""
    logs = log_softmax(logits)
    return -(np.exp(logs) * logs).sum(axis=-1)


def magnitude(logits: Float[np.ndarray, "*samples classes"]) -> Float[np.ndarray, " *samples"]:
    """The largest absolute value of the largest and the smallest logit, the activation rule's measure."""
    values = np.asarray(logits, dtype=np.float64)
    return np.maximum(np.abs(values.max(axis=-1)), np.abs(values.min(axis=-1)))


def activation_thresholds(logits: Float[np.ndarray, "samples exits classes"]) -> Float[np.ndarray, " exits"]:
    """t_i: the absolute value of the mean of all logits of exit i, over training samples and classes.

    Raises :class:`InvalidValue` for no samples, and NaN or infinite logits.
    """
    checked(logits)
    return np.abs(np.asarray(logits, dtype=np.float64).mean(axis=(0, 2)))


def checked(logits: np.ndarray, rank: int = 3) -> None:
    """Raise :class:`InvalidValue` unless ``logits`` are finite, of this rank, with at least two classes."""
    if logits.ndim != rank or 0 in logits.shape:
        wanted = "(samples, exits, classes)" if rank == 3 else "(samples, classes)"
        raise InvalidValue(f"logits must have the shape {wanted}, none of them 0, not {list(logits.shape)}")
    if logits.shape[-1] < 2:
        raise InvalidValue(f"logits of {logits.shape[-1]} class; at least 2 classes are needed to be sure of one")
    if not np.isfinite(logits).all():
        where = [int(index) for index in np.argwhere(~np.isfinite(logits))[0]]
        raise InvalidValue(f"logits must be finite; the one at {where} is {logits[tuple(where)]}")


@dataclass(frozen=True)
class ConfidenceRule:
    """Whether a sample leaves at an exit, by that exit's logits.

    Made by :meth:`softmax` (max log-softmax ≥ log β), :meth:`activation` (:func:`magnitude` / (β·t_i) ≥ 1),
    :meth:`entropy` (entropy < T, BranchyNet) or :meth:`patience` (p exits in a row name the same class, PABEE; only
    :class:`~sparing.adaptive.policies.EveryExitPolicy` and its placed kin can count them).
    """

    kind: RuleKind
    threshold: float
    """β, T in nats, or p."""
    thresholds: tuple[float, ...] = ()
    """t_i of each exit; of the activation rule only."""

    def __post_init__(self) -> None:
        value = self.threshold
        if not math.isfinite(value) or value <= 0:
            raise InvalidValue(f"threshold of the {self.kind} rule = {value}; a finite number above 0 is expected")
        if self.kind == "softmax" and value >= 1:
            raise InvalidValue(f"beta = {value}; the softmax rule wants a probability above 0 and below 1")
        if self.kind == "patience" and value != int(value):
            raise InvalidValue(f"patience = {value}; a whole number of exits is expected")
        if (self.kind == "activation") != bool(self.thresholds):
            raise InvalidValue(
                f"the {self.kind} rule with thresholds {list(self.thresholds)}: activation alone has some"
            )
        for exit_, t in enumerate(self.thresholds):
            if not math.isfinite(t) or t <= 0:
                raise InvalidValue(
                    f"the activation threshold of exit {exit_ + 1} is {t}; every logit would do. A finite number above "
                    "0 is needed: use the softmax rule, or leave that exit out"
                )

    @classmethod
    def softmax(cls, beta: float) -> ConfidenceRule:
        """Leave where the largest probability is at least β, 0 < β < 1."""
        return cls("softmax", float(beta))

    @classmethod
    def activation(cls, thresholds: Float[np.ndarray, " exits"], beta: float) -> ConfidenceRule:
        """Leave where :func:`magnitude` is at least β·t_i (AAAI code; Passalis et al. 2020); β > 0."""
        return cls("activation", float(beta), tuple(float(t) for t in np.asarray(thresholds).ravel()))

    @classmethod
    def entropy(cls, limit: float) -> ConfidenceRule:
        """Leave where the entropy is below ``limit`` nats (Teerapittayanon et al. 2016)."""
        return cls("entropy", float(limit))

    @classmethod
    def patience(cls, exits: int) -> ConfidenceRule:
        """Leave when so many evaluated exits in a row name one class (Zhou et al. 2020)."""
        return cls("patience", float(exits))

    def ratio(self, logits: Float[np.ndarray, "*samples classes"], exit_: int) -> Float[np.ndarray, " *samples"]:
        """How sure the logits are, as a multiple of what is asked: 1 and more is enough. (For the softmax rule the
        probability over β, for the entropy rule T over the entropy.)"""
        if self.kind == "activation":
            t = self.thresholds[min(exit_, len(self.thresholds) - 1)]
            return magnitude(logits) / (self.threshold * t)
        if self.kind == "softmax":
            return np.exp(highest(logits)) / self.threshold
        if self.kind == "entropy":
            return self.threshold / np.maximum(entropy(logits), 1e-300)
        raise InvalidValue("patience counts exits that agree; one exit's logits say nothing of it")

    def passes(
        self, logits: Float[np.ndarray, "*samples classes"], exit_: int, strict: bool = False
    ) -> Bool[np.ndarray, " *samples"]:
        """Whether each sample may leave at ``exit_`` (from 0; beyond the last, the last one's threshold holds).

        ``strict``: equality is not enough, as forecasts have it; entropy is always strict.
        """
        if self.kind == "softmax":  # compared as logarithms, as the reference does: the last bit decides ties
            best, limit = highest(logits), math.log(self.threshold)
            return best > limit if strict else best >= limit
        if self.kind == "entropy":
            return entropy(logits) < self.threshold
        if self.kind == "activation" and strict:
            return magnitude(logits) > self.threshold * self.thresholds[min(exit_, len(self.thresholds) - 1)]
        return self.ratio(logits, exit_) >= 1
