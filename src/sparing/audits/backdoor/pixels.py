"""Between [0, 1] pixels and the normalised space in which networks see them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sparing.core.errors import InvalidValue

SLACK = 1e-3
"""How far outside [0, 1] float32 arithmetic may put a pixel that is still valid."""


@dataclass(frozen=True)
class PixelSpace:
    """x = (pixel - mean) / std by channel, pixels in [0, 1].

    Raises :class:`InvalidValue` unless there are as many positive ``std`` as ``mean``.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise InvalidValue(
                f"pixels: {len(self.mean)} means and {len(self.std)} deviations; one of each per channel"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std)) or min(self.std) <= 0:
            raise InvalidValue(f"pixels: mean = {self.mean}, std = {self.std}; finite, and std above 0, is expected")

    def _column(self, values: tuple[float, ...], x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[-3] != len(values):
            raise InvalidValue(f"pixels: images of shape {tuple(x.shape)}; (…, {len(values)}, H, W) is expected")
        return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1)

    def normalise(self, unit: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """Pixels in [0, 1] → what a network sees."""
        return (unit - self._column(self.mean, unit)) / self._column(self.std, unit)

    def to_unit(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """What a network sees → pixels, in [0, 1] if they are valid; nothing is clipped."""
        return x * self._column(self.std, x) + self._column(self.mean, x)

    def clamp(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """Normalised images with every value moved into the range of valid pixels."""
        mean, std = self._column(self.mean, x), self._column(self.std, x)
        return torch.minimum(torch.maximum(x, (0 - mean) / std), (1 - mean) / std)

    def excess(self, x: Float[Tensor, "*n c h w"]) -> float:
        """How far the worst value lies outside [0, 1], in units of the whole pixel range; 0 for valid images."""
        unit = self.to_unit(x)
        return max(0.0, float(unit.max()) - 1, -float(unit.min())) if unit.numel() else 0.0

    def check(self, x: Float[Tensor, "n c h w"], where: str) -> None:
        """Raise :class:`InvalidValue` naming the first image that is not finite or leaves the range of pixels."""
        unit = self.to_unit(x).flatten(1)
        bad = ~((unit >= -SLACK) & (unit <= 1 + SLACK)).all(dim=1)
        if bad.any():
            index = int(bad.nonzero()[0])
            raise InvalidValue(
                f"{where}: image {index} spans {float(unit[index].min()):.4g} to {float(unit[index].max()):.4g} as "
                f"pixels under mean {self.mean} and std {self.std}; 0 to 1 is expected"
            )

    def to_uint8(self, x: Float[Tensor, "*n c h w"]) -> UInt8[Tensor, "*n c h w"]:
        """Normalised images → 8-bit pixels; :class:`InvalidValue` for values that no 8-bit pixel can hold."""
        excess = self.excess(x)
        if not excess <= SLACK:
            raise InvalidValue(
                f"pixels: values reach {excess:.4g} of the pixel range outside it; an 8-bit image cannot hold them"
            )
        return (self.to_unit(x) * 255).round().clamp(0, 255).to(torch.uint8)

    def from_uint8(self, pixels: UInt8[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """8-bit pixels, channels first, → what a network sees."""
        return self.normalise(pixels.float() / 255)
