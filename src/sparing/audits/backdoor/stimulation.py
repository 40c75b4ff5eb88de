"""Stimulating units one by one: which can drive a class alone? (After ABS, Liu et al., CCS 2019; simplified.)"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.audits.backdoor.finding import Defence, Finding, Subject, settings
from sparing.audits.backdoor.layers import (
    last_linear,
    logits_and_features,
    penultimate_features,
    predict,
)
from sparing.audits.backdoor.neural_cleanse import START_SPREAD, Reversed, blended, squash, stamp_of
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.models.surgery import evaluating

LEARNING_RATE = 0.1


def stimulation_rises(
    weight: Float[Tensor, "classes units"], largest: Float[Tensor, " units"]
) -> Float[Tensor, "units classes"]:
    """How far each unit can lift each class above all others, at twice its largest activation on clean inputs.

    With a linear head: rise(j, c) = W[c, j]·v_j - max over c' ≠ c of W[c', j]·v_j.
    """
    shown = (weight * (2 * largest)).T
    best = shown.topk(2, dim=1)
    others = torch.where(
        torch.arange(shown.shape[1], device=shown.device) == best.indices[:, :1], best.values[:, 1:], best.values[:, :1]
    )
    return shown - others


def reverse_unit(
    model: nn.Module,
    head: nn.Linear,
    x: Float[Tensor, "n c h w"],
    unit: int,
    target: int,
    pixels: PixelSpace,
    steps: int,
    weight: float,
    generator: torch.Generator,
) -> Reversed:
    """Mask and pattern that raise one unit: loss = -mean activation + ``weight`` · the L1 norm of the mask.

    Success is left at 0.
    """
    _, channels, height, width = x.shape
    raw_mask, raw_pattern = (
        (START_SPREAD * torch.randn(1, depth, height, width, generator=generator)).to(x.device).requires_grad_()
        for depth in (1, channels)
    )
    optimizer = torch.optim.Adam([raw_mask, raw_pattern], lr=LEARNING_RATE)
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            _, features = logits_and_features(model, blended(x, raw_mask, raw_pattern, pixels), head)
            loss = weight * squash(raw_mask).sum() - features[:, unit].mean()
            raw_mask.grad, raw_pattern.grad = torch.autograd.grad(loss, (raw_mask, raw_pattern))
            optimizer.step()
    mask, pattern = squash(raw_mask.detach())[0], squash(raw_pattern.detach())[0]
    return Reversed(target, mask, pattern, float(mask.sum()), 0.0)


class UnitStimulation(Defence):
    """A small patch that drives one unit and thereby one class on held-out images is a backdoor.

    Args:
        pairs: pairs (unit, class) of the largest rise to look at.
        steps: of Adam for each.
        weight: of the mask's L1.
        area: largest share of the image that a mask may cover.
        images: clean images to optimise on, at most.
        threshold: success on held-out images of other classes, above which it is one.
    """

    name, level = "unit_stimulation", "model"
    source = "after Liu et al., ABS, CCS 2019"

    def __init__(
        self,
        pairs: int = 5,
        steps: int = 200,
        weight: float = 1e-3,
        area: float = 0.05,
        images: int = 64,
        threshold: float = 0.88,
    ) -> None:
        settings(
            self.name,
            {
                "pairs": (pairs, 1, 10**6),
                "steps": (steps, 1, 10**6),
                "weight": (weight, 0, 1e6),
                "area": (area, 0, 1),
                "images": (images, 1, 10**6),
                "threshold": (threshold, 0, 1),
            },
        )
        self.pairs, self.steps, self.weight, self.area = pairs, steps, weight, area
        self.images, self.threshold = images, threshold

    def judge(self, subject: Subject) -> Finding:
        """Success of the patch of each of the top pairs whose mask is small enough."""
        model, (clean, judged) = subject.model, subject.halves()
        head = last_linear(model, clean.x[:1])
        rises = stimulation_rises(head.weight.detach(), penultimate_features(model, clean.x).amax(dim=0))
        generator = torch.Generator().manual_seed(subject.seed)
        limit = self.area * clean.x.shape[2] * clean.x.shape[3]
        rows, found = [], []
        for place in rises.flatten().topk(min(self.pairs, rises.numel())).indices.tolist():
            unit, target = divmod(place, rises.shape[1])
            patch = reverse_unit(
                model, head, clean.x[: self.images], unit, target, subject.pixels, self.steps, self.weight, generator
            )
            stamp = stamp_of(patch, subject.pixels, self.name)
            others = judged.of(judged.y != target).x
            success = (
                float((predict(model, stamp.apply(others)).argmax(dim=1) == target).float().mean())
                if len(others)
                else math.nan
            )
            counts = patch.l1 <= limit
            rows.append(
                {
                    "unit": unit,
                    "class": target,
                    "rise": float(rises[unit, target]),
                    "mask_l1": patch.l1,
                    "success": success,
                    "small_enough": counts,
                }
            )
            found.append((success if counts else -math.inf, patch))
        figures = {"pairs": rows, "largest_mask_l1": limit}
        score = max(success for success, _ in found)
        if score == -math.inf:
            return self.finding(
                "no evidence", threshold=self.threshold, remark="no mask is small enough to count", figures=figures
            )
        flagged = [patch for success, patch in found if success > self.threshold]
        return self.finding(
            "evidence" if flagged else "no evidence",
            score=score,
            threshold=self.threshold,
            suspects=tuple(sorted({patch.target for patch in flagged})),
            figures=figures,
            pictures={f"class {patch.target}": patch.mask * patch.pattern for patch in flagged},
        )
