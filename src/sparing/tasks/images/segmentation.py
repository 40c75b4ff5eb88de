"""Semantic segmentation: a class for each pixel, scored by mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float, Integer

from sparing.core.collation import batches_of
from sparing.core.errors import InvalidValue
from sparing.core.predictor.preprocessing import Operation
from sparing.core.task import IGNORED, Evaluation, Metric
from sparing.data.boxes import LabelMaps, confusion
from sparing.data.coco import nearest_cells
from sparing.tasks.images.dense import EMOJI80_BACKBONE, AnnotatedImages, Emoji80

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 32
BACKGROUND = "background"
AUXILIARY = 0.4
"""Weight of the auxiliary head's loss (Zhao et al. 2017, section 3.3)."""


def segmentation_scores(counts: Integer[np.ndarray, "c c"]) -> tuple[dict[str, float], Float[np.ndarray, " c"]]:
    """Mean intersection over union, share of right pixels and mean share by class, of a confusion matrix.

    Rows of ``counts`` (C, C) are true classes, columns predicted ones. A class that is neither there nor predicted
    takes no part in the mean intersection, one that is not there none in the mean share.

    Returns:
        (name → figure in 0…1, intersection over union of each class, NaN for one that takes no part).
    """
    counts = counts.astype(np.float64)
    if not counts.sum():
        raise InvalidValue("no pixel with a known class to evaluate; at least one is expected")
    right, there, said = np.diag(counts), counts.sum(1), counts.sum(0)
    with np.errstate(invalid="ignore"):
        iou, share = right / (there + said - right), right / there
    figures = {"miou": np.nanmean(iou), "aacc": right.sum() / counts.sum(), "macc": np.nanmean(share)}
    return {name: float(value) for name, value in figures.items()}, iou


def pixel_losses(logits: Float[Tensor, "n c h w"], labels: Integer[Tensor, "n height width"]) -> Float[Tensor, " n"]:
    """Cross-entropy of each image, in nats, mean over its pixels of known class; logits are brought to their size.

    0 for an image none of whose pixels is known.
    """
    from torch.nn.functional import cross_entropy

    from sparing.models.segmentation import resized

    larger = resized(logits, int(labels.shape[1]), int(labels.shape[2]))
    known = (labels != IGNORED).flatten(1).sum(1)
    return cross_entropy(larger, labels, reduction="none", ignore_index=IGNORED).flatten(1).sum(1) / known.clamp(min=1)


class Segmentation(AnnotatedImages):
    """A class for each pixel of an image, background among them; headline: mean intersection over union.

    Batches are (images float32 (N, 3, H, W), classes int64 (N, H, W)). A model gives logits (N, classes, h, w) of any
    resolution, in training possibly beside those of an auxiliary head. Figures are taken at the model's input size,
    over all pixels of the split together.
    """

    metrics: tuple[Metric, ...] = (Metric("miou"), Metric("aacc"), Metric("macc"))
    capabilities: frozenset[str] = frozenset({"segmentation", "images"})
    kind: ClassVar[Literal["boxes", "maps"]] = "maps"

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Background, and the kinds of objects."""
        return (BACKGROUND, *self.categories)

    @property
    def postprocessing(self) -> Operation:  # type: ignore[override]
        """The class of each pixel, at the model's input size."""
        return LabelMaps(self.image_size, self.image_size)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Mean cross-entropy of the pixels of each image, mean over images; 0.4 times an auxiliary head's is added."""
        main, *others = outputs if isinstance(outputs, tuple | list) else (outputs,)
        losses = pixel_losses(main, batch[1]).mean()
        for other in others:
            losses = losses + AUXILIARY * pixel_losses(other, batch[1]).mean()
        return losses

    def class_logits(self, outputs: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (N·h·w, classes), classes (N·h·w,)): at the model's resolution, the class at each cell's centre."""
        logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
        rows, columns = (
            nearest_cells(full, size) for full, size in zip(batch[1].shape[1:], logits.shape[2:], strict=True)
        )
        return logits.movedim(1, -1).flatten(0, -2), batch[1][:, rows][:, :, columns].flatten()

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Mean intersection over union, share of right pixels, mean share by class."""
        classes = len(self.labels)
        counts = np.zeros((classes, classes), np.int64)
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            outputs = self.outputs(predictor, batch)
            logits = np.asarray(outputs[0] if isinstance(outputs, tuple | list) else outputs)
            if logits.ndim != 4 or logits.shape[1] != classes or not np.isfinite(logits).all():
                raise InvalidValue(
                    f"{self.name}: outputs of shape {logits.shape}; finite logits (N, {classes}, h, w) are expected"
                )
            targets = np.asarray(batch[1])
            counts += confusion(LabelMaps(*targets.shape[1:])(logits), targets, classes)
        figures, iou = segmentation_scores(counts)
        by_class = {name: float(value) for name, value in zip(self.labels, iou, strict=True) if not np.isnan(value)}
        return Evaluation(figures, by_class=by_class)


SEGMENTER: Mapping[str, Any] = {
    "name": "segmenter",
    "backbone": EMOJI80_BACKBONE,
    "channels": 32,
    "stage": 3,
    "dilations": [1, 2, 4],
}
"""The default segmenter at 96 pixels: DeepLabv3's decoder on the third stage."""


class CocoSegmentation(Segmentation):
    """Your own images with masks: a folder with annotation files in COCO's format, a class for each pixel."""

    name = "coco_segmentation"
    model: Mapping[str, Any] = SEGMENTER


class Emoji80Segmentation(Emoji80, Segmentation):
    """Rendered scenes of emoji on photographs, 96×96, a class for each pixel: 3,000 to train on and 600 to measure.

    Composed pictures, no photographs of real objects; figures on them say how parts compare, not how well anything is
    told in the world. Read from ``emoji80/`` under the data root, as ``emoji80_detection`` does.

    Args:
        merge: "all" tells objects from background; "supercategories" base and novel ones; "" all 80 kinds.
        train_limit: use the first so many training scenes; None: all.
        test_limit: use the first so many test scenes; None: all.
    """

    name = "emoji80_segmentation"
    model: Mapping[str, Any] = SEGMENTER
