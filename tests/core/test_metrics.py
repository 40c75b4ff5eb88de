"""Classification figures against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import (
    accuracy_by_class,
    correct,
    evaluate_classification,
    expected_calibration_error,
    log_softmax,
    negative_log_likelihood,
)

LOGITS = arrays(np.float32, st.tuples(st.integers(1, 30), st.just(4)), elements=st.floats(-50, 50, width=32))


@given(LOGITS)
def test_likelihood_is_torchs(logits: np.ndarray) -> None:
    targets = np.arange(len(logits)) % 4
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(targets))
    assert negative_log_likelihood(log_softmax(logits), targets) == pytest.approx(float(expected), rel=1e-9, abs=1e-12)


@given(
    arrays(np.float64, 40, elements=st.floats(0, 1)),
    arrays(np.bool_, 40),
    st.integers(1, 30),
)
def test_calibration_error_follows_its_equation(confidence: np.ndarray, right: np.ndarray, bins: int) -> None:
    expected = 0.0
    for b in range(bins):
        # The equation's (b/B, (b+1)/B] with the edges as the library rounds them; 0 belongs to the first bin.
        inside = np.maximum(np.ceil(confidence * bins), 1) == b + 1
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, right.astype(float), bins) == pytest.approx(expected, abs=1e-12)


def test_known_calibration_errors() -> None:
    assert expected_calibration_error(np.full(10, 0.8), np.array([1.0] * 8 + [0.0] * 2)) == pytest.approx(0)
    assert expected_calibration_error(np.ones(4), np.array([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.75)
    # Opposite errors in different bins do not cancel.
    assert expected_calibration_error(np.array([0.6, 0.9]), np.array([1.0, 0.0])) == pytest.approx((0.4 + 0.9) / 2)


def test_every_figure_of_a_small_case() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], np.float32))
    result = evaluate_classification(logits, np.array([0, 1, 1]), ["a", "b", "c"])
    assert result.per_unit is not None
    assert result.per_unit.tolist() == [1, 0, 1]
    assert result.by_class == {"a": 1.0, "b": 0.5}  # no unit of c: it is neither best nor worst
    assert result.metrics["accuracy"] == pytest.approx(2 / 3)
    assert result.metrics["worst_class_accuracy"] == 0.5
    assert result.metrics["nll"] == pytest.approx(-np.log([0.7, 0.3, 0.5]).mean(), rel=1e-6)
    assert result.metrics["ece"] == pytest.approx((0.3 + 0.6 + 0.5) / 3, rel=1e-6)
    assert result.metrics["accuracy"] == result.per_unit.mean()


def test_ties_and_empty_classes() -> None:
    assert correct(np.zeros((2, 3)), np.array([0, 1])).tolist() == [1, 0]
    assert np.isnan(accuracy_by_class(np.ones(2), np.array([0, 0]), 2)[1])


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (np.zeros((3, 2)), [0, 1], r"shape \(3, 2\) for 2 units"),
        (np.zeros((2, 3)), [0, 1], r"\(2, 2\) is expected"),
        (np.zeros((0, 2)), [], "no unit"),
        (np.array([[0, 1], [np.nan, 0], [np.inf, 0]]), [0, 1, 1], r"unit 1 is not finite \(2 of 3"),
    ],
)
def test_wrong_outputs_are_named(logits: np.ndarray, targets: list[int], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        evaluate_classification(logits, np.array(targets, int), ["a", "b"])


@pytest.mark.parametrize(
    ("targets", "said"),
    [([0, 2, -1], "unit 2 has the label -1"), ([0, 7, 9], "unit 1 has the label 7"), ([0.0, 1.0, 2.0], "float64")],
    ids=["negative", "too large", "no integers"],
)
def test_a_target_that_is_no_class_is_told_with_its_unit(targets: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        evaluate_classification(np.eye(3, dtype=np.float32), np.array(targets), ("a", "b", "c"))
    assert "0…2" in str(caught.value)
