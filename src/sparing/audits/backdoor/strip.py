"""STRIP: an input that keeps its class whatever it is blended with carries a trigger (Gao et al., ACSAC 2019)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from sparing.audits.backdoor.finding import Defence, Finding, Subject, settings
from sparing.audits.backdoor.layers import predict
from sparing.audits.backdoor.metrics import Rate
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.core.errors import InvalidValue

Blend = Literal["add", "half"]
LOG_SHIFT = 1e-12


def blend(a: Num[Tensor, "*shape"], b: Num[Tensor, "*shape"], how: Blend) -> Num[Tensor, "*shape"]:
    """Two pictures in pixels of 0 to 255: their sum, saturating, or their mean, rounded half to even; as ``a`` is."""
    if how not in ("add", "half"):
        raise InvalidValue(f"blend = {how!r}; add or half is expected")
    total = a.float() + b.float()
    mixed = total if how == "add" else (total / 2).round()
    return mixed.clamp(0, 255).to(a.dtype)


def blend_entropy(probabilities: Float[Tensor, "inputs blends classes"]) -> Float[Tensor, " inputs"]:
    """Entropy of the predictions in bits, mean over the blends of an input (equation 4 there)."""
    return -(probabilities * torch.log2(probabilities + LOG_SHIFT)).sum(dim=2).mean(dim=1)


def entropy_threshold(clean: Float[Tensor, " inputs"], frr: float = 0.01) -> float:
    """The entropy below which the share ``frr`` of clean inputs lies, by a normal fitted to theirs (section 4.3)."""
    from scipy.stats import norm

    if not 0 < frr < 1:
        raise InvalidValue(f"strip: frr = {frr}; above 0 and below 1 is expected")
    return float(clean.mean() + clean.std(correction=0) * float(norm.ppf(frr)))


def input_entropies(
    model: nn.Module,
    x: Float[Tensor, "n c h w"],
    others: Float[Tensor, "m c h w"],
    pixels: PixelSpace,
    how: Blend,
    blends: int,
    generator: torch.Generator,
) -> Float[Tensor, " n"]:
    """Entropy of each input over ``blends`` images drawn from ``others``, with replacement if there are fewer."""
    unit, pool = pixels.to_unit(x) * 255, pixels.to_unit(others) * 255
    found = []
    for image in unit:
        if blends <= len(pool):
            drawn = torch.randperm(len(pool), generator=generator)[:blends]
        else:
            drawn = torch.randint(len(pool), (blends,), generator=generator)
        mixed = blend(image.expand_as(pool[drawn]), pool[drawn], how)
        probabilities = predict(model, pixels.normalise(mixed / 255)).softmax(dim=1)
        found.append(blend_entropy(probabilities[None].double()))
    return torch.cat(found)


class Strip(Defence):
    """Share of triggered inputs whose entropy over blends lies below what clean inputs show.

    Args:
        blends: clean images that each input is blended with.
        frr: share of clean inputs that may be rejected.
        how: "add" (saturating, as in the paper) or "half" (the mean of both).
        inputs: clean inputs to fit the threshold to, and triggered ones to judge, at most.
        threshold: share of triggered inputs that must be seen for a verdict of evidence (design choice).
    """

    name, level = "strip", "input"
    source = "Gao et al., STRIP, ACSAC 2019"
    fewest_images = 50

    def __init__(
        self, blends: int = 100, frr: float = 0.01, how: Blend = "add", inputs: int = 100, threshold: float = 0.5
    ) -> None:
        settings(
            self.name,
            {"blends": (blends, 1, 10**6), "inputs": (inputs, 2, 10**6), "threshold": (threshold, 0, 1)},
        )
        if how not in ("add", "half"):
            raise InvalidValue(f"strip: how = {how!r}; add or half is expected")
        if not 0 < frr < 1:
            raise InvalidValue(f"strip: frr = {frr}; above 0 and below 1 is expected")
        self.blends, self.frr, self.how, self.inputs, self.threshold = blends, frr, how, inputs, threshold

    def judge(self, subject: Subject) -> Finding:
        """The threshold from one half of the hold-out; false alarms and detections on the other.

        Raises :class:`InvalidValue` for a hold-out of fewer than 50 images.
        """
        if len(subject.holdout.y) < self.fewest_images:
            raise InvalidValue(
                f"strip: a hold-out of {len(subject.holdout.y)} images; at least {self.fewest_images} are needed"
            )
        generator = torch.Generator().manual_seed(subject.seed)
        fitted, judged = subject.halves()

        def entropies(x: Tensor) -> Tensor:
            x = x[: self.inputs]
            return input_entropies(subject.model, x, fitted.x, subject.pixels, self.how, self.blends, generator)

        clean = entropies(fitted.x)
        limit = entropy_threshold(clean, self.frr)
        false_alarms = Rate(int((entropies(judged.x) < limit).sum()), min(self.inputs, len(judged.y)))
        figures: dict[str, object] = {
            "entropy_threshold": limit,
            "clean_entropy": float(clean.mean()),
            "false_alarms": false_alarms.value,
            "false_alarms_interval95": false_alarms.interval,
        }
        rates = {}
        for stamp in subject.stamps:
            found = entropies(stamp.apply(judged.of(judged.y != stamp.target).x))
            rate = Rate(int((found < limit).sum()), len(found))
            rates[stamp.target] = rate.value
            figures[f"detection_{stamp.target}"] = rate.value
            figures[f"detection_{stamp.target}_interval95"] = rate.interval
            figures[f"far_{stamp.target}"] = 1 - rate.value
            figures[f"triggered_entropy_{stamp.target}"] = float(found.mean())
        if not rates:
            return self.not_applicable("no trigger is known: clean false alarms only", figures=figures)
        suspects = tuple(target for target, rate in rates.items() if rate > self.threshold)
        return self.finding(
            "evidence" if suspects else "no evidence",
            score=max(rates.values()),
            threshold=self.threshold,
            suspects=suspects,
            figures=figures,
        )
