"""SSDLite: a single-shot detector of depth-wise convolutions on a backbone's feature pyramid.

Source: W. Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, arXiv 1512.02325, in the light form of M.
Sandler et al. 2018 (arXiv 1801.04381, section 6.2); sizes as in J. Zhang et al. 2023 (arXiv 2301.01146), EMO's
detector.

An anchor is (cx, cy, w, h), a box (x1, y1, x2, y2), both as shares of the image's width and height.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss

from sparing.core.errors import InvalidValue
from sparing.core.predictor import build_model
from sparing.core.predictor.module import named_model
from sparing.core.task import IGNORED
from sparing.data.boxes import OFFSET_STDS, pairwise_iou
from sparing.models.convnet import whole
from sparing.models.surgery import evaluating

RATIOS = (2.0, 3.0)
"""Width over height of the elongated anchors; each stands beside its inverse."""
LEAST, MOST = 0.15, 0.95
"""Side of the smallest and of the largest level's square anchor, as a share of the image."""
PUBLISHED_SIZES = (48, 100, 150, 202, 253, 304)
"""Sides of the square anchors of six levels at 320 pixels."""
PUBLISHED_SIDE = 320
NEGATIVES = 3
"""Background anchors for each that an object belongs to, the hardest."""
MATCH = 0.5
"""From this overlap on an anchor belongs to an object."""


# ------------------------------------------------------------------------------------------------- anchors and targets


def level_sizes(levels: int) -> list[float]:
    """Sides of the square anchors of each level and, last, the upper end of the largest level, as shares of the image.

    The published ones for six levels; otherwise evenly spaced from 0.15 to 0.95 of the image.
    """
    if levels == len(PUBLISHED_SIZES):
        return [*(size / PUBLISHED_SIDE for size in PUBLISHED_SIZES), 1.0]
    return [*np.linspace(LEAST, MOST, levels).tolist(), 1.0]


def ssd_anchors(
    maps: Sequence[tuple[int, int]], sizes: Sequence[float], image_size: int, ratios: Sequence[float] = RATIOS
) -> Float[Tensor, "anchors 4"]:
    """The anchors of all levels, (A, 4): level by level, row by row, cell by cell, and in each cell kind by kind.

    Level k with square anchors of side s = sizes[k] has in each cell a square of side s, one of side
    √(sizes[k] sizes[k + 1]), and for each ratio r a box of s√r × s/√r and one of s/√r × s√r. Cells lie at whole
    strides, image_size over the map's size, rounded: 107 pixels where 320 are cut in three.

    Args:
        maps: (rows, columns) of each level.
        sizes: side of each level's square anchor as a share of the image, and one more.
        image_size: height and width in pixels.
        ratios: width over height.
    """
    if len(sizes) != len(maps) + 1:
        raise InvalidValue(f"ssd_anchors: {len(sizes)} sizes for {len(maps)} levels; {len(maps) + 1} are expected")
    found = []
    for (rows, columns), small, large in zip(maps, sizes, sizes[1:], strict=False):
        shapes = [(small, small), (math.sqrt(small * large),) * 2]
        for ratio in ratios:
            wide = (small * math.sqrt(ratio), small / math.sqrt(ratio))
            shapes += [wide, wide[::-1]]
        steps = [max(1, round(image_size / count)) / image_size for count in (rows, columns)]
        down = (torch.arange(rows, dtype=torch.float64) + 0.5) * steps[0]
        across = (torch.arange(columns, dtype=torch.float64) + 0.5) * steps[1]
        cy, cx = torch.meshgrid(down, across, indexing="ij")
        centres = torch.stack([cx, cy], -1).view(-1, 1, 2).expand(-1, len(shapes), -1)
        sides = torch.tensor(shapes, dtype=torch.float64).expand(len(centres), -1, -1)
        found.append(torch.cat([centres, sides], -1).view(-1, 4))
    return torch.cat(found).float()


def corners(anchors: Float[Tensor, "... 4"]) -> Float[Tensor, "... 4"]:
    """(cx, cy, w, h) → (x1, y1, x2, y2)."""
    return torch.cat([anchors[..., :2] - anchors[..., 2:] / 2, anchors[..., :2] + anchors[..., 2:] / 2], -1)


def encode_boxes(boxes: Float[Tensor, "n 4"], anchors: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Boxes as offsets from anchors: the inverse of :func:`sparing.data.boxes.decode_boxes`."""
    sides = boxes[:, 2:] - boxes[:, :2]
    moved = ((boxes[:, :2] + boxes[:, 2:]) / 2 - anchors[:, :2]) / anchors[:, 2:]
    return torch.cat([moved, (sides / anchors[:, 2:]).log()], 1) / moved.new_tensor(OFFSET_STDS)


def match_anchors(
    anchors: Float[Tensor, "a 4"], boxes: Float[Tensor, "m 4"], threshold: float = MATCH
) -> Int[Tensor, " a"]:
    """Which object each anchor belongs to, −1 for background: (A,), of A anchors and M boxes.

    That of the largest intersection over union, where it is at least ``threshold``; and each object's best anchor is
    its own whatever they share. Where one anchor is the best of several, the object it overlaps most has it.
    """
    matched = torch.full((len(anchors),), -1, dtype=torch.int64, device=anchors.device)
    if not len(boxes):
        return matched
    overlaps = torch.from_numpy(pairwise_iou(corners(anchors).cpu().numpy(), boxes.cpu().numpy())).to(anchors.device)
    most, which = overlaps.max(1)
    matched = torch.where(most >= threshold, which, matched)
    most, best = overlaps.max(0)
    for number in most.argsort(stable=True).tolist():  # the largest last: its claim stands
        matched[best[number]] = number
    return matched


class SSDLosses(NamedTuple):
    """The parts of a detector's loss for each of N images."""

    classes: Float[Tensor, " n"]
    """Sum of the cross-entropies of anchors with an object and of the hardest three times as many without, in nats."""
    boxes: Float[Tensor, " n"]
    """Sum of smooth L1 over the offsets of anchors with an object."""
    positives: Int[Tensor, " n"]
    """Anchors with an object."""


def ssd_losses(
    logits: Float[Tensor, "n a c"],
    offsets: Float[Tensor, "n a 4"],
    anchors: Float[Tensor, "a 4"],
    boxes: Float[Tensor, "n m 4"],
    labels: Int[Tensor, "n m"],
) -> SSDLosses:
    """The loss of SSD (Liu et al. 2016, section 2.2) in parts; both sums are meant to be divided by the positives.

    Args:
        logits: classes, and background last.
        offsets: see :func:`encode_boxes`.
        anchors: the same for all images.
        boxes: objects of each image, filled up to M rows.
        labels: their classes; :data:`IGNORED` where there is no object.
    """
    background = logits.shape[-1] - 1
    parts: list[list[Tensor]] = [[], [], []]
    for scores, moved, objects, classes in zip(logits, offsets, boxes, labels, strict=True):
        real = classes != IGNORED
        matched = match_anchors(anchors, objects[real])
        positive = matched >= 0
        wanted = torch.full_like(matched, background)
        wanted[positive] = classes[real][matched[positive]]
        losses = cross_entropy(scores, wanted, reduction="none")
        count = int(positive.sum())
        hardest = losses.masked_fill(positive, -math.inf).topk(min(NEGATIVES * count, len(losses) - count)).values
        parts[0].append(losses[positive].sum() + hardest.sum())
        aims = encode_boxes(objects[real][matched[positive]], anchors[positive])
        parts[1].append(smooth_l1_loss(moved[positive], aims, reduction="sum"))
        parts[2].append(positive.sum())
    return SSDLosses(*map(torch.stack, parts))


# --------------------------------------------------------------------------------------------------------- the network


class LoneBatchNorm(nn.BatchNorm2d):
    """A batch norm that goes by its running statistics where a channel has one value only, which has no variance.

    Shapes: (B, C, H, W) → (B, C, H, W).
    """

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """(B, C, H, W) → the same."""
        if self.training and input.numel() == input.shape[1]:
            return nn.functional.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        return super().forward(input)


class Backbone(Protocol):
    """What a module under a detector or a segmenter has besides being one."""

    @property
    def embed_dims(self) -> Sequence[int]:
        """Channels of each stage's map."""

    def forward_features(self, images: Tensor) -> Sequence[Tensor]:
        """(N, C, H, W) → the map of each stage, from fine to coarse."""

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """Take over a classifier's weights. Only ``load_backbone`` asks for it."""

    def modules(self) -> Iterator[nn.Module]:
        """As every module has them."""


def pyramid_backbone(
    what: str, backbone: nn.Module | str | Mapping[str, Any], in_channels: int, last: int | None = None
) -> Backbone:
    """A network with ``forward_features`` and ``embed_dims``: a module as it is, or a registered model's name and
    fields.

    Raises :class:`InvalidValue` for a model that gives no pyramid.
    """
    network: Any = backbone
    if not isinstance(backbone, nn.Module):
        name, fields = named_model(backbone, f"{what}: backbone")
        network = build_model(name, **{"features_only": True, "in_channels": in_channels, **fields})
    if not hasattr(network, "forward_features") or not hasattr(network, "embed_dims"):
        raise InvalidValue(
            f"{what}: backbone = a {type(network).__name__}; a network with forward_features (images → feature maps) "
            "and embed_dims (their channels) is expected, for example emo or mobilenet"
        )
    if hasattr(network, "keep_stages") and last is not None and 1 <= last < len(network.embed_dims):
        network.keep_stages(last)
    return network


class SSDLiteDetector(nn.Module):
    """SSDLite: depth-wise detection heads on two stages of a backbone and on further halved maps (Sandler et al. 2018).

    Shapes: (N, in_channels, image_size, image_size) → {"logits": (N, A, num_classes + 1), background last; "offsets":
    (N, A, 4); "anchors": (N, A, 4)}. :class:`sparing.data.boxes.DetectBoxes` makes boxes of them.

    Args:
        backbone: {name: emo, variant: 1M}, a registered model's name and fields, or a module with ``forward_features``
            and ``embed_dims``.
        num_classes: kinds of objects.
        in_channels: channels of an image.
        image_size: height and width of the images.
        stages: which of the backbone's stages, from 1, are looked at; later ones are left out of it.
        extra_channels: channels of each further level, of half the resolution of the one before.
        sizes: side of each level's square anchors in pixels, and the upper end of the largest; None: the published ones
            (at 320 pixels 48, 100, 150, 202, 253, 304 and 320, in proportion at other sizes), or evenly spaced from
            0.15 to 0.95 of the image where there are not six levels.
        ratios: width over height of the elongated anchors; their inverses come with them.
        frozen_statistics: batch norms of the backbone keep their running means and variances in training, as is usual
            after pre-training.

    With EMO's defaults and 80 classes on EMO-1M it has 2.31 M parameters.
    """

    def __init__(
        self,
        backbone: nn.Module | str | Mapping[str, Any] | None = None,
        num_classes: int = 80,
        in_channels: int = 3,
        image_size: int = 320,
        stages: Sequence[int] = (3, 4),
        extra_channels: Sequence[int] = (512, 256, 256, 128),
        sizes: Sequence[float] | None = None,
        ratios: Sequence[float] = RATIOS,
        frozen_statistics: bool = False,
    ) -> None:
        super().__init__()
        whole("ssdlite", num_classes=num_classes, in_channels=in_channels, image_size=image_size)
        whole("ssdlite", **{f"extra_channels[{i}]": width for i, width in enumerate(extra_channels)})
        self.backbone = pyramid_backbone(
            "ssdlite", backbone or {"name": "emo", "variant": "1M"}, in_channels, max(stages, default=None)
        )
        dims = self.backbone.embed_dims
        if not stages or list(stages) != sorted({*stages}) or stages[0] < 1 or stages[-1] > len(dims):
            raise InvalidValue(f"ssdlite: stages = {stages!r}; some of 1…{len(dims)}, in order, are expected")
        if not all(ratio > 0 for ratio in ratios):
            raise InvalidValue(f"ssdlite: ratios = {ratios!r}; positive numbers are expected")
        self.in_channels = in_channels
        self.num_classes, self.image_size, self.stages = num_classes, image_size, tuple(stages)
        self.frozen_statistics = frozen_statistics
        channels = [dims[stage - 1] for stage in stages]
        self.extra = nn.ModuleList()
        for width in extra_channels:
            narrow = max(1, width // 2)
            self.extra.append(
                nn.Sequential(
                    _convolution(channels[-1], narrow), _convolution(narrow, narrow, 3, 2), _convolution(narrow, width)
                )
            )
            channels.append(width)
        kinds = 2 + 2 * len(ratios)
        self.classify = nn.ModuleList(_head(width, kinds * (num_classes + 1)) for width in channels)
        self.locate = nn.ModuleList(_head(width, kinds * 4) for width in channels)
        for module in (*self.extra.modules(), *self.classify.modules(), *self.locate.modules()):
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        levels = len(channels)
        if sizes is None:
            chosen = level_sizes(levels)
        else:
            chosen = [size / image_size for size in sizes]
            if len(chosen) != levels + 1 or not all(0 < a <= b for a, b in itertools.pairwise(chosen)):
                raise InvalidValue(
                    f"ssdlite: sizes = {list(sizes)}; {levels + 1} growing numbers of pixels for {levels} levels are "
                    "expected"
                )
        self.register_buffer("anchors", ssd_anchors(self._maps(), chosen, image_size, ratios), persistent=False)

    def _maps(self) -> list[tuple[int, int]]:
        """Sizes of the levels for one image."""
        plain: Any = self.backbone
        channels = getattr(plain, "in_channels", self.in_channels)
        image = torch.zeros(1, channels, self.image_size, self.image_size, device=next(plain.parameters()).device)
        with torch.no_grad(), evaluating(plain):
            features = plain.forward_features(image)
        maps = [(int(features[stage - 1].shape[2]), int(features[stage - 1].shape[3])) for stage in self.stages]
        for _ in self.extra:
            maps.append((-(-maps[-1][0] // 2), -(-maps[-1][1] // 2)))
        return maps

    def train(self, mode: bool = True) -> SSDLiteDetector:
        """Into training mode; the backbone's batch norms stay in evaluation mode where their statistics are frozen."""
        super().train(mode)
        if self.frozen_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """Take over a classifier's weights; see the backbone's ``load_checkpoint``."""
        self.backbone.load_checkpoint(state)

    def levels(self, images: Float[Tensor, "n c h w"]) -> Iterator[Float[Tensor, "n width rows columns"]]:
        """The feature maps that are looked at, from fine to coarse."""
        features = self.backbone.forward_features(images)
        yield from (features[stage - 1] for stage in self.stages)
        x = features[self.stages[-1] - 1]
        for extra in self.extra:
            x = extra(x)
            yield x

    def forward(self, images: Float[Tensor, "..."]) -> dict[str, Tensor]:
        """(N, in_channels, image_size, image_size) → logits, offsets and anchors of all levels."""
        if images.ndim != 4 or tuple(images.shape[2:]) != (self.image_size,) * 2:
            raise InvalidValue(
                f"ssdlite: an input of shape {tuple(images.shape)}; (N, channels, {self.image_size}, "
                f"{self.image_size}) is expected"
            )
        logits: list[Tensor] = []
        offsets: list[Tensor] = []
        for x, classify, locate in zip(self.levels(images), self.classify, self.locate, strict=True):
            for found, head, width in ((logits, classify, self.num_classes + 1), (offsets, locate, 4)):
                answer = head(x)
                # sizes are constants where a graph is traced: only the batch is free
                cells = int(answer.shape[1]) * int(answer.shape[2]) * int(answer.shape[3]) // width
                found.append(answer.permute(0, 2, 3, 1).reshape(-1, cells, width))
        anchors: Any = self.anchors
        return {
            "logits": torch.cat(logits, 1),
            "offsets": torch.cat(offsets, 1),
            "anchors": anchors.expand(images.shape[0], -1, -1),
        }


def _norm(channels: int) -> nn.Module:
    return LoneBatchNorm(channels, eps=1e-3, momentum=0.03)


def _convolution(dim_in: int, dim_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """A pointwise convolution, or a depth-wise one where the kernel is larger; batch norm, ReLU6."""
    groups = dim_in if kernel > 1 else 1
    return nn.Sequential(
        nn.Conv2d(dim_in, dim_out, kernel, stride, kernel // 2, groups=groups, bias=False), _norm(dim_out), nn.ReLU6()
    )


def _head(channels: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_convolution(channels, channels, 3), nn.Conv2d(channels, outputs, 1))
