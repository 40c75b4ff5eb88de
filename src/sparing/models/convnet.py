"""A plain ReLU convolutional network, from 8×8 digits to 224×224 photographs.

Made of convolution, batch norm, ReLU, pooling and one linear layer only, so that every export format, INT8 kernel and
pruning rule knows all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue


def whole(model: str, at_least: int = 1, **values: object) -> None:
    """Raise :class:`InvalidValue` for the first of ``values`` that is no whole number of ``at_least`` or more."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise InvalidValue(f"{model}: {name} = {value!r}; a whole number of at least {at_least} is expected")


def each(model: str, name: str, value: object, count: int) -> list[int]:
    """One whole number for each of ``count`` parts: ``value`` for all, or a sequence of them."""
    values = [value] * count if isinstance(value, int) else list(value) if isinstance(value, Sequence) else []
    if len(values) != count:
        raise InvalidValue(f"{model}: {name} = {value!r}; a whole number, or {count} of them, is expected")
    for i, item in enumerate(values):
        whole(model, **{name if isinstance(value, int) else f"{name}[{i}]": item})
    return values


Norm = Literal["batch", "instance", "none"]


def norm_of(model: str, norm: str, channels: int) -> nn.Module:
    """A norm after a convolution, with learned scale and shift: "batch", "instance" (each channel of each image for
    itself) or "none", which is the identity. Raises :class:`InvalidValue` for another."""
    if norm not in ("batch", "instance", "none"):
        raise InvalidValue(f'{model}: norm = {norm!r}; "batch", "instance" or "none" is expected')
    if norm == "none":
        return nn.Identity()
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(channels, channels)


class ConvNet(nn.Module):
    """Plain ReLU convolutional network: stages at halving resolution, then a linear layer.

    A stage is [3×3 convolution → batch norm → ReLU] × depth; each stage after the first works at half the resolution.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width in pixels.
        widths: channels of each stage; for a stage whose convolutions differ, a list of theirs.
        depths: convolutions in each stage: one number for all, or one for each stage.
        downsample: how a stage halves the resolution (odd sizes round down): "pool" (2×2 max pooling before it) or
            "stride" (its first convolution has stride 2; odd sizes round up).
        head: "average" (mean over positions, works at any size) or "flatten" (all positions, tied to ``image_size``).

    The default has 0.3 M weights, mostly in its last two stages where positions are few: 5.6 M multiply-accumulates on
    a 28×28 image.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        widths: Sequence[int | Sequence[int]] = (16, 32, 128, 256),
        depths: int | Sequence[int] = 1,
        downsample: Literal["pool", "stride"] = "pool",
        head: Literal["average", "flatten"] = "average",
    ) -> None:
        super().__init__()
        whole("convnet", in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        widths = tuple(widths)
        depths = (depths,) * len(widths) if isinstance(depths, int) else tuple(depths)
        if not widths:
            raise InvalidValue("convnet: widths is empty; at least one stage is expected")
        if len(depths) != len(widths):
            raise InvalidValue(f"convnet: depths has {len(depths)} entries, widths has {len(widths)}; equal numbers")
        channels_of = []
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            whole("convnet", **{f"depths[{stage}]": depth})
            channels_of.append(each("convnet", f"widths[{stage}]", width, depth))
        if downsample not in ("pool", "stride"):
            raise InvalidValue(f'convnet: downsample = {downsample!r}; "pool" or "stride" is expected')
        if head not in ("average", "flatten"):
            raise InvalidValue(f'convnet: head = {head!r}; "average" or "flatten" is expected')
        halvings = len(widths) - 1
        if image_size < 1 << halvings:
            raise InvalidValue(
                f"convnet: {len(widths)} stages halve the image {halvings} times, which needs an image_size of at "
                f"least {1 << halvings}, not {image_size}; give fewer widths"
            )
        self.in_channels, self.image_size = in_channels, image_size
        stages: list[nn.Module] = []
        channels, size = in_channels, image_size
        for stage, wide in enumerate(channels_of):
            layers: list[nn.Module] = []
            halve = stage > 0
            if halve and downsample == "pool":
                layers.append(nn.MaxPool2d(2))
            for layer, width in enumerate(wide):
                stride = 2 if halve and downsample == "stride" and layer == 0 else 1
                layers += [
                    nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            if halve:
                size = size // 2 if downsample == "pool" else (size + 1) // 2
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1) if head == "average" else nn.Identity()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(channels * (1 if head == "average" else size * size), num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n features"]:
        """(N, in_channels, H, W) → what the linear layer sees, (N, features)."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise InvalidValue(
                f"convnet: an input of shape {tuple(images.shape)}; (N, {self.in_channels}, {self.image_size}, "
                f"{self.image_size}) is expected"
            )
        return self.flatten(self.pool(self.stages(images)))

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """(N, in_channels, H, W) → logits (N, num_classes)."""
        return self.head(self.features(images))
