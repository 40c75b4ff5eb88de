"""Estimates by hand, counters that move, and never a constant in place of a reading."""

from dataclasses import replace

import pytest

from sparing.compression.quantization import Scheme
from sparing.core import energy
from sparing.core.energy import estimate_mj, joules_per_call
from sparing.core.predictor import Description

FP32 = Description("onnx", "onnxruntime", "fp32", 10, 10, 1_000_000, "rule", 400_000)


def test_estimate_by_hand():
    # 10⁶ MACs at 0.9 + 3.7 pJ, 400 kB in words of 8 bytes at 1.95 nJ
    value, note = estimate_mj(FP32)
    assert value == pytest.approx(4.6e-3 + 50_000 * 1.95e-6)
    assert "Horowitz, ISSCC 2014, 45 nm" in note
    assert "4.6 pJ per fp32 MAC" in note


def test_an_addition_costs_what_the_table_says():
    value, note = estimate_mj(replace(FP32, fetched_bytes=0, accumulates=2_000_000))
    assert value == pytest.approx(4.6e-3 + 2 * 0.9e-3)
    assert "0.9 pJ per addition that a spike asks for" in note
    assert "addition" not in estimate_mj(FP32)[1]


def test_what_an_answer_does_not_read_costs_nothing():
    assert estimate_mj(replace(FP32, fetched_bytes=0))[0] == pytest.approx(4.6e-3)


def test_int8_costs_what_the_table_says():
    value, note = estimate_mj(replace(FP32, precision="int8 (QDQ static, per channel)", model_bytes=0))
    assert value == pytest.approx(1e6 * 0.3e-9)
    assert "0.3 pJ per int8 MAC" in note


def test_mixed_formats_pay_the_dearest_price():
    assert estimate_mj(replace(FP32, precision="int8 + fp32")) == estimate_mj(FP32)
    assert estimate_mj(replace(FP32, precision=str(Scheme(keep_float=("head/Gemm",))))) == estimate_mj(FP32)
    assert estimate_mj(replace(FP32, precision=str(Scheme()))) < estimate_mj(FP32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"macs": None}, "not known"), ({"precision": "ternary"}, "'ternary'"), ({"precision": ""}, "''")],
)
def test_no_model_no_estimate(change, reason):
    value, note = estimate_mj(replace(FP32, **change))
    assert value is None
    assert reason in note


def test_joules_per_call():
    drawn = iter([100.0, 107.5])
    calls = []
    each, count = joules_per_call(lambda: calls.append(1), lambda: next(drawn), seconds=0.02)
    assert count == len(calls) - 1  # one call warms up
    assert each == pytest.approx(7.5 / count)


def test_reason_without_zeus(monkeypatch):
    monkeypatch.setattr(energy, "version_of", lambda name: "")
    assert "pip install 'sparing[energy]'" in energy.counter_missing()
