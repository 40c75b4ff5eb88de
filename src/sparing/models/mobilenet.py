"""A network of inverted residuals in the style of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).

The plain convolutional counterpart of :mod:`sparing.models.emo`, with the same stem, depths and widths; all operators
are known to every export format and INT8 kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.convnet import each, whole
from sparing.models.surgery import fill


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1×1 convolution to ``expanded`` channels, depth-wise convolution, 1×1 convolution back.

    Each with batch norm, the first two with ReLU6; the input is added where the shape allows (section 3.3 there).

    Shapes: (B, dim_in, H, W) → (B, dim_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, dim_in: int, dim_out: int, expanded: int, stride: int = 1, kernel: int = 3) -> None:
        super().__init__()
        self.skip = dim_in == dim_out and stride == 1
        self.expand = _convolution(dim_in, expanded)
        self.depthwise = _convolution(expanded, expanded, kernel, stride, groups=expanded)
        self.project = nn.Sequential(nn.Conv2d(expanded, dim_out, 1, bias=False), nn.BatchNorm2d(dim_out))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim_out h_out w_out"]:
        """(B, dim_in, H, W) → (B, dim_out, …)."""
        changed = self.project(self.depthwise(self.expand(x)))
        return x + changed if self.skip else changed


class MobileNet(nn.Module):
    """Inverted residuals in the style of MobileNetV2: stem, four stages at halving resolution, mean, linear layer.

    Shapes: (N, in_channels, H, W) → logits (N, num_classes); with ``features_only`` → the list of the stages' outputs,
    at strides 2, 4, 8 and 16 times ``stem_stride``.

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width of the images to come; too small ones are refused at once.
        stem_dim: channels of the first convolution.
        stem_stride: its stride, 1 or 2.
        widths: channels of each stage.
        depths: blocks in each stage; the first halves the resolution.
        expansion: channels inside a block over those of its input.
        kernel: of the depth-wise convolutions, odd.
        hidden: channels inside each block, in order, in place of ``expansion``.
        features_only: a feature pyramid instead of a classifier; there is no head then.

    The default has 136,770 parameters with 3 channels and 10 classes, and is made for 64 pixels.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 64,
        stem_dim: int = 16,
        stem_stride: int = 1,
        widths: Sequence[int] = (16, 24, 40, 64),
        depths: Sequence[int] = (1, 1, 3, 2),
        expansion: float = 5.5,
        kernel: int = 3,
        hidden: Sequence[int] | None = None,
        features_only: bool = False,
    ) -> None:
        super().__init__()
        whole("mobilenet", in_channels=in_channels, num_classes=num_classes, image_size=image_size, stem_dim=stem_dim)
        whole("mobilenet", **{f"widths[{i}]": width for i, width in enumerate(widths)}, kernel=kernel)
        whole("mobilenet", **{f"depths[{i}]": depth for i, depth in enumerate(depths)})
        if not len(widths) or len(widths) != len(depths):
            raise InvalidValue(f"mobilenet: {len(widths)} widths and {len(depths)} depths; one of each for every stage")
        if stem_stride not in (1, 2):
            raise InvalidValue(f"mobilenet: stem_stride = {stem_stride!r}; 1 or 2 is expected")
        if kernel % 2 == 0:
            raise InvalidValue(f"mobilenet: kernel = {kernel!r}; an odd number is expected")
        if not expansion >= 1:
            raise InvalidValue(f"mobilenet: expansion = {expansion!r}; 1 or more is expected")
        self.in_channels, self.smallest = in_channels, stem_stride << len(widths)
        self.features_only, self.embed_dims = features_only, tuple(widths)
        self._absent: tuple[str, ...] = ()
        if image_size < self.smallest:
            raise InvalidValue(
                f"mobilenet: image_size = {image_size}; {len(widths)} stages that halve, after a stride of "
                f"{stem_stride}, need at least {self.smallest}"
            )
        self.stem = _convolution(in_channels, stem_dim, 3, stem_stride)
        inner = None if hidden is None else iter(each("mobilenet", "hidden", hidden, sum(depths)))
        stages, dim = [], stem_dim
        for width, depth in zip(widths, depths, strict=True):
            blocks = []
            for block in range(depth):
                expanded = int(dim * expansion) if inner is None else next(inner)
                blocks.append(InvertedResidual(dim, width, expanded, 1 if block else 2, kernel))
                dim = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.head = None if features_only else nn.Linear(dim, num_classes)

    def forward_features(self, images: Float[Tensor, "..."]) -> list[Float[Tensor, "n c h w"]]:
        """(N, in_channels, H, W) → the output of each stage."""
        if images.ndim != 4 or images.shape[1] != self.in_channels or min(images.shape[2:]) < self.smallest:
            raise InvalidValue(
                f"mobilenet: an input of shape {tuple(images.shape)}; (N, {self.in_channels}, H, W) with H and W of at "
                f"least {self.smallest} is expected"
            )
        if not torch.jit.is_tracing():
            images = images.contiguous(memory_format=torch.channels_last)  # kept by all layers, quicker on a CPU
        x, features = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    def forward(self, images: Float[Tensor, "..."]) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) → logits (N, num_classes), or with ``features_only`` the output of each stage."""
        features = self.forward_features(images)
        return features if self.head is None else self.head(features[-1].mean((2, 3)))

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state dict into this model; a backbone (``features_only``) leaves out a classifier's head,
        and the stages it was told not to keep.

        Raises :class:`InvalidValue` that lists every tensor that does not fit.
        """
        fill(self, state, "mobilenet", ignored=("head.", *self._absent) if self.features_only else ())

    def keep_stages(self, count: int) -> None:
        """Leave out the stages of a backbone after the first ``count``, where nothing looks at them."""
        if not self.features_only or not 1 <= count <= len(self.embed_dims):
            raise InvalidValue(
                f"mobilenet: keep_stages({count!r}); 1…{len(self.embed_dims)} is expected, of a network with "
                "features_only"
            )
        self._absent = (*self._absent, *(f"stages.{stage}." for stage in range(count, len(self.stages))))
        self.stages = nn.Sequential(*list(self.stages)[:count])
        self.embed_dims = self.embed_dims[:count]


def _convolution(dim_in: int, dim_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(dim_out),
        nn.ReLU6(),
    )
