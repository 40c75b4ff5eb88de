"""How far decisions differ between two groups: hard figures of predictions, in plain NumPy.

The gaps are those of Dong et al. 2023 (RELIANT, arXiv:2301.01150, section 4): between shares of positive decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped
from numpy import ndarray

from sparing.core.errors import InvalidValue, shown

Gap = Literal["sp", "eo"]
"""Statistical parity: shares of positive decisions; equal opportunity: the same among those who are positive."""


def group_masks(
    sens: Shaped[ndarray, " n"], groups: Sequence[Any] | None = None
) -> tuple[Bool[ndarray, " n"], Bool[ndarray, " n"]]:
    """Who is in the first and who in the second group, both (n,), by a sensitive attribute (n,).

    Args:
        sens: the attribute's values.
        groups: the two values that are compared; others are in neither group. None: 0 and 1, and there are no others.

    Raises:
        InvalidValue: values besides 0 and 1 without ``groups``, or ``groups`` that are not two different values.
    """
    sens = np.asarray(sens)
    if groups is None:
        values = np.unique(sens)
        if not np.isin(values, (0, 1)).all():
            raise InvalidValue(
                f"the sensitive attribute has the values {shown(values.tolist())}; 0 and 1 are expected, or groups=(a, "
                "b), the two that are compared"
            )
        groups = (0, 1)
    if len(groups) != 2 or groups[0] == groups[1]:
        raise InvalidValue(f"groups = {groups!r}; two different values of the sensitive attribute are expected")
    return sens == groups[0], sens == groups[1]


def _share_gap(
    predicted: ndarray, among: ndarray, sens: ndarray, positive: int, groups: Sequence[Any] | None, whom: str
) -> float:
    if not len(predicted) == len(among) == len(sens):
        raise InvalidValue(
            f"{len(predicted)} predictions, {len(sens)} values of the sensitive attribute"
            + (f" and {len(among)} labels" if whom else "")
            + "; one for each unit is expected"
        )
    shares = []
    for number, members in enumerate(group_masks(sens, groups)):
        inside = members & among
        if not inside.any():
            name = groups[number] if groups is not None else number
            raise InvalidValue(f"the group {name!r} of the sensitive attribute holds no unit{whom}")
        shares.append(float(np.mean(predicted[inside] == positive)))
    return abs(shares[0] - shares[1])


def delta_sp(
    predicted: Integer[ndarray, " n"],
    sens: Shaped[ndarray, "..."],
    *,
    positive: int = 1,
    groups: Sequence[Any] | None = None,
) -> float:
    """Gap of statistical parity: the two groups' difference of P(ŷ = positive), in 0…1, 0 is fair.

    Args:
        predicted: classes, (n,).
        sens: the sensitive attribute, (n,).
        positive: the class that stands for a positive decision.
        groups: see :func:`group_masks`.

    Raises:
        InvalidValue: a group without a unit; see also :func:`group_masks`.
    """
    predicted = np.asarray(predicted)
    return _share_gap(predicted, np.ones(len(predicted), bool), np.asarray(sens), positive, groups, "")


def delta_eo(
    predicted: Integer[ndarray, " n"],
    labels: Integer[ndarray, "..."],
    sens: Shaped[ndarray, "..."],
    *,
    positive: int = 1,
    groups: Sequence[Any] | None = None,
) -> float:
    """Gap of equal opportunity: the two groups' difference of P(ŷ = positive given y = positive), in 0…1, 0 is fair.

    Args:
        predicted: classes, (n,).
        labels: true classes, (n,).
        sens: the sensitive attribute, (n,).
        positive: the class that stands for a positive decision.
        groups: see :func:`group_masks`.

    Raises:
        InvalidValue: a group without a positive unit; see also :func:`group_masks`.
    """
    among = np.asarray(labels) == positive
    return _share_gap(np.asarray(predicted), among, np.asarray(sens), positive, groups, f" of class {positive}")


def rate_by_group(
    outcome: Shaped[ndarray, " n"], sens: Shaped[ndarray, " n"], groups: Sequence[Any] | None = None
) -> tuple[float, float]:
    """Mean outcome (n,) of the first and of the second group; NaN for a group without a unit."""
    first, second = (
        float(np.mean(outcome[members])) if members.any() else float("nan") for members in group_masks(sens, groups)
    )
    return first, second


@dataclass
class GroupThresholds:
    """A threshold on the score for each of two groups, after the training (Hardt, Price and Srebro 2016).

    Both groups get the same share of positive decisions ("sp"), or of positive decisions among the positive ("eo"):
    of all such shares on a grid the one with the best accuracy on what it is fitted on. The decision needs the
    sensitive attribute of whom it is about, which a fair student's does not. Hardt et al. also toss coins, which meets
    the constraint exactly; here ties, and shares that are no whole number of units, leave a little of the gap on what
    it is fitted on.

    After :meth:`fit`: ``thresholds_`` (2,), a score of at least which is decided positively.
    """

    metric: Gap = "sp"
    """Which gap is closed."""
    grid: int = 1000
    """Shares that are tried."""

    def fit(
        self, scores: Float[ndarray, "..."], labels: Integer[ndarray, "..."], sens: Integer[ndarray, "..."]
    ) -> GroupThresholds:
        """Scores (n,), higher is more positive, labels (n,) and groups (n,), both 0 or 1.

        Raises:
            InvalidValue: a group without a unit, for "eo" without a positive one; lengths that differ; a score that is
                NaN, a label or group that is not 0 or 1; another metric.
        """
        scores, labels, sens = _units(scores=scores, labels=labels, sens=sens)
        if self.metric not in ("sp", "eo"):
            raise InvalidValue(f'metric = {self.metric!r}; "sp" or "eo" is expected')
        members = group_masks(sens)
        tables = []
        for number, inside in enumerate(members):
            counted = inside if self.metric == "sp" else inside & (labels == 1)
            if not counted.any():
                kind = "unit" if self.metric == "sp" else "positive unit"
                raise InvalidValue(f"the group {number} holds no {kind} to set a threshold by")
            tables.append(np.sort(scores[counted])[::-1])
        best, found = -1, (0.0, 0.0)
        for share in np.linspace(0, 1, self.grid + 1):
            at = [_threshold(table, share) for table in tables]
            right = sum(_right(scores[m], labels[m], t) for m, t in zip(members, at, strict=True))
            if right > best:
                best, found = right, (at[0], at[1])
        self.thresholds_ = np.array(found)
        return self

    def predict(self, scores: Float[ndarray, "..."], sens: Integer[ndarray, "..."]) -> Integer[ndarray, " n"]:
        """Decisions (n,), 0 or 1, for scores (n,) and groups (n,); what :meth:`fit` refuses is refused here, too."""
        if not hasattr(self, "thresholds_"):
            raise InvalidValue("these GroupThresholds are not fitted yet: call fit(scores, labels, sens) first")
        scores, sens = _units(scores=scores, sens=sens)
        return (scores >= self.thresholds_[sens.astype(np.int64)]).astype(np.int64)


def _units(**given: Any) -> tuple[ndarray, ...]:
    """Arrays with one number for each unit: scores, and others that are 0 or 1."""
    arrays = {name: np.asarray(numbers) for name, numbers in given.items()}
    if any(array.ndim != 1 or len(array) != len(arrays["scores"]) for array in arrays.values()):
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise InvalidValue(f"shapes: {found}; (n,), one number for each unit, is expected of all")
    for name, array in arrays.items():
        wrong = np.isnan(array) if name == "scores" else ~np.isin(array, (0, 1))
        for unit in np.flatnonzero(wrong)[:1]:
            expected = "a number" if name == "scores" else "0 or 1"
            raise InvalidValue(f"{name} of unit {unit} is {array[unit]}; {expected} is expected")
    return tuple(arrays.values())


def _threshold(falling: ndarray, share: float) -> float:
    """The score that the nearest number to ``share`` of these, in falling order, reach."""
    count = round(share * len(falling))
    return float(falling[count - 1]) if count else float("inf")


def _right(scores: ndarray, labels: ndarray, threshold: float) -> int:
    """How many decisions are right."""
    return int(((scores >= threshold) == (labels == 1)).sum())
