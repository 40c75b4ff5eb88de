"""What learning-rate perturbation does, where it can be worked out: on quadratics, and out of a well.

Per step LEAP adds the covariance η²ρ² diag(E[g²]) to the gradient's own noise. Near a minimum, where mini-batch noise
dominates the gradient, that is plain SGD with 1 + ρ² times the noise power at the old rate: a higher temperature.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparing.core.errors import InvalidValue
from sparing.optimization.leap import apply_leap, leap_factor


def second_moment_step(
    S: Float[Tensor, "d d"], H: Float[Tensor, "d d"], eta: float, rho: float, granularity: str = "per_parameter"
) -> Float[Tensor, "d d"]:
    """E[θθᵀ] after one step on ½ θᵀHθ at rate η, from E[θθᵀ] = ``S`` before it. Exact.

    S' = (I − ηH) S (I − ηH) + η²ρ² N, with N = diag(diag(HSH)) for independent noise on each parameter and N = HSH
    for one number on all ("scalar").

    Raises:
        InvalidValue: another granularity than these two.
    """
    if granularity not in ("per_parameter", "scalar"):
        raise InvalidValue(f"granularity = {granularity!r}; 'per_parameter' or 'scalar' is needed")
    contraction = torch.eye(len(H), dtype=H.dtype, device=H.device) - eta * H
    power = H @ S @ H
    noise = power if granularity == "scalar" else torch.diag(torch.diagonal(power))
    return contraction @ S @ contraction.mT + (eta * rho) ** 2 * noise


def stable_curvature(eta: float, rho: float) -> float:
    """2 / (η (1 + ρ²)): below this curvature, in every direction, scalar noise keeps E[θθᵀ] bounded.

    For ρ = 0 the limit 2/η of gradient descent; that of plain gradient descent at rate η (1 + ρ²) is the same.
    """
    if not eta > 0:
        raise InvalidValue(f"eta = {eta}; more than 0 is needed")
    return 2 / (eta * (1 + rho**2))


class EscapeTime(NamedTuple):
    """Steps until escape, over particles that escaped."""

    mean: float
    stderr: float
    """Standard error of the mean."""
    unescaped: int
    """Particles still inside after ``max_steps``; the mean leaves them out and is too low when there are any."""


def escape_time(
    rho: float,
    c: float,
    *,
    eta: float = 0.05,
    batch: float = 1.0,
    barrier: float = 0.25,
    particles: int = 2000,
    max_steps: int = 1_000_000,
    seed: int = 0,
) -> EscapeTime:
    """Mean number of noisy gradient steps with LEAP from the bottom of a well to the top of its wall, simulated.

    The potential is L(x) = ΔL (1 − (x/c)²)²: two wells at ±c of curvature k = 8ΔL/c², a barrier of height ΔL at 0.
    Particles start at −c, see the gradient with noise N(0, k/B), and have escaped when x ≥ 0; x is kept ≥ −3c. The
    density-diffusion argument (Xie et al. 2021, arXiv:2002.03495) gives log τ ≈ const + 2BΔL / (η (1 + ρ²) k), so
    sharp wells are left exponentially sooner than flat ones.

    Args:
        rho: ρ of the perturbation.
        c: half the distance between the wells; larger is flatter.
        eta: η.
        batch: B.
        barrier: ΔL.
        particles: independent particles; each draws its own noise and ξ at each step.
        max_steps: particles that take longer count as unescaped.
        seed: of a generator of its own.

    Raises:
        InvalidValue: a setting that is not positive, or no particle escaped.
    """
    settings = {"c": c, "eta": eta, "batch": batch, "barrier": barrier, "particles": particles, "max_steps": max_steps}
    for name, value in settings.items():
        if not value > 0:
            raise InvalidValue(f"{name} = {value}; more than 0 is needed")
    noise = math.sqrt(8 * barrier / c**2 / batch)
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((particles,), -c, dtype=torch.float64)
    times: list[Tensor] = []
    step = 0
    while len(x) and step < max_steps:
        step += 1
        draws, xi = torch.randn(2, len(x), generator=generator, dtype=torch.float64)
        gradient = -4 * barrier * x / c**2 * (1 - (x / c) ** 2) + noise * draws
        x = apply_leap(x, x - eta * gradient, leap_factor(xi, rho)).clamp_(min=-3 * c)
        out = x >= 0
        if escaped := int(out.sum()):
            times.append(torch.full((escaped,), float(step), dtype=torch.float64))
            x = x[~out]
    if not times:
        raise InvalidValue(f"no particle escaped within max_steps = {max_steps}")
    steps = torch.cat(times)
    stderr = float(steps.std()) / math.sqrt(len(steps)) if len(steps) > 1 else math.inf
    return EscapeTime(float(steps.mean()), stderr, len(x))
