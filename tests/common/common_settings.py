"""How each registered part is tried. A new part needs one line here; one without it fails its test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

import sparing
from sparing.core.predictor import build_model
from sparing.tasks.images.digits import Digits
from sparing.testing import ModelCase, StepCase, TaskCase, tiny_task

TRAIN = sparing.Train(id="first", epochs=1, batch_size=16, lr=0.02)
STUDENT = {"name": "convnet", "num_classes": 3, "image_size": 8, "widths": [4]}


def poolings() -> sparing.Task:
    """Images for a model without any layer that could be quantised."""
    tiny = tiny_task().splits(None)
    return sparing.CustomTask(
        "pools",
        *(getattr(tiny, part) for part in ("train", "test", "val", "calibration")),
        model=lambda: build_model(Pools),
        loss=nn.functional.cross_entropy,
        labels="abc",
    )


class Pools(nn.Module):
    """The mean of an image times three numbers: nothing but reductions and products."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.mean((2, 3)) * self.scale


STEPS = {
    "train": StepCase(
        sparing.Train(epochs=2, batch_size=16, lr=0.02, checkpoint_every_batches=1),
        nothing="training moves the weights",
    ),
    "distil": StepCase(
        sparing.Distil(teacher="first", model=STUDENT, epochs=2, batch_size=16, checkpoint_every_batches=1),
        before=(TRAIN,),
        nothing="training moves the weights",
    ),
    "quantize": StepCase(
        sparing.Quantize(goal="bytes", max_loss=1.0, samples=8),
        before=(TRAIN,),
        nothing=StepCase(sparing.Quantize(), before=(TRAIN,), task=poolings, nothing="is the case"),
    ),
    "export": StepCase(
        sparing.Export(),
        before=(TRAIN,),
        nothing=StepCase(sparing.Export(id="again"), before=(TRAIN, sparing.Export()), nothing="is the case"),
    ),
    "transfer": StepCase(
        sparing.Transfer(task="digits"),
        nothing=StepCase(sparing.Transfer(task="digits"), task=Digits, nothing="is the case"),
    ),
}


def image_folder(place: Path) -> Path:
    """A folder of class sub-folders with eight small images each."""
    from PIL import Image

    if any(place.iterdir()):
        return place
    draw = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (place / label).mkdir(parents=True)
        for number in range(24):
            pixels = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / label / f"{number}.png")
    return place


TASKS = {
    "digits": lambda data, scratch: TaskCase(Digits),
    "fashion_mnist": lambda data, scratch: TaskCase(lambda: registered_task("fashion_mnist"), data),
    "cifar10": lambda data, scratch: TaskCase(lambda: registered_task("cifar10"), data),
    "sign_digits": lambda data, scratch: TaskCase(lambda: registered_task("sign_digits"), data),
    "image_folder": lambda data, scratch: TaskCase(
        lambda: registered_task("image_folder", path=str(image_folder(scratch)), size=8)
    ),
}
"""Name → (data folder, scratch folder) → case."""
NEEDS_DATA = frozenset({"fashion_mnist", "cifar10", "sign_digits"})


def registered_task(name: str, **fields):
    """A registered task, built as a recipe builds it."""
    from sparing.core.registry import resolve

    return resolve("tasks", name)(**fields)


MODELS = {
    "convnet": ModelCase("convnet", Digits, {"widths": [4, 8]}),
    "mlp": ModelCase("mlp", Digits, {"widths": [8], "dropout": 0.1}),
}
