"""Random changes of images together with their boxes or classes of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing import Augment
from sparing.core.errors import IncompatibleStep
from sparing.core.task import IGNORED
from sparing.data.augmentation import DenseAugmentation, seen_through
from sparing.data.coco import Boxes

SIZE = 24


def rectangle(seed: int) -> tuple[np.ndarray, Boxes, np.ndarray]:
    """A white rectangle on black: the image, its box, its map."""
    draw = np.random.RandomState(seed)
    top, left = draw.randint(0, SIZE - 8, 2)
    tall, wide = draw.randint(3, 9, 2)
    labels = np.zeros((SIZE, SIZE), np.int16)
    labels[top : top + tall, left : left + wide] = 3
    image = np.repeat((labels[..., None] > 0).astype(np.uint8) * 255, 3, -1)
    box = np.array([[left, top, left + wide, top + tall]], np.float32) / SIZE
    return image, Boxes(box, np.array([2]), np.array([False]), np.array([tall * wide], np.float32)), labels


@given(st.integers(0, 5000), st.integers(-8, 8), st.integers(-8, 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_image_box_and_map_move_together(seed: int, top: int, left: int, flip: bool) -> None:
    image, boxes, labels = rectangle(seed)
    window = (top, left, SIZE, SIZE)
    moved, found = seen_through(image, boxes, window, flip)
    _, seen = seen_through(image, labels, window, flip)
    assert isinstance(found, Boxes)
    assert isinstance(seen, np.ndarray)
    white = moved[..., 0] > 0
    np.testing.assert_array_equal(white, seen == 3)
    outside = max(top, 0, -top), max(left, -left)
    assert int((seen == IGNORED).sum()) == SIZE * SIZE - (SIZE - outside[0]) * (SIZE - outside[1])
    if len(found.boxes):
        rows, columns = np.flatnonzero(white.any(1)), np.flatnonzero(white.any(0))
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / SIZE
        np.testing.assert_allclose(found.boxes[0], tight, atol=1e-6)
        assert found.area[0] == boxes.area[0]
    else:  # its centre lies outside
        centre = (boxes.boxes[0, :2] + boxes.boxes[0, 2:]) / 2 * SIZE - [left, top]
        assert (centre <= 0).any() or (centre >= SIZE).any()


@given(st.integers(0, 5000), st.integers(6, 24), st.integers(6, 24))
@settings(max_examples=40, deadline=None)
def test_a_part_is_brought_to_size(seed: int, tall: int, wide: int) -> None:
    image, boxes, labels = rectangle(seed)
    window = ((SIZE - tall) // 2, (SIZE - wide) // 2, tall, wide)
    _, found = seen_through(image, boxes, window)
    larger, seen = seen_through(image, labels, window)
    assert larger.shape == image.shape
    assert isinstance(found, Boxes)
    if len(found.boxes):
        rows, columns = (np.flatnonzero((seen == 3).any(axis)) for axis in (1, 0))
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / SIZE
        np.testing.assert_allclose(found.boxes[0], tight, atol=1.01 / min(tall, wide))
        np.testing.assert_allclose(found.area[0], boxes.area[0] * SIZE * SIZE / (tall * wide), rtol=1e-5)


def test_two_flips_undo_each_other() -> None:
    image, boxes, labels = rectangle(7)
    whole = (0, 0, SIZE, SIZE)
    once = seen_through(image, boxes, whole, True)
    twice = seen_through(*once, whole, True)
    np.testing.assert_array_equal(twice[0], image)
    np.testing.assert_allclose(twice[1].boxes, boxes.boxes, atol=1e-6)  # type: ignore[union-attr]
    np.testing.assert_array_equal(seen_through(*seen_through(image, labels, whole, True), whole, True)[1], labels)


@pytest.mark.parametrize(
    "change",
    [DenseAugmentation(), DenseAugmentation("resized", flip=0.5), DenseAugmentation("off", flip=1.0, jitter=0.0)],
    ids=["padded", "resized", "flip"],
)
def test_a_change_depends_on_the_seed_alone(change: DenseAugmentation) -> None:
    given_ = [rectangle(seed) for seed in range(6)]
    images, targets = np.stack([image for image, _, _ in given_]), [boxes for _, boxes, _ in given_]
    made: list[Any] = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        made.append(change(images, list(targets)))
    np.testing.assert_array_equal(made[0][0], made[1][0])
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(made[0][1], made[1][1], strict=True))
    assert change.flip == 1.0 or not np.array_equal(made[0][0], made[2][0])
    assert not np.array_equal(made[0][0], images)
    assert images.max() == 255  # as they were


@pytest.mark.parametrize("fields", [{"randaugment": 2}, {"erase": 0.5}])
def test_what_would_leave_targets_behind_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleStep, match=next(iter(fields))):
        Augment(**fields).dense_change()


def test_with_every_operation_off_nothing_is_changed() -> None:
    assert Augment(crop="off", jitter=0).dense_change().nothing
    assert not Augment(crop="off", jitter=0, flip=0.1).dense_change().nothing
