"""Neural Cleanse: the smallest patch that leads everything to a class (Wang et al., IEEE S&P 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparing.audits.backdoor.finding import Defence, Finding, Stamp, Subject, settings
from sparing.audits.backdoor.metrics import mad_outliers
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.models.surgery import evaluating

LEARNING_RATE, BETAS = 0.1, (0.5, 0.9)
START_SPREAD = 0.1
FIRST_WEIGHT, FACTOR, PATIENCE, GOAL = 1e-3, 1.5, 5, 0.99


def squash(raw: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """tanh(raw)/2 + 1/2: any number → 0 to 1."""
    return torch.tanh(raw) / 2 + 0.5


def blended(
    x: Float[Tensor, "n c h w"],
    raw_mask: Float[Tensor, "1 1 h w"],
    raw_pattern: Float[Tensor, "1 c h w"],
    pixels: PixelSpace,
) -> Float[Tensor, "n c h w"]:
    """Normalised images under (1 - mask)·pixel + mask·pattern, both squashed; mixed as [0, 1] pixels."""
    mask, pattern = squash(raw_mask), squash(raw_pattern)
    return pixels.normalise((1 - mask) * pixels.to_unit(x) + mask * pattern)


@dataclass(frozen=True)
class CleanseLoss:
    """Cross-entropy towards the class, L1 of the mask, and their sum, the second weighted."""

    logits: Float[Tensor, "n classes"]
    cross_entropy: Float[Tensor, ""]
    mask_l1: Float[Tensor, ""]
    total: Float[Tensor, ""]


def cleanse_loss(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: int,
    raw_mask: Float[Tensor, "1 1 h w"],
    raw_pattern: Float[Tensor, "1 c h w"],
    weight: float,
    pixels: PixelSpace,
) -> CleanseLoss:
    """CE(f(x'), target), mean over the images, + ``weight`` · the L1 norm of the mask (section IV-B there)."""
    logits = model(blended(x, raw_mask, raw_pattern, pixels))
    entropy = cross_entropy(logits, torch.full((len(x),), target, device=x.device))
    size = squash(raw_mask).sum()
    return CleanseLoss(logits, entropy, size, entropy + weight * size)


class MaskWeight:
    """Weight of the mask's size, raised while the attack succeeds and lowered while it does not.

    x 1.5 after five epochs in a row with success of 0.99 or more, / 1.5^1.5 after five below. Either count starts
    again at the opposite outcome and after a change.
    """

    def __init__(self, start: float = FIRST_WEIGHT) -> None:
        self.value = start
        self._above = self._below = 0

    def update(self, success: float) -> float:
        """The weight after an epoch in which the share ``success`` of images was led to the class."""
        reached = success >= GOAL
        self._above, self._below = (self._above + 1, 0) if reached else (0, self._below + 1)
        if max(self._above, self._below) == PATIENCE:
            self.value = self.value * FACTOR if reached else self.value / FACTOR**1.5
            self._above = self._below = 0
        return self.value


@dataclass(frozen=True)
class Reversed:
    """The smallest mask found for a class that reaches the goal; L1 is infinite when none does."""

    target: int
    mask: Float[Tensor, "1 h w"]
    pattern: Float[Tensor, "c h w"]
    l1: float
    success: float
    """Of the epoch in which that mask was found, else the best of any epoch."""


def reverse_trigger(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: int,
    pixels: PixelSpace,
    epochs: int = 40,
    batch: int = 32,
    generator: torch.Generator | None = None,
) -> Reversed:
    """Mask and pattern that lead clean images to ``target``, as small as Neural Cleanse can make them."""
    _, channels, height, width = x.shape
    raw_mask, raw_pattern = (
        (START_SPREAD * torch.randn(1, depth, height, width, generator=generator)).to(x.device).requires_grad_()
        for depth in (1, channels)
    )
    optimizer = torch.optim.Adam([raw_mask, raw_pattern], lr=LEARNING_RATE, betas=BETAS)
    weight = MaskWeight()
    best = Reversed(target, squash(raw_mask.detach())[0], squash(raw_pattern.detach())[0], math.inf, 0.0)
    with evaluating(model), torch.enable_grad():
        for _ in range(epochs):
            hits = 0
            for places in torch.randperm(len(x), generator=generator).split(batch):
                loss = cleanse_loss(model, x[places], target, raw_mask, raw_pattern, weight.value, pixels)
                raw_mask.grad, raw_pattern.grad = torch.autograd.grad(loss.total, (raw_mask, raw_pattern))
                optimizer.step()
                hits += int((loss.logits.argmax(dim=1) == target).sum())
            success = hits / len(x)
            weight.update(success)
            with torch.no_grad():
                mask, pattern = squash(raw_mask)[0], squash(raw_pattern)[0]
            size = float(mask.sum()) if success >= GOAL else math.inf
            if size < best.l1 or (math.isinf(best.l1) and success > best.success):
                best = Reversed(target, mask, pattern, size, success)
    return best


def stamp_of(found: Reversed, pixels: PixelSpace, origin: str) -> Stamp:
    """The reconstructed trigger as something to put on images."""

    def apply(x: Tensor) -> Tensor:
        mask, pattern = found.mask.to(x), found.pattern.to(x)
        return pixels.normalise((1 - mask) * pixels.to_unit(x) + mask * pattern)

    return Stamp(found.target, apply, origin, (found.mask, found.pattern))


class NeuralCleanse(Defence):
    """A class whose smallest mask is an outlier among the classes' has a backdoor.

    Args:
        epochs: over the hold-out, for each class.
        batch: images a step.
        threshold: anomaly index, abs(L1 - median) / (1.4826 · median deviation), above which a small mask is flagged.
    """

    name, level = "neural_cleanse", "model"
    source = "Wang et al., Neural Cleanse, IEEE S&P 2019"
    reconstructs = True

    def __init__(self, epochs: int = 40, batch: int = 32, threshold: float = 2.0) -> None:
        settings(
            self.name, {"epochs": (epochs, 1, 10**6), "batch": (batch, 1, 10**6), "threshold": (threshold, 0, 1e6)}
        )
        self.epochs, self.batch, self.threshold = epochs, batch, threshold

    def judge(self, subject: Subject) -> Finding:
        """Masks of all classes, their L1 norms and anomaly indices; each class is kept once it is done."""
        generator = torch.Generator().manual_seed(subject.seed)
        found = list[Reversed]()
        state = subject.keeper.load() if subject.keeper is not None else None
        if state is not None:
            found = [Reversed(**one) for one in state["found"]]
            generator.set_state(state["generator"])
        settings = (self.epochs, self.batch, generator)
        for c in range(len(found), subject.classes):
            found.append(reverse_trigger(subject.model, subject.holdout.x, c, subject.pixels, *settings))
            if subject.keeper is not None:
                subject.keeper.save({"found": [vars(one) for one in found], "generator": generator.get_state()})
        norms = np.array([one.l1 for one in found])
        figures = {"mask_l1": norms, "success": [one.success for one in found]}
        outliers = mad_outliers(norms, "lower", self.threshold)
        if outliers is None:
            reached = int(np.isfinite(norms).sum())
            return self.not_applicable(
                f"masks of {reached} classes reach {GOAL:.0%}; five that differ are needed to name an outlier",
                figures=figures,
            )
        below = np.flatnonzero(norms < outliers.median)
        flagged = [found[c] for c in outliers.flagged]
        return self.finding(
            "evidence" if flagged else "no evidence",
            score=float(outliers.index[below].max()),
            threshold=self.threshold,
            suspects=outliers.flagged,
            figures=figures | {"anomaly_index": outliers.index},
            stamps=tuple(stamp_of(one, subject.pixels, self.name) for one in flagged),
            pictures={f"class {one.target}": one.mask * one.pattern for one in flagged},
        )
