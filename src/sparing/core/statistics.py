"""How sure a figure is: intervals for means, shares, quantiles and paired differences. Pure functions of arrays.

All intervals are two-sided. SciPy is imported when it is first needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparing.core.errors import InvalidValue

LEVEL = 0.95
RESAMPLES = 4000
_CHUNK = 4_000_000  # resampled values held in memory at once


@dataclass(frozen=True)
class Difference:
    """How much higher ``after`` is than ``before``, with its uncertainty and how that was found."""

    value: float
    interval: tuple[float, float] | None
    """95 %, or None when the stored outcomes do not tell."""
    n: int
    """Test units, or seeds, that the interval rests on."""
    method: str
    p: float | None = None
    """Exact McNemar test of "no difference", for right-or-wrong outcomes."""

    @property
    def shown(self) -> bool:
        """True when the interval excludes zero."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Student's interval for the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean = float(np.mean(values))
    half = float(t.ppf(0.5 + level / 2, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - half, mean + half


def is_binary(values: np.ndarray) -> bool:
    """True when every value is 0 or 1."""
    return bool(np.isin(values, (0, 1)).all())


def share_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's score interval for a share of ``n`` independent units (Wilson 1927)."""
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(level, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(values: np.ndarray, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean of independent values (n,); the same values give the same interval."""
    n = len(values)
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    step = max(1, _CHUNK // n)
    for start in range(0, RESAMPLES, step):
        stop = min(start + step, RESAMPLES)
        means[start:stop] = values[generator.integers(0, n, (stop - start, n))].mean(axis=1)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def units_interval(outcomes: np.ndarray, level: float = LEVEL) -> tuple[tuple[float, float] | None, str]:
    """An interval for the mean of per-unit outcomes (n,), and the name of the method."""
    n = len(outcomes)
    if n < 2:
        return None, f"{n} unit: no interval"
    if is_binary(outcomes):
        return share_interval(int(outcomes.sum()), n, level), f"Wilson over {n} units"
    return bootstrap_interval(outcomes.astype(np.float64), level), f"bootstrap over {n} units"


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p of McNemar's test from the two counts of units whose outcome changed (McNemar 1947)."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired_share_interval(gained: int, lost: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval for the difference of two shares of the same ``n`` units, of which ``gained`` and ``lost`` changed.

    Adjusted Wald interval of Bonett and Price (2012), which keeps its level for small and one-sided counts.
    """
    from scipy.stats import norm

    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = float(norm.ppf(0.5 + level / 2)) * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


def paired_difference(before: np.ndarray, after: np.ndarray, level: float = LEVEL) -> Difference:
    """Mean of ``after`` minus mean of ``before``, both the outcomes (n,) of the same units in the same order.

    Right-or-wrong outcomes: exact McNemar p and Bonett–Price interval. Others: paired bootstrap, always drawn alike.
    """
    if before.shape != after.shape or before.ndim != 1:
        raise InvalidValue(f"outcomes of shapes {before.shape} and {after.shape} do not belong to the same units")
    n = len(before)
    if n == 0:
        raise InvalidValue("no outcomes to compare: both arrays are empty")
    change = after.astype(np.float64) - before.astype(np.float64)
    value = float(change.mean())
    if is_binary(before) and is_binary(after):
        gained, lost = int((change > 0).sum()), int((change < 0).sum())
        interval = paired_share_interval(gained, lost, n, level)
        return Difference(value, interval, n, f"paired, {gained} gained, {lost} lost", mcnemar(gained, lost))
    if n < 2:
        return Difference(value, None, n, "one unit: no interval")
    return Difference(value, bootstrap_interval(change, level), n, "paired bootstrap")


def difference_over_seeds(differences: Sequence[float], level: float = LEVEL) -> Difference:
    """Mean of one difference for each seed, with Student's interval."""
    if not differences:
        raise InvalidValue("no differences to average: the two rows share no seed")
    n = len(differences)
    value = float(np.mean(differences))
    return Difference(value, t_interval(differences, level), n, "Student-t over seeds" if n > 1 else "one seed")


def order_ranks(n: int, quantile: float = 0.5, level: float = LEVEL) -> tuple[int | None, int | None]:
    """1-based ranks (l, u) of n sorted independent values between which the quantile lies with at least ``level``.

    Distribution-free: each side errs with at most (1 − level)/2 (David and Nagaraja, Order Statistics, §7.1). A side is
    None when so few values bound nothing there.
    """
    from scipy.stats import binom

    low = int(binom.ppf(0.5 - level / 2, n, quantile))
    high = int(binom.ppf(0.5 + level / 2, n, quantile)) + 1
    return (low if low >= 1 else None, high if high <= n else None)


def quantile_interval(values: np.ndarray, quantile: float = 0.5, level: float = LEVEL) -> tuple[float, float] | None:
    """Distribution-free interval of a quantile of independent values (n,); None when a side is unbounded."""
    low, high = order_ranks(len(values), quantile, level)
    if low is None or high is None:
        return None
    ordered = np.sort(values)
    return float(ordered[low - 1]), float(ordered[high - 1])


def group_gap(outcomes: np.ndarray, groups: np.ndarray) -> tuple[float, tuple[float, float] | None, str]:
    """Best minus worst group mean, Welch's interval for these two groups, and a note that names them.

    ``outcomes`` and ``groups`` are (n,). The interval treats the two groups as if chosen beforehand.
    """
    if groups.shape != outcomes.shape:
        raise InvalidValue(f"group membership of shape {groups.shape} for outcomes of shape {outcomes.shape}")
    parts = {str(name): outcomes[groups == name].astype(np.float64) for name in np.unique(groups)}
    if len(parts) < 2:
        raise InvalidValue(f"a gap needs two groups; all units are in {next(iter(parts), 'none')!r}")
    best, worst = (choose(parts, key=lambda name: parts[name].mean()) for choose in (max, min))
    gap = float(parts[best].mean() - parts[worst].mean())
    note = ", ".join(f"{name} {parts[name].mean():.4g} (n={len(parts[name])})" for name in dict.fromkeys((worst, best)))
    a, b = parts[best], parts[worst]
    if min(len(a), len(b)) < 2 or (a.var() == 0 and b.var() == 0):
        return gap, None, note
    from scipy.stats import ttest_ind

    found = ttest_ind(a, b, equal_var=False).confidence_interval(LEVEL)
    return gap, (float(found.low), float(found.high)), note
