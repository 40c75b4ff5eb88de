"""Light segmentation decoders on a backbone's last stage: DeepLabv3's and PSPNet's, with an auxiliary head.

Sources: L.-C. Chen et al., "Rethinking Atrous Convolution for Semantic Image Segmentation", 2017, arXiv 1706.05587;
H. Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, arXiv 1612.01105; sizes as in J. Zhang et al. 2023
(arXiv 2301.01146), EMO's segmenters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from sparing.core.errors import InvalidValue
from sparing.models.convnet import whole
from sparing.models.detection import LoneBatchNorm, pyramid_backbone

DILATIONS = (1, 12, 24, 36)
POOLS = (1, 2, 3, 6)


def resized(maps: Float[Tensor, "n c h w"], height: int, width: int) -> Float[Tensor, "n c height width"]:
    """Bilinear, pixel centres aligned."""
    return interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)


class AtrousPyramid(nn.Module):
    """DeepLabv3's decoder: convolutions of several dilations beside the image's mean, joined (section 3.3 there).

    Shapes: (B, channels_in, H, W) → (B, channels, H, W).
    """

    def __init__(self, channels_in: int, channels: int, dilations: Sequence[int] = DILATIONS) -> None:
        super().__init__()
        self.image = _convolution(channels_in, channels)
        self.branches = nn.ModuleList(
            _convolution(channels_in, channels, 1 if dilation == 1 else 3, dilation) for dilation in dilations
        )
        self.join = _convolution((1 + len(dilations)) * channels, channels, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width h w"]:
        """(B, channels_in, H, W) → (B, channels, H, W)."""
        image = self.image(x.mean((2, 3), keepdim=True))
        spread = image.expand(-1, -1, int(x.shape[2]), int(x.shape[3]))
        return self.join(torch.cat([spread, *(branch(x) for branch in self.branches)], 1))


class PooledPyramid(nn.Module):
    """PSPNet's decoder: means over 1×1, 2×2 … parts of the map beside the map itself, joined (section 3.2 there).

    Shapes: (B, channels_in, H, W) → (B, channels, H, W).
    """

    def __init__(self, channels_in: int, channels: int, pools: Sequence[int] = POOLS) -> None:
        super().__init__()
        self.pools = tuple(pools)
        self.branches = nn.ModuleList(_convolution(channels_in, channels) for _ in pools)
        self.join = _convolution(channels_in + len(pools) * channels, channels, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width h w"]:
        """(B, channels_in, H, W) → (B, channels, H, W)."""
        height, width = int(x.shape[2]), int(x.shape[3])
        means = [branch(_pooled(x, pool)) for pool, branch in zip(self.pools, self.branches, strict=True)]
        return self.join(torch.cat([x, *(resized(mean, height, width) for mean in means)], 1))


class SegmentationModel(nn.Module):
    """Segmentation: a DeepLabv3 or PSPNet decoder on a backbone, and a plain auxiliary head on the stage before.

    Shapes: (N, in_channels, H, W) → logits (N, num_classes, h, w) at the last stage's resolution; in training with an
    auxiliary head → (logits, the auxiliary head's logits, (N, num_classes, h', w')).
    :class:`sparing.data.boxes.LabelMaps` makes maps of them.

    Args:
        backbone: {name: emo, variant: 1M}, a registered model's name and fields, or a module with ``forward_features``
            and ``embed_dims``.
        num_classes: classes of a pixel.
        in_channels: channels of an image.
        decoder: "deeplabv3" or "psp".
        channels: width of the decoder and of the auxiliary head.
        stage: the backbone's stage, from 1, that is decoded, and the last that is kept; the auxiliary head sits on the
            one before. None: the last.
        dilations: of DeepLabv3's branches; one of 1 is a pointwise convolution.
        pools: rows and columns of PSPNet's means.
        dropout: before the last convolution.
        auxiliary: whether there is an auxiliary head. It takes part in training only.

    With 150 classes on EMO-1M: 5.65 M parameters with DeepLabv3's decoder, 4.37 M with PSPNet's, as published (5.6 and
    4.3 M, cut behind the point), the auxiliary head among them.
    """

    def __init__(
        self,
        backbone: nn.Module | str | Mapping[str, Any] | None = None,
        num_classes: int = 150,
        in_channels: int = 3,
        decoder: Literal["deeplabv3", "psp"] = "deeplabv3",
        channels: int = 256,
        stage: int | None = None,
        dilations: Sequence[int] = DILATIONS,
        pools: Sequence[int] = POOLS,
        dropout: float = 0.1,
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        whole("segmenter", num_classes=num_classes, in_channels=in_channels, channels=channels)
        least = 2 if auxiliary else 1
        whole("segmenter", least, stage=least if stage is None else stage)
        whole("segmenter", **{f"dilations[{i}]": dilation for i, dilation in enumerate(dilations)})
        whole("segmenter", **{f"pools[{i}]": pool for i, pool in enumerate(pools)})
        if decoder not in ("deeplabv3", "psp"):
            raise InvalidValue(f'segmenter: decoder = {decoder!r}; "deeplabv3" or "psp" is expected')
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise InvalidValue(f"segmenter: dropout = {dropout!r}; 0 ≤ dropout < 1 is expected")
        self.backbone = pyramid_backbone("segmenter", backbone or {"name": "emo", "variant": "1M"}, in_channels, stage)
        dims = self.backbone.embed_dims
        self.stage = len(dims) if stage is None else stage
        if not least <= self.stage <= len(dims):
            raise InvalidValue(f"segmenter: stage = {self.stage}; {least}…{len(dims)} is expected of this backbone")
        width = dims[self.stage - 1]
        self.decoder: nn.Module
        if decoder == "deeplabv3":
            self.decoder = AtrousPyramid(width, channels, dilations)
        else:
            self.decoder = PooledPyramid(width, channels, pools)
        self.classify = _classifier(channels, num_classes, dropout)
        self.auxiliary = None
        if auxiliary:
            before = dims[self.stage - 2]
            self.auxiliary = nn.Sequential(
                _convolution(before, channels, 3), _classifier(channels, num_classes, dropout)
            )

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a classifier's weights; see the backbone's ``load_checkpoint``."""
        self.backbone.load_checkpoint(state)

    def forward(self, images: Float[Tensor, "..."]) -> Tensor | tuple[Tensor, Tensor]:
        """(N, in_channels, H, W) → logits, in training beside the auxiliary head's."""
        features = self.backbone.forward_features(images)
        logits = self.classify(self.decoder(features[self.stage - 1]))
        if self.auxiliary is None or not self.training:
            return logits
        return logits, self.auxiliary(features[self.stage - 2])


def _pooled(x: Tensor, parts: int) -> Tensor:
    """Means over parts × parts of a map, (B, C, H, W) → (B, C, parts, parts).

    As two products, which every export format knows for any size: part i covers rows ⌊i H / parts⌋ … ⌈(i+1) H / parts⌉.
    """
    if not torch.jit.is_tracing():
        return adaptive_avg_pool2d(x, parts)
    down, across = (_means(int(size), parts).to(x) for size in x.shape[2:])
    return down @ x @ across.T


def _means(size: int, parts: int) -> Tensor:
    weights = torch.zeros(parts, size)
    for part in range(parts):
        begin, end = part * size // parts, -(-(part + 1) * size // parts)
        weights[part, begin:end] = 1 / (end - begin)
    return weights


def _convolution(dim_in: int, dim_out: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, kernel, padding=padding, dilation=dilation, bias=False),
        LoneBatchNorm(dim_out),
        nn.ReLU(),
    )


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    last = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(dropout) if dropout else nn.Identity(), last)
