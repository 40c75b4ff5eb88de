"""How well a backdoored network does its work and its attacker's (dd_backdoor sheet, Metrics)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparing.core.errors import InvalidValue
from sparing.core.statistics import share_interval

MAD_TO_SIGMA = 1.4826
"""Median absolute deviation of a normal variable x this = its standard deviation."""
FEWEST_VALUES = 5
"""Fewer values say nothing about which of them is an outlier."""


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n`` images."""

    hits: int
    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InvalidValue("a rate over no images; at least one is expected")

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % (Wilson 1927)."""
        return share_interval(self.hits, self.n)


@dataclass(frozen=True)
class BackdoorRates:
    """One network's rates on clean images and on the same images with the trigger."""

    cta: Rate
    """Clean images classified as they should be."""
    asr: Rate
    """Triggered images of other classes predicted as the target."""
    asr_all: Rate
    """Triggered images of all classes predicted as the target, as the paper's code counts."""
    null: Rate
    """Clean images of other classes predicted as the target: what no trigger can do."""

    @property
    def excess(self) -> float:
        """Attack success above the null rate; 0 when the null rate is within or above its 95 % interval."""
        return self.asr.value - self.null.value if self.asr.interval[0] > self.null.value else 0.0


def _predicted_as(logits: Tensor, wanted: Tensor | int) -> Tensor:
    return logits.argmax(dim=1) == wanted


def _rate(hits: Bool[Tensor, " n"]) -> Rate:
    return Rate(int(hits.sum()), len(hits))


def check_target(target: int, classes: int) -> None:
    """Raise :class:`InvalidValue` unless ``target`` is one of the classes 0 … ``classes`` - 1."""
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < classes:
        raise InvalidValue(f"target = {target!r} is no class; 0 to {classes - 1} is expected")


def backdoor_rates(
    clean: Float[Tensor, "n classes"], triggered: Float[Tensor, "n classes"], labels: Int[Tensor, " n"], target: int
) -> BackdoorRates:
    """Rates from the logits of the same images without and with the trigger.

    Raises :class:`InvalidValue` when ``target`` is no class, or when all images are of that class.
    """
    check_target(target, clean.shape[1])
    others = labels != target
    if not others.any():
        raise InvalidValue(f"all {len(labels)} images are of the target class {target}; some of others are expected")
    return BackdoorRates(
        cta=_rate(_predicted_as(clean, labels)),
        asr=_rate(_predicted_as(triggered[others], target)),
        asr_all=_rate(_predicted_as(triggered, target)),
        null=_rate(_predicted_as(clean[others], target)),
    )


@dataclass(frozen=True)
class Outliers:
    """Which of some values stand out, by their distance from the median in units of the median deviation."""

    median: float
    deviation: float
    """1.4826 x the median absolute deviation from the median."""
    index: np.ndarray
    """abs(value - median) / deviation; NaN for values that were left out."""
    flagged: tuple[int, ...]
    """Places of the outliers on the side that was asked for."""


def mad_outliers(values: Float[np.ndarray, " n"], side: str, threshold: float = 2.0) -> Outliers | None:
    """Values on the "lower" or "upper" side of the median whose anomaly index exceeds ``threshold`` (Wang et al. 2019).

    Values that are not finite are left out. None when fewer than five remain or when they do not deviate at all.
    """
    if side not in ("lower", "upper"):
        raise InvalidValue(f"side = {side!r}; lower or upper is expected")
    counted = np.isfinite(values)
    if counted.sum() < FEWEST_VALUES:
        return None
    median = float(np.median(values[counted]))
    deviation = MAD_TO_SIGMA * float(np.median(np.abs(values[counted] - median)))
    if deviation == 0:
        return None
    index = np.where(counted, np.abs(np.where(counted, values, median) - median) / deviation, np.nan)
    beyond = values < median if side == "lower" else values > median
    flagged = np.flatnonzero(counted & beyond & (np.nan_to_num(index) > threshold))
    return Outliers(median, deviation, index, tuple(int(i) for i in flagged))
