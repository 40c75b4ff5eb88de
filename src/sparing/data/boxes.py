"""Boxes: overlap, suppression, and the operations that turn a dense model's outputs into answers.

A box is (x1, y1, x2, y2), left, top, right and bottom. Unless something else is said, they are shares of the image's
width and height, so that they hold at any size. All is NumPy: a saved model answers without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Integer

from sparing.core.errors import InvalidValue
from sparing.core.predictor.preprocessing import Operation

OFFSET_STDS = (0.1, 0.1, 0.2, 0.2)
"""What the offsets (dx, dy, dw, dh) of a box are divided by, so that a network's outputs are of like size."""
MAX_LOG = 8.0
"""Largest logarithm of a side over its anchor's that is decoded; beyond lies nothing but overflow."""


def pairwise_iou(one: Float[np.ndarray, "n 4"], other: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """Intersection over union of every box (N, 4) with every other (M, 4) → (N, M); 0 where both are empty."""
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(-1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def nms(
    boxes: Float[np.ndarray, "n 4"], scores: Float[np.ndarray, " n"], threshold: float = 0.45
) -> Integer[np.ndarray, " kept"]:
    """Greedy non-maximum suppression: which boxes stay, best first.

    From the best box on, those that overlap a kept one by more than ``threshold`` (intersection over union) go. Equal
    scores are taken in the order given.
    """
    order = np.argsort(-scores, kind="stable")
    overlaps = pairwise_iou(boxes[order], boxes[order]) > threshold
    alive = np.ones(len(order), bool)
    for place in range(len(order)):
        if alive[place]:
            alive[place + 1 :] &= ~overlaps[place, place + 1 :]
    return order[alive]


def decode_boxes(
    offsets: Float[np.ndarray, "... 4"], anchors: Float[np.ndarray, "... 4"]
) -> Float[np.ndarray, "... 4"]:
    """Offsets from anchors → boxes (x1, y1, x2, y2), float64.

    With an anchor's centre (cx, cy) and sides (w, h), the box has its centre at cx + 0.1 dx w, cy + 0.1 dy h and the
    sides w exp(0.2 dw), h exp(0.2 dh): Liu et al. 2016 (arXiv 1512.02325), section 2.2, with the usual scales.

    Args:
        offsets: (dx, dy, dw, dh) in the last dimension.
        anchors: (cx, cy, w, h) in the last dimension.
    """
    scaled = np.asarray(offsets, np.float64) * OFFSET_STDS
    anchors = np.asarray(anchors, np.float64)
    centre = anchors[..., :2] + scaled[..., :2] * anchors[..., 2:]
    half = anchors[..., 2:] * np.exp(np.clip(scaled[..., 2:], -MAX_LOG, MAX_LOG)) / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


@dataclass(frozen=True)
class DetectBoxes(Operation):
    """A detector's logits, offsets and anchors → boxes, scores and labels for each image, best first.

    A mapping of "logits" (N, A, classes + 1), the last class being background, "offsets" and "anchors" (N, A, 4)
    becomes a list of N mappings: "boxes" (k, 4) as shares of the image, "scores" (k,) in 0…1 and "labels" (k,).
    """

    score: float = 0.02
    """Boxes with a probability of this or less are left out."""
    iou: float = 0.45
    """Of two boxes of one class that overlap by more, the worse one is left out."""
    candidates: int = 1000
    """So many of the best boxes of each class are looked at."""
    limit: int = 200
    """At most so many boxes for an image."""

    def __post_init__(self) -> None:
        for name in ("score", "iou"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidValue(f"detect_boxes: {name} = {getattr(self, name)!r}; 0 ≤ {name} < 1 is expected")
        for name in ("candidates", "limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidValue(f"detect_boxes: {name} = {value!r}; a whole number of at least 1 is expected")

    def __call__(self, batch: Any) -> list[dict[str, np.ndarray]]:
        """A detector's outputs → an answer for each image."""
        if not isinstance(batch, Mapping) or set(batch) != {"logits", "offsets", "anchors"}:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise InvalidValue(f"detect_boxes: outputs {found}; logits, offsets and anchors are expected")
        logits = np.asarray(batch["logits"], np.float64)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        boxes = decode_boxes(batch["offsets"], batch["anchors"]).clip(0, 1)
        return [self._one(p[:, :-1], b) for p, b in zip(probabilities, boxes, strict=True)]

    def _one(self, probabilities: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
        kept: list[np.ndarray] = []
        classes: list[np.ndarray] = []
        for label in np.flatnonzero((probabilities > self.score).any(0)):
            scores = probabilities[:, label]
            rows = np.flatnonzero(scores > self.score)
            rows = rows[np.argsort(-scores[rows], kind="stable")[: self.candidates]]
            kept.append(rows[nms(boxes[rows], scores[rows], self.iou)])
            classes.append(np.full(len(kept[-1]), label))
        rows = np.concatenate(kept) if kept else np.zeros(0, np.int64)
        labels = np.concatenate(classes) if classes else np.zeros(0, np.int64)
        scores = probabilities[rows, labels]
        best = np.argsort(-scores, kind="stable")[: self.limit]
        return {
            "boxes": boxes[rows[best]].astype(np.float32),
            "scores": scores[best].astype(np.float32),
            "labels": labels[best].astype(np.int64),
        }


def bilinear_weights(size: int, target: int) -> Float[np.ndarray, "target size"]:
    """What each of ``size`` values in a row contributes to each of ``target`` values: linear, pixel centres aligned."""
    at = (np.arange(target) + 0.5) * size / target - 0.5
    low = np.floor(at).astype(int)
    share = (at - low)[:, None]
    rows = np.eye(size)
    return (1 - share) * rows[np.clip(low, 0, size - 1)] + share * rows[np.clip(low + 1, 0, size - 1)]


@dataclass(frozen=True)
class LabelMaps(Operation):
    """Logits (N, classes, h, w) → the class of each pixel, int64 (N, height, width).

    The logits are brought to the size bilinearly, as in training, before the largest is looked for.
    """

    height: int
    width: int

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 13:
                raise InvalidValue(f"label_maps: {name} = {value!r}; a whole number in 1…{1 << 13} is expected")

    def __call__(self, batch: Any) -> Integer[np.ndarray, "n height width"]:
        """A segmenter's outputs → a map for each image."""
        logits = np.asarray(batch)
        if logits.ndim != 4:
            raise InvalidValue(f"label_maps: outputs of shape {logits.shape}; (N, classes, h, w) is expected")
        down = bilinear_weights(logits.shape[2], self.height).astype(np.float32)
        across = bilinear_weights(logits.shape[3], self.width).astype(np.float32)
        return np.stack([(down @ image @ across.T).argmax(0) for image in logits.astype(np.float32)])


def confusion(
    predicted: Integer[np.ndarray, "..."], targets: Integer[np.ndarray, "..."], classes: int
) -> Integer[np.ndarray, "c c"]:
    """How many pixels of each class (rows) were taken for which (columns); targets outside 0…classes − 1 do not count.

    Args:
        predicted: class of each pixel, any shape.
        targets: the same shape.
        classes: their number.
    """
    counts: Bool[np.ndarray, "..."] = (targets >= 0) & (targets < classes)
    places = targets[counts].astype(np.int64) * classes + predicted[counts]
    return np.bincount(places, minlength=classes * classes).reshape(classes, classes)
