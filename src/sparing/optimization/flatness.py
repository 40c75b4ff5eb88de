"""How flat a minimum is: curvature of the loss, and how it rises around a point.

All three work on the model as it is, in evaluation mode, and leave it (weights, gradients, buffers, modes) untouched.
``data`` is what can be gone through many times: batches ``(inputs, targets)``, a list or a ``DataLoader`` that does not
shuffle in place of whole data sets. The loss is the mean over all samples, so batches count by their size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparing.core.errors import DataError, IncompatibleStep, InvalidValue

Batches = Iterable[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]


class Sharpness(NamedTuple):
    """Eigenvalues of the Hessian, largest magnitude first."""

    values: Float[Tensor, "k"]
    """λ, with their sign."""
    residuals: Float[Tensor, "k"]
    """‖Hv − λv‖ ÷ ‖λ‖: how far each pair is from being one; more than ``tol`` where the iterations did not suffice."""
    iterations: tuple[int, ...]
    """Hessian-vector products spent on each."""


class Estimate(NamedTuple):
    """A mean of random probes with its standard error."""

    mean: float
    stderr: float


def sharpness(
    model: nn.Module,
    loss_fn: Loss,
    data: Batches,
    k: int = 1,
    method: str = "power",
    iters: int = 100,
    tol: float = 1e-3,
    seed: int = 0,
) -> Sharpness:
    """The ``k`` eigenvalues of the loss's Hessian that are largest in magnitude, by power iteration with deflation.

    Args:
        model: any module; the Hessian is taken with respect to its parameters that require gradients.
        loss_fn: (outputs, targets) → mean loss over the batch, e.g. ``torch.nn.functional.cross_entropy``.
        data: batches (inputs, targets), see above.
        k: how many.
        method: "power".
        iters: Hessian-vector products for each eigenvalue at most; one costs about two gradients over all data.
        tol: relative residual at which an eigenvalue is good enough.
        seed: of the start vectors.

    Raises:
        InvalidValue: arguments outside their bounds, another method, k > number of parameters.
        DataError: no data, or a loss that is not finite.
        IncompatibleStep: the model has nothing to train.
    """
    if method != "power":
        raise InvalidValue(f"method = {method!r}; 'power' is needed")
    if iters < 1 or not tol > 0:
        raise InvalidValue(f"iters = {iters}, tol = {tol}; iters ≥ 1 and tol > 0 are needed")
    with _hessian(model, loss_fn, data) as (size, product):
        if not 1 <= k <= size:
            raise InvalidValue(f"k = {k}; 1 … {size}, the number of parameters, is possible")
        found: list[Tensor] = []
        values, residuals, iterations = [], [], []
        generator = torch.Generator().manual_seed(seed)
        for _ in range(k):
            v = _unit(_orthogonal(_normal(size, generator, model), found))
            for iteration in range(1, iters + 1):  # noqa: B007
                image = _orthogonal(product(v), found)
                value = torch.dot(v, image)
                residual = torch.linalg.vector_norm(image - value * v)
                if residual <= tol * value.abs() or not image.any():
                    break
                v = _unit(image)
            found.append(v)
            values.append(value)
            residuals.append(residual / value.abs() if value else residual)
            iterations.append(iteration)
    return Sharpness(torch.stack(values), torch.stack(residuals), tuple(iterations))


def hessian_trace(model: nn.Module, loss_fn: Loss, data: Batches, n: int = 100, seed: int = 0) -> Estimate:
    """The trace of the loss's Hessian: mean of zᵀHz over ``n`` probes z with entries ±1 (Hutchinson 1990).

    Arguments and errors as of :func:`sharpness`.
    """
    if n < 2:
        raise InvalidValue(f"n = {n}; at least 2 probes are needed for a standard error")
    with _hessian(model, loss_fn, data) as (size, product):
        generator = torch.Generator().manual_seed(seed)
        like = next(_trained(model))
        probes = []
        for _ in range(n):
            z = (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).to(like)
            probes.append(float(torch.dot(z, product(z))))
    return _estimate(probes)


def perturbation_flatness(
    model: nn.Module, loss: Callable[[nn.Module], Any], radius: float, n: int = 20, seed: int = 0
) -> Estimate:
    """L(θ + r u) − L(θ), mean over ``n`` random directions u with ‖u‖ = 1 over all parameters together.

    Args:
        model: copied; its parameters that require gradients are moved.
        loss: module in evaluation mode → L, a number.
        radius: r > 0, in units of the weights.
        n: directions.
        seed: of the directions.

    Raises:
        InvalidValue: arguments outside their bounds.
        DataError: a loss that is not finite.
        IncompatibleStep: the model has nothing to train.
    """
    if not 0 < radius < math.inf:
        raise InvalidValue(f"radius = {radius}; a finite number > 0 is needed")
    if n < 2:
        raise InvalidValue(f"n = {n}; at least 2 directions are needed for a standard error")
    _refuse_untrainable(model)
    moved = copy.deepcopy(model).eval()
    parameters, originals = list(_trained(moved)), [p.detach().clone() for p in _trained(model)]
    generator = torch.Generator().manual_seed(seed)
    size = sum(p.numel() for p in parameters)

    def value() -> float:
        found = float(loss(moved))
        if not math.isfinite(found):
            raise DataError(f"the loss is {found}; a finite one is needed")
        return found

    with torch.no_grad():
        here = value()
        rises = []
        for _ in range(n):
            direction = _unit(_normal(size, generator, moved))
            for parameter, original, part in zip(parameters, originals, _split(direction, parameters), strict=True):
                parameter.copy_(original + radius * part)
            rises.append(value() - here)
    return _estimate(rises)


# --- inside --------------------------------------------------------------------------------------------------------


@contextmanager
def _hessian(model: nn.Module, loss_fn: Loss, data: Batches) -> Iterator[tuple[int, Callable[[Tensor], Tensor]]]:
    """(number of parameters, v ↦ Hv) with the model in evaluation mode inside the block."""
    _refuse_untrainable(model)
    parameters = list(_trained(model))
    modes = {module: module.training for module in model.modules()}

    def product(vector: Tensor) -> Tensor:
        total, count = torch.zeros_like(vector), 0
        parts = _split(vector, parameters)
        for inputs, targets in data:
            loss = loss_fn(model(inputs), targets)
            if not torch.isfinite(loss).all():
                raise DataError(f"the loss is {loss.detach()} on the batch that begins at sample {count}")
            slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
            slope = sum((g * v).sum() for g, v in zip(slopes, parts, strict=True))
            rows: Sequence[Tensor] = (
                torch.autograd.grad(slope, parameters, materialize_grads=True)
                if isinstance(slope, Tensor) and slope.requires_grad  # else the loss is linear in every parameter
                else [torch.zeros_like(p) for p in parameters]
            )
            total += len(targets) * torch.cat([row.reshape(-1) for row in rows])
            count += len(targets)
        if not count:
            raise DataError("the data are empty (or an iterator that can be gone through only once)")
        return total / count

    model.eval()
    try:
        # other attention kernels have no second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield sum(p.numel() for p in parameters), product
    finally:
        for module, mode in modes.items():
            module.training = mode


def _trained(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.requires_grad)


def _refuse_untrainable(model: nn.Module) -> None:
    if next(_trained(model), None) is None:
        raise IncompatibleStep(f"the model {type(model).__name__} has no parameter that requires a gradient")


def _normal(size: int, generator: torch.Generator, model: nn.Module) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64).to(next(_trained(model)).detach())


def _split(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    pieces = torch.split(vector, [p.numel() for p in like])
    return [piece.view(p.shape) for piece, p in zip(pieces, like, strict=True)]


def _orthogonal(vector: Tensor, to: Sequence[Tensor]) -> Tensor:
    for other in to:
        vector = vector - torch.dot(other, vector) * other
    return vector


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)


def _estimate(values: Sequence[float]) -> Estimate:
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std()) / math.sqrt(len(values)))
