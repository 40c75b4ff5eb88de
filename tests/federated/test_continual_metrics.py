"""Average accuracy, forgetting and backward transfer on a matrix small enough for a pencil."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.core.errors import InvalidValue
from sparing.federated.metrics import ContinualMetrics


def test_a_matrix_of_three_tasks():
    found = ContinualMetrics([[0.8, 0.3, 0.1], [0.9, 0.6, 0.2], [0.5, 0.7, 0.4]])
    assert found.average_accuracy == pytest.approx([0.8, 0.75, 1.6 / 3])
    assert found.forgetting == pytest.approx([0, -0.1, (0.4 - 0.1) / 2])
    assert found.forgetting_rate == pytest.approx([0, -0.125, (0.3 / 0.8 - 0.1 / 0.6) / 2])
    assert found.backward_transfer == pytest.approx((-0.3 + 0.1) / 2)


def test_entries_of_tasks_to_come_are_not_looked_at():
    first, second = [[0.5, np.nan], [0.4, 0.9]], [[0.5, 7.0], [0.4, 0.9]]
    assert np.array_equal(ContinualMetrics(first).average_accuracy, ContinualMetrics(second).average_accuracy)


def test_a_single_task_forgets_nothing():
    found = ContinualMetrics([[0.7, 0.0]])
    assert found.forgetting.tolist() == found.forgetting_rate.tolist() == [0.0]
    assert found.backward_transfer == 0
    assert found.average_accuracy.tolist() == [0.7]


def test_a_task_that_was_never_answered_cannot_be_forgotten():
    assert ContinualMetrics([[0.0, 0], [0.0, 0.5]]).forgetting_rate.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        ([0.5], r"of shape \(1,\)"),
        ([[0.5], [0.5]], r"of shape \(2, 1\)"),
        ([[0.5, 0], [1.5, 0.2]], r"A\[1, 0\] = 1.5"),
        ([[float("nan")]], r"A\[0, 0\] = nan"),
    ],
    ids=["a row", "too few columns", "above one", "not a number"],
)
def test_what_is_no_matrix_of_accuracies_is_refused(matrix, says):
    with pytest.raises(InvalidValue, match=says):
        ContinualMetrics(matrix)
