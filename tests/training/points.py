"""A small task with random augmentation, and a way to kill a training and go on."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from sparing.core.store import Progress
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.core.training import FitResult

FEATURES, CLASSES = 8, 3


class Points(Dataset):
    """Labelled points; ``noisy`` ones are moved by all three global generators whenever they are read."""

    def __init__(self, count: int, seed: int, noisy: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, FEATURES, generator=generator)
        self.y = self.x[:, :CLASSES].argmax(1)
        self.noisy = noisy

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index]
        if self.noisy:
            x = x + 0.1 * (torch.randn(FEATURES) + random.random() + np.random.rand())
        return x, self.y[index]


class PointTask(Task):
    """Three classes of points. ``reduction`` is that of the loss."""

    name = "points"
    metrics = (Metric("accuracy"), Metric("error", "lower"))
    capabilities = frozenset({"classification"})
    labels = tuple("abc")

    def __init__(self, reduction: str = "mean") -> None:
        self.loss_reduction = reduction

    def splits(self, root: Path | None) -> Splits:
        return Splits(Points(90, 0, noisy=True), Points(60, 1), Points(30, 2), Points(60, 3))

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1], reduction=self.loss_reduction)

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        right = (predictor(split.x.numpy()).argmax(1) == split.y.numpy()).astype(float)
        return Evaluation({"accuracy": float(right.mean()), "error": float(1 - right.mean())}, right)

    def example_input(self, batch: int = 2) -> tuple[torch.Tensor]:
        return (torch.zeros(batch, FEATURES),)

    def default_model(self) -> nn.Module:
        return network()

    def fingerprint(self) -> str:
        return f"points {self.loss_reduction}"


def network(norm: bool = True, dropout: float = 0.3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Linear(FEATURES, 16)]
        if norm:
            layers.append(nn.BatchNorm1d(16))
        layers += [nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, CLASSES)]
        return nn.Sequential(*layers)


class KillingTask(PointTask):
    """Kills its process at the given call of ``loss`` or ``evaluate``, counted together."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        self._count()
        return super().loss(outputs, batch)

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        evaluation = super().evaluate(predictor, split)
        self._count()
        return evaluation


class CountingProgress(Progress):
    """A store's progress that counts what it loads and saves."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.saves = 0
        self.found: list[Any] = []

    def load(self) -> Any:
        state = super().load()
        self.found.append(None if state is None else dict(state["position"]))
        return state

    def save(self, state: Any) -> None:
        self.saves += 1
        super().save(state)


def killed(run: Callable[[], Any]) -> bool:
    """Run in a forked child; True when SIGKILL ended it, False when it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            run()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def assert_same(one: FitResult, other: FitResult) -> None:
    """Bit for bit."""
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert one.record() == other.record()
