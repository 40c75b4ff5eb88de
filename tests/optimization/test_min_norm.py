"""Least squares by scale times direction: laws that hold at every step, limits, and where it is refused."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from sparing.core.errors import DataError, InvalidValue, SparingError, TrainingDiverged
from sparing.optimization.min_norm import (
    LeastSquares,
    first_phase,
    largest_eigenvalue,
    phase_one_steps,
    predict_limit,
    rpgd_step,
    second_phase,
    single_phase,
    slope,
    two_phase,
    wn_gradients,
    wn_step,
)
from sparing.optimization.min_norm_regressor import MinNormRegressor

METHODS = ("rpgd", "wn", "gd", "two_phase")


def system(seed: int = 0, m: int = 6, d: int = 15, targets: int | None = None, norm: float = 2.0) -> Any:
    """(A, y, unit w0): ‖A⁺y‖ = norm for each target."""
    draw = np.random.default_rng(seed)
    shape = () if targets is None else (targets,)
    A, y, w0 = draw.standard_normal((m, d)), draw.standard_normal((m, *shape)), draw.standard_normal((d, *shape))
    y *= norm / np.linalg.norm(np.linalg.pinv(A) @ y, axis=0)
    return A, y, w0 / np.linalg.norm(w0, axis=0)


# --- the problem


def test_a_system_is_known_by_its_singular_values() -> None:
    A, y, w0 = system(targets=3)
    problem = LeastSquares.of(A, y)
    np.testing.assert_allclose(problem.solution, np.linalg.pinv(A) @ y)
    np.testing.assert_allclose(problem.norm, 2.0)
    assert problem.lam == pytest.approx(np.linalg.norm(A, 2) ** 2)
    null = problem.null_part(w0)
    np.testing.assert_allclose(A @ null, 0, atol=1e-12)
    np.testing.assert_allclose(problem.null_part(A.T), 0, atol=1e-12)
    assert np.all(problem.norm_bound <= problem.norm)
    white = problem.whitened()
    np.testing.assert_allclose(white.A @ white.A.T, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(white.norm_bound, 2.0)
    again = LeastSquares.of(white.A, white.y)
    np.testing.assert_allclose(again.solution, problem.solution)


def test_dependent_rows_are_replaced_and_the_gradient_stays() -> None:
    A, y, w0 = system()
    tall, both = np.vstack([A, A[:2] + A[1:3]]), np.concatenate([y, [5.0, -1.0]])
    problem = LeastSquares.of(tall, both)
    assert problem.rank == 6
    assert problem.A.shape == (6, 15)
    np.testing.assert_allclose(problem.solution, np.linalg.pinv(tall) @ both)
    np.testing.assert_allclose(problem.A.T @ (problem.A @ w0 - problem.y), tall.T @ (tall @ w0 - both), atol=1e-10)


@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_power_iteration_finds_the_largest_eigenvalue(seed: int, scale: float) -> None:
    A = scale * np.random.default_rng(seed).standard_normal((5, 9))
    assert largest_eigenvalue(A, seed=seed) == pytest.approx(np.linalg.norm(A, 2) ** 2, rel=1e-5)


def test_power_iteration_says_what_it_cannot_do() -> None:
    with pytest.raises(InvalidValue, match=r"shape \(2, 3\) has no eigenvalue above 0"):
        largest_eigenvalue(np.zeros((2, 3)))
    with pytest.raises(InvalidValue, match="max_iter = 1 the residual"):
        largest_eigenvalue(system()[0], max_iter=1, tol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused_with_their_place(bad: float) -> None:
    A, y, _ = system()
    A[1, 2] = bad
    with pytest.raises(DataError, match=rf"A\[1, 2\] = {bad}"):
        LeastSquares.of(A, y)
    with pytest.raises(DataError, match="rank 0"):
        LeastSquares.of(np.zeros((2, 3)), np.ones(2))


# --- steps


@given(st.integers(0, 1000), st.floats(0.1, 5))
def test_gradients_of_wn_are_those_of_its_loss(seed: int, g: float) -> None:
    A, y, w = system(seed)
    w = 1.7 * w

    def loss(w: np.ndarray, g: float) -> float:
        return 0.5 * float(np.sum((g * A @ w / np.linalg.norm(w) - y) ** 2))

    slope_w, slope_g = wn_gradients(A, y, w, g)
    h, move = 1e-6, np.random.default_rng(seed).standard_normal(len(w))
    numeric = (loss(w + h * move, g) - loss(w - h * move, g)) / (2 * h)
    assert float(slope_w @ move) == pytest.approx(numeric, rel=1e-4, abs=1e-5)
    assert slope_g == pytest.approx((loss(w, g + h) - loss(w, g - h)) / (2 * h), rel=1e-4, abs=1e-5)
    assert float(slope_w @ w) == pytest.approx(0, abs=1e-9)
    after, _ = wn_step(A, y, w, g, 0.01, 0.01)
    assert float(after @ after) == pytest.approx(float(w @ w) + 1e-4 * float(slope_w @ slope_w))


@given(st.integers(0, 1000), st.floats(0.1, 5), st.floats(1e-3, 0.5))
def test_a_step_of_rpgd_keeps_the_length_and_divides_the_null_part(seed: int, g: float, rate: float) -> None:
    A, y, w = system(seed)
    problem = LeastSquares.of(A, y)
    eta = rate / problem.lam
    after, _ = rpgd_step(A, y, w, g, eta, 0.1 * eta)
    assert np.linalg.norm(after) == pytest.approx(1)
    v = w - eta * g * A.T @ (g * A @ w - y)
    np.testing.assert_allclose(
        problem.null_part(after), problem.null_part(w) / np.linalg.norm(v), rtol=1e-9, atol=1e-12
    )


def test_targets_do_not_feel_each_other() -> None:
    A, y, w = system(targets=3)
    g = np.array([0.5, 1.0, 3.0])
    for step in (rpgd_step, wn_step):
        together = step(A, y, w, g, 0.01, 0.02)
        for k in range(3):
            alone = step(A, y[:, k], w[:, k], float(g[k]), 0.01, 0.02)
            np.testing.assert_allclose(together[0][:, k], alone[0])
            assert together[1][k] == pytest.approx(alone[1])


def test_rates_and_starts_out_of_bounds_are_refused() -> None:
    A, y, w = system()
    problem = LeastSquares.of(A, y)
    with pytest.raises(InvalidValue, match="eta = 0"):
        rpgd_step(A, y, w, 1.0, 0.0, 0.1)
    with pytest.raises(InvalidValue, match=r"gamma = -0\.1"):
        wn_step(A, y, w, 1.0, 0.1, -0.1)
    with pytest.raises(InvalidValue, match="w is zero"):
        wn_gradients(A, y, 0 * w, 1.0)
    for phase in (single_phase, first_phase, second_phase):
        with pytest.raises(InvalidValue, match="w is zero"):
            next(phase(problem, 0 * w, 1.0))
        with pytest.raises(InvalidValue, match=r"g0 = 0\.0"):
            next(phase(problem, w, 0.0))
    with pytest.raises(InvalidValue, match="step_ratio = 0"):
        next(single_phase(problem, w, 1.0, c=0))
    with pytest.raises(InvalidValue, match="bound = -1"):
        next(second_phase(problem, w, 1.0, bound=-1.0))


# --- limits


@given(st.floats(1e-2, 10), st.floats(0, 1), st.floats(1e-2, 10), st.floats(1e-2, 10))
def test_the_limit_solves_its_equation(g0: float, a: float, g_star: float, c: float) -> None:
    limit = predict_limit(g0, a, g_star, c)
    assert limit.g >= g_star * (1 - 1e-12)
    assert limit.distance**2 == pytest.approx(limit.g**2 - g_star**2, rel=1e-6, abs=1e-10 * g_star**2)
    larger = predict_limit(1.1 * g0, a, g_star, c)
    assert larger.distance >= limit.distance * (1 - 1e-9)


def test_tiny_distances_do_not_cancel() -> None:
    limit = predict_limit(0.5, 0.7, 2.0, 0.05)
    assert limit.g - 2 < 1e-15
    assert limit.distance == pytest.approx(2 * math.sqrt(0.7) * math.exp((0.25 - 4) / 0.1), rel=1e-9)
    assert predict_limit(1.0, 0.0, 2.0, 1.0) == (2.0, 0.0)


def test_small_steps_follow_the_invariant_and_end_at_the_limit() -> None:
    A, y, w = system(3)
    problem = LeastSquares.of(A, y)
    c, g, first = 1.0, 0.5, problem.null_part(w)
    eta = 0.02 / problem.lam
    start = first * math.exp(g**2 / (2 * c))
    for _ in range(4000):
        w, g = rpgd_step(A, y, w, g, eta, c * eta)
    np.testing.assert_allclose(problem.null_part(w) * math.exp(g**2 / (2 * c)), start, rtol=0.02, atol=2e-3)
    limit = predict_limit(0.5, float(first @ first), 2.0, c)
    assert np.linalg.norm(g * w - problem.solution) == pytest.approx(limit.distance, rel=0.02)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((0, 0.5, 1, 1), "g0 = 0"),
        ((1, 1.5, 1, 1), r"a = 1\.5"),
        ((1, 0.5, -1, 1), "g_star = -1"),
        ((1, 0.5, 1, 0), "c = 0"),
    ],
)
def test_limits_of_nothing_are_refused(values: Any, says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        predict_limit(*values)


# --- two phases


def test_phase_one_halves_the_null_part_as_its_formula_says() -> None:
    A, y, w = system(1)
    problem = LeastSquares.of(A, y).whitened()
    steps = phase_one_steps(1.0, 2.0)
    assert steps == 27
    path = [np.linalg.norm(problem.null_part(v)) for v, _ in itertools.islice(first_phase(problem, w, 1.0), steps)]
    assert path[-1] <= 1e-8
    for before, after in itertools.pairwise(path):
        assert after**2 == pytest.approx(before**2 / (4 + before**2), rel=1e-6)
    with pytest.raises(InvalidValue, match=r"g = 2\.0, g_star = 2\.0"):
        phase_one_steps(2.0, 2.0)
    with pytest.raises(InvalidValue, match="delta = 2"):
        phase_one_steps(1.0, 2.0, delta=2)


@pytest.mark.parametrize("white", [True, False])
def test_two_phases_end_at_the_minimum_norm(white: bool) -> None:
    A, y, w = system(2)
    problem = LeastSquares.of(A, y)
    problem = problem.whitened() if white else problem
    w, g = next(itertools.islice(two_phase(problem, w, 0.5 * problem.norm_bound, first=400), 6000, None))
    assert np.linalg.norm(g * w - problem.solution) < 1e-8


@pytest.mark.parametrize(("g", "below"), [(1.9, True), (2.1, False)])
def test_the_slope_tells_whether_g_was_below_the_minimum_norm(g: float, below: bool) -> None:
    A, y, w = system(4)
    problem = LeastSquares.of(A, y).whitened()
    w, _ = next(itertools.islice(first_phase(problem, w, g), 2000, None))
    rate = slope(problem.A, problem.y, w, g)
    assert (rate > 1e-6) == below
    assert (np.linalg.norm(problem.null_part(w)) < 1e-8) == below


# --- the estimator


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_and_says_how_far_from_the_minimum_norm_it_ended(method: Any) -> None:
    A, y, _ = system(targets=2)
    fitted = MinNormRegressor(method, seed=1).fit(A, y)
    assert fitted.coef_.shape == (2, 15)
    np.testing.assert_allclose(fitted.predict(A), y, atol=1e-6)
    exact = np.linalg.pinv(A) @ y
    np.testing.assert_allclose(fitted.distance_to_min_norm_, np.linalg.norm(fitted.coef_.T - exact, axis=0), atol=1e-12)
    np.testing.assert_allclose(fitted.g_, np.linalg.norm(fitted.coef_, axis=1), rtol=1e-9)
    history = fitted.history_
    assert history["iteration"][-1] == fitted.n_iter_
    assert history["residual"].shape == history["distance"].shape == history["g"].shape == (len(history["g"]), 2)
    np.testing.assert_array_equal(history["distance"][-1], fitted.distance_to_min_norm_)
    tolerance = {"gd": 1e-6, "two_phase": 1e-6}.get(method, 0.1)
    np.testing.assert_allclose(fitted.distance_to_min_norm_, fitted.predicted_distance_, rtol=1e-6, atol=tolerance)
    one = clone(fitted).fit(A, y[:, 0])
    assert one.coef_.shape == (15,)
    assert isinstance(one.distance_to_min_norm_, float)
    assert one.predict(A).shape == (6,)


def test_from_large_starts_only_two_phases_come_to_the_minimum_norm() -> None:
    A, y, w0 = system(5)
    found = {m: MinNormRegressor(m, g0=6.0, w0=w0, max_iter=50_000).fit(A, y) for m in METHODS}  # type: ignore[arg-type]
    assert found["two_phase"].distance_to_min_norm_ < 1e-6
    assert found["gd"].distance_to_min_norm_ > 3
    assert found["gd"].predicted_distance_ == pytest.approx(found["gd"].distance_to_min_norm_, rel=1e-6)
    small = MinNormRegressor("rpgd", g0=0.1, w0=w0, step_ratio=0.1, max_iter=50_000).fit(A, y)
    assert small.distance_to_min_norm_ < 1e-6


def test_the_seed_decides_and_a_given_start_is_taken_at_any_length() -> None:
    A, y, w0 = system()
    one, same, other = (MinNormRegressor("gd", seed=seed).fit(A, y).coef_ for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    short, long = (MinNormRegressor("gd", w0=length * w0).fit(A, y).coef_ for length in (0.1, 10))
    np.testing.assert_allclose(short, long)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "rgpd"}, "Did you mean 'rpgd'"),
        ({"g0": 0.0}, "g0 = 0"),
        ({"g0": "small"}, "g0 = 'small'"),
        ({"g0": np.ones(3)}, r"g0 is of shape \(3,\)"),
        ({"step_ratio": 0}, "step_ratio = 0"),
        ({"tol": -1}, "tol = -1"),
        ({"max_iter": 0}, "max_iter = 0"),
        ({"delta": math.nan}, "delta = nan"),
        ({"w0": np.zeros(15)}, "w is zero"),
        ({"w0": np.ones(4)}, r"w0 is of shape \(4,\)"),
        ({"w0": np.full(15, math.inf)}, "w0 holds values that are not finite"),
    ],
)
def test_settings_out_of_bounds_are_refused(fields: dict[str, Any], says: str) -> None:
    A, y, _ = system()
    with pytest.raises(InvalidValue, match=says):
        MinNormRegressor(**fields).fit(A, y)


def test_bad_data_are_refused_and_doubtful_ones_warned_of() -> None:
    A, y, _ = system()
    with pytest.raises(InvalidValue, match="NaN"):
        MinNormRegressor().fit(A, np.where(y > 0, math.nan, y))
    with pytest.raises(InvalidValue, match="target 0 is zero everywhere"):
        MinNormRegressor().fit(A, 0 * y)
    with pytest.raises(NotFittedError):
        MinNormRegressor().predict(A)
    with pytest.raises(InvalidValue, match="15 features"):
        MinNormRegressor("gd").fit(A, y).predict(A[:, :3])
    with pytest.warns(UserWarning, match="have rank 6"):
        MinNormRegressor("gd").fit(np.vstack([A, A[:1]]), np.append(y, 0.0))
    with pytest.warns(UserWarning, match="15 samples of 6 features leave no freedom"):
        fitted = MinNormRegressor("two_phase").fit(A.T, A.T @ np.ones(6))
    np.testing.assert_allclose(fitted.coef_, 1, atol=1e-6)
    with pytest.warns(ConvergenceWarning, match="after max_iter = 3"):
        MinNormRegressor(max_iter=3).fit(A, y)


def test_a_scale_that_crosses_zero_is_warned_of() -> None:
    A, y, _ = system()
    against = -np.linalg.pinv(A) @ y
    with pytest.warns(UserWarning, match="crossed 0"):
        MinNormRegressor("wn", g0=0.05, w0=against + 1e-3, step_ratio=4.0, max_iter=20_000).fit(A, y)


def test_iterations_that_leave_the_numbers_are_errors() -> None:
    A, y, _ = system()
    with np.errstate(all="ignore"), pytest.raises(TrainingDiverged, match="iteration 1 of gd"):
        MinNormRegressor("gd", g0=1e308).fit(1e5 * A, y)
    assert issubclass(TrainingDiverged, SparingError)


def test_nothing_is_warned_of_without_need() -> None:
    A, y, _ = system()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in METHODS:
            MinNormRegressor(method).fit(A, y)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([MinNormRegressor("gd", max_iter=500)])
def test_as_scikit_learn_wants_estimators(estimator: Any, check: Any) -> None:
    check(estimator)
