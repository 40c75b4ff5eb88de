"""Guest: a task on graphs, and a step that replaces its training graphs by a few synthesised ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from harness import Points, go, survives_kills
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from sparing.core.collation import batches_of
from sparing.core.errors import RecipeError
from sparing.core.job import Job
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.predictor import build_model
from sparing.core.randomness import isolated_rng
from sparing.core.step import Stage, Step, step
from sparing.core.store import TENSORS
from sparing.core.task import Evaluation, Splits, Task
from sparing.core.training import Train

NODES, FEATURES = 5, 4


class GraphNet(nn.Module):
    """One propagation, mean over nodes: x (N, nodes, features), adjacency (N, nodes, nodes) → logits (N, 2)."""

    def __init__(self, features: int = FEATURES, hidden: int = 8) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(features, hidden), nn.Linear(hidden, 2)

    def embed(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return (adjacency @ self.first(x)).relu().mean(1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.last(self.embed(x, adjacency))


class Graphs(Task):
    """Sparse against dense graphs; items are (x, adjacency, label)."""

    name = "graphs"
    unit: ClassVar[str] = "graph"
    metrics = CLASSIFICATION_METRICS
    capabilities = frozenset({"classification", "graphs"})
    labels = ("sparse", "dense")

    def splits(self, root: Path | None) -> Splits:
        def part(count: int, seed: int) -> TensorDataset:
            draw = torch.Generator().manual_seed(seed)
            y = torch.arange(count) % 2
            upper = (torch.rand(count, NODES, NODES, generator=draw) < 0.25 + 0.5 * y.view(-1, 1, 1)).float().triu(1)
            adjacency = (upper + upper.mT + torch.eye(NODES)) / NODES
            return TensorDataset(torch.randn(count, NODES, FEATURES, generator=draw) + 0.5, adjacency, y)

        return Splits(part(40, 1), part(12, 2), part(8, 3), part(30, 4))

    def outputs(self, model: Any, batch: Any) -> Any:
        return model(batch[0], batch[1])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch[2])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        (batch,) = batches_of(split, len(split))
        return evaluate_classification(np.asarray(self.outputs(predictor, batch)), np.asarray(batch[2]), self.labels)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        draw = torch.Generator().manual_seed(0)
        return torch.randn(batch, NODES, FEATURES, generator=draw), torch.rand(batch, NODES, NODES, generator=draw)

    def default_model(self) -> nn.Module:
        return build_model(GraphNet)


@step("condense_graphs")
class CondenseGraphs(Step):
    """Train on a few synthesised graphs whose mean embeddings under random networks match the class means."""

    stage = Stage.DATA
    needs = frozenset({"graphs", "classification"})
    source = "distribution matching, Zhao and Bilen 2023, eq. 5, on graphs"

    per_class: int = Field(2, ge=1)
    steps: int = Field(6, ge=1)

    def apply(self, job: Job) -> Job:
        small = job.store.once("graphs", lambda: self.condense(job), TENSORS)
        job.record("training graphs", len(small["y"]), "")
        return job.replace(train=TensorDataset(small["x"], small["adjacency"], small["y"]))

    def condense(self, job: Job) -> dict[str, Tensor]:
        (batch,) = batches_of(job.train, len(job.train))
        y = torch.arange(2).repeat_interleave(self.per_class)
        x = torch.randn(len(y), NODES, FEATURES)
        edges = torch.zeros(len(y), NODES, NODES)
        progress, start = job.store.progress("graphs"), 0
        if state := progress.load():
            x, edges, start = state["x"], state["edges"], state["step"]
        for number in range(start, self.steps):
            with isolated_rng(job.seed, "condense", number):
                net = job.fresh_model()
                for layer in (net.first, net.last):
                    layer.reset_parameters()
            x.requires_grad_(), edges.requires_grad_()
            loss = sum(
                (net.embed(*(part[batch[2] == c] for part in batch[:2])).mean(0) - made[y == c].mean(0)).square().sum()
                for made in [net.embed(x, edges.sigmoid())]
                for c in (0, 1)
            )
            x, edges = (v.detach() - g for v, g in zip((x, edges), torch.autograd.grad(loss, (x, edges)), strict=True))
            progress.save({"x": x, "edges": edges, "step": number + 1})
        return {"x": x, "adjacency": edges.sigmoid(), "y": y}


TRAIN = Train(epochs=3, batch_size=4, checkpoint_every_batches=2)


def test_condensed_training_is_a_row_and_survives_kills(tmp_path):
    done = survives_kills(go(Graphs(), CondenseGraphs(per_class=3), TRAIN), tmp_path)
    condensed, trained = done.ledger.rows
    assert condensed.figures["training graphs"].value == 6
    assert condensed.runtime == ""  # no model yet, so nothing was measured
    assert trained.figures["training samples"].value == 3 * 6
    assert trained.runtime == "onnxruntime"
    assert len(done.job.train) == 6
    assert len(done.job.task.splits(None).train) == 40  # the untouched data stay there


def test_refused_on_a_task_without_graphs(tmp_path):
    with pytest.raises(RecipeError, match=r"'condense_graphs' needs 'graphs'.*it comes with the task"):
        go(Points(), CondenseGraphs(), TRAIN)(tmp_path)
