"""Clock and voltage by what is left to compute, and what that saves: simulated (predictive_exit sheet, sections 6, 7).

Once a forecast says where a sample will leave, the layers up to there may take as long as all the remaining ones would
at full clock. Running them slower takes less voltage, and energy goes with its square. Every joule here is an estimate
by the formulas below; measured ones are another column (:mod:`sparing.core.energy`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from jaxtyping import Float

from sparing.adaptive.exit_cost import CostModel
from sparing.adaptive.policies import ExitTrace
from sparing.adaptive.reference_tables import LEVELS_HZ
from sparing.core.errors import InvalidValue

SWITCH_SHARE = 0.005
"""Of a full run, for a change of clock of :meth:`EnergyModel.of_network`."""


@dataclass(frozen=True)
class DVFSGovernor:
    """Chooses a level, an index into ``frequencies``.

    ``frequencies`` ascend, in any one unit. ``voltages`` in volts, one for each; None: a straight line from 0.6 to 1 V.
    ``rounding``: "up" to the next level that is fast enough, or "nearest" as the reference has it (ties go down, what
    is below the lowest level becomes that one). ``floor="energy"``: never below the level where a cycle is cheapest
    with leakage counted; None: as low as there is time for. ``static_share``: ρ, static power at the highest level as a
    share of the dynamic.
    """

    frequencies: tuple[float, ...]
    voltages: tuple[float, ...] | None = None
    rounding: Literal["up", "nearest"] = "up"
    floor: Literal["energy"] | None = "energy"
    static_share: float = 0.05
    launch_ratio: float = 1.0
    """What a jump is multiplied by first; 2–4 in the reference for a CPU that only launches another chip's kernels."""

    def __post_init__(self) -> None:
        f = np.asarray(self.frequencies, dtype=np.float64)
        if f.ndim != 1 or len(f) == 0 or not np.isfinite(f).all() or f[0] <= 0 or (np.diff(f) <= 0).any():
            raise InvalidValue(f"frequencies = {list(self.frequencies)}; ascending numbers above 0 are expected")
        if self.voltages is not None:
            v = np.asarray(self.voltages, dtype=np.float64)
            if len(v) != len(f) or not np.isfinite(v).all() or v[0] <= 0 or (np.diff(v) < 0).any():
                raise InvalidValue(
                    f"voltages = {list(self.voltages)}; one for each of {len(f)} frequencies, above 0 and not falling, "
                    "is expected"
                )
        if self.rounding not in ("up", "nearest") or self.floor not in ("energy", None):
            raise InvalidValue(f"rounding = {self.rounding!r}, floor = {self.floor!r}; up or nearest, energy or None")
        if not np.isfinite(self.launch_ratio) or self.launch_ratio < 1:
            raise InvalidValue(f"launch_ratio = {self.launch_ratio}; a number of at least 1 is expected")
        if not np.isfinite(self.static_share) or self.static_share < 0:
            raise InvalidValue(f"static_share = {self.static_share}; a share of at least 0 is expected")

    @property
    def volts(self) -> Float[np.ndarray, " levels"]:
        """V of each level."""
        if self.voltages is not None:
            return np.asarray(self.voltages, dtype=np.float64)
        f = np.asarray(self.frequencies, dtype=np.float64)
        span = f[-1] - f[0]
        return 0.6 + 0.4 * (f - f[0]) / span if span else np.array([1.0])

    @property
    def highest(self) -> int:
        """The level of the full clock."""
        return len(self.frequencies) - 1

    @property
    def cheapest(self) -> int:
        """The level whose cycle takes the least energy: V² + ρ·V_max²·f_max/f."""
        f, v = np.asarray(self.frequencies, dtype=np.float64), self.volts
        return int(np.argmin(v**2 + self.static_share * v[-1] ** 2 * f[-1] / f))

    def level(self, jump: float, rem: float) -> int:
        """The level that does ``jump`` of the ``rem`` amounts that are left in the time of all of them at full clock.

        Layers, as the reference counts, or multiply-accumulates. Multiplied first, then divided: exact ties occur.
        """
        if not 0 < jump <= rem:
            raise InvalidValue(f"jump = {jump} of rem = {rem}; more than 0 and no more than what is left is expected")
        f = np.asarray(self.frequencies, dtype=np.float64)
        wanted = min(self.frequencies[-1] * (jump * self.launch_ratio) / rem, self.frequencies[-1])
        if self.rounding == "nearest":
            found = int(np.argmin(np.abs(f - wanted)))  # the first of equals: the lower
        else:
            found = min(int(np.searchsorted(f, wanted)), self.highest)
        return max(found, self.cheapest) if self.floor == "energy" else found


@dataclass(frozen=True)
class EnergyReport:
    """Simulated figures, means over samples."""

    joules: float
    full_clock_joules: float
    """The same samples, exits and evaluations at the highest level throughout."""
    network_joules: float
    """The network without exits at the highest level."""
    seconds: float
    deadline: float
    """What the network without exits takes at the highest level."""
    late: float
    """Share of samples that took longer than that."""
    switches: float


@dataclass(frozen=True)
class EnergyModel:
    """E = C·V²·cycles + P_static·t for each piece of work, and a time and an energy for each change of level.

    Only ratios mean anything: ``c_eff`` (farad), ``macs_per_cycle`` and ``t_switch`` (seconds; its energy is P_static ·
    t_switch) are round numbers. P_static = ρ·C·V_max²·f_max is charged while the sample runs; idle time costs nothing.
    ``hertz`` is what one of the governor's frequencies is in.
    """

    governor: DVFSGovernor
    c_eff: float = 1e-9
    macs_per_cycle: float = 100.0
    t_switch: float = 50e-6
    hertz: float = 1.0

    def __post_init__(self) -> None:
        for name in ("c_eff", "macs_per_cycle", "hertz"):
            if not np.isfinite(getattr(self, name)) or getattr(self, name) <= 0:
                raise InvalidValue(f"{name} = {getattr(self, name)}; a finite number above 0 is expected")
        if not np.isfinite(self.t_switch) or self.t_switch < 0:
            raise InvalidValue(f"t_switch = {self.t_switch}; seconds, at least 0, are expected")

    @classmethod
    def of_network(cls, cost: CostModel, static_share: float = 0.05) -> Self:
        """A Jetson TX2's clock levels; a change of them takes half a percent of a full run, since a real one would
        dwarf a small network."""
        model = cls(DVFSGovernor(tuple(map(float, LEVELS_HZ["tx2"])), static_share=static_share))
        seconds, _ = model.spent(cost.full, model.governor.highest)
        return replace(model, t_switch=SWITCH_SHARE * seconds)

    @property
    def static_watts(self) -> float:
        """P_static."""
        g = self.governor
        return g.static_share * self.c_eff * float(g.volts[-1]) ** 2 * g.frequencies[-1] * self.hertz

    def spent(self, macs: float, level: int) -> tuple[float, float]:
        """(seconds, joules) of so much work at a level."""
        cycles = macs / self.macs_per_cycle
        seconds = cycles / (self.governor.frequencies[level] * self.hertz)
        return seconds, self.c_eff * float(self.governor.volts[level]) ** 2 * cycles + self.static_watts * seconds

    def simulate(self, trace: ExitTrace, cost: CostModel) -> EnergyReport:
        """Run every sample of a trace through the governor.

        Layers up to the first evaluated exit run at full clock. A forecast sets the level for the layers up to where it
        points, with the time of that exit and of the switch taken off the slack. A sample that leaves there, as all do
        with ``single_jump``, meets the deadline, unless no clock could: one that is sent to the final head, or nearly,
        is late by the exits it was asked at. Where a forecast fails its slack is used up: the rest runs at full clock,
        and ``late`` tells how many samples miss the deadline. The full clock is restored after each sample.
        """
        rows = np.concatenate([trace.exit_index[:, None], trace.evaluated.astype(np.int64), trace.jumps], axis=1)
        unique, counts = np.unique(rows, axis=0, return_counts=True)
        exits = cost.exits
        shares = counts / counts.sum()
        found = np.array([self._one(int(row[0]), row[1 : 1 + exits] > 0, row[1 + exits :], cost) for row in unique])
        deadline, network = self.spent(cost.full, self.governor.highest)
        late = float(shares @ (found[:, 0] > deadline * (1 + 1e-9)))
        seconds, joules, full_clock, switches = (float(shares @ column) for column in found.T)
        return EnergyReport(joules, full_clock, network, seconds, deadline, late, switches)

    def objective(self, cost: CostModel) -> Callable[[Sequence[int]], Callable[[ExitTrace], float]]:
        """For some of the exits of ``cost``: the joules of traces of the network with these alone."""
        return lambda exits: lambda trace: self.simulate(trace, cost.of_exits(exits)).joules

    def _one(
        self, left: int, evaluated: np.ndarray, jumps: np.ndarray, cost: CostModel
    ) -> tuple[float, float, float, float]:
        """(seconds, joules, joules at full clock, switches) of one sample."""
        exits, top = cost.exits, self.governor.highest
        deadline, _ = self.spent(cost.full, top)
        seconds = joules = full_clock = 0.0
        switches, level, forecast_before = 0, top, False
        for i in range(left + 1):
            work = cost.layer_macs[i] + (cost.exit_macs[i] if i < exits and evaluated[i] else 0.0)
            took, energy = self.spent(work, level)
            seconds, joules = seconds + took, joules + energy
            full_clock += self.spent(work, top)[1]
            if i == left:
                break
            if jumps[i] > 0:
                wanted = top
                if not forecast_before:  # else that one failed, and its slack is used up
                    asked = np.flatnonzero(evaluated[i + 1 :])  # the activation rule cuts its jumps at the last exit
                    target = i + 1 + int(asked[0]) if len(asked) else exits
                    wanted = self.level(i, target, deadline - seconds, cost)
                forecast_before = True
                if wanted != level:
                    switches += 1
                    seconds, joules = seconds + self.t_switch, joules + self.static_watts * self.t_switch
                    level = wanted
        if level != top:  # after the answer: it costs energy, and this sample no time
            switches += 1
            joules += self.static_watts * self.t_switch
        return seconds, joules, full_clock, float(switches)

    def level(self, here: int, target: int, left_s: float, cost: CostModel) -> int:
        """The level for what follows exit ``here`` (from 0) up to and with exit ``target``, or the final head, with
        ``left_s`` seconds left. The highest where even that takes longer."""
        work = float(sum(cost.layer_macs[here + 1 : target + 1]))
        work += cost.exit_macs[target] if target < cost.exits else 0.0
        budget = (left_s - self.t_switch) * self.governor.frequencies[-1] * self.hertz * self.macs_per_cycle
        return self.governor.level(work, budget) if 0 < work <= budget else self.governor.highest
