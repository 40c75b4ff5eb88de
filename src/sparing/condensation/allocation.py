"""Which class gets how many synthetic samples, and checks of arguments that the condensers of graphs share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparing.core.errors import InvalidValue
from sparing.models.convnet import whole


@dataclass(frozen=True)
class LabelAllocation:
    """The classes of the synthetic samples."""

    labels: Tensor
    """Class of each row, int64 (n,)."""
    ranges: tuple[tuple[int, int], ...]
    """Of each class: its first row and the one after its last."""


def allocate_labels(
    counts: Sequence[int], *, per_class: int | None = None, rate: float | None = None
) -> LabelAllocation:
    """How many synthetic samples each class gets, and which rows (GCond, Jin et al. 2022, arXiv:2110.07580, its code).

    With ``per_class``, so many of each class, 0…C − 1. With ``rate``, ⌊rate · count⌋ but at least 1 of each class, from
    the rarest to the most frequent (of equals, the lower number first), and for the last what is missing to
    ⌊rate · total⌋, which may be none.

    Args:
        counts: real samples of each class 0…C − 1.
        per_class: at least 1.
        rate: 0 < rate ≤ 1. One of the two is given.

    Raises:
        InvalidValue: neither or both are given, or out of range; nothing, or less, is left for the last class.
    """
    if (per_class is None) == (rate is None):
        raise InvalidValue(f"per_class = {per_class}, rate = {rate}; one of the two is expected")
    if per_class is not None:
        whole("allocate_labels", per_class=per_class)
        order, sizes = list(range(len(counts))), [per_class] * len(counts)
    else:
        assert rate is not None
        check_rate(rate)
        order = sorted(range(len(counts)), key=lambda c: counts[c])
        sizes = [max(int(counts[c] * rate), 1) for c in order[:-1]]
        left = int(sum(counts) * rate) - sum(sizes)
        if left < 0:
            raise InvalidValue(
                f"rate = {rate} of {sum(counts)} samples makes {int(sum(counts) * rate)}, fewer than one for each of "
                f"the other {len(sizes)} classes; a higher rate is expected"
            )
        sizes.append(left)
    ranges = [(0, 0)] * len(counts)
    first = 0
    for number, size in zip(order, sizes, strict=True):
        ranges[number] = (first, first + size)
        first += size
    return LabelAllocation(torch.tensor(order).repeat_interleave(torch.tensor(sizes)), tuple(ranges))


def rows_for_all(allocation: LabelAllocation) -> LabelAllocation:
    """``allocation``, or :class:`InvalidValue` naming a class that got no row."""
    for number, (first, last) in enumerate(allocation.ranges):
        if first == last:
            raise InvalidValue(f"class {number} gets no synthetic sample; a higher rate, or n_per_class, is expected")
    return allocation


def check_positive(zero: bool = False, **values: Any) -> None:
    """:class:`InvalidValue` for the first that is no finite number above 0, or from 0 on if ``zero``."""
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and not zero):
            raise InvalidValue(f"{name} = {value!r}; a number {'≥' if zero else '>'} 0 is expected")


def check_rate(rate: Any) -> None:
    """:class:`InvalidValue` for what is no number in (0, 1]."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
        raise InvalidValue(f"rate = {rate!r}; 0 < rate ≤ 1 is expected")


def check_size(condenser: str, n_per_class: Any, rate: Any) -> None:
    """:class:`InvalidValue` unless at most one of the two is given, and in range."""
    if n_per_class is not None and rate is not None:
        raise InvalidValue(f"n_per_class = {n_per_class} and rate = {rate}; at most one is expected")
    if n_per_class is not None:
        whole(condenser, n_per_class=n_per_class)
    if rate is not None:
        check_rate(rate)


def check_annealing(condenser: str, start: Any, end: Any, steps: Any) -> None:
    """:class:`InvalidValue` for what is no schedule of falling temperatures."""
    whole(condenser, anneal_steps=steps)
    check_positive(temperature_start=start, temperature_end=end)
    if end > start:
        raise InvalidValue(f"temperature_end = {end} is above temperature_start = {start}")
