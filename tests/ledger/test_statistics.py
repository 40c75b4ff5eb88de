"""Intervals and tests against hand computations, published examples and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import InvalidValue
from sparing.core.statistics import (
    bootstrap_interval,
    difference_over_seeds,
    group_gap,
    mcnemar,
    order_ranks,
    paired_difference,
    paired_share_interval,
    quantile_interval,
    share_interval,
    t_interval,
    units_interval,
)


def test_t_interval_by_hand():
    low, high = t_interval([0.90, 0.92, 0.94])
    half = 4.302652729911275 * 0.02 / math.sqrt(3)  # t(0.975, 2 degrees of freedom), s = 0.02
    assert (low, high) == pytest.approx((0.92 - half, 0.92 + half), abs=1e-9)
    assert t_interval([0.9]) is None


def test_mcnemar_by_hand():
    # 1 gained, 9 lost: 2·(C(10,0)+C(10,1))/2¹⁰
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 0) == 1.0


def test_mcnemar_on_agrestis_approval_ratings():
    # Agresti, Categorical Data Analysis, table 10.1: 794 approve twice, 150 only first, 86 only second, 570 never
    before = np.repeat([1, 1, 0, 0], [794, 150, 86, 570])
    after = np.repeat([1, 0, 1, 0], [794, 150, 86, 570])
    found = paired_difference(before, after)
    tail = sum(math.comb(236, k) for k in range(87)) / 2**236
    assert found.p == pytest.approx(2 * tail, rel=1e-9)
    assert found.value == pytest.approx(-64 / 1600)
    assert found.n == 1600
    # the book's Wald interval is (−0.059, −0.021); the adjusted one agrees to the third digit at this size
    assert found.interval == pytest.approx((-0.0587, -0.0213), abs=5e-4)
    assert found.shown


@pytest.mark.parametrize(("gained", "lost"), [(0.02, 0.05), (0.01, 0.01), (0.2, 0.1)])
def test_paired_share_interval_covers(gained, lost):
    generator, n = np.random.default_rng(1), 200
    draws = generator.multinomial(n, [gained, lost, 1 - gained - lost], size=1500)
    held = [low <= gained - lost <= high for low, high in (paired_share_interval(g, b, n) for g, b, _ in draws)]
    assert np.mean(held) >= 0.935  # conservative where hardly any unit changes
    assert np.mean(held) <= 0.99 or gained + lost < 0.05


def test_share_interval_is_wilsons():
    n, share, z = 50, 45 / 50, 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert share_interval(45, 50) == pytest.approx((centre - half, centre + half))
    assert share_interval(50, 50)[1] == 1.0


def test_bootstrap_agrees_with_the_normal_interval_and_repeats():
    values = np.random.default_rng(2).normal(3.0, 2.0, 4000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(4000)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert bootstrap_interval(values) == (low, high)


def test_paired_bootstrap_uses_the_pairing():
    generator = np.random.default_rng(3)
    before = generator.normal(0, 10, 500)
    after = before + generator.normal(0.5, 0.1, 500)
    found = paired_difference(before, after)
    assert found.value == pytest.approx(0.5, abs=0.02)
    assert found.interval is not None
    assert found.interval[1] - found.interval[0] < 0.04  # unpaired it would be about 2.5 wide
    assert found.shown
    assert found.p is None


def test_paired_difference_of_one_and_no_unit():
    assert paired_difference(np.array([0.3]), np.array([0.5])).interval is None
    with pytest.raises(InvalidValue, match="empty"):
        paired_difference(np.array([]), np.array([]))
    with pytest.raises(InvalidValue, match=r"\(2,\) and \(3,\)"):
        paired_difference(np.zeros(2), np.zeros(3))


def test_difference_over_seeds():
    found = difference_over_seeds([0.01, 0.03, 0.02])
    assert (found.value, found.n) == (pytest.approx(0.02), 3)
    assert found.interval == pytest.approx((0.02 - 4.302652729911275 * 0.01 / math.sqrt(3), 0.0448414), abs=1e-6)
    assert difference_over_seeds([0.01]).interval is None


def test_order_ranks_of_a_median_by_hand():
    # n = 10: P(B ≤ 1) = 11/1024 ≤ 0.025 < P(B ≤ 2) = 56/1024, so ranks 2 and 9 with confidence 1 − 2·11/1024
    assert order_ranks(10) == (2, 9)
    assert order_ranks(5) == (None, None)
    assert order_ranks(6) == (1, 6)


@pytest.mark.parametrize(("n", "quantile"), [(15, 0.5), (40, 0.5), (600, 0.99)])
def test_quantile_interval_covers_whatever_the_distribution(n, quantile):
    generator = np.random.default_rng(4)
    truth = -math.log(1 - quantile)  # of the exponential distribution
    intervals = [quantile_interval(generator.exponential(size=n), quantile) for _ in range(1200)]
    held = np.mean([low <= truth <= high for low, high in intervals])
    assert held >= 0.94


@given(st.integers(1, 3000), st.sampled_from([0.5, 0.9, 0.99]))
def test_order_ranks_are_ranks(n, quantile):
    low, high = order_ranks(n, quantile)
    assert low is None or 1 <= low <= n
    assert high is None or 1 <= high <= n
    assert low is None or high is None or low < high


def test_units_interval_names_its_method():
    assert units_interval(np.array([1, 0, 1, 1], dtype=bool))[1] == "Wilson over 4 units"
    assert units_interval(np.array([0.2, 0.4]))[1] == "bootstrap over 2 units"
    assert units_interval(np.array([0.2])) == (None, "1 unit: no interval")


def test_group_gap():
    outcomes = np.array([1, 1, 1, 0, 1, 0, 0, 0], dtype=bool)
    groups = np.array(["a"] * 4 + ["b"] * 4)
    gap, interval, note = group_gap(outcomes, groups)
    assert gap == pytest.approx(0.5)
    # Welch: equal sizes and variances 0.25, so t(0.975, 6)·√(0.25/4 + 0.25/4)
    half = 2.4469118511449692 * math.sqrt(0.125)
    assert interval == pytest.approx((0.5 - half, 0.5 + half))
    assert note == "b 0.25 (n=4), a 0.75 (n=4)"
    with pytest.raises(InvalidValue, match="two groups"):
        group_gap(outcomes, np.array(["a"] * 8))
    with pytest.raises(InvalidValue, match=r"\(3,\).*\(8,\)"):
        group_gap(outcomes, np.zeros(3))
