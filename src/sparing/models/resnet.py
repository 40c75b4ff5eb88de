"""Residual networks of basic blocks, from 28×28 images to photographs (He et al. 2016, arXiv 1512.03385).

The plain residual counterpart of :mod:`sparing.models.convnet`: convolutions, norms, ReLU and additions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.convnet import Norm, each, norm_of, whole


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, each with a norm, and the input added before the last ReLU (section 3.3 there).

    Where the shape changes, the input passes a 1×1 convolution and a norm first (option B). Without norms the
    convolutions have biases.

    Shapes: (B, dim_in, H, W) → (B, dim_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int = 1, norm: Norm = "batch") -> None:
        super().__init__()
        bias = norm == "none"
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, stride=stride, padding=1, bias=bias)
        self.bn1 = norm_of("resnet", norm, dim_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=bias)
        self.bn2 = norm_of("resnet", norm, dim_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim_in != dim_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(dim_in, dim_out, 1, stride=stride, bias=bias), norm_of("resnet", norm, dim_out)
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b dim_out h_out w_out"]:
        """(B, dim_in, H, W) → (B, dim_out, …)."""
        changed = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(changed + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network of basic blocks: stem, stages at halving resolution, mean over positions, linear layer.

    Shapes: (N, in_channels, H, W) → logits (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        widths: channels of each stage; the stem has those of the first.
        depths: blocks in each stage: one number for all, or one for each; each stage after the first halves the
            resolution (odd sizes round up).
        stem: "small" (3×3 convolution at full resolution, for images of some 32 pixels) or "large" (7×7 convolution
            of stride 2 and max pooling of stride 2, for photographs).
        norm: "batch", "instance" (each channel of each image for itself, with learned scale and shift) or "none".

    The default has 0.7 M parameters. ``widths=(64, 128, 256, 512)`` with ``depths=2`` is ResNet-18, with
    ``depths=(3, 4, 6, 3)`` ResNet-34. What condensed images are judged by in the literature is ResNet-18 with the norm
    "instance".
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64, 128),
        depths: int | Sequence[int] = 2,
        stem: Literal["small", "large"] = "small",
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        whole("resnet", in_channels=in_channels, num_classes=num_classes)
        widths = each("resnet", "widths", widths, len(widths) if isinstance(widths, Sequence) else 1)
        if not widths:
            raise InvalidValue("resnet: widths is empty; at least one stage is expected")
        depths = each("resnet", "depths", depths, len(widths))
        if stem not in ("small", "large"):
            raise InvalidValue(f'resnet: stem = {stem!r}; "small" or "large" is expected')
        self.in_channels = in_channels
        kernel, stride = (3, 1) if stem == "small" else (7, 2)
        first: list[nn.Module] = [
            nn.Conv2d(in_channels, widths[0], kernel, stride=stride, padding=kernel // 2, bias=norm == "none"),
            norm_of("resnet", norm, widths[0]),
            nn.ReLU(),
        ]
        if stem == "large":
            first.append(nn.MaxPool2d(3, stride=2, padding=1))
        self.stem = nn.Sequential(*first)
        stages, dim = [], widths[0]
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = []
            for block in range(depth):
                blocks.append(BasicBlock(dim, width, 2 if stage and not block else 1, norm))
                dim = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """(N, in_channels, H, W) → logits (N, num_classes)."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise InvalidValue(
                f"resnet: an input of shape {tuple(images.shape)}; (N, {self.in_channels}, H, W) is expected"
            )
        return self.head(self.flatten(self.pool(self.stages(self.stem(images)))))
