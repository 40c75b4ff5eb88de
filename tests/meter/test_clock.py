"""The timing loop: what it estimates, when it says noisy, and that two measurements agree."""

import gc
import time
from itertools import pairwise

import numpy as np
import pytest

from sparing.core import clock as module
from sparing.core.clock import MIN_ROUNDS, clock, usable_cores


def spin(seconds):
    """A call of a known duration that sleeps for nobody."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


@pytest.fixture
def quiet(monkeypatch):
    """Take other processes' work out of the verdict; the intervals stay real."""
    monkeypatch.setattr(module._Load, "beyond", lambda self, threads: "")


class Weather:
    """A fake clock and a call whose duration follows a script, so that the estimator is tested without a machine."""

    def __init__(self, monkeypatch, duration):
        self.now = 0.0
        self.duration = duration
        self.calls = 0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module.time, "perf_counter_ns", lambda: round(self.now * 1e9))

    def __call__(self):
        self.now += self.duration(self.now)
        self.calls += 1


def test_known_duration(quiet):
    found = clock({"a": lambda: spin(1e-3), "b": lambda: spin(4e-4)}, min_seconds=0.5, max_seconds=4)
    # a busy machine may take longer, never less
    assert 1e-3 <= found["a"].p50 < 2e-3
    assert 4e-4 <= found["b"].p50 < 8e-4
    for timing in found.values():
        assert timing.interval is not None
        assert timing.interval[0] <= timing.p50 <= timing.interval[1]
        assert timing.rounds >= MIN_ROUNDS
        if timing.repetitions >= 100:  # a busy machine may leave no time for so many
            assert timing.p99 is not None
            assert timing.p99 >= timing.p50


def test_steady_calls_end_early_and_are_not_noisy(monkeypatch, quiet):
    generator = np.random.default_rng(0)
    weather = Weather(monkeypatch, lambda now: 2e-5 * generator.lognormal(0, 0.05))
    found = clock({"a": weather}, min_seconds=0.3, max_seconds=8)["a"]
    assert found.noisy == ""
    assert found.p50 == pytest.approx(2e-5, rel=0.01)
    assert weather.now < 1.0


def test_bursts_do_not_move_the_figure(monkeypatch, quiet):
    # a neighbour makes every call three times as slow for 30 of every 100 ms
    weather = Weather(monkeypatch, lambda now: 2e-5 * (3 if now % 0.1 < 0.03 else 1))
    found = clock({"a": weather}, min_seconds=1.5, max_seconds=8)["a"]
    assert found.p50 == pytest.approx(2e-5, rel=0.01)
    assert found.p99 == pytest.approx(6e-5, rel=0.01)


def test_drift_is_noisy_although_the_blocks_agree_locally(monkeypatch, quiet):
    weather = Weather(monkeypatch, lambda now: 2e-5 * (1 + 0.2 * now))
    found = clock({"a": weather}, min_seconds=1.5, max_seconds=4)["a"]
    assert "interval of the p50 is ±" in found.noisy
    assert "noisy" in found.note
    assert found.interval is not None
    assert found.interval[0] < 2.3e-5
    assert found.interval[1] > 3.2e-5


def test_two_levels_are_noisy(monkeypatch, quiet):
    # the machine changes its pace for as many calls as it keeps it: no p50 is right
    weather = Weather(monkeypatch, lambda now: 2e-5 * (1.5 if weather.calls // 25_000 % 2 else 1))
    assert clock({"a": weather}, min_seconds=1.5, max_seconds=4)["a"].noisy


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_two_measurements_agree_within_five_percent_or_say_noisy(monkeypatch, quiet, correlation):
    """The gate meter_repeat, on 20 pairs of simulated weather with independent and with drifting blocks."""
    generator = np.random.default_rng(5)
    level, since = 0.0, -1.0

    def duration(now):
        nonlocal level, since
        if now - since > 0.01:  # the pace changes every 10 ms, more or less remembering the last
            since = now
            level = correlation * level + (1 - correlation**2) ** 0.5 * generator.normal(0, 0.05)
        return 1e-3 * float(np.exp(level))

    weather = Weather(monkeypatch, duration)
    apart = loud = 0
    for _ in range(20):
        one, two = (clock({"a": weather}, min_seconds=2, max_seconds=6)["a"] for _ in range(2))
        quiet_pair = not one.noisy and not two.noisy
        apart += quiet_pair and abs(one.p50 / two.p50 - 1) > 0.05
        loud += not quiet_pair
    assert apart <= 1  # 95 % intervals
    assert loud <= (1 if correlation == 0 else 14)


def test_a_slow_call_gets_one_block_and_says_why(monkeypatch, quiet):
    weather = Weather(monkeypatch, lambda now: 3.0)
    fast = []
    found = clock({"slow": weather, "fast": lambda: fast.append(weather())}, min_seconds=1, max_seconds=8)
    assert found["slow"].interval is None
    assert "rounds fitted" in found["slow"].noisy
    assert found["slow"].p99 is None
    assert found["slow"].p50 == 3.0


def test_calls_take_turns(quiet):
    order = []
    calls = {name: (lambda name=name: (order.append(name), spin(2e-3))) for name in "ab"}
    clock(calls, min_seconds=0.1, max_seconds=0.6)
    timed = "".join(order)
    changes = sum(a != b for a, b in pairwise(timed))
    assert changes >= 2 * MIN_ROUNDS - 2


def test_garbage_collection_is_off_and_comes_back(quiet):
    seen = set()
    clock({"a": lambda: (seen.add(gc.isenabled()), spin(1e-3))}, min_seconds=0, max_seconds=0.2)
    assert False in seen
    assert gc.isenabled()

    def fail():
        if not gc.isenabled():
            raise RuntimeError("while measuring")

    with pytest.raises(RuntimeError, match="while measuring"):
        clock({"a": fail})
    assert gc.isenabled()


class TestForeignWork:
    def found(self, monkeypatch, busy, own, threads):
        cores = len(usable_cores())
        readings = iter([(0.0, 0.0, 0.0, cores), (busy * cores, own, 1.0, cores)])
        monkeypatch.setattr(module._Load, "_counters", lambda self: next(readings))
        return module._Load().beyond(threads)

    def test_idle_cores_may_be_used(self, monkeypatch):
        assert self.found(monkeypatch, busy=0.0, own=0.0, threads=1) == ""

    def test_our_own_work_is_not_foreign(self, monkeypatch):
        cores = len(usable_cores())
        assert self.found(monkeypatch, busy=1.0, own=float(cores), threads=cores) == ""

    def test_work_on_our_core_is_said(self, monkeypatch):
        cores = len(usable_cores())
        said = self.found(monkeypatch, busy=1.0, own=0.5, threads=1)
        assert said == f"other processes kept {cores - 0.5:.1f} of {cores} cores busy"

    def test_every_timing_becomes_noisy(self, monkeypatch):
        monkeypatch.setattr(module._Load, "beyond", lambda self, threads: f"others on {threads}")
        found = clock({"a": lambda: spin(1e-3)}, min_seconds=0, max_seconds=4, threads=2)
        assert found["a"].noisy.startswith("others on 2")

    def test_counters_count_this_machine(self):
        load = module._Load()
        start = time.process_time()
        while time.process_time() - start < 0.3:
            pass
        before, after = load._before, load._counters()
        assert 0.25 <= after[1] - before[1] <= 0.6  # our own CPU seconds, counted in hundredths
        assert after[0] - before[0] >= 0.25  # are among the busy ones
        assert after[3] == len(usable_cores())
