"""Measures of flatness beside what is known: quadratics, and Hessians worked out in full."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparing.core.errors import DataError, IncompatibleStep, InvalidValue
from sparing.core.fingerprint import fingerprint
from sparing.optimization.flatness import hessian_trace, perturbation_flatness, sharpness

EIGENVALUES = [-5.0, 3.0, 1.0, 0.5, 0.1, 0.0]


class Quadratic(nn.Module):
    """½ θᵀHθ with known eigenvalues."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(6, 6, generator=draw, dtype=torch.float64)).Q
        self.H = basis @ torch.diag(torch.tensor(EIGENVALUES, dtype=torch.float64)) @ basis.T
        self.first = nn.Parameter(torch.randn(4, generator=draw, dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(1, 2, generator=draw, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        theta = torch.cat([self.first, self.second.reshape(-1)])
        return 0.5 * theta @ self.H @ theta * x


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs * targets).mean()


ONES = [(torch.ones(3), torch.ones(3))]


def test_eigenvalues_and_trace_of_a_quadratic_are_found() -> None:
    found = sharpness(Quadratic(), mean_loss, ONES, k=5, iters=500, tol=1e-6)
    torch.testing.assert_close(found.values, torch.tensor(EIGENVALUES[:5], dtype=torch.float64), rtol=1e-5, atol=0)
    assert float(found.residuals.max()) <= 1e-6
    assert all(1 < n < 500 for n in found.iterations)
    trace = hessian_trace(Quadratic(), mean_loss, ONES, n=2000)
    assert abs(trace.mean - sum(EIGENVALUES)) < 4 * trace.stderr
    assert trace.stderr < 0.2


def test_too_few_iterations_show_in_the_residual() -> None:
    found = sharpness(Quadratic(), mean_loss, ONES, k=2, iters=2)
    assert found.iterations == (2, 2)
    assert float(found.residuals.min()) > 1e-3


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def data(sizes: tuple[int, ...] = (8, 8, 4)) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (20,), generator=draw)
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def full_hessian(model: nn.Module) -> Tensor:
    """By torch.func, over all data in one batch, in evaluation mode."""
    from torch.func import functional_call, hessian

    names, values = zip(*model.named_parameters(), strict=True)
    ((x, y),) = data((20,))

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([v.numel() for v in values])
        named = {n: p.view(v.shape) for n, p, v in zip(names, parts, values, strict=True)}
        return cross_entropy(functional_call(model.eval(), named, (x,)), y)

    return hessian(loss)(torch.cat([v.detach().reshape(-1) for v in values]))


def test_a_networks_curvature_is_that_of_its_full_hessian_however_the_data_are_cut() -> None:
    H = full_hessian(classifier())
    exact = torch.linalg.eigvalsh(H)
    exact = exact[exact.abs().argsort(descending=True)]
    for sizes in ((20,), (8, 8, 4)):
        found = sharpness(classifier(), cross_entropy, data(sizes), k=3, iters=2000, tol=1e-7)
        torch.testing.assert_close(found.values, exact[:3], rtol=1e-5, atol=1e-9)
    trace = hessian_trace(classifier(), cross_entropy, data(), n=400)
    assert abs(trace.mean - float(torch.trace(H))) < 4 * trace.stderr


def test_flatness_under_perturbation_is_half_the_trace_times_the_radius_squared_over_the_dimension() -> None:
    class Bowl(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.H = self.H @ self.H
            nn.init.zeros_(self.first)
            nn.init.zeros_(self.second)

    found = perturbation_flatness(Bowl(), lambda m: m(torch.ones(())), radius=0.3, n=4000)
    expected = 0.5 * 0.3**2 * sum(x * x for x in EIGENVALUES) / 6
    assert abs(found.mean - expected) < 4 * found.stderr
    assert found.stderr < 0.05 * expected


def measured(model: nn.Module, seed: int = 0) -> list[Any]:
    batches = data()
    return [
        *sharpness(model, cross_entropy, batches, k=2, iters=5, seed=seed)[0].tolist(),
        hessian_trace(model, cross_entropy, batches, n=3, seed=seed),
        perturbation_flatness(
            model, lambda m: sum(cross_entropy(m(x), y) for x, y in batches), radius=0.1, n=3, seed=seed
        ),
    ]


def test_the_model_and_the_generators_are_left_as_they_were_and_the_seed_decides() -> None:
    model = classifier().train()
    model[2].eval()
    loss = cross_entropy(model(data((20,))[0][0]), data((20,))[0][1])
    loss.backward()
    before = [fingerprint(model), [m.training for m in model.modules()], [p.grad.clone() for p in model.parameters()]]
    state = torch.get_rng_state()
    once = measured(model)
    with torch.no_grad():
        assert measured(model) == once
    assert measured(model, seed=1) != once
    assert torch.equal(torch.get_rng_state(), state)
    after = [fingerprint(model), [m.training for m in model.modules()], [p.grad for p in model.parameters()]]
    assert before[:2] == after[:2]
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))


def test_frozen_parameters_unused_ones_linear_losses_and_attention() -> None:
    model = Quadratic()
    model.second.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    top = torch.linalg.eigvalsh(model.H[:4, :4]).abs().max()
    found = sharpness(model, mean_loss, ONES, iters=1000, tol=1e-8)
    torch.testing.assert_close(found.values.abs()[0], top, rtol=1e-6, atol=0)
    linear = nn.Linear(2, 1)
    flat = sharpness(linear, lambda outputs, _: outputs.mean(), [(torch.ones(3, 2), torch.ones(3))], k=2)
    assert flat.values.tolist() == flat.residuals.tolist() == [0, 0]

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            return nn.functional.scaled_dot_product_attention(x, x, x).sum((1, 2))

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert float(sharpness(Attention(), lambda o, t: (o**2).mean(), [(x, x)]).values.abs()[0]) > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "lanczos"}, "method = 'lanczos'"),
        ({"k": 0}, "k = 0"),
        ({"k": 7}, "k = 7; 1 … 6"),
        ({"iters": 0}, "iters = 0"),
        ({"tol": 0}, "tol = 0"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        sharpness(Quadratic(), mean_loss, ONES, **options)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InvalidValue, match="n = 1"):
        hessian_trace(Quadratic(), mean_loss, ONES, n=1)
    for radius in (0, math.nan, math.inf):
        with pytest.raises(InvalidValue, match="radius"):
            perturbation_flatness(Quadratic(), lambda m: 0.0, radius)
    with pytest.raises(InvalidValue, match="n = 1"):
        perturbation_flatness(Quadratic(), lambda m: 0.0, 1.0, n=1)
    with pytest.raises(DataError, match="the loss is nan"):
        perturbation_flatness(Quadratic(), lambda m: math.nan, 1.0)
    with pytest.raises(DataError, match="empty"):
        sharpness(Quadratic(), mean_loss, [])
    with pytest.raises(DataError, match="begins at sample 3"):
        sharpness(Quadratic(), mean_loss, [*ONES, (torch.full((3,), math.nan), torch.ones(3))])
    frozen = Quadratic().requires_grad_(False)
    for call in (
        lambda: sharpness(frozen, mean_loss, ONES),
        lambda: hessian_trace(frozen, mean_loss, ONES),
        lambda: perturbation_flatness(frozen, lambda m: 0.0, 1.0),
    ):
        with pytest.raises(IncompatibleStep, match="Quadratic has no parameter"):
            call()
