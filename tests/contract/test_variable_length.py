"""Guest: texts of any length: batches are padded to their longest, and an exported model takes every length."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from harness import go, survives_kills
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparing import Quantize, load
from sparing.core.collation import batches_of
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.predictor import build_model
from sparing.core.task import Evaluation, Splits, Task
from sparing.core.training import Train

PAD, WORDS = 0, 20


class Reader(nn.Module):
    """Mean embedding of the words that are no padding: (N, length) → logits (N, 2)."""

    def __init__(self, words: int = WORDS, size: int = 8) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(words, size), nn.Linear(size, 16), nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        real = (ids != PAD).unsqueeze(-1).to(self.table.weight.dtype)
        mean = (self.table(ids) * real).sum(1) / real.sum(1).clamp(min=1)
        return self.head(self.hidden(mean).relu())


class Texts(Task):
    """Does a text hold more of the upper half of the vocabulary? Items are (word numbers of any length, label)."""

    name = "texts"
    unit: ClassVar[str] = "text"
    metrics = CLASSIFICATION_METRICS
    capabilities = frozenset({"classification", "text"})
    labels = ("low", "high")

    def splits(self, root: Path | None) -> Splits:
        def part(count: int, seed: int) -> list[tuple[Tensor, int]]:
            draw = np.random.default_rng(seed)
            texts = [draw.integers(1, WORDS, draw.integers(3, 15)) for _ in range(count)]
            return [(torch.as_tensor(text), int(np.median(text) >= WORDS / 2)) for text in texts]

        return Splits(part(80, 1), part(20, 2), part(20, 3), part(40, 4))

    @staticmethod
    def collate(items: list[Any]) -> tuple[Tensor, Tensor]:
        texts, labels = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(list(texts), batch_first=True, padding_value=PAD), torch.tensor(labels)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        pairs = [(self.outputs(predictor, batch), batch[1]) for batch in batches_of(split, 7, self.collate)]
        logits = np.concatenate([np.asarray(out) for out, _ in pairs])
        return evaluate_classification(logits, np.concatenate([np.asarray(y) for _, y in pairs]), self.labels)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return (torch.randint(WORDS, (batch, 5 + batch), generator=torch.Generator().manual_seed(0)),)

    def default_model(self) -> nn.Module:
        return build_model(Reader)


TRAIN = Train(epochs=8, batch_size=8, lr=0.02, checkpoint_every_batches=10)


def test_texts_of_any_length_through_training_int8_and_kills(tmp_path):
    done = survives_kills(go(Texts(), TRAIN, Quantize(goal="bytes", max_loss=0.5, samples=8)), tmp_path, deaths=3)
    train, quantized = done.ledger.rows
    assert [row.runtime for row in done.ledger.rows] == ["onnxruntime"] * 2
    assert train.figures["accuracy"].value > 0.7
    assert quantized.figures["model bytes"].value <= train.figures["model bytes"].value
    saved = load(done.folder / "model")
    for length in (1, 4, 40):
        assert saved(np.ones((3, length), np.int64)).shape == (3, 2)
