"""Differentiable Siamese augmentation (DSA; Zhao and Bilen 2021, arXiv:2102.08259, section 3.2).

One change, with the same drawn numbers, is made to all images of a real batch and of the synthetic batch that is
compared with it. Every family can be differentiated with respect to the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, pad

from sparing.core.errors import InvalidValue, did_you_mean

FAMILIES = ("color", "crop", "cutout", "flip", "scale", "rotate")
"""What one is picked from; "color" is brightness, then saturation, then contrast."""
CROP, CUTOUT, SCALE, DEGREES = 0.125, 0.5, 1.2, 15.0
"""Largest shift and the square's side as shares of the image's side, largest zoom, largest angle."""


def brightness(x: Float[Tensor, "n c h w"], u: float) -> Float[Tensor, "n c h w"]:
    """x + (u − ½)."""
    return x + (u - 0.5)


def saturation(x: Float[Tensor, "n c h w"], u: float) -> Float[Tensor, "n c h w"]:
    """(x − m) · 2u + m with m the mean over a pixel's channels; grey images stay as they are."""
    grey = x.mean(dim=1, keepdim=True)
    return (x - grey) * (2 * u) + grey


def contrast(x: Float[Tensor, "n c h w"], u: float) -> Float[Tensor, "n c h w"]:
    """(x − m) · (u + ½) + m with m the mean of a whole image."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (u + 0.5) + mean


def color(x: Float[Tensor, "n c h w"], *u: float) -> Float[Tensor, "n c h w"]:
    """Brightness, saturation and contrast, one u for each."""
    return contrast(saturation(brightness(x, u[0]), u[1]), u[2])


def crop(x: Float[Tensor, "n c h w"], a: int, b: int) -> Float[Tensor, "n c h w"]:
    """Pixel (i + a, j + b) comes to row i, column j; zeros where the image has none."""
    height, width = x.shape[2:]
    up, left = abs(a), abs(b)
    return pad(x, (left, left, up, up))[:, :, up + a : up + a + height, left + b : left + b + width]


def cutout(x: Float[Tensor, "n c h w"], a: int, b: int) -> Float[Tensor, "n c h w"]:
    """A rectangle of half the image's sides (rounded half up) around row a, column b becomes 0."""
    sides = [int(CUTOUT * size + 0.5) for size in x.shape[2:]]
    (top, left), (bottom, right) = zip(
        *((max(at - side // 2, 0), max(at - side // 2 + side, 0)) for at, side in zip((a, b), sides, strict=True)),
        strict=True,
    )
    mask = x.new_ones(x.shape[2:])
    mask[top:bottom, left:right] = 0
    return x * mask


def flip(x: Float[Tensor, "n c h w"], u: float) -> Float[Tensor, "n c h w"]:
    """Columns mirrored when u < ½."""
    return x.flip(3) if u < 0.5 else x


def scale(x: Float[Tensor, "n c h w"], sx: float, sy: float) -> Float[Tensor, "n c h w"]:
    """Columns seen sx times as far from the centre, rows sy times: more than 1 shrinks the picture."""
    return _affine(x, [[sx, 0.0, 0.0], [0.0, sy, 0.0]])


def rotate(x: Float[Tensor, "n c h w"], t: float) -> Float[Tensor, "n c h w"]:
    """Turned about the centre by t radians, in coordinates of −1 … 1 along each side."""
    return _affine(x, [[math.cos(t), -math.sin(t), 0.0], [math.sin(t), math.cos(t), 0.0]])


def _affine(x: Tensor, matrix: list[list[float]]) -> Tensor:
    theta = torch.tensor(matrix, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
    grid = affine_grid(theta, list(x.shape), align_corners=False)
    return grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


OPERATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "color": (color, 3),
    "brightness": (brightness, 1),
    "saturation": (saturation, 1),
    "contrast": (contrast, 1),
    "crop": (crop, 2),
    "cutout": (cutout, 2),
    "flip": (flip, 1),
    "scale": (scale, 2),
    "rotate": (rotate, 1),
}
"""Name → (function of images and parameters, number of parameters)."""


def siamese_augment(
    x: Float[Tensor, "n c h w"], operation: str, parameters: Sequence[float]
) -> Float[Tensor, "n c h w"]:
    """Images (N, C, H, W) after one operation with given parameters, the same for all of them.

    Raises:
        InvalidValue: an unknown operation, or another number of parameters than it takes.
    """
    _known(operation, OPERATIONS)
    function, count = OPERATIONS[operation]
    if len(parameters) != count:
        raise InvalidValue(f"{operation}: {len(parameters)} parameters; {count} are expected")
    return function(x, *parameters)


class Draws:
    """Uniform numbers, one after the other, from a generator that is given."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self) -> float:
        """From [0, 1)."""
        return float(torch.rand(1, generator=self.generator))

    def integer(self, low: int, high: int) -> int:
        """From low, …, high."""
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))


class Augmentation(NamedTuple):
    """An operation with its parameters, to be called on any number of batches."""

    operation: str
    parameters: tuple[float, ...]

    def __call__(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Images (N, C, H, W) → changed images of the same shape."""
        return siamese_augment(x, *self)


def draw_parameters(operation: str, height: int, width: int, draws: Draws) -> tuple[float, ...]:
    """The parameters of one operation on images of a size.

    Raises:
        InvalidValue: an unknown operation.
    """
    _known(operation, OPERATIONS)
    if operation == "crop":
        reach = [int(CROP * size + 0.5) for size in (height, width)]
        return tuple(draws.integer(-far, far) for far in reach)
    if operation == "cutout":
        sides = [(size, int(CUTOUT * size + 0.5)) for size in (height, width)]
        return tuple(draws.integer(0, size - side % 2) for size, side in sides)
    if operation == "scale":
        return tuple(1 / SCALE + draws.uniform() * (SCALE - 1 / SCALE) for _ in range(2))
    if operation == "rotate":
        return ((2 * draws.uniform() - 1) * math.radians(DEGREES),)
    return tuple(draws.uniform() for _ in range(OPERATIONS[operation][1]))


def draw_augmentation(height: int, width: int, draws: Draws, families: Sequence[str] = FAMILIES) -> Augmentation:
    """One family, picked at random, with random parameters.

    Args:
        height: of the images, in pixels.
        width: likewise.
        draws: where chance comes from.
        families: what is picked from, in this order.

    Raises:
        InvalidValue: no families, or one that is unknown.
    """
    check_families(families)
    operation = families[draws.integer(0, len(families) - 1)]
    return Augmentation(operation, draw_parameters(operation, height, width, draws))


def check_families(families: Sequence[str]) -> None:
    """Raise :class:`InvalidValue` unless these are one or more known families."""
    if isinstance(families, str) or not families:
        raise InvalidValue(f"families = {families!r}; a sequence of one or more of {', '.join(FAMILIES)} is expected")
    for name in families:
        _known(name, FAMILIES)


def _known(name: str, known: Collection[str]) -> None:
    if name not in known:
        raise InvalidValue(f"no augmentation {name!r}; one of {', '.join(known)}.{did_you_mean(name, known)}")
