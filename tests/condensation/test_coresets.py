"""Core sets: the rules on rows that can be checked by hand, and what the selector refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.condensation.coresets import CoresetSelector, herding, k_center
from sparing.core.errors import InvalidValue

LINE = np.array([[0.0], [1.0], [2.0], [3.0], [9.0]])  # mean 3


def test_rules_on_a_line() -> None:
    # herding: nearest 3 is row 3; then 2·3 − 3 = 3, nearest of the others row 2; then 9 − 5 = 4, row 1 is the nearest
    assert herding(LINE, 3).tolist() == [3, 2, 1]
    # k-center: row 3; farthest is 9; then 0, at distance 3
    assert k_center(LINE, 3).tolist() == [3, 4, 0]


def test_ties_go_to_the_lower_row_and_equal_rows_are_chosen_once() -> None:
    same = np.zeros((4, 2))
    assert herding(same, 4).tolist() == k_center(same, 4).tolist() == [0, 1, 2, 3]
    assert herding(same, 0).tolist() == k_center(same, 0).tolist() == []


@given(st.integers(0, 2**31), st.integers(1, 12))
def test_a_permutation_whose_herding_mean_is_the_mean(seed: int, n: int) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, 3))
    for rule in (herding, k_center):
        assert sorted(rule(rows, n)) == list(range(n))
        assert rule(rows, n)[: n // 2].tolist() == rule(rows, n // 2).tolist()


@pytest.mark.parametrize("strategy", ["random", "herding", "kcenter"])
def test_classes_in_order_and_indices_of_all_samples(strategy: Any) -> None:
    y = np.array([2, 0, 1, 0, 2, 1, 0, 2])
    X = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    selector = CoresetSelector(strategy, [2, 1, 2], random_state=1).fit(X, y)
    assert y[selector.indices_].tolist() == [0, 0, 1, 2, 2]
    assert len(set(selector.indices_.tolist())) == 5
    kept, labels = CoresetSelector(strategy, [2, 1, 2], random_state=1).fit_resample(X, torch.tensor(y))
    assert torch.equal(kept, X[selector.indices_])
    assert labels.tolist() == [0, 0, 1, 2, 2]


def test_embeddings_of_samples_that_are_no_arrays() -> None:
    words = ["a", "aaaa", "aa", "aaaaaa", "aaa"]
    selector = CoresetSelector("kcenter", 2, embed=lambda samples: [[len(s)] for s in samples])
    assert selector.fit_resample(words, np.zeros(5, int))[0] == ["aaa", "aaaaaa"]


def test_chance_comes_from_the_seed() -> None:
    y = np.zeros(100, int)
    first, again, other = (CoresetSelector("random", 5, random_state=seed).fit(y, y).indices_ for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


@pytest.mark.parametrize(
    ("arguments", "y", "message"),
    [
        ({"strategy": "best"}, [0], "strategy = 'best'"),
        ({"n_per_class": 0}, [0], "n_per_class = 0 chooses nothing"),
        ({"n_per_class": [1, -1]}, [0], r"n_per_class = \[1, -1\]"),
        ({"n_per_class": 2}, [0, 0, 1], "2 samples of class 1 are wanted, but there are 1"),
        ({"n_per_class": 1}, [0, 2, 2], "1 samples of class 1 are wanted, but there are 0"),
        ({"n_per_class": [1]}, [0, 1, 1], "n_per_class has 1 entries; the labels name 2 classes"),
        ({}, [0, 1], r"3 samples and labels \(2,\)"),
        ({}, [0.0, 1.0, 1.0], "labels of type float64"),
        ({}, [0, -1, 1], "label -1 of sample 1"),
        ({"embed": lambda x: x[:2], "n_per_class": 1}, [0, 0, 0], "embed gave 2 rows for 3 samples"),
    ],
)
def test_refusals(arguments: dict[str, Any], y: list[Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        CoresetSelector(**arguments).fit(np.zeros((3, 1)), np.array(y))


def test_what_is_not_finite_is_named() -> None:
    rows = np.zeros((4, 2))
    rows[2, 1] = np.nan
    with pytest.raises(InvalidValue, match="row 2"):
        herding(rows, 1)
    with pytest.raises(InvalidValue, match=r"5 rows of embeddings \(4, 2\)"):
        k_center(rows, 5)
