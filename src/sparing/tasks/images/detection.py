"""Object detection: boxes around the objects of an image, scored as COCO does."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import InvalidValue, MissingDependency
from sparing.core.predictor.tree import map_leaves, to_numpy
from sparing.core.task import IGNORED, Evaluation, Metric
from sparing.data.boxes import DetectBoxes
from sparing.data.coco import collate_boxes
from sparing.tasks.images.dense import EMOJI80_BACKBONE, AnnotatedImages, Emoji80

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor

EVALUATION_BATCH = 64
COCO_FIGURES = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""The twelve figures of COCO's evaluation, in its order."""


def coco_scores(
    truths: Iterable[Mapping[str, np.ndarray]], answers: Iterable[Mapping[str, np.ndarray]], classes: int
) -> tuple[dict[str, float], np.ndarray]:
    """COCO's twelve figures (by pycocotools' ``COCOeval``), and the average precision of each class.

    Figures are in 0…1, and −1 where nothing of that size, or class, is to be found, as COCO has it.

    Args:
        truths: for each image "boxes" (m, 4), (x1, y1, x2, y2) in pixels; "labels", "crowd" and "area" (m,).
        answers: for each image "boxes" (k, 4) in the same pixels; "scores" and "labels" (k,).
        classes: their number.

    Returns:
        (name → figure, average precision over intersections of 0.5…0.95 of each class (classes,)).
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ModuleNotFoundError as error:
        raise MissingDependency("pycocotools", "detection", "COCO's evaluation") from error
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, truth in enumerate(truths):
        images.append({"id": number})
        for box, label, crowd, area in zip(
            *(truth[name] for name in ("boxes", "labels", "crowd", "area")), strict=True
        ):
            entry = _entry(number, label, box)
            annotations.append({**entry, "id": len(annotations) + 1, "area": float(area), "iscrowd": int(crowd)})
    found = []
    for number, answer in enumerate(answers):
        for box, score, label in zip(answer["boxes"], answer["scores"], answer["labels"], strict=True):
            found.append({**_entry(number, label, box), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth_api = COCO()
        truth_api.dataset = {
            "info": {},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": label} for label in range(classes)],
        }
        truth_api.createIndex()
        if found:
            answer_api = truth_api.loadRes(found)
        else:  # which loadRes cannot do
            answer_api = COCO()
            answer_api.dataset = {**truth_api.dataset, "annotations": []}
            answer_api.createIndex()
        judge = COCOeval(truth_api, answer_api, "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes; all sizes, 100 boxes
    by_class = np.array([p[p > -1].mean() if (p > -1).any() else -1.0 for p in np.moveaxis(precision, 2, 0)])
    return {name: float(value) for name, value in zip(COCO_FIGURES, judge.stats, strict=True)}, by_class


def _entry(image: int, label: Any, box: np.ndarray) -> dict[str, Any]:
    """What annotations and answers have in common in COCO's format."""
    return {"image_id": image, "category_id": int(label), "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]}


class Detection(AnnotatedImages):
    """Objects in images and their boxes; headline: COCO's average precision.

    Batches are (images float32 (N, 3, H, W), targets); see :func:`sparing.data.coco.collate_boxes`. A model gives
    "logits", "offsets" and "anchors", as :class:`~sparing.models.detection.SSDLiteDetector` does. Crowds are left out
    of the loss, and COCO's evaluation counts what is found in them neither as right nor as wrong.
    """

    metrics: tuple[Metric, ...] = (Metric("ap"), Metric("ap50"), Metric("ap75"), Metric("ar100"))
    capabilities: frozenset[str] = frozenset({"detection", "images"})
    kind: ClassVar[Literal["boxes", "maps"]] = "boxes"
    collate: Callable[[list[Any]], Any] | None = staticmethod(collate_boxes)
    postprocessing = DetectBoxes()

    @property
    def labels(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the kinds of objects."""
        return self.categories

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """SSD's loss: cross-entropy and smooth L1 of each image over its positive anchors, mean over images.

        An image without an object adds nothing. (The published code divides by the positives of the whole batch; by
        image, a loss does not depend on how a batch is cut into parts.)
        """
        from sparing.models.detection import ssd_losses

        targets = batch[1]
        learned = targets["labels"].masked_fill(targets["crowd"], IGNORED)
        parts = ssd_losses(outputs["logits"], outputs["offsets"], outputs["anchors"][0], targets["boxes"], learned)
        return ((parts.classes + parts.boxes) / parts.positives.clamp(min=1)).mean()

    def coco_figures(self, predictor: Predictor | nn.Module, split: Any) -> tuple[dict[str, float], np.ndarray]:
        """All twelve figures of COCO, and the average precision of each class; see :func:`coco_scores`."""
        truths, answers = [], []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            outputs = map_leaves(lambda leaf: np.asarray(to_numpy(leaf)), self.outputs(predictor, batch))
            targets = {name: value.numpy() for name, value in batch[1].items()}
            for number, answer in enumerate(self.postprocessing(outputs)):
                scale = np.tile(targets["size"][number], 2).astype(np.float64)
                real = targets["labels"][number] != IGNORED
                truth = {name: targets[name][number][real] for name in ("boxes", "labels", "crowd", "area")}
                truths.append({**truth, "boxes": truth["boxes"] * scale})
                answers.append({**answer, "boxes": answer["boxes"] * scale})
        if not truths:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no image")
        return coco_scores(truths, answers, len(self.labels))

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """COCO's average precision (over overlaps of 0.5…0.95, at 0.5, at 0.75) and recall with 100 boxes.

        0 where the split has no object. The figures for small, medium and large objects are among those of
        :meth:`coco_figures`.
        """
        figures, by_class = self.coco_figures(predictor, split)
        return Evaluation(
            {metric.name: max(0.0, figures[metric.name]) for metric in self.metrics},
            by_class={name: float(ap) for name, ap in zip(self.labels, by_class, strict=True) if ap >= 0},
        )


SSDLITE: Mapping[str, Any] = {
    "name": "ssdlite",
    "backbone": EMOJI80_BACKBONE,
    "extra_channels": [64],
    "sizes": [26, 38, 50, 62],
}
"""The default detector at 96 pixels."""


class CocoDetection(Detection):
    """Your own images with boxes: a folder with annotation files in COCO's format, for detection."""

    name = "coco_detection"

    @property
    def model(self) -> Mapping[str, Any]:  # type: ignore[override]
        """SSDLite on EMO-0.14M, its anchors in proportion to the image."""
        return {**SSDLITE, "sizes": [side * self.image_size / 96 for side in SSDLITE["sizes"]]}


class Emoji80Detection(Emoji80, Detection):
    """Rendered scenes of emoji on photographs, 96×96, with boxes of 80 kinds: 3,000 to train on and 600 to measure.

    Composed pictures, no photographs of real objects; figures on them say how parts compare, not how well anything is
    found in the world. Read from ``emoji80/`` under the data root: ``train_base``, ``train_novel`` and ``val``, each as
    NAME.json.gz and NAME.tar. Validation and calibration scenes are cut from the training scenes.

    Args:
        merge: "all" looks for objects of any kind; "supercategories" tells base and novel ones apart; "" all 80.
        train_limit: use the first so many training scenes; None: all.
        test_limit: use the first so many test scenes; None: all.
    """

    name = "emoji80_detection"
    model: Mapping[str, Any] = SSDLITE
