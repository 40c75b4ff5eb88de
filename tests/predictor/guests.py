"""Models and operations that tests save and load: classes must live in a module to be built again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparing.core.predictor import Operation


class SmallNet(nn.Module):
    """(N, 1, 8, 8) → (N, classes)."""

    def __init__(self, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


class Tied(nn.Module):
    """An embedding whose transpose is the output layer."""

    def __init__(self, words: int = 11, width: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.out = nn.Linear(width, words, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.embedding(tokens).mean(1))


class TwoInputs(nn.Module):
    """{"ids" (N, L) int64, "mask" (N, L)} → {"logits" (N, 3), "states": ((N, L, 8), (N, 8))}."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        states = self.encoder(self.embedding(inputs["ids"])) * inputs["mask"][..., None]
        over_time, _ = self.recurrent(states)
        return {"logits": self.head(over_time[:, -1]), "states": (states, states.mean(1))}


class Branching(nn.Module):
    """Looks at a value."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Bessel(nn.Module):
    """Uses an operator ONNX has not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class FixedBatch(nn.Module):
    """Answers for two rows only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).repeat(x.shape[0] // 2, 1) if x.shape[0] == 2 else x[:, :1]


class Plain:
    """No module."""


@dataclass(frozen=True)
class Scale(Operation):
    """Numbers → float32 times ``factor``."""

    factor: float = 1.0
    shape: tuple[int, ...] = (1, 8, 8)

    def __call__(self, batch: Any) -> np.ndarray:
        return np.stack([np.asarray(item, dtype=np.float32).reshape(self.shape) for item in batch]) * self.factor


@dataclass(frozen=True)
class Unregistered(Operation):
    """Nobody's."""

    def __call__(self, batch: Any) -> Any:
        return batch
