"""Overlaps, suppression, decoding and the operations that make answers of outputs, against naive restatements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from sparing.core.errors import InvalidValue
from sparing.core.predictor import Preprocessing
from sparing.data.boxes import (
    DetectBoxes,
    LabelMaps,
    bilinear_weights,
    confusion,
    decode_boxes,
    nms,
    pairwise_iou,
)


def drawn(count: int, seed: int) -> np.ndarray:
    corner = np.random.RandomState(seed).rand(count, 2, 2)
    return np.concatenate([corner.min(1), corner.max(1)], 1)


def iou_of_two(a: np.ndarray, b: np.ndarray) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(wide, 0) * max(tall, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union else 0.0


def naive_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float) -> list[int]:
    kept: list[int] = []
    for row in sorted(range(len(boxes)), key=lambda row: (-scores[row], row)):
        if all(iou_of_two(boxes[row], boxes[other]) <= threshold for other in kept):
            kept.append(row)
    return kept


def test_overlaps_by_hand() -> None:
    one = np.array([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    other = np.array([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_allclose(pairwise_iou(one, other), [[1 / 7, 1, 0, 0], [0, 0, 0, 0]])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_overlaps_pair_by_pair(seed: int) -> None:
    one, other = drawn(4, seed), drawn(5, seed + 1)
    np.testing.assert_allclose(pairwise_iou(one, other), [[iou_of_two(a, b) for b in other] for a in one], atol=1e-12)


@given(st.integers(0, 10_000), st.integers(0, 25), st.sampled_from([0.0, 0.3, 0.45, 0.8]))
@settings(max_examples=60, deadline=None)
def test_suppression_is_the_naive_one(seed: int, count: int, threshold: float) -> None:
    boxes = drawn(count, seed)
    scores = np.random.RandomState(seed).randint(0, 6, count) / 5  # ties among them
    assert nms(boxes, scores, threshold).tolist() == naive_nms(boxes, scores, threshold)


def test_a_box_is_decoded_by_hand() -> None:
    anchors = np.array([[0.5, 0.4, 0.2, 0.1]])
    centre, sides = (0.5 + 0.1 * 2 * 0.2, 0.4 - 0.1 * 0.1), (0.2 * math.exp(0.2), 0.1 * math.exp(-0.4))
    expected = [centre[0] - sides[0] / 2, centre[1] - sides[1] / 2, centre[0] + sides[0] / 2, centre[1] + sides[1] / 2]
    np.testing.assert_allclose(decode_boxes(np.array([[2.0, -1.0, 1.0, -2.0]]), anchors)[0], expected)
    assert np.isfinite(decode_boxes(np.full((1, 4), 1e6), anchors)).all()


def outputs(probabilities: list[list[float]], boxes: list[list[float]]) -> dict[str, np.ndarray]:
    """What a detector gives for one image whose anchors are the boxes themselves."""
    corner = np.array(boxes)
    anchors = np.concatenate([(corner[:, :2] + corner[:, 2:]) / 2, corner[:, 2:] - corner[:, :2]], 1)
    return {
        "logits": np.log(np.array(probabilities))[None],
        "offsets": np.zeros((1, len(boxes), 4)),
        "anchors": anchors[None],
    }


def test_answers_by_hand() -> None:
    left, near, right = [0.0, 0.0, 0.5, 0.5], [0.02, 0.0, 0.52, 0.5], [0.5, 0.5, 1.0, 1.0]
    found = DetectBoxes(score=0.1)(
        outputs([[0.6, 0.3, 0.1], [0.7, 0.05, 0.25], [0.05, 0.9, 0.05]], [left, near, right])
    )
    assert len(found) == 1
    assert found[0]["labels"].tolist() == [1, 0, 1]  # of class 0 only the better of the two that overlap
    np.testing.assert_allclose(found[0]["scores"], [0.9, 0.7, 0.3], rtol=1e-6)
    np.testing.assert_allclose(found[0]["boxes"], [right, near, left], atol=1e-6)
    best = DetectBoxes(score=0.1, limit=1)(outputs([[0.6, 0.4], [0.7, 0.3]], [left, right]))
    np.testing.assert_allclose(best[0]["scores"], [0.7], rtol=1e-6)
    few = DetectBoxes(score=0.1, candidates=1)(outputs([[0.6, 0.4], [0.7, 0.3]], [left, right]))
    assert len(few[0]["boxes"]) == 1


def test_nothing_found_is_an_answer() -> None:
    (found,) = DetectBoxes()(outputs([[1e-9, 1.0]], [[0.0, 0.0, 1.0, 1.0]]))
    assert {name: part.shape for name, part in found.items()} == {"boxes": (0, 4), "scores": (0,), "labels": (0,)}


def test_boxes_end_at_the_image() -> None:
    (found,) = DetectBoxes()(outputs([[0.9, 0.1]], [[-0.5, 0.25, 0.5, 1.5]]))
    np.testing.assert_allclose(found["boxes"], [[0, 0.25, 0.5, 1]], atol=1e-6)


@pytest.mark.parametrize(("size", "target"), [(3, 7), (7, 3), (1, 4), (6, 96), (5, 5)])
def test_maps_grow_as_in_training(size: int, target: int) -> None:
    rows = torch.randn(2, 3, size, 4)
    larger = torch.nn.functional.interpolate(rows, (target, 9), mode="bilinear", align_corners=False)
    ours = bilinear_weights(size, target) @ rows.double().numpy() @ bilinear_weights(4, 9).T
    np.testing.assert_allclose(ours, larger.double().numpy(), atol=1e-5)
    np.testing.assert_array_equal(LabelMaps(target, 9)(rows.numpy()), larger.argmax(1).numpy())


def test_confusion_is_that_of_scikit_learn() -> None:
    draw = np.random.RandomState(0)
    predicted, targets = draw.randint(0, 4, (3, 8, 9)), draw.randint(0, 4, (3, 8, 9))
    np.testing.assert_array_equal(
        confusion(predicted, targets, 5), confusion_matrix(targets.ravel(), predicted.ravel(), labels=range(5))
    )
    unknown = draw.rand(*targets.shape) < 0.3
    np.testing.assert_array_equal(
        confusion(predicted, np.where(unknown, -100, targets), 5),
        confusion_matrix(targets[~unknown], predicted[~unknown], labels=range(5)),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DetectBoxes(score=1.0), "score = 1.0"),
        (lambda: DetectBoxes(iou=-0.1), "iou = -0.1"),
        (lambda: DetectBoxes(limit=0), "limit = 0"),
        (lambda: DetectBoxes(candidates=True), "candidates = True"),
        (lambda: LabelMaps(0, 4), "height = 0"),
        (lambda: LabelMaps(4, 4)(np.zeros((2, 3))), r"shape \(2, 3\)"),
        (lambda: DetectBoxes()(np.zeros(3)), "logits, offsets and anchors"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()


@pytest.mark.parametrize("operation", [DetectBoxes(0.1, 0.5, 10, 20), LabelMaps(4, 6)])
def test_they_are_written_and_read(operation) -> None:
    chain = Preprocessing((operation,))
    assert Preprocessing.from_config(chain.to_config()) == chain
