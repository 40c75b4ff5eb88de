"""Minimum-norm linear regression in scikit-learn's manner, by what :mod:`sparing.optimization.min_norm` iterates."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.validation import validate_data

from sparing.core.errors import InvalidValue, TrainingDiverged, did_you_mean, shown
from sparing.optimization.min_norm import (
    LeastSquares,
    check_start,
    first_phase,
    positive,
    predict_limit,
    second_phase,
    single_phase,
    wn_step,
)

METHODS = ("rpgd", "wn", "gd", "two_phase")
STALLED = 1e-12
"""A direction has stalled when it moves by less in a step."""
POINTS = 200
"""Points of the history at least, when there are so many iterations; at most twice as many."""


class MinNormRegressor(RegressorMixin, BaseEstimator):
    """Linear regression without intercept by gradient steps on scale and direction, for fewer samples than features.

    Each target has a scale g and a direction w of its own. Of all weights that fit the data the minimum-norm ones are
    coef* = X⁺y; the closed form is ``numpy.linalg.pinv(X) @ y``. This class is for looking at how near WN, rPGD and
    gradient descent come to it from where they start: it works out the closed form too, to say so.

    Args:
        method: "rpgd", "wn" (both :func:`~sparing.optimization.min_norm.single_phase`), "two_phase"
            (:func:`~sparing.optimization.min_norm.first_phase` until ‖P⊥w‖ ≤ ``delta`` or the direction stalls, then
            :func:`~sparing.optimization.min_norm.second_phase`), or "gd", plain gradient descent with step 1/λ₁.
        g0: scale to begin with, a number or one for each target; "auto": ½‖y‖/√λ₁, which is at most g*/2. Where the
            first of two phases stalls before it has done its work, as it does unless g0 < g*, it goes on from there.
        step_ratio: c = γ/η > 0 of the single-phase methods, in units of g².
        tol: the largest ‖Xw − y‖/‖y‖ of a target at which the iterations end.
        max_iter: iterations at most, of both phases together.
        delta: ‖P⊥w‖ at which phase I has done its work.
        w0: directions to begin with, (d,) or (d, targets), of any length but 0. None: normal draws.
        seed: of these draws.

    Attributes:
        coef_: g·w, (d,) or (targets, d).
        g_: g of each target in the end; its size is the norm of the weights.
        g0_: the scale that was begun with.
        distance_to_min_norm_: ‖coef − coef*‖ of each target.
        predicted_distance_: the same in closed form (:func:`~sparing.optimization.min_norm.predict_limit`): exact for
            gradient descent, 0 for two phases, and for small steps otherwise.
        n_iter_: iterations made.
        history_: "iteration" (n,), and for each of them "residual" ‖Xw − y‖/‖y‖, "distance" ‖coef − coef*‖ and
            "g" (n, targets).

    ``fit`` raises:

    - :class:`~sparing.core.errors.InvalidValue`: a setting outside its bounds, data that are not finite or do not
      fit together, a target that is zero everywhere with ``g0="auto"``.
    - :class:`~sparing.core.errors.TrainingDiverged`: an iteration that is not finite.

    It warns of dependent rows (the row space is used), of no fewer independent samples than features (every start then
    leads to the same weights), of a g that crosses 0, and, as ``ConvergenceWarning``, of too few iterations in
    ``max_iter``.
    """

    def __init__(
        self,
        method: Literal["rpgd", "wn", "gd", "two_phase"] = "rpgd",
        g0: float | ndarray | Literal["auto"] = "auto",
        step_ratio: float = 1.0,
        tol: float = 1e-8,
        max_iter: int = 10_000,
        delta: float = 1e-8,
        w0: ndarray | None = None,
        seed: int = 0,
    ) -> None:
        self.method = method
        self.g0 = g0
        self.step_ratio = step_ratio
        self.tol = tol
        self.max_iter = max_iter
        self.delta = delta
        self.w0 = w0
        self.seed = seed

    def fit(self, X: Any, y: Any) -> MinNormRegressor:
        """Fit X (n, d) to targets (n,) or (n, targets)."""
        self._check()
        try:
            X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        except ValueError as error:
            raise InvalidValue(f"fit: {error}") from error
        y = np.asarray(y, dtype=np.float64)
        problem = LeastSquares.of(X, y.reshape(len(y), -1))
        if problem.rank == X.shape[1]:
            warnings.warn(
                f"{len(X)} samples of {X.shape[1]} features leave no freedom: every start leads to the same weights",
                UserWarning,
                stacklevel=2,
            )
        elif problem.rank < len(X):
            warnings.warn(
                f"the {len(X)} rows of X have rank {problem.rank}: the row space is used, and what of y lies outside "
                "their range stays unexplained",
                UserWarning,
                stacklevel=2,
            )
        w, g = self._start(problem)
        self.g0_ = g
        self.predicted_distance_ = self._predicted(problem, w, g)
        x = self._iterate(problem, w, g)
        self.distance_to_min_norm_ = np.linalg.norm(x - problem.solution, axis=0)
        self.coef_ = x.T
        if y.ndim == 1:
            self.coef_ = x[:, 0]
            for name in ("g_", "g0_", "distance_to_min_norm_", "predicted_distance_"):
                setattr(self, name, float(getattr(self, name)[0]))
        return self

    def predict(self, X: Any) -> ndarray:
        """Xw, (n,) or (n, targets), for X (n, d)."""
        if not hasattr(self, "coef_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(X, y) first")
        try:
            X = validate_data(self, X, dtype=np.float64, reset=False)
        except ValueError as error:
            raise InvalidValue(f"predict: {error}") from error
        return X @ self.coef_.T

    def __sklearn_tags__(self) -> Any:
        """Several targets at once are welcome."""
        tags = super().__sklearn_tags__()
        tags.target_tags.single_output = tags.target_tags.multi_output = True
        return tags

    # --- inside

    def _check(self) -> None:
        if self.method not in METHODS:
            hint = did_you_mean(self.method, METHODS) if isinstance(self.method, str) else ""
            raise InvalidValue(f"method = {shown(self.method)}; one of {', '.join(METHODS)} is needed.{hint}")
        for name in ("step_ratio", "tol", "max_iter", "delta"):
            positive(name, getattr(self, name))
        if isinstance(self.g0, str):
            if self.g0 != "auto":
                raise InvalidValue(f"g0 = {self.g0!r}; numbers > 0 or 'auto' are needed")
        else:
            positive("g0", self.g0)

    def _start(self, problem: LeastSquares) -> tuple[ndarray, ndarray]:
        """Directions (d, k) of length 1 and scales (k,)."""
        shape = problem.solution.shape
        if self.w0 is None:
            w = np.random.default_rng(self.seed).standard_normal(shape)
        else:
            w = np.asarray(self.w0, dtype=np.float64)
            if w.shape not in (shape, shape[:1]):
                raise InvalidValue(f"w0 is of shape {w.shape}; {shape} or {shape[:1]} is needed")
            w = np.broadcast_to(w.reshape(shape[0], -1), shape)
            if not np.isfinite(w).all():
                raise InvalidValue("w0 holds values that are not finite")
        if isinstance(self.g0, str):
            g = np.asarray(0.5 * problem.norm_bound)
            if not g.all():
                place = int(np.argmin(g))
                raise InvalidValue(f"target {place} is zero everywhere, so g0 = 'auto' is 0; leave it out, or give g0")
        else:
            given = np.asarray(self.g0, dtype=np.float64)
            if given.shape not in ((), shape[1:]):
                raise InvalidValue(f"g0 is of shape {given.shape}; a number or {shape[1:]} is needed")
            g = np.broadcast_to(given, shape[1:]).copy()
        check_start(w, g)
        return w / np.linalg.norm(w, axis=0), g

    def _predicted(self, problem: LeastSquares, w: ndarray, g: ndarray) -> ndarray:
        a = np.minimum(np.linalg.norm(problem.null_part(w), axis=0) ** 2, 1)
        if self.method == "gd":
            return g * np.sqrt(a)
        if self.method == "two_phase":
            return np.zeros_like(g)
        norms = np.asarray(problem.norm)
        return np.array(
            [
                predict_limit(float(g0), float(share), float(g_star), self.step_ratio).distance if g_star else np.nan
                for g0, share, g_star in zip(g, a, norms, strict=True)
            ]
        )

    def _iterate(self, problem: LeastSquares, w: ndarray, g: ndarray) -> ndarray:
        """Weights (d, k) in the end; sets ``g_``, ``n_iter_`` and ``history_``."""
        scale = np.linalg.norm(problem.y, axis=0)
        scale = np.where(scale > 0, scale, 1)
        history: dict[str, list[Any]] = {"iteration": [], "residual": [], "distance": [], "g": []}
        every = 1
        signs, crossed = np.sign(g), False
        x, residual, n = g * w, np.full(len(g), np.inf), 0
        states = self._states(problem, w, g)
        for n, (x, g, settled) in enumerate(states, start=1):
            residual = np.linalg.norm(problem.A @ x - problem.y, axis=0) / scale
            if not np.isfinite(residual).all():
                raise TrainingDiverged(f"iteration {n} of {self.method}: the residuals are {residual}")
            crossed |= bool((np.sign(g) != signs).any())
            done = settled and (residual <= self.tol).all()
            end = done or n == self.max_iter
            if n % every == 0 or end:
                distance = np.linalg.norm(x - problem.solution, axis=0)
                for name, value in (("iteration", n), ("residual", residual), ("distance", distance), ("g", g)):
                    history[name].append(value)
            if end:
                break
            if len(history["iteration"]) == 2 * POINTS:
                history = {name: values[1::2] for name, values in history.items()}
                every *= 2
        if crossed:
            warnings.warn(
                "a scale g crossed 0, near which the iteration can stand still; begin with a smaller step_ratio",
                UserWarning,
                stacklevel=3,
            )
        if not (residual <= self.tol).all():
            warnings.warn(
                f"{self.method}: after max_iter = {self.max_iter} the largest residual is {residual.max():.2g} of y, "
                f"above tol = {self.tol:g}",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.g_, self.n_iter_ = np.asarray(g), n
        self.history_ = {name: np.array(values) for name, values in history.items()}
        return x

    def _states(self, problem: LeastSquares, w: ndarray, g: ndarray) -> Iterator[tuple[ndarray, ndarray, bool]]:
        """(weights, g, whether a small residual is the end) after each iteration."""
        if self.method == "gd":
            x = g * w
            while True:
                x = x - problem.A.T @ (problem.A @ x - problem.y) / problem.lam
                yield x, np.linalg.norm(x, axis=0), True
        if self.method != "two_phase":
            step = {"step": wn_step} if self.method == "wn" else {}
            for after, scale in single_phase(problem, w, g, self.step_ratio, **step):
                yield scale * (after / np.linalg.norm(after, axis=0)), np.asarray(scale), True
        for last in (False, True):
            states = first_phase(problem, w, g)
            for after, _ in states:
                moved, w = np.linalg.norm(after - w, axis=0), after
                yield g * w, g, False
                null = np.linalg.norm(problem.null_part(w), axis=0)
                if ((null <= self.delta) | (moved <= STALLED)).all():
                    break
            if last or (null <= self.delta).all():
                break
            # what has stalled had no g below g*, or one too near to it; half the bound is below for certain
            g = np.where(null <= self.delta, g, np.minimum(g, 0.5 * np.asarray(problem.norm_bound)))
        for after, scale in second_phase(problem, w, g):
            yield scale * after, np.asarray(scale), True
