"""LEAP beside numbers worked out from its formulas: trajectories, moments on a quadratic, escape times."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparing.optimization.leap import LEAP, apply_leap, leap_factor
from sparing.optimization.leap_theory import escape_time, second_moment_step, stable_curvature

OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd_wd": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02),
}
"""As the fixtures' README defines them."""
MODES = ("relative", "absolute", "scalar")
SCHEDULES = ("constant", "cosine")
STANDARD_ERRORS = 4.0
PARTICLES = 4000

Arrays = Mapping[str, np.ndarray]


class Given(LEAP):
    """LEAP that is told its ξ instead of drawing."""

    xi: dict[Tensor, np.ndarray]
    xi_scalar: np.ndarray

    def _draw(self, parameter: Tensor) -> Tensor:
        given = self.xi_scalar if self.granularity == "scalar" else self.xi[parameter]
        return torch.as_tensor(given[self.steps])


def close(found: Any, expected: np.ndarray, what: str, rtol: float, atol: float) -> int:
    np.testing.assert_allclose(np.asarray(found), expected, rtol=rtol, atol=atol, err_msg=what)
    return 1


# --- trajectories


def inputs(arrays: Arrays) -> dict[str, list[np.ndarray]]:
    numbers = sorted(int(name.removeprefix("param0_")) for name in arrays if name.startswith("param0_"))
    return {kind: [arrays[f"{kind}_{i}"] for i in numbers] for kind in ("param0", "grads", "xi")}


def trajectory(
    arrays: Arrays, optimizer: str, mode: str, schedule: str, through: str
) -> tuple[list[np.ndarray], np.ndarray]:
    """([T, …] for each parameter, [T] learning rates), through the class or through the pure functions."""
    given = inputs(arrays)
    parameters = [torch.tensor(start, requires_grad=True) for start in given["param0"]]
    steps = len(arrays["xi_scalar"])
    rho, sigma = float(arrays["rho"]), float(arrays["sigma_abs"])
    base = OPTIMIZERS[optimizer](parameters)
    leap = Given(
        base,
        rho=rho,
        mode="absolute" if mode == "absolute" else "relative",
        sigma=sigma if mode == "absolute" else None,
        granularity="scalar" if mode == "scalar" else "per_parameter",
    )
    leap.xi, leap.xi_scalar = dict(zip(parameters, given["xi"], strict=True)), arrays["xi_scalar"]
    outermost: torch.optim.Optimizer = leap if through == "class" else base
    scheduler = (
        torch.optim.lr_scheduler.CosineAnnealingLR(outermost, T_max=steps, eta_min=1e-3)
        if schedule == "cosine"
        else torch.optim.lr_scheduler.ConstantLR(outermost, factor=1.0)
    )
    path: list[list[np.ndarray]] = [[] for _ in parameters]
    rates = []
    for t in range(steps):
        for parameter, gradients in zip(parameters, given["grads"], strict=True):
            parameter.grad = torch.tensor(gradients[t])
        (rate,) = scheduler.get_last_lr()
        rates.append(rate)
        before = [p.detach().clone() for p in parameters]
        outermost.step()
        if through == "functions":
            for old, parameter, xi in zip(before, parameters, given["xi"], strict=True):
                draws = torch.as_tensor(arrays["xi_scalar"][t] if mode == "scalar" else xi[t])
                factor = leap_factor(draws, sigma / rate if mode == "absolute" else rho)
                with torch.no_grad():
                    parameter.copy_(apply_leap(old, parameter.detach(), factor))
        scheduler.step()
        for points, parameter in zip(path, parameters, strict=True):
            points.append(parameter.detach().numpy().copy())
    return [np.stack(points) for points in path], np.array(rates)


def trajectories(arrays: Arrays) -> set[str]:
    """Compare every trajectory; names of the arrays compared."""
    compared = set()
    wanted = {tuple(name.split(".")[:3]) for name in arrays if name.count(".") == 3}
    for optimizer, mode, schedule in sorted(wanted):
        assert optimizer in OPTIMIZERS, f"unknown optimizer {optimizer!r}"
        assert mode in MODES, f"unknown mode {mode!r}"
        assert schedule in SCHEDULES, f"unknown schedule {schedule!r}"
        for through in ("class", "functions"):
            path, rates = trajectory(arrays, optimizer, mode, schedule, through)
            for i, points in enumerate(path):
                name = f"{optimizer}.{mode}.{schedule}.param_{i}"
                close(points, arrays[name], f"{name} through the {through}", 1e-12, 1e-13)
                compared.add(name)
            name = f"{optimizer}.{schedule}.lr"
            close(rates, arrays[name], name, 1e-12, 1e-13)
            compared.add(name)
    return compared


# --- moments on a quadratic


def quadratic(arrays: Arrays) -> set[str]:
    """The recursions exactly, and the class by simulation."""
    H, start = torch.tensor(arrays["quad_H"]), torch.tensor(arrays["quad_x0"])
    eta, rho = float(arrays["quad_eta"]), float(arrays["rho"])
    names = {"per_parameter": "quad_second_moment_param", "scalar": "quad_second_moment_scalar"}
    for granularity, name in names.items():
        S = torch.outer(start, start)
        for t, expected in enumerate(arrays[name]):
            close(S, expected, f"{name}[{t}]", 1e-10, 1e-12)
            S = second_moment_step(S, H, eta, rho, granularity)
    means = simulate(H, start, eta, 0.0, len(arrays["quad_mean"]) - 1, "per_parameter", 1, seed=0)
    close(means[:, 0], arrays["quad_mean"], "the unperturbed path is the mean path", 1e-10, 1e-12)
    for granularity, name in names.items():
        # two looks: by chance alone one entry in some thousands lies beyond four standard errors
        worst = [_worst(arrays, H, start, eta, rho, granularity, name, seed) for seed in (0, 1)]
        assert min(worst) <= STANDARD_ERRORS, f"{name}: {worst} standard errors from the exact moments"
    return {"quad_mean", *names.values()}


def simulate(H: Tensor, start: Tensor, eta: float, rho: float, steps: int, granularity: str, n: int, seed: int) -> Any:
    """Positions [steps + 1, n, d] of independent runs of SGD with LEAP on ½xᵀHx."""
    if granularity == "per_parameter":  # a tensor of n rows is n runs
        x = start.repeat(n, 1).requires_grad_()
        runs = [(x, LEAP(torch.optim.SGD([x], lr=eta), rho=rho, generator=seed))]
    else:  # an optimizer for each
        points = [start.clone()[None].requires_grad_() for _ in range(n)]
        runs = [
            (x, LEAP(torch.optim.SGD([x], lr=eta), rho=rho, granularity="scalar", generator=seed * n + i))
            for i, x in enumerate(points)
        ]
    path = [start.repeat(n, 1).numpy()]
    for _ in range(steps):
        for x, optimizer in runs:
            x.grad = x.detach() @ H
            optimizer.step()
        path.append(np.concatenate([x.detach().numpy().copy() for x, _ in runs]))
    return np.stack(path)


def _worst(
    arrays: Arrays, H: Tensor, start: Tensor, eta: float, rho: float, granularity: str, name: str, seed: int
) -> float:
    """Largest distance from the exact first and second moments, in standard errors."""
    n = 20_000 if granularity == "per_parameter" else 2000
    path = simulate(H, start, eta, rho, len(arrays[name]) - 1, granularity, n, seed)
    worst = 0.0
    for t, x in enumerate(path):
        for sample, expected in ((x, arrays["quad_mean"][t]), (np.einsum("ni,nj->nij", x, x), arrays[name][t])):
            error = sample.std(axis=0, ddof=1) / math.sqrt(n)
            distance = np.abs(sample.mean(axis=0) - expected)
            worst = max(worst, float((distance / np.maximum(error, 1e-10)).max()))  # at the start nothing varies
    return worst


def stability(arrays: Arrays) -> set[str]:
    """The formula, and the second moment that grows just above the limit and shrinks just below."""
    eta = float(arrays["quad_eta"])
    for rho, limit in zip(arrays["stab_rho"], arrays["stab_lambda_max_scalar"], strict=True):
        close(stable_curvature(eta, float(rho)), limit, f"largest stable curvature at rho = {rho}", 1e-10, 0)
        for factor, grows in ((1 - 1e-6, False), (1 + 1e-6, True)):
            one = torch.ones(1, 1, dtype=torch.float64)
            after = second_moment_step(one, factor * float(limit) * one, eta, float(rho), "scalar")
            assert (float(after) > 1) == grows, (rho, factor)
    return {"stab_rho", "stab_lambda_max_scalar"}


# --- escape


def escapes(arrays: Arrays) -> set[str]:
    setup = json.loads(str(arrays["setup"]))
    rows = arrays["rho_c_curvature_meantime_stderr_unescaped"]
    for number, (rho, c, curvature, mean, stderr, unescaped) in enumerate(rows):
        assert unescaped == 0, f"row {number} leaves out {unescaped} particles: its mean is no mean"
        close(8 * setup["dL"] / c**2, curvature, f"curvature of row {number}", 1e-12, 0)
        found = escape_time(
            float(rho), float(c), eta=setup["eta"], batch=setup["B"], barrier=setup["dL"], particles=PARTICLES
        )
        assert found.unescaped == 0
        apart = abs(found.mean - mean) / math.hypot(found.stderr, stderr)
        assert apart <= STANDARD_ERRORS, (
            f"rho = {rho}, c = {c}: {found.mean:.4g} ± {found.stderr:.2g} steps here, {mean:.4g} ± {stderr:.2g} there"
        )
    return {"setup", "rho_c_curvature_meantime_stderr_unescaped"}


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("leap"):
        with np.load(file, allow_pickle=False) as opened:
            arrays = dict(opened)
        compared: set[str] = set()
        if "xi_scalar" in arrays:
            found = trajectories(arrays)
            assert found, f"{file.name}: draws, but no trajectory"
            compared |= found | {"rho", "sigma_abs", "xi_scalar"}
            compared |= {name for name in arrays if name.startswith(("param0_", "grads_", "xi_"))}
        if "quad_H" in arrays:
            compared |= quadratic(arrays) | {"quad_H", "quad_eta", "quad_x0", "rho"}
        if "stab_rho" in arrays:
            compared |= stability(arrays) | {"quad_eta"}
        if "setup" in arrays:
            compared |= escapes(arrays)
        assert compared == arrays.keys(), f"{file.name}: not understood: {sorted(arrays.keys() - compared)}"
        count += len(compared)
    record_property("arrays", count)
    print(f"LEAP: {count} arrays read, all that are outputs compared")


def test_other_draws_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    """The comparison fails when the draws come in another order."""
    file = next(file for file in oracles("leap") if "xi_scalar" in np.load(file, allow_pickle=False))
    arrays = dict(np.load(file, allow_pickle=False))
    wrong = arrays | {"xi_0": np.roll(arrays["xi_0"], 1, axis=0)}
    with pytest.raises(AssertionError, match="param_0"):
        trajectories(wrong)
