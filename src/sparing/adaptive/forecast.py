"""At which exit a sample will be sure enough, from the logits of one before it (predictive_exit sheet, section 4).

The remaining layers are modelled by one small convolution over the class axis, repeated once for each layer. Its cost
is ``len(kernel) · classes`` multiply-accumulates a round, next to nothing beside a layer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from sparing.adaptive.confidence import ConfidenceRule, checked, highest, magnitude
from sparing.core.errors import InvalidValue


def convolved(
    logits: Float[np.ndarray, "*samples classes"], kernel: Sequence[float]
) -> Float[np.ndarray, "*samples classes"]:
    """z'_k = Σ_j w_j · z_{k+j−h} with zeros beyond both ends, h = half the width, in float64."""
    half = len(kernel) // 2
    values = np.asarray(logits, dtype=np.float64)
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(half, half)])
    classes = values.shape[-1]
    return sum(w * padded[..., j : j + classes] for j, w in enumerate(kernel))  # type: ignore[return-value]


@dataclass(frozen=True)
class ExitPredictor:
    """How many exits ahead a sample will pass ``rule``.

    With the activation rule (AAAI code, v1): the first round r = 1…R whose convolved logits exceed β·t of the exit r
    ahead, else R. With the softmax or entropy rule (later code, v2): the first round r = 1…R−1 that passes, else R,
    where R is at most the way to the final head. Comparisons are strict.

    ``history`` > 1 (the "multi" variant): the last so many evaluated exits are convolved, exit j (0 = newest) j times
    more, and a round passes when Σ_j w_j · max softmax > β · Σ_j w_j with w = 1, 2, 3, …; softmax rule only.
    """

    rule: ConfidenceRule
    kernel: tuple[float, ...] = (1.0, 1.0, 1.0)
    max_round: int = 8
    history: int = 1
    kind: Literal["convolution"] = "convolution"

    def __post_init__(self) -> None:
        if len(self.kernel) % 2 == 0 or not all(math.isfinite(w) for w in self.kernel):
            raise InvalidValue(f"kernel = {list(self.kernel)}; an odd number of finite weights is expected")
        if self.max_round < 1 or self.history < 1:
            raise InvalidValue(
                f"max_round = {self.max_round}, history = {self.history}; at least 1 is expected of each"
            )
        if self.rule.kind == "patience" or (self.history > 1 and self.rule.kind != "softmax"):
            raise InvalidValue(f"the {self.rule.kind} rule cannot be forecast from {self.history} exits' logits")

    def predict(
        self,
        logits: Float[np.ndarray, "samples classes"],
        layer: int,
        num_exits: int,
        single_jump: bool = False,
        earlier: Sequence[Float[np.ndarray, "samples classes"]] = (),
    ) -> Int[np.ndarray, " samples"]:
        """Exits to jump from exit number ``layer`` (from 1) of ``num_exits``; ≥ 1.

        A jump that ends at ``num_exits + 1`` is one to the final head. ``single_jump``: rounds go up to there whatever
        ``max_round`` is. ``earlier``: for ``history`` > 1, logits of exits that were evaluated before, newest first;
        samples that have none hold NaN there.
        """
        checked(logits, rank=2)
        if not 1 <= layer <= num_exits:
            raise InvalidValue(f"layer = {layer}; exits are numbered 1…{num_exits}")
        ahead = num_exits - layer + 1
        if self.rule.kind == "activation":
            rounds, last = self.max_round, self.max_round
        else:
            last = ahead if single_jump else min(self.max_round, ahead)
            rounds = last - 1
        jump = np.full(len(logits), last)
        if rounds:
            passing = self._passing(logits, earlier[: self.history - 1], layer, rounds)
            found = passing.any(axis=1)
            jump[found] = passing[found].argmax(axis=1) + 1
        return jump

    def _passing(self, logits: np.ndarray, earlier: Sequence[np.ndarray], layer: int, rounds: int) -> np.ndarray:
        """(samples, rounds) whether the logits after so many rounds pass."""
        powers = _powers(self.kernel, logits.shape[-1], rounds + len(earlier))
        ahead = np.asarray(logits, dtype=np.float64) @ powers[:rounds]
        ahead = ahead.swapaxes(0, 1)
        if self.rule.kind == "activation":
            reached = np.minimum(layer + np.arange(rounds), len(self.rule.thresholds) - 1)
            return magnitude(ahead) > self.rule.threshold * np.asarray(self.rule.thresholds)[reached]
        if self.history == 1:
            return self.rule.passes(ahead, layer, strict=True)
        sure, weights = np.exp(highest(ahead)), np.ones((len(logits), 1))
        for age, before in enumerate(earlier, start=1):
            known = np.isfinite(before).all(axis=-1)
            older = np.where(known[:, None], before, 0.0) @ powers[age : age + rounds]
            weight = (age + 1) * known[:, None]
            sure = sure + weight * np.exp(highest(older.swapaxes(0, 1)))
            weights = weights + weight
        return sure > self.rule.threshold * weights


@functools.cache
def _powers(kernel: tuple[float, ...], classes: int, rounds: int) -> np.ndarray:
    """(rounds, classes, classes) what one, two, … rounds of the convolution do to a row of logits."""
    once = convolved(np.eye(classes), kernel)
    powers = [once]
    for _ in range(rounds - 1):
        powers.append(powers[-1] @ once)
    return np.stack(powers)


@dataclass(frozen=True)
class IsotonicPredictor:
    """Jumps by a table for each exit: the more certain, the shorter; made by :func:`fit_isotonic`.

    The ablation of the convolution: it needs exit logits of calibration samples, and does not depend on the order of
    the classes.
    """

    rule: ConfidenceRule
    confidences: tuple[tuple[float, ...], ...]
    """For each exit, ascending values of the largest log-probability …"""
    jumps: tuple[tuple[float, ...], ...]
    """… and the expected jump at each of them; interpolated between, rounded to a whole jump."""
    kind: Literal["isotonic"] = "isotonic"

    @property
    def history(self) -> int:
        """One exit's logits are looked at."""
        return 1

    @property
    def kernel(self) -> tuple[float, ...]:
        """A look-up costs no multiplication by classes."""
        return ()

    def predict(
        self,
        logits: Float[np.ndarray, "samples classes"],
        layer: int,
        num_exits: int,
        single_jump: bool = False,
        earlier: Sequence[np.ndarray] = (),
    ) -> Int[np.ndarray, " samples"]:
        """As :meth:`ExitPredictor.predict`."""
        checked(logits, rank=2)
        if not 1 <= layer <= num_exits or num_exits != len(self.jumps):
            raise InvalidValue(f"layer {layer} of {num_exits}; the tables are for {len(self.jumps)} exits")
        best = highest(logits)
        expected = np.interp(best, self.confidences[layer - 1], self.jumps[layer - 1])
        return np.clip(np.rint(expected), 1, num_exits - layer + 1).astype(int)


def first_passing(exit_logits: Float[np.ndarray, "samples heads classes"], rule: ConfidenceRule) -> np.ndarray:
    """(samples,) the first exit that passes the rule, from 0; the number of exits where none does (the final head)."""
    exits = exit_logits.shape[1] - 1
    passing = np.stack([rule.passes(exit_logits[:, i], i) for i in range(exits)], axis=1)
    return np.where(passing.any(axis=1), passing.argmax(axis=1), exits)


def fit_isotonic(exit_logits: Float[np.ndarray, "samples heads classes"], rule: ConfidenceRule) -> IsotonicPredictor:
    """Isotonic regression, for each exit, of the jump to the next exit that passes on the exit's confidence.

    ``exit_logits`` hold the final head last. Fitted on the samples that do not pass at the exit itself.
    """
    from sklearn.isotonic import IsotonicRegression

    checked(exit_logits)
    exits = exit_logits.shape[1] - 1
    passing = np.stack([rule.passes(exit_logits[:, i], i) for i in range(exits)] + [np.ones(len(exit_logits), bool)], 1)
    confidences: list[tuple[float, ...]] = []
    jumps: list[tuple[float, ...]] = []
    for i in range(exits):
        staying = ~passing[:, i]
        if not staying.any():
            confidences.append((0.0,))
            jumps.append((1.0,))
            continue
        jump = passing[staying, i + 1 :].argmax(axis=1) + 1
        best = highest(exit_logits[staying, i])
        fitted = IsotonicRegression(increasing=False, out_of_bounds="clip").fit(best, jump)
        confidences.append(tuple(float(x) for x in fitted.X_thresholds_))
        jumps.append(tuple(float(y) for y in fitted.y_thresholds_))
    return IsotonicPredictor(rule, tuple(confidences), tuple(jumps))


def fit_kernel(exit_logits: Float[np.ndarray, "samples heads classes"], width: int = 3) -> tuple[float, ...]:
    """The kernel that best turns each exit's logits into the next one's: least squares over all exits and samples."""
    checked(exit_logits)
    if width < 1 or width % 2 == 0:
        raise InvalidValue(f"width = {width}; an odd number is expected")
    before = np.asarray(exit_logits[:, :-1], dtype=np.float64)
    shifted = [convolved(before, [float(j == k) for j in range(width)]).ravel() for k in range(width)]
    weights, *_ = np.linalg.lstsq(np.stack(shifted, axis=1), exit_logits[:, 1:].astype(np.float64).ravel(), rcond=None)
    return tuple(float(w) for w in weights)
