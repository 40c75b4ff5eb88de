"""Changing inputs a little before the network sees them: a patch that must sit at its place loses its effect.

ShrinkPad after Li et al. 2021 (arXiv 2104.02361); shifts, flip, JPEG and median filter are common practice.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate, pad

from sparing.audits.backdoor.finding import Defence, Finding, Subject, settings
from sparing.audits.backdoor.layers import predict
from sparing.audits.backdoor.metrics import backdoor_rates
from sparing.audits.backdoor.repair import mitigation
from sparing.core.errors import InvalidValue

Pictures = Float[Tensor, "n c h w"]
Transformation = Callable[[Tensor], Tensor]


def shift(unit: Pictures, down: int, right: int) -> Pictures:
    """Pictures moved by whole pixels; what comes in is 0."""
    height, width = unit.shape[2:]
    moved = torch.zeros_like(unit)
    rows, columns = height - abs(down), width - abs(right)
    if rows > 0 and columns > 0:
        moved[:, :, max(down, 0) : max(down, 0) + rows, max(right, 0) : max(right, 0) + columns] = unit[
            :, :, max(-down, 0) : max(-down, 0) + rows, max(-right, 0) : max(-right, 0) + columns
        ]
    return moved


def flip(unit: Pictures) -> Pictures:
    """Left and right exchanged."""
    return unit.flip(3)


def shrink_pad(unit: Pictures, pixels: int, generator: torch.Generator) -> Pictures:
    """Each picture made ``pixels`` smaller (bilinear) and put at a random place on a canvas of 0."""
    height, width = unit.shape[2:]
    if not 1 <= pixels < min(height, width):
        raise InvalidValue(f"shrink_pad: {pixels} pixels off an image of {height} x {width}")
    small = interpolate(unit, size=(height - pixels, width - pixels), mode="bilinear", align_corners=False)
    places = torch.randint(pixels + 1, (len(unit), 2), generator=generator).tolist()
    return torch.stack(
        [
            pad(image, (column, pixels - column, row, pixels - row))
            for image, (row, column) in zip(small, places, strict=True)
        ]
    )


def jpeg(unit: Pictures, quality: int) -> Pictures:
    """Pictures of one or three channels through JPEG; what is no pixel is clipped first."""
    from PIL import Image

    if unit.shape[1] not in (1, 3):
        raise InvalidValue(f"jpeg: pictures of {unit.shape[1]} channels; 1 or 3 are expected")
    mode = "L" if unit.shape[1] == 1 else "RGB"
    decoded = []
    for picture in (unit * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(picture[:, :, 0] if mode == "L" else picture).save(file, "JPEG", quality=quality)
        array = np.array(Image.open(io.BytesIO(file.getvalue())).convert(mode), dtype=np.float32)
        decoded.append(torch.from_numpy(array).view(*picture.shape).permute(2, 0, 1) / 255)
    return torch.stack(decoded).to(unit)


def median_filter(unit: Pictures) -> Pictures:
    """Each pixel the median of the 3 x 3 around it; the border is repeated."""
    around = pad(unit, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    return around.flatten(4).median(dim=4).values


def transformations(generator: torch.Generator) -> dict[str, list[Transformation]]:
    """Name → its variants, whose figures are averaged: eight directions of a shift, one of everything else."""
    directions = [(d, r) for d in (-1, 0, 1) for r in (-1, 0, 1) if (d, r) != (0, 0)]
    found: dict[str, list[Transformation]] = {
        f"shrink_pad_{k}": [partial(shrink_pad, pixels=k, generator=generator)] for k in (2, 4)
    }
    for k in (1, 2, 3):
        found[f"shift_{k}"] = [partial(shift, down=k * d, right=k * r) for d, r in directions]
    found["flip"] = [flip]
    for quality in (75, 50, 25):
        found[f"jpeg_{quality}"] = [partial(jpeg, quality=quality)]
    found["median_3"] = [median_filter]
    return found


class InputTransforms(Defence):
    """Attack success and clean accuracy after each of a dozen small changes of the input.

    The score is the smallest share of the attack's excess (success above the null rate) that any transformation leaves
    without losing more than ``allowed_drop`` of clean accuracy; below ``threshold`` the attack counts as mitigated
    (design choice).
    """

    name, level = "input_transforms", "input"
    source = "Li et al. 2021, arXiv 2104.02361, and common practice"

    def __init__(self, threshold: float = 0.5, allowed_drop: float = 0.04) -> None:
        settings(self.name, {"threshold": (threshold, 0, 1), "allowed_drop": (allowed_drop, 0, 1)})
        self.threshold, self.allowed_drop = threshold, allowed_drop

    def judge(self, subject: Subject) -> Finding:
        """Both rates after each transformation, for each trigger at hand."""
        images, pixels, model = subject.holdout, subject.pixels, subject.model
        generator = torch.Generator().manual_seed(subject.seed)

        def logits(x: Tensor, change: Transformation) -> Tensor:
            return predict(model, pixels.normalise(change(pixels.to_unit(x))))

        plain = predict(model, images.x)
        before = float((plain.argmax(dim=1) == images.y).float().mean())
        old = {
            s.target: backdoor_rates(plain, predict(model, s.apply(images.x)), images.y, s.target)
            for s in subject.stamps
        }
        rows: dict[str, dict[str, Any]] = {}
        left: dict[str, dict[int, float]] = {}
        for name, variants in transformations(generator).items():
            clean = [logits(images.x, change) for change in variants]
            cta = float(np.mean([float((one.argmax(dim=1) == images.y).float().mean()) for one in clean]))
            rows[name], left[name] = {"cta": cta}, {}
            for stamp in subject.stamps:
                stamped = stamp.apply(images.x)
                rates = [
                    backdoor_rates(one, logits(stamped, change), images.y, stamp.target)
                    for one, change in zip(clean, variants, strict=True)
                ]
                asr = float(np.mean([rate.asr.value for rate in rates]))
                null = float(np.mean([rate.null.value for rate in rates]))
                rows[name] |= {f"asr_{stamp.target}": asr, f"null_{stamp.target}": null}
                if old[stamp.target].excess > 0:
                    left[name][stamp.target] = max(asr - null, 0.0) / old[stamp.target].excess
        figures = {
            "cta": before,
            "asr": {target: rates.asr.value for target, rates in old.items()},
            "after": rows,
        }
        accurate = [name for name in rows if before - rows[name]["cta"] <= self.allowed_drop]
        best = min(accurate or rows, key=lambda name: max(left[name].values(), default=0.0))
        return mitigation(
            self, left[best], bool(accurate), self.threshold, bool(subject.stamps), figures | {"best": best}
        )
