"""Least squares by scale times direction: WN and rPGD, which land near the solution of minimum norm.

min ½‖Ax − y‖² with A (m, d), m < d, has a plane of solutions; x* = A⁺y is the one of minimum norm g* = ‖x*‖. Gradient
descent from x₀ ends at x* + P⊥x₀, with P⊥ = I − A⁺A: what x₀ has outside the row space stays. Written as x = g · w/‖w‖
(weight normalisation, WN: Salimans and Kingma 2016, arXiv:1602.07868) or as x = g·w with ‖w‖ = 1 (reparametrised
projected gradient descent, rPGD: Wu et al., NeurIPS 2020, arXiv:1911.07956), that part shrinks while g grows, and it
goes altogether in two phases. :class:`sparing.optimization.min_norm_regressor.MinNormRegressor` runs all of them; a
loop of your own::

    problem = LeastSquares.of(A, y)
    for w, g in itertools.islice(two_phase(problem, w, g0, first=27), 500): ...
    x = g * w

Several targets are solved side by side, each with a g and a w of its own: y (m, k), w (d, k), g (k,). All in NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparing.core.errors import DataError, InvalidValue

Gain = float | Float[ndarray, "*k"]
"""g, or a step size: one number, or one for each target."""


# --- the problem ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LeastSquares:
    """A system Ax = y and what its singular values say of it."""

    A: Float[ndarray, "m d"]
    y: Float[ndarray, "m *k"]
    solution: Float[ndarray, "d *k"]
    """x* = A⁺y."""
    norm: Gain
    """g* = ‖x*‖."""
    eigenvalues: Float[ndarray, "r"]
    """Of AAᵀ, those that are not 0, ascending."""
    row_space: Float[ndarray, "r d"]
    """Orthonormal rows that span it."""
    rank: int
    """Of the A that was given."""

    @classmethod
    def of(cls, A: Float[ndarray, "m d"], y: Float[ndarray, "m *k"]) -> LeastSquares:
        """Look at a system. One of dependent rows is replaced by as many independent ones as its rank.

        Gradients stay the same by that; the part of y that no x can reach is left out of it.

        Raises:
            DataError: values that are not finite, or an A of zeros.
        """
        for name, values in (("A", A), ("y", y)):
            if not np.isfinite(values).all():
                place = tuple(int(i) for i in np.argwhere(~np.isfinite(values))[0])
                raise DataError(f"{name}{list(place)} = {values[place]}; finite numbers are needed")
        U, s, V = np.linalg.svd(A, full_matrices=False)
        rank = int((s > s.max(initial=0) * max(A.shape) * np.finfo(s.dtype).eps).sum())
        if rank == 0:
            raise DataError(f"A of shape {A.shape} has rank 0: there is nothing to fit with")
        U, s, V = U[:, :rank], s[:rank], V[:rank]
        if rank < len(A):
            A, y = s[:, None] * V, U.T @ y
            U = np.eye(rank, dtype=s.dtype)
        solution = V.T @ ((U.T @ y).T / s).T
        return cls(A, y, solution, np.linalg.norm(solution, axis=0), s[::-1] ** 2, V, rank)

    @property
    def lam(self) -> float:
        """λ₁, the largest eigenvalue of AAᵀ."""
        return float(self.eigenvalues[-1])

    @property
    def norm_bound(self) -> Gain:
        """‖y‖/√λ₁ ≤ g*; equal if AAᵀ = I."""
        return np.linalg.norm(self.y, axis=0) / math.sqrt(self.lam)

    def null_part(self, x: Float[ndarray, "d *k"]) -> Float[ndarray, "d *k"]:
        """P⊥x, the part of x outside the row space."""
        return x - self.row_space.T @ (self.row_space @ x)

    def gd_limit(self, start: Float[ndarray, "d *k"]) -> Float[ndarray, "d *k"]:
        """x* + P⊥x₀: where gradient descent from x₀ ends, for any step below 2/λ₁."""
        return self.solution + self.null_part(start)

    def whitened(self) -> LeastSquares:
        """The system (AAᵀ)^(−½) A x = (AAᵀ)^(−½) y: the same solutions, and AAᵀ = I."""
        # with A = U S V: (AAᵀ)^(−½) A = U V, and (AAᵀ)^(−½) y = U V x*
        U = (self.A @ self.row_space.T) / np.sqrt(self.eigenvalues[::-1])
        A = U @ self.row_space
        return LeastSquares(
            A, A @ self.solution, self.solution, self.norm, np.ones_like(self.eigenvalues), self.row_space, self.rank
        )


def largest_eigenvalue(A: Float[ndarray, "m d"], *, tol: float = 1e-6, max_iter: int = 100_000, seed: int = 0) -> float:
    """λ₁ of AAᵀ by power iteration, for matrices that are too large for singular values; two products each.

    Args:
        A: any matrix that is not zero.
        tol: ‖AAᵀv − λv‖ ÷ λ at which λ is good enough; its relative error is at most that, and mostly its square.
        max_iter: iterations at most.
        seed: of the start vector.

    Raises:
        InvalidValue: not good enough after ``max_iter``, or an A of zeros.
    """
    v = np.asarray(np.random.default_rng(seed).standard_normal(A.shape[0]), dtype=A.dtype)
    residual = math.inf
    for _ in range(max_iter):
        v /= np.linalg.norm(v)
        image = A @ (A.T @ v)
        value = float(v @ image)
        if not value > 0:
            raise InvalidValue(f"A of shape {A.shape} has no eigenvalue above 0: vᵀAAᵀv = {value}")
        residual = float(np.linalg.norm(image - value * v)) / value
        if residual <= tol:
            return value
        v = image
    raise InvalidValue(
        f"after max_iter = {max_iter} the residual of the largest eigenvalue is {residual:.2g}, above tol = {tol:g}"
    )


# --- one step ------------------------------------------------------------------------------------------------------


def wn_gradients(
    A: Float[ndarray, "m d"], y: Float[ndarray, "m *k"], w: Float[ndarray, "d *k"], g: Gain
) -> tuple[Float[ndarray, "d *k"], Gain]:
    """(∂h/∂w, ∂h/∂g) of h(w, g) = ½‖gAu − y‖², u = w/‖w‖: (g/‖w‖)(q − (uᵀq)u) and uᵀq, with q = Aᵀ(gAu − y).

    ∂h/∂w is orthogonal to w, so a step of size η lengthens w: ‖w‖² grows by η²‖∂h/∂w‖².

    Raises:
        InvalidValue: a w of zeros.
    """
    length = _length(w)
    u = w / length
    q = A.T @ (g * (A @ u) - y)
    along = (u * q).sum(axis=0)
    return g / length * (q - along * u), along


def wn_step(
    A: Float[ndarray, "m d"], y: Float[ndarray, "m *k"], w: Float[ndarray, "d *k"], g: Gain, eta: Gain, gamma: Gain
) -> tuple[Float[ndarray, "d *k"], Gain]:
    """(w, g) after a step of gradient descent on both at once: w ← w − η ∂h/∂w, g ← g − γ ∂h/∂g.

    Raises:
        InvalidValue: a w of zeros, η ≤ 0, γ < 0.
    """
    _check_rates(eta, gamma)
    slope_w, slope_g = wn_gradients(A, y, w, g)
    return w - eta * slope_w, g - gamma * slope_g


def rpgd_step(
    A: Float[ndarray, "m d"], y: Float[ndarray, "m *k"], w: Float[ndarray, "d *k"], g: Gain, eta: Gain, gamma: Gain
) -> tuple[Float[ndarray, "d *k"], Gain]:
    """(w, g) after a step of rPGD on f(w, g) = ½‖gAw − y‖²: w ← v/‖v‖ with v = w − η g q, and g ← g − γ wᵀq.

    q = Aᵀ(gAw − y), and both use the old w and g. Only the step of w is projected, not its gradient. γ = 0 keeps g, as
    phase I of :func:`two_phase` does.

    Args:
        A: (m, d).
        y: (m,), or (m, k) for k targets.
        w: (d,) or (d, k), of length 1 along d.
        g: a number, or (k,).
        eta: η > 0; at most 1/(g²λ₁) is safe.
        gamma: γ ≥ 0.

    Raises:
        InvalidValue: η ≤ 0, γ < 0.
    """
    _check_rates(eta, gamma)
    q = A.T @ (g * (A @ w) - y)
    v = w - eta * g * q
    return v / np.linalg.norm(v, axis=0), g - gamma * (w * q).sum(axis=0)


Iteration = Callable[[ndarray, ndarray, ndarray, Gain, Gain, Gain], tuple[ndarray, Gain]]
"""What :func:`wn_step` and :func:`rpgd_step` are."""


def slope(A: Float[ndarray, "m d"], y: Float[ndarray, "m *k"], w: Float[ndarray, "d *k"], g: Gain) -> Gain:
    """wᵀAᵀ(y − gAw), which at the end of phase I is above 0 exactly if g < g*: a test that need not know g*."""
    return (w * (A.T @ (y - g * (A @ w)))).sum(axis=0)


# --- many steps ----------------------------------------------------------------------------------------------------


def single_phase(
    problem: LeastSquares, w: Float[ndarray, "d *k"], g: Gain, c: float = 1.0, step: Iteration = rpgd_step
) -> Iterator[tuple[ndarray, Gain]]:
    """(w, g) after 1, 2, … steps of WN or rPGD with γ = cη, without end.

    η = 1/(λ₁ max(ĝ², 2c)), where ĝ is the largest of g so far and of the lower bound of g*: as large as is safe for the
    direction, 1/(ĝ²λ₁), and for the scale, γ ≤ ½/λ₁. The limit follows :func:`predict_limit` the closer, the smaller
    the steps are.

    Args:
        problem: the system.
        w: where to begin; of length 1 for rPGD.
        g: g₀ > 0.
        c: γ/η > 0, in units of g²: the smaller beside g*², the closer to the minimum norm, and the slower.
        step: :func:`rpgd_step` or :func:`wn_step`.

    Raises:
        InvalidValue: a w of zeros, g₀ ≤ 0, c ≤ 0.
    """
    check_start(w, g)
    positive("step_ratio", c)
    lam, bound = problem.lam, problem.norm_bound
    while True:
        bound = np.maximum(bound, g)
        eta = 1 / (lam * np.maximum(bound**2, 2 * c))
        w, g = step(problem.A, problem.y, w, g, eta, c * eta)
        yield w, g


def first_phase(problem: LeastSquares, w: Float[ndarray, "d *k"], g: Gain) -> Iterator[tuple[ndarray, Gain]]:
    """(w, g) after 1, 2, … steps of phase I: g stays, η = 1/(g²λ₁). Without end.

    For g < g* the part P⊥w decays at a linear rate, as ‖P⊥w‖ ← ‖P⊥w‖/‖v‖ with ‖v‖ > 1 in the end; if AAᵀ = I by the
    factor g/g* or more in every step (:func:`phase_one_steps`). For g ≥ g* it does not decay.

    Raises:
        InvalidValue: a w of zeros, g ≤ 0.
    """
    check_start(w, g)
    eta = 1 / (g**2 * problem.lam)
    while True:
        w, _ = rpgd_step(problem.A, problem.y, w, g, eta, 0.0)
        yield w, g


def second_phase(
    problem: LeastSquares, w: Float[ndarray, "d *k"], g: Gain, bound: Gain | None = None
) -> Iterator[tuple[ndarray, Gain]]:
    """(w, g) after 1, 2, … steps of phase II: γ = ½/λ₁, η = 1/(max(g, ĝ)²λ₁). Without end.

    Args:
        problem: the system.
        w: what phase I came to.
        g: its g > 0.
        bound: ĝ > 0 to begin with; it grows with the largest g seen. None: ‖y‖/√λ₁, which is at most g*.

    Raises:
        InvalidValue: a w of zeros, g ≤ 0, a bound ≤ 0.
    """
    check_start(w, g)
    bound = problem.norm_bound if bound is None else bound
    positive("bound", bound)
    lam = problem.lam
    while True:
        bound = np.maximum(bound, g)
        w, g = rpgd_step(problem.A, problem.y, w, g, 1 / (bound**2 * lam), 0.5 / lam)
        yield w, g


def two_phase(
    problem: LeastSquares, w: Float[ndarray, "d *k"], g: Gain, first: int, bound: Gain | None = None
) -> Iterator[tuple[ndarray, Gain]]:
    """(w, g) after 1, 2, … steps: ``first`` of :func:`first_phase`, then those of :func:`second_phase`.

    Its limit is the solution of minimum norm, up to what ``first`` steps leave of P⊥w, if g < g*. ½‖y‖/√λ₁ always is:
    half of :attr:`LeastSquares.norm_bound`.
    """
    after = w
    for after, _ in islice(first_phase(problem, w, g), first):
        yield after, g
    yield from second_phase(problem, after, g, bound)


def phase_one_steps(g: float, g_star: float, delta: float = 1e-8) -> int:
    """ln(1/δ)/ln(g*/g), rounded up: steps of phase I after which ‖P⊥w‖ ≤ δ, if AAᵀ = I.

    Raises:
        InvalidValue: not 0 < g < g*, or not 0 < δ < 1.
    """
    if not 0 < g < g_star < math.inf:
        raise InvalidValue(f"g = {g}, g_star = {g_star}; phase I shrinks nothing unless 0 < g < g_star")
    if not 0 < delta < 1:
        raise InvalidValue(f"delta = {delta}; 0 < delta < 1 is needed")
    return math.ceil(math.log(1 / delta) / math.log(g_star / g))


# --- where it ends -------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    """Where the flow ends."""

    g: float
    """g∞ = ‖x∞‖."""
    distance: float
    """‖x∞ − x*‖."""


def predict_limit(g0: float, a: float, g_star: float, c: float) -> Limit:
    """Limit of WN and rPGD for small steps of a fixed ratio, in closed form.

    Along the flow dg/dt = c wᵀAᵀr, dw/dt = g (I − wwᵀ) Aᵀr, r = y − gAw, the vector P⊥w exp(g²/(2c)) does not change.
    If the loss goes to 0 with g∞ ≠ 0, then g∞² (1 − a exp((g₀² − g∞²)/c)) = g*², which has one root with a bracket
    above 0, and ‖x∞ − x*‖ = √(g∞² − g*²) = g∞ √a exp((g₀² − g∞²)/(2c)), of which the second does not cancel. (For
    gradient descent it is g₀ √a.)

    Args:
        g0: g₀ > 0.
        a: ‖P⊥w₀‖², in [0, 1], of w₀ at length 1.
        g_star: g* = ‖A⁺y‖ > 0.
        c: γ/η > 0; for WN from a w₀ of another length γ/η · ‖w₀‖².

    Raises:
        InvalidValue: a value outside these bounds.
    """
    for name, value in (("g0", g0), ("g_star", g_star), ("c", c)):
        positive(name, value)
    if not 0 <= a <= 1:
        raise InvalidValue(f"a = {a}; the squared length of a part of a unit vector, 0 ≤ a ≤ 1, is needed")
    if a == 0:
        return Limit(g_star, 0.0)
    from scipy.optimize import brentq

    low = max(g_star, math.sqrt(max(0.0, g0**2 + c * math.log(a))))
    high = g_star + g0 + 10 * math.sqrt(c)

    def excess(g: float) -> float:
        return g**2 * -math.expm1(math.log(a) + (g0**2 - g**2) / c) - g_star**2

    # at the lower end the bracket may be 0 but for rounding
    g = low if excess(low) >= 0 else float(brentq(excess, low, high, xtol=1e-15 * low, rtol=1e-15))
    return Limit(g, g * math.exp((math.log(a) + (g0**2 - g**2) / c) / 2))


# --- inside --------------------------------------------------------------------------------------------------------


def positive(name: str, value: Gain) -> None:
    """Raise :class:`InvalidValue` unless every number is finite and above 0."""
    values = np.asarray(value)
    if not (np.isfinite(values) & (values > 0)).all():
        raise InvalidValue(f"{name} = {value}; finite numbers > 0 are needed")


def check_start(w: Float[ndarray, "d *k"], g: Gain) -> None:
    """Raise :class:`InvalidValue` for a w₀ or g₀ to begin with that has no direction or no size."""
    _length(w)
    positive("g0", g)


def _length(w: Float[ndarray, "d *k"]) -> Gain:
    length = np.linalg.norm(w, axis=0)
    if not np.all(length):
        raise InvalidValue("w is zero, so it has no direction; begin with any other vector, random numbers say")
    return length


def _check_rates(eta: Gain, gamma: Gain) -> None:
    if not (np.all(np.asarray(eta) > 0) and np.all(np.asarray(gamma) >= 0)):
        raise InvalidValue(f"eta = {eta}, gamma = {gamma}; eta > 0 and gamma ≥ 0 are needed")
