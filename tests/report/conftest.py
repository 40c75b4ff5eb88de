"""Ledgers written by hand: what a report must show is known exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sparing.core import ledger as columns
from sparing.core.ledger import Figure, Ledger, Row

UNITS = 360
CONFIG = {"epochs": 8}
CLASSES = [str(digit) for digit in range(10)]


def made_row(
    row_id: str,
    seed: int,
    outcomes: np.ndarray,
    *,
    size: int,
    p50: float,
    macs: int,
    step: str = "train",
    runtime: str = "onnxruntime",
    task: str = "digits",
    **more: object,
) -> Row:
    accuracy = float(outcomes.mean())
    figures = {
        "accuracy": Figure(accuracy, better="higher", interval=(accuracy - 0.012, accuracy + 0.009)),
        "worst class": Figure(accuracy - 0.06, better="higher"),
        "calibration error": Figure(0.0213),
        columns.MODEL_BYTES: Figure(size, "B"),
        columns.PARAMETERS: Figure(size // 4, ""),
        columns.MACS: Figure(macs, "", "derived", note="convolutions and matrix products"),
        columns.P50: Figure(p50, "ms", interval=(p50 * 0.99, p50 * 1.01), note="2400 repetitions in 20 rounds"),
        columns.THROUGHPUT: Figure(1e3 / p50, "1/s", better="higher"),
        columns.ENERGY: Figure(p50 * 12, "mJ", "est", note="12 W of the processor's rated power"),
        columns.BREAK_EVEN: Figure(None, "inferences", note="the step saves no time"),
        columns.WALL: Figure(13.4, "s"),
    }
    by_class = {name: accuracy - 0.006 * (int(name) % 4) for name in CLASSES}
    return Row(row_id, step, "training", task, seed, "accuracy", runtime, "onnx", figures, by_class=by_class, **more)


def made_ledger(seeds: tuple[int, ...] = (0,), recipe: str = "task: digits\nsteps:\n  - train\n") -> Ledger:
    ledger = Ledger(
        recipe=recipe,
        environment={
            "python": "3.11.2",
            "cpu": "Example CPU",
            "versions": {"torch": "2.13.0", "onnxruntime": "1.31.0"},
        },
        tasks={"digits": "sha256:0123"},
        created="2026-01-02T03:04:05+00:00",
    )
    for seed in seeds:
        generator = np.random.default_rng(seed)
        big, small, eight = (generator.random(UNITS) < share for share in (0.98, 0.93, 0.925))
        curve = {
            "training loss": [(step * 10.0, 2.3 * 0.93**step) for step in range(40)],
            "validation accuracy": [(step * 40.0, 0.97 - 0.8 * 0.6**step) for step in range(10)],
        }
        ledger.add(made_row("baseline", seed, big, size=384_112, p50=0.412, macs=5_600_000, curves=curve), big)
        student = made_row(
            "student",
            seed,
            small,
            size=61_004,
            p50=0.101,
            macs=700_000,
            step="distil",
            curves=curve,
            config=CONFIG,
        )
        ledger.add(student, small)
        int8 = made_row(
            "int8",
            seed,
            eight,
            size=19_807,
            p50=0.088,
            macs=700_000,
            step="quantize",
            outcome="static INT8, per channel",
            candidates=[
                {"name": "FP32", "latency p50 (ms)": 0.101, "accuracy": 0.93},
                {"name": "static INT8", "latency p50 (ms)": 0.088, "accuracy": 0.925},
            ],
            remarks=["2 of 9 layers stay in FP32"],
            sub={"audit": [made_row("inner", seed, eight, size=900, p50=0.02, macs=10)]},
        )
        ledger.add(int8, eight)
    return ledger


@pytest.fixture
def ledger() -> Ledger:
    return made_ledger()


@pytest.fixture
def build() -> Callable[..., Ledger]:
    return made_ledger
