"""Pre-training without labels: masked autoencoding (He et al. 2022, arXiv 2111.06377), and what its stages share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from sparing.core.errors import InvalidValue

WARMUP_SHARE = 1 / 20
"""Share of a training that is warm-up when nothing is said: 40 of 800 epochs, 15 of 300, 5 of 100."""


def half_cosine(epoch: float, lr: float, warmup: float, epochs: float, floor: float = 0.0) -> float:
    """The learning rate at a fractional epoch: linear warm-up from 0, then half a cosine (MAE, appendix A).

    With e = ``epoch`` + share of it that is over, w = ``warmup`` and E = ``epochs``::

        e < w:   lr · e / w
        e ≥ w:   floor + ½ (lr − floor) (1 + cos(π (e − w) / (E − w)))

    Args:
        epoch: e, at least 0; the floor is kept from E on.
        lr: the highest rate.
        warmup: w, in epochs; at least 0 and below E.
        epochs: E.
        floor: the rate at the end.
    """
    if not 0 <= warmup < epochs:
        raise InvalidValue(f"warmup = {warmup} epochs of {epochs}; at least 0 and fewer than all are expected")
    if not 0 <= floor <= lr:
        raise InvalidValue(f"floor = {floor}; 0 … lr = {lr} is expected")
    if epoch < 0:
        raise InvalidValue(f"epoch = {epoch}; 0 or more is expected")
    if epoch < warmup:
        return lr * epoch / warmup
    return floor + (lr - floor) * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / (epochs - warmup)))) / 2


def half_cosine_scheduler(
    lr: float, epochs: float, warmup: float | None = None, floor: float = 0.0
) -> Callable[[Any, int], Any]:
    """:func:`half_cosine` as a training plan's schedule: (optimizer, total steps) → ``LambdaLR``.

    Each group of the optimizer keeps the share of ``lr`` that its own rate is. ``warmup`` in epochs; None: a twentieth.
    """
    begun = epochs * WARMUP_SHARE if warmup is None else warmup
    half_cosine(0, lr, begun, epochs, floor)  # refuses what it would refuse later

    def scheduler(optimizer: Any, total: int) -> Any:
        from torch.optim.lr_scheduler import LambdaLR

        return LambdaLR(optimizer, lambda done: half_cosine(done * epochs / total, lr, begun, epochs, floor) / lr)

    return scheduler


def scaled_lr(base: float, batch: int) -> float:
    """The rule lr = base · batch / 256 (Goyal et al. 2017), with the batch of one optimizer step in all."""
    return base * batch / 256
