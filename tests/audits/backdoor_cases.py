"""Small pictures of six classes, and networks with and without a planted backdoor."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from sparing.audits.backdoor.finding import Images, Stamp, Subject
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.triggers import PatchTrigger
from sparing.condensation.evaluation import train_on_condensed
from sparing.core.randomness import isolated_rng
from sparing.models.blocknet import BlockNet

CLASSES, SIZE, TARGET = 6, 12, 0
PIXELS = PixelSpace((0.4,), (0.25,))


def pictures(n: int, seed: int) -> Images:
    """``n`` noisy pictures: each class has a fixed coarse pattern of dim pixels."""
    patterns = torch.rand(CLASSES, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.arange(n) % CLASSES
    unit = nn.functional.interpolate(patterns, size=SIZE)[labels] * 0.6 + 0.2
    unit = (unit + 0.1 * torch.randn(unit.shape, generator=generator)).clamp(0, 1)
    return Images(PIXELS.normalise(unit), labels)


def factory() -> nn.Module:
    return BlockNet(1, CLASSES, SIZE, width=8, depth=2, norm="none", hidden=24, first_padding=1)


def fresh(seed: int = 0) -> nn.Module:
    """An untrained network, always the same."""
    with isolated_rng("fresh", seed):
        return factory()


def white_patch(size: int = 2) -> PatchTrigger:
    return PatchTrigger((1, SIZE, SIZE), PIXELS, size)


def poisoned(images: Images, trigger: PatchTrigger, every: int = 5) -> Images:
    """Each ``every``-th picture stamped and relabelled."""
    x, y = images.x.clone(), images.y.clone()
    x[::every] = trigger.apply(x[::every])
    y[::every] = TARGET
    return Images(x, y)


def trained(images: Images, seed: int = 0) -> nn.Module:
    with isolated_rng("case", seed):
        return train_on_condensed(factory(), images.x, images.y, epochs=40, batch_size=32, lr=0.05, seed=seed)


@cache
def clean_model() -> nn.Module:
    return trained(pictures(300, 0))


@cache
def backdoored_model() -> nn.Module:
    return trained(poisoned(pictures(300, 0), white_patch()))


def subject(model: nn.Module, known: bool = True, **given: object) -> Subject:
    stamps = (Stamp(TARGET, white_patch().apply, "attacker"),) if known else ()
    return Subject(model, pictures(120, 1), PIXELS, CLASSES, stamps=stamps, **given)  # type: ignore[arg-type]


def stamped(x: Tensor) -> Tensor:
    return white_patch().apply(x)
