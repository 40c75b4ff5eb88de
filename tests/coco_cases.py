"""A small folder in COCO's format, for tests of whatever reads one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import sparing
from sparing.core.ledger import Row

SHAPES = ("square", "bar")


def runs_of(mask: np.ndarray) -> list[int]:
    """A mask's lengths of runs, columns first, beginning with one without the object."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    ends = [] if edges[-1:].tolist() == [mask.size] else [mask.size]
    return np.diff(np.concatenate([[0], edges, ends]).astype(int)).tolist()


def scene(number: int, size: int = 32) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An image (size, size, 3) with a square and a bar on noise, and its annotations without ids."""
    draw = np.random.RandomState(number)
    pixels = draw.randint(0, 90, (size, size, 3))
    found = []
    for label, (tall, wide) in enumerate(((10, 10), (6, 16))):
        top, left = draw.randint(0, size // 2 - tall + 1) + label * size // 2, draw.randint(0, size - wide + 1)
        mask = np.zeros((size, size), bool)
        mask[top : top + tall, left : left + wide] = True
        pixels[mask, label] = 230
        found.append(
            {
                "category_id": 10 * label + 3,
                "bbox": [int(left), int(top), wide, tall],
                "area": tall * wide,
                "iscrowd": 0,
                "segmentation": {"size": [size, size], "counts": runs_of(mask)},
            }
        )
    return pixels.astype(np.uint8), found


def content(count: int = 24, size: int = 32) -> dict[str, Any]:
    """The annotation file of so many scenes."""
    annotations = [
        {**entry, "id": 2 * number + place, "image_id": 100 + number}
        for number in range(count)
        for place, entry in enumerate(scene(number, size)[1])
    ]
    return {
        "images": [{"id": 100 + n, "file_name": f"{n:03d}.png", "width": size, "height": size} for n in range(count)],
        "categories": [
            {"id": 10 * label + 3, "name": name, "supercategory": "shape"} for label, name in enumerate(SHAPES)
        ],
        "annotations": annotations,
    }


def coco_folder(place: Path, count: int = 24, size: int = 32) -> Path:
    """``instances.json`` and ``images/`` of so many scenes."""
    if not (place / "instances.json").exists():
        (place / "images").mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.fromarray(scene(number, size)[0]).save(place / "images" / f"{number:03d}.png")
        (place / "instances.json").write_text(json.dumps(content(count, size)))
    return place


def row_of(task: sparing.Task, model: dict[str, Any], epochs: int, store: Path, **settings: Any) -> Row:
    """The ledger's row of a model trained on a task, with flips and a little jitter."""
    done = sparing.run(
        task=task,
        model=model,
        steps=[
            sparing.Augment(flip=0.5, jitter=0.1),
            sparing.Train(epochs=epochs, validate_every=epochs, **settings),
        ],
        meter={"min_seconds": 0.0, "max_seconds": 0.05, "memory": False},
        store=store,
    )
    return done.ledger.rows[-1]
