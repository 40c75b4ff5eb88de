"""WN and rPGD beside independent code: least squares beside NumPy, layers beside PyTorch's weight_norm."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparing.optimization.min_norm import (
    LeastSquares,
    first_phase,
    largest_eigenvalue,
    predict_limit,
    rpgd_step,
    two_phase,
    wn_step,
)
from sparing.optimization.min_norm_regressor import MinNormRegressor
from sparing.optimization.rpgd import RPGD
from sparing.optimization.weight_norm import bake, scale_and_direction, unit_direction, weight_normalize

Arrays = Mapping[str, np.ndarray]

SMALL_STEPS = 60_000
SMALL_ETA = 0.004
"""Times 1/λ₁; both as the fixtures' README defines them, like the steps of phase II."""
SECOND_PHASE = 4000
NOISE = 1e-11
"""Residuals below it are rounding."""


def close(found: Any, expected: np.ndarray, what: str, rtol: float, atol: float = 0.0) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, {expected.shape} in the reference"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=what)


# --- least squares


def settings_of(arrays: Arrays, kind: str) -> list[dict[str, Any]]:
    """What the names of the arrays of one kind say of their settings."""
    names = [name.removeprefix(f"{kind}_") for name in arrays if name.startswith(f"{kind}_g0=")]
    found = []
    for name in names:
        parts = re.fullmatch(r"g0=([0-9.e+-]+)(?:_c=([0-9.e+-]+))?(?:_traj)?", name)
        assert parts, f"{kind}_{name}: not understood"
        g0, c = parts.groups()
        found.append({"name": name, "g0": float(g0)} | ({} if c is None else {"c": float(c)}))
    return found


def problem_of(arrays: Arrays) -> tuple[LeastSquares, set[str]]:
    A, y = arrays["A"], arrays["y"]
    problem = LeastSquares.of(A, y)
    assert problem.rank == len(A)
    close(problem.solution, arrays["x_min_norm"], "x_min_norm", 1e-9, 1e-12)
    close(problem.norm, arrays["g_star"], "g_star", 1e-9)
    close(problem.eigenvalues, arrays["eig_AAt"], "eig_AAt", 1e-9, 1e-12)
    close(problem.null_part(np.eye(A.shape[1])), arrays["null_projector"], "null_projector", 1e-9, 1e-12)
    close(largest_eigenvalue(A), arrays["eig_AAt"][-1], "largest eigenvalue by power iteration", 1e-6)
    close(0.1 / problem.lam, arrays["eta"], "eta", 1e-9)
    white = problem.whitened()
    close(white.A @ white.A.T, np.eye(len(A)), "whitened", 0, 1e-10)
    close(white.A @ arrays["x_min_norm"], white.y, "whitened, the same solution", 1e-9, 1e-10)
    return problem, {"A", "y", "x_min_norm", "g_star", "eig_AAt", "null_projector", "eta"}


def trajectories(arrays: Arrays) -> set[str]:
    """Every state after ``traj_steps`` steps of η and γ = cη."""
    steps, eta = [int(t) for t in arrays["traj_steps"]], float(arrays["eta"])
    compared = {"traj_steps", "wn_w0_norm"}
    for kind, step, start in (
        ("wn", wn_step, float(arrays["wn_w0_norm"]) * arrays["w0"]),
        ("rpgd", rpgd_step, arrays["w0"]),
    ):
        for setting in settings_of({name: a for name, a in arrays.items() if name.endswith("_traj")}, kind):
            w, g, rows = start, setting["g0"], []
            for t in range(max(steps) + 1):
                if t in steps:
                    rows.append(np.concatenate([[g], w]))
                w, g = step(arrays["A"], arrays["y"], w, g, eta, setting["c"] * eta)
            name = f"{kind}_{setting['name']}"
            close(np.stack(rows), arrays[name], name, 1e-9, 1e-12)
            compared.add(name)
    return compared


def limits(arrays: Arrays, problem: LeastSquares) -> set[str]:
    """Limits of the flow in closed form, and small steps towards them."""
    w0, g_star = arrays["w0"], float(arrays["g_star"])
    a = float(np.linalg.norm(problem.null_part(w0)) ** 2)
    settings = settings_of(arrays, "flow_g_inf")
    compared = set()
    for setting in settings:
        found = predict_limit(setting["g0"], a, g_star, setting["c"])
        inf, excess = f"flow_g_inf_{setting['name']}", f"flow_excess_{setting['name']}"
        close(found.g, arrays[inf], inf, 1e-8)
        close(found.distance**2, arrays[excess] ** 2, f"{excess}, squared", 1e-8, 1e-13 * g_star**2)
        compared |= {inf, excess}
    # all settings side by side, as targets of one system
    targets = len(settings)
    y, w = np.repeat(arrays["y"][:, None], targets, axis=1), np.repeat(w0[:, None], targets, axis=1)
    g, c = (np.array([setting[name] for setting in settings]) for name in ("g0", "c"))
    eta = SMALL_ETA / problem.lam
    step = inspect.unwrap(rpgd_step)  # with --shapes each call would take ten times as long
    for _ in range(SMALL_STEPS):
        w, g = step(arrays["A"], y, w, g, eta, c * eta)
    distance = np.linalg.norm(g * w - problem.solution[:, None], axis=0)
    residual = np.linalg.norm(arrays["A"] @ (g * w) - y, axis=0)
    for k, setting in enumerate(settings):
        excess, rest = (f"rpgd_small_step_{kind}_{setting['name']}" for kind in ("excess", "residual"))
        close(distance[k], arrays[excess], excess, 1e-6)
        close(residual[k], arrays[rest], rest, 1e-6, NOISE)
        predicted = predict_limit(setting["g0"], a, g_star, setting["c"]).distance
        if residual[k] <= NOISE:
            assert abs(distance[k] - predicted) <= max(0.02 * predicted, 2e-3), f"{excess} and the closed form"
        compared |= {excess, rest}
    return compared


def gradient_descent(arrays: Arrays, problem: LeastSquares) -> set[str]:
    compared = set()
    for setting in settings_of(arrays, "gd_final"):
        start = setting["g0"] * arrays["w0"]
        final, excess = f"gd_final_{setting['name']}", f"gd_excess_{setting['name']}"
        close(problem.gd_limit(start), arrays[final], final, 1e-9, 1e-12)
        close(np.linalg.norm(problem.null_part(start)), arrays[excess], excess, 1e-9)
        fitted = MinNormRegressor("gd", g0=setting["g0"], w0=arrays["w0"], tol=1e-12, max_iter=10**5)
        fitted.fit(arrays["A"], arrays["y"])
        close(fitted.coef_, arrays[final], f"{final}, iterated", 1e-7, 1e-8)
        close(fitted.distance_to_min_norm_, arrays[excess], f"{excess}, iterated", 1e-7)
        close(fitted.predicted_distance_, arrays[excess], f"{excess}, predicted", 1e-9)
        compared |= {final, excess}
    return compared


def phases(arrays: Arrays, problem: LeastSquares) -> set[str]:
    compared = set()
    for setting in settings_of(arrays, "two_phase_wperp"):
        names = {
            kind: f"two_phase_{kind}_{setting['name']}"
            for kind in ("wperp", "w_end_phase1", "final_excess", "final_residual")
        }
        decay, g0 = arrays[names["wperp"]], setting["g0"]
        path = [w for w, _ in itertools.islice(first_phase(problem, arrays["w0"], g0), len(decay) - 1)]
        null = [np.linalg.norm(problem.null_part(w)) for w in (arrays["w0"], *path)]
        close(np.array(null), decay, names["wperp"], 1e-6, 1e-12)
        close(path[-1], arrays[names["w_end_phase1"]], names["w_end_phase1"], 1e-6, 1e-12)
        both = two_phase(problem, arrays["w0"], g0, first=len(path), bound=float(arrays["g_star"]))
        w, g = next(itertools.islice(both, len(path) + SECOND_PHASE - 1, None))
        x = g * w
        close(np.linalg.norm(x - problem.solution), arrays[names["final_excess"]], names["final_excess"], 0.01, 1e-12)
        residual = np.linalg.norm(problem.A @ x - problem.y)
        close(residual, arrays[names["final_residual"]], names["final_residual"], 0, NOISE)
        compared |= set(names.values())
    return compared


def least_squares(arrays: Arrays) -> set[str]:
    problem, compared = problem_of(arrays)
    assert np.linalg.norm(arrays["w0"]) == pytest.approx(1, rel=1e-12)
    compared |= trajectories(arrays) | limits(arrays, problem) | gradient_descent(arrays, problem)
    return compared | phases(arrays, problem) | {"w0"}


# --- layers


def layer_of(case: Arrays) -> nn.Module:
    """A plain layer with the weight from before the parametrisation."""
    weight = torch.tensor(case["weight_before"])
    if weight.ndim == 2:
        layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    else:
        assert case["out"].shape[2:] == case["x"].shape[2:], "stride 1 and padding that keeps the size"
        padding = tuple(size // 2 for size in weight.shape[2:])
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], padding=padding, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": torch.tensor(case["bias"])})
    return layer


def dim_of(g: np.ndarray) -> int | None:
    axes = [axis for axis, size in enumerate(g.shape) if size > 1]
    assert len(axes) == (g.ndim > 0), f"g of shape {g.shape} names no dimension"
    return axes[0] if axes else None


def run(layer: nn.Module, case: Arrays) -> tuple[Tensor, Tensor]:
    """(output, input) after backward of Σ out · cotangent."""
    x = torch.tensor(case["x"], requires_grad=True)
    out = layer(x)
    (out * torch.tensor(case["cotangent"])).sum().backward()
    return out, x


def fill(layer: nn.Module, g: np.ndarray, v: np.ndarray) -> tuple[nn.Parameter, nn.Parameter]:
    scale, direction = scale_and_direction(layer)
    assert scale.shape == g.shape
    assert direction.shape == v.shape
    with torch.no_grad():
        scale.copy_(torch.tensor(g))
        direction.copy_(torch.tensor(v))
    return scale, direction


def weight_norm_layer(case: Arrays, name: str) -> set[str]:
    layer, before = layer_of(case), torch.tensor(case["weight_before"])
    dim = dim_of(case["g"])
    weight_normalize(layer, dim=dim)
    assert torch.equal(layer.weight, before), f"{name}: the weight changed when it was parametrised"
    scale, direction = fill(layer, case["g"], case["v"])
    out, x = run(layer, case)
    found = {"weight": layer.weight, "out": out, "grad_g": scale.grad, "grad_v": direction.grad, "grad_x": x.grad}
    for what, value in found.items():
        close(value, case[what], f"{name}.{what}", 1e-9, 1e-12)
    bake(layer)
    assert torch.equal(layer(x), out), f"{name}: baking changed the outputs"
    return {"weight_before", "g", "v", "bias", "x", "cotangent", *found}


def rpgd_layer(case: Arrays, name: str) -> set[str]:
    """One step of the optimizer, with both scalings."""
    dim = dim_of(case["g"])
    for scaling, after in (("none", "rpgd_w_after"), ("inverse_square", "rpgd_w_after_g2scaled")):
        layer = unit_direction(layer_of(case), dim=dim)
        scale, direction = fill(layer, case["g"], case["rpgd_w_before"])
        optimizer = RPGD(layer, float(case["rpgd_lr_w"]), float(case["rpgd_lr_g"]), g_scaling=scaling)
        run(layer, case)
        assert direction.grad is not None
        close(direction.grad, case["g"] * case["rpgd_grad_weight"], f"{name}.rpgd_grad_weight", 1e-9, 1e-12)
        close(scale.grad, case["rpgd_grad_g"], f"{name}.rpgd_grad_g", 1e-9, 1e-12)
        optimizer.step()
        close(direction, case[after], f"{name}.{after}", 1e-9, 1e-12)
        close(scale, case["rpgd_g_after"], f"{name}.rpgd_g_after", 1e-9, 1e-12)
    return {f"rpgd_{what}" for what in ("grad_weight", "grad_g", "w_before", "lr_w", "lr_g", "w_after", "g_after")} | {
        "rpgd_w_after_g2scaled"
    }


def layers(arrays: Arrays) -> set[str]:
    compared: set[str] = set()
    for name in sorted({key.rpartition(".")[0] for key in arrays}):
        case = {key.rpartition(".")[2]: a for key, a in arrays.items() if key.rpartition(".")[0] == name}
        found = weight_norm_layer(case, name)
        if "rpgd_w_before" in case:
            found |= rpgd_layer(case, name)
        compared |= {f"{name}.{key}" for key in found}
    return compared


# --- all


def compare(arrays: Arrays) -> set[str]:
    return least_squares(arrays) if "A" in arrays else layers(arrays)


def opened(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def one_with(files: Iterable[Path], marker: str) -> dict[str, np.ndarray]:
    return next(arrays for arrays in map(opened, files) if any(marker in name for name in arrays))


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("wn_rpgd"):
        arrays = opened(file)
        assert "A" in arrays or any(name.endswith(".weight_before") for name in arrays), f"{file.name}: not understood"
        compared = compare(arrays)
        assert compared == arrays.keys(), f"{file.name}: missing or not understood: {sorted(arrays.keys() ^ compared)}"
        count += len(compared)
    record_property("arrays", count)
    print(f"WN / rPGD: {count} arrays read, all that are outputs compared")


def test_another_start_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("wn_rpgd"), "null_projector")
    with pytest.raises(AssertionError, match="traj"):
        trajectories(arrays | {"w0": arrays["w0"][::-1].copy()})


def test_another_cotangent_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("wn_rpgd"), "rpgd_w_before")
    name = next(name for name in arrays if name.endswith("cotangent"))
    with pytest.raises(AssertionError, match="grad_g"):
        layers(arrays | {name: arrays[name][::-1].copy()})
