"""Guest: an embedding table with sparse gradients, one optimiser made of two, and a loss that is a sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from harness import Points, go, survives_kills
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import TensorDataset

from sparing.core.errors import InvalidValue, RecipeError
from sparing.core.job import Job
from sparing.core.predictor import build_model
from sparing.core.randomness import isolated_rng
from sparing.core.step import Stage, Step, step
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.core.training import Batches, Train


class Clicker(nn.Module):
    """Two identifiers (N, 2) → click logit (N,): embeddings with sparse gradients and a linear layer."""

    def __init__(self, identifiers: int = 30, size: int = 4) -> None:
        super().__init__()
        self.table = nn.Embedding(identifiers, size, sparse=True)
        self.head = nn.Linear(2 * size, 1)

    def forward(self, identifiers: Tensor) -> Tensor:
        return self.head(self.table(identifiers).flatten(1)).squeeze(1)


class Clicks(Task):
    """Is this pair of identifiers clicked? Headline: log loss."""

    name = "clicks"
    unit: ClassVar[str] = "impression"
    metrics = (Metric("log_loss", "lower", "nats"),)
    loss_reduction = "sum"
    capabilities = frozenset({"tables"})

    def splits(self, root: Path | None) -> Splits:
        def part(count: int, seed: int) -> TensorDataset:
            pairs = torch.randint(30, (count, 2), generator=torch.Generator().manual_seed(seed))
            return TensorDataset(pairs, (pairs.sum(1) % 3 == 0).float())

        return Splits(part(90, 1), part(20, 2), part(20, 3), part(50, 4))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return binary_cross_entropy_with_logits(outputs, batch[1], reduction="sum")

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        pairs, clicked = split.tensors
        losses = np.logaddexp(0, np.where(clicked.numpy() > 0, -1, 1) * np.asarray(predictor(pairs)))
        return Evaluation({"log_loss": float(losses.mean())}, losses)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return (torch.zeros(batch, 2, dtype=torch.long),)

    def default_model(self) -> nn.Module:
        return build_model(Clicker)


class Both(torch.optim.Optimizer):
    """Two optimisers as one: what Lightning, schedulers and resumption need to see."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(own)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


@step("sparse_tables")
class SparseTables(Step):
    """Update only the rows of the table that a batch touched."""

    stage = Stage.TRAINING
    needs = frozenset({"tables"})
    slots = frozenset({"optimizer"})
    promises = frozenset({"training"})

    def apply(self, job: Job) -> Job:
        return job.replace(training=job.training.adding(optimizer=self.optimizer))

    @staticmethod
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        tables = [layer.weight for layer in model.modules() if isinstance(layer, nn.Embedding)]
        dense = [p for p in model.parameters() if all(p is not table for table in tables)]
        return Both(torch.optim.SparseAdam(tables, lr=0.01), torch.optim.SGD(dense, lr=0.001, momentum=0.9))


TRAIN = Train(epochs=2, batch_size=16, checkpoint_every_batches=2)


def test_two_optimisers_in_one_resume_exactly(tmp_path):
    done = survives_kills(go(Clicks(), SparseTables(), TRAIN), tmp_path)
    first, last = done.ledger.rows[-1].curves["train_loss"][0][1], done.ledger.rows[-1].curves["train_loss"][-1][1]
    assert last < first < 1.5  # per sample, not per batch of 16
    assert done.ledger.rows[-1].runtime == "onnxruntime"


def test_the_sum_is_what_a_bare_loop_sums(tmp_path):
    done = go(Clicks(), SparseTables(), TRAIN)(tmp_path)
    task = Clicks()
    with isolated_rng("model", 0):
        fresh = task.default_model()
    optimizer, data = SparseTables.optimizer(fresh), task.splits(None).train
    batches = Batches(data, 16, seed=0)
    for epoch in range(2):
        batches.set_epoch(epoch)
        for indices in batches:
            optimizer.zero_grad()
            x, y = data[list(indices)]
            binary_cross_entropy_with_logits(fresh(x), y, reduction="sum").backward()
            optimizer.step()
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(done.job.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_the_default_optimiser_cannot_take_sparse_gradients_and_says_so(tmp_path):
    with pytest.raises(InvalidValue, match=r"batch 0 of epoch 0: AdamW cannot make a step: .*sparse gradients"):
        go(Clicks(), TRAIN)(tmp_path)


def test_refused_where_there_is_no_table(tmp_path):
    with pytest.raises(RecipeError, match="'sparse_tables' needs 'tables'"):
        go(Points(), SparseTables(), TRAIN)(tmp_path)
