"""The governor at work: an early-exit predictor that sets a real clock as its forecasts allow, one sample at a time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from sparing.adaptive.clock_files import Clock
from sparing.adaptive.dvfs import EnergyModel
from sparing.adaptive.exit_predictor import EarlyExitPredictor
from sparing.adaptive.policies import Policy, Walk
from sparing.core.errors import InvalidValue


class Paced:
    """Answers one sample at a time as ``predictor`` does, and lowers ``clock`` after a sample's first forecast.

    The level is the one :meth:`EnergyModel.simulate` chooses: what is left up to the forecast exit is to take no longer
    than the whole network at full clock. After a forecast that fails, and after each sample, the clock is back at its
    highest level. A context manager: whatever the clock's files held is put back at the end. Nothing is written without
    ``Clock(write=True)``.

    Energy is measured by :func:`sparing.core.energy.joules_per_call` with a counter of the machine or of one's own.

    Raises :class:`InvalidValue` for a clock whose levels are not the governor's.
    """

    def __init__(self, predictor: EarlyExitPredictor, clock: Clock, energy: EnergyModel) -> None:
        if tuple(map(float, clock.frequencies)) != tuple(map(float, energy.governor.frequencies)):
            raise InvalidValue(
                f"the clock's levels {list(clock.frequencies)} are not the governor's "
                f"{list(energy.governor.frequencies)}; both in the unit of the clock's files are expected"
            )
        self.clock = clock
        self._runner = copy.copy(predictor)
        self._runner.policy = _Paced(predictor.policy, self, energy)

    def __enter__(self) -> Self:
        """Take the clock to its highest level."""
        self.clock.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put back what the clock's files held."""
        self.clock.__exit__(kind, error, trace)

    def __call__(self, *inputs: Any) -> Float[np.ndarray, "1 classes"]:
        """A batch of one → its logits."""
        if self.clock.level < 0:
            raise InvalidValue("the clock is not at any level; use `with Paced(…) as paced:`")
        try:
            return self._runner(*inputs)
        finally:
            self.clock.set(self.clock.highest)


@dataclass(frozen=True)
class _Paced(Policy):
    policy: Policy
    owner: Paced
    energy: EnergyModel

    def walk(self, samples: int, exits: int) -> Walk:
        if samples != 1:
            raise InvalidValue(f"a batch of {samples}; samples that share a clock are answered one at a time")
        return _Pacing(self.policy.walk(samples, exits), self)


class _Pacing(Walk):
    """The decisions of another walk, and the clock they allow."""

    def __init__(self, inner: Walk, policy: _Paced) -> None:
        self.inner, self.policy = inner, policy
        self.samples, self.exits, self.jumps = inner.samples, inner.exits, inner.jumps
        self.asked = 0.0

    def wants(self, exit_: int) -> Bool[np.ndarray, " samples"]:
        return self.inner.wants(exit_)

    def observe(
        self, exit_: int, who: Int[np.ndarray, " asked"], logits: Float[np.ndarray, "asked classes"]
    ) -> Bool[np.ndarray, " asked"]:
        before = bool((self.jumps > 0).any())
        leaves = self.inner.observe(exit_, who, logits)
        cost, energy, clock = self.policy.owner._runner.cost, self.policy.energy, self.policy.owner.clock
        self.asked += cost.exit_macs[exit_]
        if self.jumps[0, exit_] > 0:
            level = clock.highest
            if not before:  # else that forecast failed, and its slack is used up
                target = next((i for i in range(exit_ + 1, self.exits) if self.wants(i)[0]), self.exits)
                gone = sum(cost.layer_macs[: exit_ + 1]) + self.asked
                left_s = energy.spent(cost.full - gone, energy.governor.highest)[0]
                level = energy.level(exit_, target, left_s, cost)
            clock.set(level)
        return leaves
