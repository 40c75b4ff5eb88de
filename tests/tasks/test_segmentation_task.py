"""Segmentation: figures against scikit-learn, the loss by hand, answers of a saved predictor, a run to a ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, jaccard_score, recall_score

from coco_cases import coco_folder, row_of, scene
from sparing.core.collation import batches_of
from sparing.core.errors import InvalidValue
from sparing.core.predictor import ModulePredictor, build_model, load, to_onnx
from sparing.core.task import IGNORED
from sparing.data.boxes import confusion
from sparing.tasks.images.segmentation import CocoSegmentation, pixel_losses, segmentation_scores

BACKBONE = {"name": "mobilenet", "widths": [8, 8, 12, 12], "depths": [1, 1, 1, 1], "expansion": 3}
FIELDS: dict[str, Any] = {"backbone": BACKBONE, "channels": 12, "dilations": [1, 2], "stage": 2, "dropout": 0.0}


def task_of(folder: Path, **fields: Any) -> CocoSegmentation:
    return CocoSegmentation(str(coco_folder(folder)), **{"size": 32, **fields})


def test_figures_are_those_of_scikit_learn() -> None:
    draw = np.random.RandomState(0)
    targets = draw.randint(0, 4, 500)
    predicted = np.where(draw.rand(500) < 0.6, targets, draw.randint(0, 4, 500))
    figures, iou = segmentation_scores(confusion(predicted, targets, 4))
    np.testing.assert_allclose(iou, jaccard_score(targets, predicted, average=None))
    assert figures["miou"] == pytest.approx(jaccard_score(targets, predicted, average="macro"))
    assert figures["aacc"] == pytest.approx(accuracy_score(targets, predicted))
    assert figures["macc"] == pytest.approx(recall_score(targets, predicted, average="macro"))


def test_classes_that_are_nowhere_take_no_part() -> None:
    counts = np.array([[6, 2, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    figures, iou = segmentation_scores(counts)
    assert figures["miou"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert np.isnan(iou[2:]).all()
    with pytest.raises(InvalidValue, match="no pixel with a known class"):
        segmentation_scores(np.zeros((3, 3), int))


def test_the_loss_pixel_by_pixel() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 2, 3), torch.randint(0, 4, (3, 5, 7))
    labels[0, 1] = IGNORED
    labels[2] = IGNORED
    larger = torch.nn.functional.interpolate(logits, (5, 7), mode="bilinear", align_corners=False).log_softmax(1)
    for image, found in enumerate(pixel_losses(logits, labels).tolist()):
        each = [
            -float(larger[image, labels[image, y, x], y, x])
            for y in range(5)
            for x in range(7)
            if labels[image, y, x] != IGNORED
        ]
        assert found == pytest.approx(sum(each) / len(each) if each else 0.0, rel=1e-5)


def test_the_auxiliary_head_counts_two_fifths(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    batch = next(batches_of(task.splits(None).train, 4, task.collate))
    main, other = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 8, 8)
    together = task.loss((main, other), batch)
    torch.testing.assert_close(together, task.loss(main, batch) + 0.4 * task.loss(other, batch))


def test_logits_and_classes_of_cells(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    batch = next(batches_of(task.splits(None).train, 2, task.collate))
    logits, classes = task.class_logits(torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float(), batch)
    assert logits.shape == (32, 3)
    assert logits[5].tolist() == [5, 21, 37]
    assert classes[5] == batch[1][0, 12, 12]  # row 1, column 1 of cells of 8 pixels


def test_a_predictor_that_knows_scores_one(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    split = task.splits(None).train
    answers = [torch.nn.functional.one_hot(labels, 3).permute(2, 0, 1) for _, labels in (split[i] for i in range(16))]
    known = torch.stack(answers).float().numpy()
    found = task.evaluate(lambda images: known, split)  # type: ignore[arg-type]
    assert dict(found.metrics) == {"miou": 1.0, "aacc": 1.0, "macc": 1.0}
    assert found.by_class == {"background": 1.0, "square": 1.0, "bar": 1.0}
    with pytest.raises(InvalidValue, match=r"finite logits \(N, 3, h, w\)"):
        task.evaluate(lambda images: known[:, :2], split)  # type: ignore[arg-type]


def test_a_saved_segmenter_answers_with_maps(tmp_path: Path) -> None:
    task = task_of(tmp_path / "data")
    predictor = ModulePredictor(build_model("segmenter", task, **FIELDS), task)
    raws = [scene(1)[0], scene(2)[0]]
    expected = predictor.predict(raws)
    assert expected.shape == (2, 32, 32)
    assert expected.dtype == np.int64
    for number, other in enumerate((predictor, to_onnx(predictor, task=task))):
        again = load(other.save(tmp_path / str(number))).predict(raws)
        assert (again == expected).mean() > 0.999


@pytest.mark.slow
def test_from_masks_to_a_ledger(tmp_path: Path) -> None:
    task, model = task_of(tmp_path / "data", test_share=0.25), {"name": "segmenter", **FIELDS}
    row = row_of(task, model, epochs=60, store=tmp_path / "store", batch_size=4, lr=0.02)
    assert row.runtime == "onnxruntime"
    assert row.figures["miou"].value > 0.5, row.figures["miou"]


def test_coco_mini_has_a_class_for_each_pixel(data_root: Path) -> None:
    task = CocoSegmentation("coco_mini", size=64)
    _, labels = task.splits(data_root).test[0]
    assert labels.shape == (64, 64)
    assert len(task.labels) == 81
    assert task.labels[0] == "background"
    assert int(labels.max()) > 0
