"""Timing calls on a machine that is never quite quiet.

Each call is timed in short blocks, and the blocks of all calls take turns, so that what is compared was measured in the
same weather. A p50 is the median of its blocks' medians: a burst of foreign work spoils some blocks, not the figure.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparing.core.statistics import quantile_interval

SEGMENTS = 9
MIN_ROUNDS = 2 * SEGMENTS
BLOCK_SECONDS = 0.015
MAX_BLOCK = 4096
WARM_UP_SECONDS = 0.05
P95_REPETITIONS = 20
P99_REPETITIONS = 100
FOREIGN_CORES = 0.1
"""Foreign work up to this many cores beyond the idle ones is not called a disturbance."""


@dataclass(frozen=True)
class Timing:
    """What one call took, in seconds."""

    p50: float
    interval: tuple[float, float] | None
    """95 % interval of the p50, None for too few rounds: order statistics of the p50s of nine consecutive stretches of
    the measuring time, which stay independent where neighbouring blocks are not."""
    p99: float | None
    """None for fewer than P99_REPETITIONS repetitions."""
    p99_interval: tuple[float, float] | None
    repetitions: int
    rounds: int
    noisy: str
    """Why the p50 is not to be trusted to the asked precision, or empty."""
    p95: float | None = None
    """None for fewer than P95_REPETITIONS repetitions."""

    @property
    def note(self) -> str:
        """Repetitions and, when there is cause, the word "noisy" with the reason."""
        count = f"{self.repetitions} repetitions in {self.rounds} rounds"
        return f"noisy: {self.noisy}; {count}" if self.noisy else count


def clock(
    calls: Mapping[str, Callable[[], Any]],
    *,
    precision: float = 0.03,
    min_seconds: float = 2.0,
    max_seconds: float = 6.0,
    threads: int = 1,
) -> dict[str, Timing]:
    """Time every call, in turns, until the 95 % interval of each p50 is within ``precision`` of it.

    At least ``min_seconds`` and MIN_ROUNDS rounds, so that the interval has seen some of the machine's weather; at most
    ``max_seconds`` shared equally (one round is always finished). ``threads`` is how many cores a call keeps busy: work
    of other processes beyond the cores left over makes every timing noisy.
    """
    sizes = {name: _warm_up(call) for name, call in calls.items()}
    blocks: dict[str, list[np.ndarray]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    share = max_seconds / len(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        load = _Load()
        start, rounds, look = time.perf_counter(), 0, MIN_ROUNDS
        while True:
            for name, call in calls.items():
                if spent[name] <= share:
                    before = time.perf_counter()
                    blocks[name].append(_block(call, sizes[name]))
                    spent[name] += time.perf_counter() - before
            rounds += 1
            if all(used > share for used in spent.values()):
                break
            # looking after every round would stop at the first lucky one
            if rounds >= look and time.perf_counter() - start >= min_seconds:
                look = rounds + max(3, rounds // 4)
                if all(_within(_p50(part), precision) or spent[name] > share for name, part in blocks.items()):
                    break
        disturbed = load.beyond(threads)
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(part, precision, disturbed) for name, part in blocks.items()}


def in_turns(calls: Sequence[Callable[[], Any]], runs: int, warmup: int) -> np.ndarray:
    """Seconds of each call, mean over the middle half of its ``runs``.

    The calls take turns, so that what else the machine does meets all of them alike; an interruption does not count.
    """
    taken = np.zeros((runs, len(calls)))
    for number in range(-warmup, runs):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if number >= 0:
                taken[number, i] = time.perf_counter() - start
    taken.sort(axis=0)
    return taken[runs // 4 : runs - runs // 4].mean(axis=0)


def _warm_up(call: Callable[[], Any]) -> int:
    """Call until caches, thread pools and allocators have settled; returns the repetitions of a block."""
    call()
    count, elapsed, start = 0, 0.0, time.perf_counter()
    while elapsed < WARM_UP_SECONDS:
        call()
        count, elapsed = count + 1, time.perf_counter() - start
    return int(min(MAX_BLOCK, max(1, BLOCK_SECONDS * count / elapsed)))


def _block(call: Callable[[], Any], size: int) -> np.ndarray:
    """Nanoseconds (size,) of consecutive calls, after a few that bring this call's data back into the caches."""
    now = time.perf_counter_ns
    stamps = [0] * size
    for _ in range(size // 10):
        call()
    for index in range(size):
        start = now()
        call()
        stamps[index] = now() - start
    return np.asarray(stamps, dtype=np.int64)


def _p50(blocks: list[np.ndarray]) -> tuple[float, tuple[float, float] | None]:
    """(p50, interval) in nanoseconds; no interval for fewer than MIN_ROUNDS blocks."""
    medians = np.array([np.median(block) for block in blocks])
    p50 = float(np.median(medians))
    if len(medians) < MIN_ROUNDS:
        return p50, None
    stretches = np.array([np.median(part) for part in np.array_split(medians, SEGMENTS)])
    bounds = quantile_interval(stretches)
    assert bounds is not None  # nine values bound their median on both sides
    return p50, (min(bounds[0], p50), max(bounds[1], p50))


def _within(found: tuple[float, tuple[float, float] | None], precision: float) -> bool:
    p50, interval = found
    return interval is not None and max(interval[1] - p50, p50 - interval[0]) <= precision * p50


def _timing(blocks: list[np.ndarray], precision: float, disturbed: str) -> Timing:
    samples = np.concatenate(blocks)
    found = p50, interval = _p50(blocks)
    noisy = disturbed
    if interval is None:
        noisy = f"only {len(blocks)} of {MIN_ROUNDS} rounds fitted into the time allowed"
    elif not _within(found, precision):
        wide = max(interval[1] - p50, p50 - interval[0]) / p50
        noisy = f"the 95 % interval of the p50 is ±{100 * wide:.1f} %"
    p95 = float(np.quantile(samples, 0.95)) / 1e9 if len(samples) >= P95_REPETITIONS else None
    p99 = tail = None
    if len(samples) >= P99_REPETITIONS:
        p99 = float(np.quantile(samples, 0.99)) / 1e9
        if (bounds := quantile_interval(samples, 0.99)) is not None:
            tail = (bounds[0] / 1e9, bounds[1] / 1e9)
    seconds = None if interval is None else (interval[0] / 1e9, interval[1] / 1e9)
    return Timing(p50 / 1e9, seconds, p99, tail, len(samples), len(blocks), noisy, p95)


class _Load:
    """How busy other processes keep the cores this process may use, from now on."""

    def __init__(self) -> None:
        import psutil

        self._psutil, self._process = psutil, psutil.Process()
        self._before = self._counters()

    def _counters(self) -> tuple[float, float, float, int]:
        """(seconds all these cores were busy, CPU seconds of this process, clock, number of these cores)."""
        own = self._process.cpu_times()
        every = self._psutil.cpu_times(percpu=True)
        mine = [every[core] for core in usable_cores() if core < len(every)] or every
        idle = {"idle", "iowait", "guest", "guest_nice"}  # guests' seconds are in "user" and "nice" already
        busy = sum(seconds for core in mine for name, seconds in core._asdict().items() if name not in idle)
        return busy, own.user + own.system, time.perf_counter(), len(mine)

    def beyond(self, threads: int) -> str:
        """Empty, or that others were so busy that they were in the way of ``threads`` threads."""
        *after, cores = self._counters()
        busy, own, wall = (late - early for late, early in zip(after, self._before, strict=False))
        foreign = (busy - own) / max(wall, 1e-9)
        if foreign <= max(0, cores - threads) + FOREIGN_CORES:
            return ""
        return f"other processes kept {foreign:.1f} of {cores} cores busy"


def usable_cores() -> list[int]:
    """Numbers of the logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
