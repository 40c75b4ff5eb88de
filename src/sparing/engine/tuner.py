"""The most sequences a second within a latency limit: batch size × instances (fast_distilbert sheet, section 7).

Instances are threads, each pinned to a core that no other has, with a workspace of its own over the one set of weights;
native code runs outside the interpreter's lock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparing.core.clock import usable_cores
from sparing.core.errors import InvalidValue, NoEffect
from sparing.engine.runtime import Engine, example_ids

BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """One combination, measured. Latencies are of a whole batch."""

    batch: int
    instances: int
    p50_ms: float
    p99_ms: float
    """The percentile that the limit is for, whatever it was chosen to be."""
    cores: int = 1
    """Cores that are each instance's share of the machine. It runs on the first: a call is one thread's work."""

    @property
    def throughput(self) -> float:
        """Sequences a second: batch · instances · 1000 / p50."""
        return self.batch * self.instances * 1000 / self.p50_ms


@dataclass(frozen=True)
class Production:
    """The winner and all that it was chosen from."""

    best: Row
    table: tuple[Row, ...]
    max_latency_ms: float
    percentile: float


def choose_production(table: Sequence[Row], max_latency_ms: float) -> int:
    """Index of the row with the most throughput whose p99 fits; of equals the first.

    Raises :class:`NoEffect`, naming the smallest p99, when none fits.
    """
    if not table:
        raise InvalidValue("the table is empty; at least one row is needed")
    if not max_latency_ms > 0:
        raise InvalidValue(f"max_latency_ms must be positive, not {max_latency_ms}")
    fitting = [index for index, row in enumerate(table) if row.p99_ms <= max_latency_ms]
    if not fitting:
        row = min(table, key=lambda item: item.p99_ms)
        raise NoEffect(
            f"no combination stays within {max_latency_ms:g} ms: the smallest p99 is {row.p99_ms:.4g} ms, of batch "
            f"{row.batch} with {row.instances} instances"
        )
    return max(fitting, key=lambda index: (table[index].throughput, -index))


def tune_production(
    engine: Engine,
    max_latency_ms: float,
    percentile: float = 99,
    batches: Sequence[int] | None = None,
    instances: Sequence[int] | None = None,
    *,
    length: int | None = None,
    iterations: int = 100,
) -> Production:
    """Measure every batch × instances, and choose.

    Args:
        engine: what is served.
        max_latency_ms: limit for the ``percentile`` of a batch's latency.
        percentile: between 50 and 100.
        batches: default 1, 2, 4, 8 as far as the engine takes them.
        instances: default 1, 2, 4 … as far as there are cores, and as many as there are. The cores are shared out
            equally, and each instance, which is one thread, is pinned to one core of its share.
        length: tokens of each sequence; default: the engine's longest.
        iterations: timed batches of each instance, after a tenth of that (at least 3) to warm up.

    Raises:
        InvalidValue: for what the engine or the machine does not have.
        NoEffect: when nothing fits; names the smallest latency found.
    """
    cores = sorted(usable_cores())
    batches = list(batches) if batches is not None else [size for size in BATCHES if size <= engine.max_batch]
    instances = list(instances) if instances is not None else default_instances(len(cores))
    if not batches or min(batches) < 1 or max(batches) > engine.max_batch:
        raise InvalidValue(f"batches must be in 1…{engine.max_batch}, not {batches}")
    if not instances or min(instances) < 1 or max(instances) > len(cores):
        raise InvalidValue(f"instances must be in 1…{len(cores)}, the cores of this process, not {instances}")
    if not 50 <= percentile <= 100 or iterations < 1 or not max_latency_ms > 0:
        raise InvalidValue(
            f"max_latency_ms = {max_latency_ms}, percentile = {percentile}, iterations = {iterations}: a positive "
            "limit, 50…100 and at least 1 are expected"
        )
    length = engine.max_length if length is None else length
    if not 1 <= length <= engine.max_length:
        raise InvalidValue(f"length must be in 1…{engine.max_length}, not {length}")
    workers = [engine.instance() for _ in range(max(instances))]
    table = tuple(
        _measured(workers[:count], batch, length, iterations, percentile, cores)
        for batch in batches
        for count in instances
    )
    best = table[choose_production(table, max_latency_ms)]
    return Production(best, table, max_latency_ms, percentile)


def default_instances(cores: int) -> list[int]:
    """Powers of two up to ``cores``, and ``cores`` itself."""
    return sorted({1 << n for n in range(cores.bit_length())} | {cores})


def warm_up(iterations: int) -> int:
    """Batches before the timed ones."""
    return max(3, iterations // 10)


def _measured(
    workers: Sequence[Engine], batch: int, length: int, iterations: int, percentile: float, cores: Sequence[int]
) -> Row:
    share = len(cores) // len(workers)
    ids = example_ids(workers[0].encoder, batch, length)
    latencies: list[list[float]] = [[] for _ in workers]
    failures: list[BaseException] = []
    together = threading.Barrier(len(workers))

    def serve(index: int) -> None:
        try:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, [cores[index * share]])  # of this thread
            for _ in range(warm_up(iterations)):
                workers[index].run(ids)
            together.wait()
            for _ in range(iterations):
                start = time.perf_counter()
                workers[index].run(ids)
                latencies[index].append((time.perf_counter() - start) * 1e3)
        except BaseException as error:
            together.abort()
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(workers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    every = np.concatenate(latencies)
    return Row(batch, len(workers), float(np.median(every)), float(np.percentile(every, percentile)), share)
