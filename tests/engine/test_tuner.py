"""The production choice, and the measuring behind it."""

from __future__ import annotations

import os
from typing import Any

import pytest

from sparing.core.errors import InvalidValue, NoEffect
from sparing.engine import tuner
from sparing.engine.compiler import compile_encoder
from sparing.engine.tuner import Row, choose_production, default_instances, tune_production, warm_up


def test_the_most_throughput_within_the_limit_and_of_equals_the_first() -> None:
    table = [Row(1, 1, 2.0, 3.0), Row(4, 1, 4.0, 6.0), Row(8, 2, 10.0, 30.0), Row(2, 2, 4.0, 5.0)]
    assert [row.throughput for row in table] == [500, 1000, 1600, 1000]
    assert choose_production(table, 30) == 2
    assert choose_production(table, 29) == 1
    assert choose_production(table, 5.5) == 3
    with pytest.raises(NoEffect, match=r"within 2.5 ms: the smallest p99 is 3 ms, of batch 1 with 1 instances"):
        choose_production(table, 2.5)
    with pytest.raises(InvalidValue, match="empty"):
        choose_production([], 1)
    with pytest.raises(InvalidValue, match="positive, not 0"):
        choose_production(table, 0)


def test_warm_up_is_a_tenth_and_three_at_least() -> None:
    assert [warm_up(iterations) for iterations in (1, 29, 30, 40, 1000)] == [3, 3, 3, 4, 100]


def test_instances_go_up_to_all_cores() -> None:
    assert [default_instances(cores) for cores in (1, 2, 3, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def test_every_combination_is_measured_on_disjoint_cores(sparse_bert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[int, ...]] = []
    real = os.sched_setaffinity

    def pin(thread: int, cores: Any) -> None:
        pinned.append(tuple(cores))
        real(thread, cores)

    monkeypatch.setattr(tuner.os, "sched_setaffinity", pin)
    here = os.sched_getaffinity(0)
    engine = compile_encoder(sparse_bert, 4, 32)
    counts = [1, 2] if len(here) > 1 else [1]
    found = tune_production(engine, 1000, batches=[1, 4], instances=counts, iterations=10)
    assert [(row.batch, row.instances) for row in found.table] == [(b, i) for b in (1, 4) for i in counts]
    assert found.best == max(found.table, key=lambda row: row.throughput)
    assert all(0 < row.p50_ms <= row.p99_ms for row in found.table)
    assert all(len(cores) == 1 for cores in pinned), "a call is one thread's work"
    assert all(row.cores == len(here) // row.instances for row in found.table)
    if len(counts) == 2:
        assert not set(pinned[1]) & set(pinned[2]), pinned
    assert os.sched_getaffinity(0) == here, "the caller's thread stays free"
    with pytest.raises(NoEffect, match="smallest p99"):
        tune_production(engine, 1e-6, batches=[1], instances=[1], iterations=3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"batches": [8]}, r"1…4, not \[8\]"),
        ({"instances": [4096]}, "4096"),
        ({"percentile": 30}, "percentile = 30"),
        ({"iterations": 0}, "iterations = 0"),
        ({"length": 33}, "1…32, not 33"),
        ({"max_latency_ms": -1.0}, "max_latency_ms = -1.0"),
    ],
)
def test_refusals(sparse_bert: Any, changes: dict[str, Any], named: str) -> None:
    engine = compile_encoder(sparse_bert, 4, 32)
    with pytest.raises(InvalidValue, match=named):
        tune_production(engine, **({"max_latency_ms": 10.0} | changes))
