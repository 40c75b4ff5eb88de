"""A task and models that are small enough to measure in a test; importable by name in a fresh process."""

import numpy as np
import torch
from torch import nn

from sparing.core.task import Evaluation, Metric, Splits, Task


class Blobs(Task):
    """Two Gaussian blobs in eight dimensions."""

    name = "blobs"
    unit = "point"
    metrics = (Metric("accuracy"), Metric("confidence", "higher", "nats"))
    labels = ("left", "right")

    def __init__(self, groups=None):
        self._groups = groups

    @property
    def groups(self):
        return self._groups

    def splits(self, root=None):
        generator = np.random.default_rng(0)
        y = np.arange(60) % 2
        x = (generator.normal(size=(60, 8)) + y[:, None]).astype(np.float32)
        return Splits(None, None, None, (x, y))

    def loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1])

    def evaluate(self, predictor, split):
        logits = self.outputs(predictor, split)
        right = logits.argmax(1) == split[1]
        by_class = {name: float(right[split[1] == i].mean()) for i, name in enumerate(self.labels)}
        return Evaluation(
            {"accuracy": float(right.mean()), "confidence": float(np.abs(logits).mean())}, right, by_class
        )

    def example_input(self, batch=2):
        return (torch.zeros(batch, 8),)

    def default_model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def corruptions(self, split):
        return {"offset": (split[0] + 3, split[1])}

    def fingerprint(self):
        return "blobs 1"


class Own(nn.Module):
    """A user's own class: nobody's registered model."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.layer = nn.Linear(8, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.layer(x).relu())
