"""Small images and networks that the tests of pre-training, distillation and fine-tuning share."""

from __future__ import annotations

import numpy as np

import sparing


def task_of(count: int = 24) -> sparing.Task:
    from sparing.tasks.images.estimator import _InMemory

    draw = np.random.RandomState(0)
    labels = np.arange(count) % 3
    images = (draw.randint(0, 100, (count, 16, 16, 3)) + 50 * labels[:, None, None, None]).astype(np.uint8)
    return _InMemory(images, labels, ["a", "b", "c"], None)


TEACHING = {"name": "mae_vit", "patch_size": 4, "dim": 16, "depth": 3, "heads": 4}
LEARNING = {"name": "mae_vit", "patch_size": 4, "dim": 8, "depth": 2, "heads": 2}
