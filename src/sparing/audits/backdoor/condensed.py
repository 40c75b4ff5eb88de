"""Checks of condensed sets themselves (our own; what they are worth is measured, not assumed)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sparing.audits.backdoor.finding import Defence, Finding, Images, Subject, settings
from sparing.audits.backdoor.layers import predict
from sparing.audits.backdoor.metrics import MAD_TO_SIGMA, mad_outliers
from sparing.core.errors import InvalidValue

LEAST_DEVIATION = 0.05


def class_moments(
    images: Float[Tensor, "n c h w"], labels: Tensor, classes: int, where: str
) -> tuple[Float[Tensor, "k c h w"], Float[Tensor, "k c h w"], Tensor]:
    """(means, standard deviations, counts) of each class's images; :class:`InvalidValue` names a missing class."""
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        raise InvalidValue(
            f"{where}: class {int((counts == 0).nonzero()[0])} has no image; all {classes} must be there"
        )
    groups = [images[labels == c] for c in range(classes)]
    means = torch.stack([group.mean(dim=0) for group in groups])
    return means, torch.stack([group.std(dim=0, correction=0) for group in groups]), counts


@dataclass(frozen=True)
class Residuals:
    """How far each place of each class stands out."""

    map: Float[Tensor, "k rows columns"]
    """d_c: residual over windows, less the median over classes."""
    statistic: Float[np.ndarray, " k"]
    """T_c: largest magnitude of d_c in units of its median deviation."""
    places: tuple[tuple[int, int], ...]
    """Row and column of the window where that is."""


def residual_statistics(residual: Float[Tensor, "k c h w"], window: int) -> Residuals:
    """Standardised differences of the classes' mean images → T_c, the most prominent window of each class.

    r_c averaged over channels and ``window`` x ``window`` pixels, d_c = r_c - median over classes, T_c = max abs(d_c) /
    (1.4826 · median abs(d_c - median d_c)); NaN where d_c does not vary.
    """
    height, width = residual.shape[2:]
    if not 1 <= window <= min(height, width):
        raise InvalidValue(f"residual map: windows of {window} pixels in images of {height} x {width}")
    smooth = avg_pool2d(residual.mean(dim=1, keepdim=True), window, stride=1)[:, 0]
    centred = smooth - torch.from_numpy(np.median(smooth.cpu().numpy(), axis=0)).to(smooth)
    flat = centred.flatten(1).cpu().numpy()
    deviation = MAD_TO_SIGMA * np.median(np.abs(flat - np.median(flat, axis=1, keepdims=True)), axis=1)
    deviation = np.where(deviation > 0, deviation, np.nan)
    places = [divmod(int(place), centred.shape[2]) for place in np.abs(flat).argmax(axis=1)]
    return Residuals(centred, np.abs(flat).max(axis=1) / deviation, tuple(places))


class ResidualMap(Defence):
    """A place where a class's mean synthetic image differs from the real one as no other class's does.

    r_c(u) = (mean_S,c - mean_R,c) / (max(sd_R,c, 0.05) / sqrt(images per class)) in [0, 1] pixels. Real images are no
    null for it, as any condensed image differs from them: its false alarms on clean condensed sets must be measured.

    Args:
        window: side of the patch looked for.
        threshold: anomaly index of a class's statistic among the classes'.
    """

    name, level, source = "residual_map", "data", "own"

    def __init__(self, window: int = 2, threshold: float = 2.0) -> None:
        settings(self.name, {"window": (window, 1, 10**6), "threshold": (threshold, 0, 1e6)})
        self.window, self.threshold = window, threshold

    def residual(self, subject: Subject, condensed: Images) -> Tensor:
        """r_c, (classes, channels, H, W)."""
        reference = subject.reference or subject.holdout
        mean, _, count = class_moments(
            subject.pixels.to_unit(condensed.x), condensed.y, subject.classes, "condensed set"
        )
        real, deviation, _ = class_moments(
            subject.pixels.to_unit(reference.x), reference.y, subject.classes, "reference images"
        )
        return (mean - real) / (deviation.clamp(min=LEAST_DEVIATION) / count.view(-1, 1, 1, 1).sqrt())

    def missing(self, subject: Subject) -> str:
        """What the subject lacks for this check, or an empty text."""
        return "" if subject.condensed is not None else "there is no condensed set"

    def judge(self, subject: Subject) -> Finding:
        """T_c of each class, where it is, and its anomaly index."""
        missing = self.missing(subject)
        if missing or subject.condensed is None:
            return self.not_applicable(missing)
        found = residual_statistics(self.residual(subject, subject.condensed), self.window)
        figures = {"statistic": found.statistic, "places": found.places}
        outliers = mad_outliers(found.statistic, "upper", self.threshold)
        if outliers is None:
            return self.not_applicable(
                "fewer than five classes, or all alike: no outlier can be named", figures=figures
            )
        above = found.statistic > outliers.median
        flagged = {f"class {c}": found.map[c].abs() / found.map[c].abs().max() for c in outliers.flagged}
        return self.finding(
            "evidence" if outliers.flagged else "no evidence",
            score=float(outliers.index[above].max()),
            threshold=self.threshold,
            suspects=outliers.flagged,
            figures=figures | {"anomaly_index": outliers.index},
            pictures={name: picture[None] for name, picture in flagged.items()},
        )


class OwnSetComparison(ResidualMap):
    """The residual map against a set that one has condensed oneself from the same real data.

    r_c(u) = (mean_S,c - mean_O,c) / (max(sd_R,c, 0.05) · sqrt(1/n_S + 1/n_O)), with the real images' deviation: what is
    common to all condensed images cancels.
    """

    name = "own_set_comparison"

    def missing(self, subject: Subject) -> str:
        """What the subject lacks for this check, or an empty text."""
        return super().missing(subject) or ("" if subject.own is not None else "there is no set of one's own")

    def residual(self, subject: Subject, condensed: Images) -> Tensor:
        """r_c, (classes, channels, H, W)."""
        if subject.own is None:
            raise InvalidValue(f"{self.name}: there is no set of one's own")
        reference, own = subject.reference or subject.holdout, subject.own
        mean, _, count = class_moments(
            subject.pixels.to_unit(condensed.x), condensed.y, subject.classes, "condensed set"
        )
        other, _, others = class_moments(subject.pixels.to_unit(own.x), own.y, subject.classes, "one's own set")
        _, deviation, _ = class_moments(
            subject.pixels.to_unit(reference.x), reference.y, subject.classes, "reference images"
        )
        share = (1 / count + 1 / others).view(-1, 1, 1, 1).sqrt()
        return (mean - other) / (deviation.clamp(min=LEAST_DEVIATION) * share)


class PixelRange(Defence):
    """Values that no 8-bit pixel can hold, in a trigger or in the images given (a trigger that leaves the range).

    Args:
        threshold: excess over the range, as a share of it.
    """

    name, level, source = "pixel_range", "input", "own"

    def __init__(self, threshold: float = 1e-3) -> None:
        settings(self.name, {"threshold": (threshold, 0, 1e6)})
        self.threshold = threshold

    def judge(self, subject: Subject) -> Finding:
        """Largest excess of stamped hold-out images; that of the condensed set is reported but is no sign."""
        figures = {"holdout": subject.pixels.excess(subject.holdout.x)}
        if subject.condensed is not None:  # condensers do not clip, so this is common in clean sets
            figures["condensed_set"] = subject.pixels.excess(subject.condensed.x)
        shown = {s.target: subject.pixels.excess(s.apply(subject.holdout.x[:1])) for s in subject.stamps}
        if not shown:
            return self.not_applicable("no trigger is known", figures=figures)
        suspects = tuple(target for target, excess in shown.items() if excess > self.threshold)
        return self.finding(
            "evidence" if suspects else "no evidence",
            score=max(shown.values()),
            threshold=self.threshold,
            suspects=suspects,
            figures=figures | {"stamped": shown},
        )


class PatchScan(Defence):
    """Small patches at a grid of places on clean images: is there one that leads them to a class as no other does?

    Rates are the share of images of other classes predicted as the class, less the same without the patch; a class's
    statistic is its largest rate over places and patches.

    Args:
        sides: of the patches, each also the stride of its grid.
        random: patches of random pixels at each place, besides a white and a black one.
        images: clean hold-out images, at most.
        threshold: anomaly index of a class's largest rate among the classes'.
    """

    name, level, source = "patch_scan", "model", "own"

    def __init__(
        self, sides: tuple[int, ...] = (2, 4), random: int = 8, images: int = 200, threshold: float = 2.0
    ) -> None:
        limits: dict[str, tuple[float, float, float]] = {
            f"sides[{i}]": (side, 1, 10**6) for i, side in enumerate(sides)
        }
        settings(
            self.name,
            limits | {"random": (random, 0, 10**6), "images": (images, 1, 10**6), "threshold": (threshold, 0, 1e6)},
        )
        if not sides:
            raise InvalidValue("patch_scan: sides is empty; at least one is expected")
        self.sides, self.random, self.images, self.threshold = tuple(sides), random, images, threshold

    def judge(self, subject: Subject) -> Finding:
        """The largest rate of each class and where it was found."""
        generator = torch.Generator().manual_seed(subject.seed)
        places = torch.randperm(len(subject.holdout.y), generator=generator)[: self.images]
        images = subject.holdout.of(places)
        _, channels, height, width = images.x.shape
        others = torch.stack([images.y != c for c in range(subject.classes)])
        counts = others.sum(dim=1)
        if max(self.sides) > min(height, width) or (counts == 0).any():
            return self.not_applicable("images of one class only, or smaller than the patch")

        def rates(x: Tensor) -> Tensor:
            predicted = predict(subject.model, x).argmax(dim=1)
            return torch.stack([(predicted[others[c]] == c).float().mean() for c in range(subject.classes)])

        plain = rates(images.x)
        best = torch.full((subject.classes,), -torch.inf)
        where: list[dict[str, int | str]] = [{} for _ in range(subject.classes)]
        for side in self.sides:
            drawn = torch.randint(256, (self.random, channels, side, side), generator=generator)
            patches = [("white", torch.full((channels, side, side), 255)), ("black", torch.zeros(channels, side, side))]
            patches += [(f"random {i}", patch) for i, patch in enumerate(drawn)]
            for row in range(0, height - side + 1, side):
                for column in range(0, width - side + 1, side):
                    for kind, patch in patches:
                        stamped = images.x.clone()
                        shown = subject.pixels.normalise(patch.float() / 255).to(stamped)
                        stamped[:, :, row : row + side, column : column + side] = shown
                        gained = (rates(stamped) - plain).cpu()
                        for c in (gained > best).nonzero().flatten().tolist():
                            best[c] = gained[c]
                            where[c] = {"side": side, "row": row, "column": column, "patch": kind}
        figures = {"largest_gain": best, "where": where}
        outliers = mad_outliers(best.numpy(), "upper", self.threshold)
        if outliers is None:
            return self.not_applicable(
                "fewer than five classes, or all alike: no outlier can be named", figures=figures
            )
        above = best.numpy() > outliers.median
        return self.finding(
            "evidence" if outliers.flagged else "no evidence",
            score=float(outliers.index[above].max()),
            threshold=self.threshold,
            suspects=outliers.flagged,
            figures=figures | {"anomaly_index": outliers.index},
        )
