"""What can be worked out about LEAP, beside simulations of small size."""

from __future__ import annotations

import math

import pytest
import torch

from sparing.core.errors import InvalidValue
from sparing.optimization.leap_theory import escape_time, second_moment_step, stable_curvature


def test_without_noise_the_second_moment_is_the_square_of_the_path() -> None:
    H = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    after = (torch.eye(2, dtype=torch.float64) - 0.1 * H) @ x
    for granularity in ("per_parameter", "scalar"):
        S = second_moment_step(torch.outer(x, x), H, 0.1, 0.0, granularity)
        torch.testing.assert_close(S, torch.outer(after, after))


def test_one_dimension_knows_no_granularity_and_noise_adds_its_power() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for granularity in ("per_parameter", "scalar"):
        S = second_moment_step(one, 2 * one, 0.25, 0.5, granularity)
        assert float(S) == pytest.approx((1 - 0.5) ** 2 + (0.25 * 0.5 * 2) ** 2)


def test_the_limit_of_scalar_noise_is_that_of_a_rate_larger_by_one_plus_rho_squared() -> None:
    assert stable_curvature(0.1, 0) == pytest.approx(20)
    assert stable_curvature(0.1, 1.5) == pytest.approx(stable_curvature(0.1 * (1 + 1.5**2), 0))


def test_noise_and_sharpness_shorten_the_escape() -> None:
    times = {(rho, c): escape_time(rho, c, particles=500) for rho in (0.0, 1.0) for c in (0.5, 0.7)}
    for found in times.values():
        assert found.unescaped == 0
        assert found.stderr < 0.06 * found.mean
    assert times[1.0, 0.5].mean < times[1.0, 0.7].mean
    assert times[1.0, 0.7].mean < times[0.0, 0.7].mean
    assert times[1.0, 0.5].mean < times[0.0, 0.5].mean


def test_the_seed_decides_and_those_that_stay_are_counted() -> None:
    assert escape_time(1.0, 0.5, particles=200, seed=1) == escape_time(1.0, 0.5, particles=200, seed=1)
    assert escape_time(1.0, 0.5, particles=200, seed=1) != escape_time(1.0, 0.5, particles=200, seed=2)
    short = escape_time(0.0, 0.5, particles=200, max_steps=20)
    assert 0 < short.unescaped < 200
    assert short.mean <= 20
    assert escape_time(1.0, 0.5, particles=1).stderr == math.inf


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InvalidValue, match="granularity = 'per_tensor'"):
        second_moment_step(torch.eye(2), torch.eye(2), 0.1, 0.1, "per_tensor")
    with pytest.raises(InvalidValue, match="eta = 0"):
        stable_curvature(0, 1)
    for name in ("c", "eta", "batch", "barrier", "particles", "max_steps"):
        with pytest.raises(InvalidValue, match=f"{name} = -1"):
            escape_time(**({"rho": 0.1, "c": 1.0} | {name: -1}))  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="no particle escaped within max_steps = 1"):
        escape_time(0.0, 2.0, particles=5, max_steps=1)
    with pytest.raises(InvalidValue, match="rho = -1"):
        escape_time(-1.0, 1.0)
