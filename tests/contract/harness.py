"""What the guests share: a small task of their own, and a way to run steps on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from sparing.core.collation import batches_of
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.pipeline import Run, run
from sparing.core.predictor import build_model
from sparing.core.store import Store
from sparing.core.task import Evaluation, Splits, Task
from sparing.testing import QUICK, survives_kills

METER = dict(QUICK)


class Net(nn.Module):
    """Two layers with dropout: (N, inputs) → logits (N, classes)."""

    def __init__(self, inputs: int = 6, hidden: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x).relu()))


class Points(Task):
    """Points of three classes around their centres in six dimensions."""

    name = "points"
    unit: ClassVar[str] = "point"
    metrics = CLASSIFICATION_METRICS
    capabilities = frozenset({"classification"})
    labels = ("a", "b", "c")

    def __init__(self, seed: int = 0, spread: float = 1.5) -> None:
        self.seed, self.spread = seed, spread

    def part(self, count: int, part: int) -> TensorDataset:
        draw = torch.Generator().manual_seed(1000 * self.seed + part)
        centres = torch.randn(3, 6, generator=torch.Generator().manual_seed(self.seed)) * 2
        y = torch.arange(count) % 3
        return TensorDataset(centres[y] + self.spread * torch.randn(count, 6, generator=draw), y)

    def splits(self, root: Path | None) -> Splits:
        return Splits(self.part(96, 1), self.part(24, 2), self.part(24, 3), self.part(60, 4))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        pairs = [(self.outputs(predictor, batch), batch[1]) for batch in batches_of(split, 32)]
        logits = np.concatenate([np.asarray(out) for out, _ in pairs])
        return evaluate_classification(logits, np.concatenate([np.asarray(y) for _, y in pairs]), self.labels)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return (torch.randn(batch, 6, generator=torch.Generator().manual_seed(0)),)

    def default_model(self) -> nn.Module:
        return build_model(Net)


def go(task: Task, *steps: Any, **options: Any) -> Callable[[Path], Run]:
    """A run of ``steps`` with a store and an output folder below the folder it is given."""

    options = {"meter": METER} | options

    def start(folder: Path) -> Run:
        return run(task=task, steps=steps, store=Store(folder / "store"), out=folder / "out", **options)

    return start


__all__ = ["METER", "Net", "Points", "go", "survives_kills"]
