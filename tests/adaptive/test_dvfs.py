"""The governor, the simulated energy, and the files of a clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparing.adaptive.clock_files import Clock, ClockNotSettable
from sparing.adaptive.dvfs import DVFSGovernor, EnergyModel
from sparing.adaptive.exit_cost import CostModel
from sparing.adaptive.policies import ExitTrace
from sparing.adaptive.reference_tables import LEVELS_HZ
from sparing.core.errors import InvalidValue

LEVELS = tuple(float(f) for f in range(100, 1001, 100))
COST = CostModel((100.0,) * 10 + (0.0,), (0.0,) * 10)


def trace(left: int, jumps: dict[int, int]) -> ExitTrace:
    evaluated, jumped = np.zeros((1, 10), bool), np.zeros((1, 10), int)
    for exit_, jump in jumps.items():
        evaluated[0, exit_], jumped[0, exit_] = True, jump
    if left < 10:
        evaluated[0, left] = True
    return ExitTrace(np.array([left]), evaluated, jumped)


def test_levels() -> None:
    up, nearest = (DVFSGovernor(LEVELS, rounding=r, floor=None) for r in ("up", "nearest"))  # type: ignore[arg-type]
    assert up.level(1, 4) == 2
    assert nearest.level(1, 4) == 1, "250 is as near to 200 as to 300: the lower"
    assert up.level(1, 2) == 4 == nearest.level(1, 2)
    assert up.level(1, 1000) == 0 == nearest.level(1, 1000)
    assert up.level(3, 3) == 9
    assert DVFSGovernor(LEVELS, floor=None, launch_ratio=3).level(1, 4) == 7


@pytest.mark.parametrize(("rho", "critical"), [(0.05, 0.32), (0.2, 0.56), (0.3, 0.66)])
def test_below_a_critical_level_slower_is_dearer(rho: float, critical: float) -> None:
    levels = tuple(map(float, LEVELS_HZ["tx2"]))
    governor = DVFSGovernor(levels, static_share=rho)
    assert levels[governor.cheapest] / levels[-1] == pytest.approx(critical, abs=0.005)
    assert governor.level(0.001, 1) == governor.cheapest


def test_a_right_forecast_meets_the_deadline_and_saves() -> None:
    model = EnergyModel(DVFSGovernor(LEVELS, static_share=0.0, floor=None), t_switch=0.0)
    found = model.simulate(trace(5, {0: 5}), COST)
    assert found.seconds <= found.deadline
    assert found.late == 0
    # one layer at 1000, five at 600 (5/9 of full clock, rounded up)
    volts = 0.6 + 0.4 * (600 - 100) / 900
    assert found.joules / found.full_clock_joules == pytest.approx((1 + 5 * volts**2) / 6)
    assert found.full_clock_joules / found.network_joules == pytest.approx(0.6)
    assert found.switches == 2


def test_switches_cost_time_and_energy() -> None:
    slow = EnergyModel(DVFSGovernor(LEVELS, floor=None), t_switch=1e-3)
    free = EnergyModel(DVFSGovernor(LEVELS, floor=None), t_switch=0.0)
    one, other = slow.simulate(trace(5, {0: 5}), COST), free.simulate(trace(5, {0: 5}), COST)
    assert one.joules > other.joules
    assert one.seconds <= one.deadline, "the switch is taken off the slack"


def test_a_failed_forecast_is_late_and_goes_on_at_full_clock() -> None:
    model = EnergyModel(DVFSGovernor(LEVELS, floor=None), t_switch=0.0)
    found = model.simulate(trace(9, {0: 3, 3: 6}), COST)
    assert found.late == 1
    alone = model.simulate(trace(3, {0: 3}), COST)
    assert found.seconds == pytest.approx(alone.seconds + model.spent(600, 9)[0])


@pytest.mark.parametrize("seed", range(5))
def test_single_jumps_never_miss_the_deadline(seed: int) -> None:
    rng = np.random.RandomState(seed)
    cost = CostModel(tuple(rng.rand(11) * 100), tuple(rng.rand(10) * 3))
    model = EnergyModel(DVFSGovernor(LEVELS), t_switch=1e-5 * rng.rand())
    seen = 0
    for _ in range(30):
        start = rng.randint(0, 9)
        jump = rng.randint(1, 10 - start + 1)
        target = min(start + jump, 10)
        slack = sum(cost.layer_macs[target + 1 :])
        overhead = cost.exit_macs[start] + (cost.exit_macs[target] if target < 10 else 0) + model.t_switch * 1e5
        if slack > overhead:  # else the exits themselves are more than what is left out
            seen += 1
            assert model.simulate(trace(target, {start: jump}), cost).late == 0
    assert seen > 10


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DVFSGovernor((2.0, 1.0)), "ascending"),
        (lambda: DVFSGovernor(()), "ascending"),
        (lambda: DVFSGovernor((1.0, 2.0), (1.0,)), "one for each of 2"),
        (lambda: DVFSGovernor(LEVELS, static_share=-1), "static_share = -1"),
        (lambda: DVFSGovernor(LEVELS, rounding="down"), "'down'"),  # type: ignore[arg-type]
        (lambda: DVFSGovernor(LEVELS).level(5, 4), "jump = 5 of rem = 4"),
        (lambda: EnergyModel(DVFSGovernor(LEVELS), c_eff=0), "c_eff = 0"),
        (lambda: EnergyModel(DVFSGovernor(LEVELS), t_switch=-1), "t_switch = -1"),
    ],
)
def test_refusals(make: object, named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        make()  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------- clock files


@pytest.fixture
def devfreq(tmp_path: Path) -> tuple[Path, Path]:
    files = tmp_path / "min_freq", tmp_path / "max_freq"
    files[0].write_text("200\n")
    files[1].write_text("800\n")
    return files


def test_nothing_is_written_unless_told(devfreq: tuple[Path, Path]) -> None:
    with Clock(devfreq, (100, 500, 900)) as clock:
        clock.set(0)
    assert [file.read_text() for file in devfreq] == ["200\n", "800\n"]
    assert clock.log[-2:] == [(devfreq[0], 100), (devfreq[1], 100)]


def test_the_order_keeps_the_minimum_below_the_maximum(devfreq: tuple[Path, Path]) -> None:
    with Clock(devfreq, (100, 500, 900), write=True) as clock:
        assert clock.log == [(devfreq[1], 900), (devfreq[0], 900)], "going up, the maximum first"
        clock.set(1)
        assert clock.log[2:] == [(devfreq[0], 500), (devfreq[1], 500)], "going down, the minimum first"
        clock.set(1)
        assert len(clock.log) == 4, "unchanged, nothing is written"
        clock.set(2)
        assert [file.read_text() for file in devfreq] == ["900", "900"]
        assert clock.seconds > 0
        assert clock.switches == 3
    assert [file.read_text() for file in devfreq] == ["200", "800"]


def test_what_was_found_is_put_back_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "scaling_setspeed"
    file.write_text("<unsupported>")

    def interrupted() -> None:
        with Clock((file,), (1, 2), write=True) as clock:
            clock.set(0)
            assert file.read_text() == "1"
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        interrupted()
    assert file.read_text() == "<unsupported>"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ClockNotSettable, match="scaling_setspeed"),
        Clock((tmp_path / "scaling_setspeed",), (1,), write=True),
    ):
        pass
    with pytest.raises(InvalidValue, match="levels 0…1"), Clock((tmp_path / "x",), (1, 2)) as clock:
        clock.set(2)
    with pytest.raises(InvalidValue, match="ascending"):
        Clock((tmp_path / "x",), (2, 1))
