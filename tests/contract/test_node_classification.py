"""Guest: node classification on one big graph: a data set of length 1, full batches, masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from harness import METER, go, survives_kills
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparing.core.errors import SparingError
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.pipeline import run
from sparing.core.predictor import build_model, load
from sparing.core.task import Evaluation, Splits, Task
from sparing.core.training import Train

NODES, FEATURES, CLASSES = 60, 6, 3


class OneGraph:
    """A data set with one item: (x, edges, labels, mask of the nodes that count in this split)."""

    def __init__(self, mask: Tensor) -> None:
        draw = torch.Generator().manual_seed(0)
        self.y = torch.arange(NODES) % CLASSES
        self.x = torch.randn(NODES, FEATURES, generator=draw) + torch.eye(CLASSES, FEATURES)[self.y]
        pairs = torch.randint(NODES, (2, 600), generator=draw)
        self.edges = pairs[:, self.y[pairs[0]] == self.y[pairs[1]]]
        self.mask = mask

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.edges, self.y, self.mask

    def fingerprint(self) -> list[Any]:
        return [self.x, self.edges, self.y, self.mask]


class NodeNet(nn.Module):
    """Mean over neighbours between two layers: x (nodes, features), edges (2, E) → logits (nodes, classes)."""

    def __init__(self, features: int = FEATURES, classes: int = CLASSES) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(features, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        summed = torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])
        ones = torch.ones_like(edges[1], dtype=x.dtype)
        counts = torch.zeros_like(x[:, 0]).index_add(0, edges[1], ones)
        return self.last(hidden + summed / counts.clamp(min=1).unsqueeze(1))


class Nodes(Task):
    """Class of every node of one graph."""

    name = "nodes"
    unit: ClassVar[str] = "node"
    metrics = CLASSIFICATION_METRICS
    capabilities = frozenset({"classification", "graph"})
    labels = ("a", "b", "c")

    def splits(self, root: Path | None) -> Splits:
        part = torch.arange(NODES) // CLASSES % 4
        return Splits(*(OneGraph(part == number) for number in range(4)))

    @staticmethod
    def collate(items: list[Any]) -> Any:
        (item,) = items
        return item

    def outputs(self, model: Any, batch: Any) -> Any:
        return model(batch[0], batch[1])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs[batch[3]], batch[2][batch[3]])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        x, edges, y, mask = split[0]
        logits = np.asarray(predictor(x, edges))
        return evaluate_classification(logits[mask.numpy()], y.numpy()[mask.numpy()], self.labels)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        nodes = NODES + batch  # graphs have no batch; any number of nodes and edges will do
        draw = torch.Generator().manual_seed(0)
        return torch.randn(nodes, FEATURES, generator=draw), torch.randint(nodes, (2, 4 * nodes), generator=draw)

    def default_model(self) -> nn.Module:
        return build_model(NodeNet)


TRAIN = Train(epochs=8, lr=0.05, checkpoint_every_batches=2)


def test_full_batch_training_measured_over_masked_nodes(tmp_path):
    done = survives_kills(go(Nodes(), TRAIN, meter=METER | {"runtime": "module"}), tmp_path)
    (row,) = done.ledger.rows
    assert row.figures["training samples"].value == 8  # one graph, eight times
    assert done.ledger.outcomes["0/train"].shape == (15,)  # paired comparisons are over the test mask's nodes
    assert row.runtime == "torch"
    assert row.figures["accuracy"].value > 0.6


def test_exported_with_any_number_of_nodes_and_edges(tmp_path):
    done = go(Nodes(), TRAIN)(tmp_path)
    (row,) = done.ledger.rows
    assert row.runtime == "onnxruntime"
    saved = load(done.folder / "model")
    x, edges = torch.randn(7, FEATURES), torch.randint(7, (2, 11))
    expected = done.job.model.eval()(x, edges).detach()
    torch.testing.assert_close(torch.from_numpy(saved(x, edges)), expected, rtol=1e-4, atol=1e-5)


class Looking(NodeNet):
    """A network whose path depends on what it computes, which no graph of operators can hold."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        out = super().forward(x, edges)
        return out if bool(out.sum() > 0) else 2 * out


def test_a_task_without_export_is_measured_in_torch_and_says_so(tmp_path):
    done = go(Nodes(), TRAIN, Train(id="more", epochs=1), model=build_model(Looking))(tmp_path)
    assert [row.runtime for row in done.ledger.rows] == ["torch", "torch"]  # all rows of a task in one runtime
    assert any("measured in torch, as are the rows after it" in remark for remark in done.ledger.rows[0].remarks)


def test_refused_without_a_node_to_learn_from(tmp_path):
    class Unlabelled(Nodes):
        def splits(self, root: Path | None) -> Splits:
            empty = OneGraph(torch.zeros(NODES, dtype=torch.bool))
            return Splits(empty, empty, empty, empty)

    with pytest.raises(SparingError):
        run(task=Unlabelled(), steps=[TRAIN], meter=METER)
