"""What a policy's way through a network costs, in multiply-accumulates (predictive_exit sheet, evaluation and demo)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sparing.adaptive.policies import ExitTrace
from sparing.core.errors import InvalidValue

SDN_SHARES = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)
"""Shares of the compute at which Shallow-Deep Networks place their classifiers (Kaya et al. 2019)."""


@dataclass(frozen=True)
class CostModel:
    """Multiply-accumulates (or any other additive cost) of a network with N exits."""

    layer_macs: tuple[float, ...]
    """(N + 1) of what runs up to each exit since the one before it; the last is the rest with the final head."""
    exit_macs: tuple[float, ...]
    """(N) of each exit."""
    round_macs: float = 0.0
    """Of one round of a forecast: kernel width × classes."""

    def __post_init__(self) -> None:
        if len(self.layer_macs) != len(self.exit_macs) + 1 or not self.exit_macs:
            raise InvalidValue(
                f"{len(self.layer_macs)} layer costs for {len(self.exit_macs)} exits; one more than exits is expected, "
                "the last for what follows the last exit"
            )
        if min(*self.layer_macs, *self.exit_macs, self.round_macs) < 0:
            raise InvalidValue("a cost is negative")

    @property
    def exits(self) -> int:
        """N."""
        return len(self.exit_macs)

    @property
    def full(self) -> float:
        """Of the network without exits."""
        return float(sum(self.layer_macs))

    def of_exits(self, exits: Sequence[int]) -> CostModel:
        """The network with these of its exits alone, from 0, ascending: layers up to each since the one before it."""
        if list(exits) != sorted({int(e) for e in exits if 0 <= e < self.exits}) or not exits:
            raise InvalidValue(
                f"exits = {list(exits)}; different numbers of 0…{self.exits - 1}, ascending, are expected"
            )
        starts = [0, *(e + 1 for e in exits)]
        ends = [*(e + 1 for e in exits), self.exits + 1]
        layers = tuple(float(sum(self.layer_macs[a:b])) for a, b in zip(starts, ends, strict=True))
        return CostModel(layers, tuple(self.exit_macs[e] for e in exits), self.round_macs)

    def per_sample(self, trace: ExitTrace) -> Float[np.ndarray, " samples"]:
        """Layers that ran, exits that were evaluated, and the rounds of the forecasts."""
        if trace.evaluated.shape[1] != self.exits:
            raise InvalidValue(f"the trace has {trace.evaluated.shape[1]} exits, the cost model {self.exits}")
        layers = np.cumsum(self.layer_macs)[trace.exit_index]
        return layers + trace.evaluated @ np.asarray(self.exit_macs, float) + trace.jumps.sum(axis=1) * self.round_macs

    def objective(self, exits: Sequence[int]) -> Callable[[ExitTrace], float]:
        """What traces of the network with these exits alone cost, on average."""
        cost = self.of_exits(exits)
        return lambda trace: float(cost.per_sample(trace).mean())


def sdn_exits(cost: CostModel, shares: Sequence[float] = SDN_SHARES) -> tuple[int, ...]:
    """The exits nearest to these shares of the full network's cost, each once."""
    reached = np.cumsum(cost.layer_macs)[:-1] / cost.full
    return tuple(sorted({int(np.abs(reached - share).argmin()) for share in shares}))


def placement_scores(
    layer_cost: Sequence[float], exit_cost: Sequence[float], continue_rate: Sequence[float], target: float = 0.5
) -> Float[np.ndarray, " exits"]:
    """The reference's placement rule: (TH − m_k)·y_{k+1} − (1 − m_k)·c_k − (1 − TH)·y_k for each exit k.

    Args:
        layer_cost: y, of at least one layer more than exits.
        exit_cost: c, of at least as many as exits.
        continue_rate: m, the share of samples that do not leave when only exit k is active.
        target: TH.

    An exit is kept where the score is ≥ 0. With equal layer costs that is next to never: for parity, not for use; see
    :func:`~sparing.adaptive.calibration.greedy_exits`.
    """
    m = np.asarray(continue_rate, dtype=np.float64)
    exits = len(m)
    if len(layer_cost) <= exits or len(exit_cost) < exits:
        raise InvalidValue(
            f"{len(layer_cost)} layer and {len(exit_cost)} exit costs for {exits} exits; {exits + 1} and {exits} at "
            "least are needed"
        )
    y, c = np.asarray(layer_cost, dtype=np.float64), np.asarray(exit_cost, dtype=np.float64)
    return (target - m) * y[1 : exits + 1] - (1 - m) * c[:exits] - (1 - target) * y[:exits]


def kept_exits(scores: Float[np.ndarray, " exits"]) -> Bool[np.ndarray, " exits"]:
    """Which exits :func:`placement_scores` would keep."""
    return scores >= 0
