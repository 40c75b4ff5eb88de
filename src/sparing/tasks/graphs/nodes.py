"""Node classification: labels of some nodes of one graph, which is seen whole (the transductive setting)."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification, macro_f1
from sparing.core.task import IGNORED, Evaluation, Metric, Splits, Task
from sparing.data.images import stratified_cut
from sparing.data.nodes import NodeSet, join_nodes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch_geometric.data import Data

    from sparing.core.predictor import Predictor


def _takes_weights(model: Any) -> bool:
    """Whether a network, or the one it wraps, has an argument for the weights of edges."""
    called = getattr(model, "__wrapped__", getattr(model, "forward", model))
    return "edge_weight" in inspect.signature(called).parameters


class NodeClassification(Task):
    """Classes of the nodes of one graph; headline: accuracy.

    A subclass sets the class variables and reads its graph in :meth:`read`. A split is a :class:`NodeSet`: every sample
    is a node. A batch is ``(x (N, F), edge_index (2, E), nodes (n,), labels (n,))``, all of the graph and the labels of
    the batch's nodes; a graph with weights, as a condensed one, adds ``edge_weight (E,)``. A model maps
    ``x, edge_index`` to the logits (N, classes) of all nodes of the graph, and is given ``edge_weight`` where it has
    such an argument: others see the edges alone. Training is full-batch when ``batch_size`` is at least the number of
    training nodes.
    """

    unit: ClassVar[str] = "node"
    metrics: tuple[Metric, ...] = (*CLASSIFICATION_METRICS, Metric("macro_f1"))
    capabilities: frozenset[str] = frozenset({"classification", "graph", "node_classification"})
    collate = staticmethod(join_nodes)
    in_features: int
    """Features of a node."""
    example_nodes: int
    """Nodes of an example input, about those of the graph."""
    example_edges: int
    """Edges of an example input, each direction counted, about those of the graph."""
    example_nonzeros: ClassVar[int]
    """Non-zero features of a node of an example input."""
    calibration_share: ClassVar[float] = 0.1
    """Share of each class's training nodes that calibrates instead."""

    def __init__(self) -> None:
        self._splits: dict[Path | None, Splits] = {}

    @abstractmethod
    def read(self, root: Path | None) -> Data:
        """The graph under ``root``: ``x`` (dense or sparse COO), ``edge_index``, ``y`` and PyG's three masks."""

    def splits(self, root: Path | None = None) -> Splits:
        """The masks' nodes, calibration cut from the training nodes class by class; read once for each ``root``."""
        if root not in self._splits:
            self._splits[root] = self._cut(self.read(root))
        return self._splits[root]

    def _cut(self, data: Data) -> Splits:
        import torch

        if data.x.shape[1] != self.in_features:
            raise DataError(f"{self.name}: {data.x.shape[1]} features; {self.in_features} are expected")
        nodes = {name: data[f"{name}_mask"].nonzero().squeeze(1) for name in ("train", "val", "test")}
        for name, members in nodes.items():
            for node in members[(data.y[members] < 0) | (data.y[members] >= len(self.labels))][:1].tolist():
                raise DataError(
                    f"{self.name}: node {node} of {name} has the label {int(data.y[node])}; "
                    f"0…{len(self.labels) - 1} is expected"
                )
        parts = stratified_cut(data.y[nodes["train"]].numpy(), {"calibration": self.calibration_share}, seed=0)
        given = nodes["train"]
        nodes |= {"train": given[torch.from_numpy(parts["rest"])]}
        nodes |= {"calibration": given[torch.from_numpy(parts["calibration"])]}
        sens = self.groups_of(data)
        return Splits(
            **{
                name: NodeSet(data.x, data.edge_index, members, data.y[members], sens=sens)
                for name, members in nodes.items()
            }
        )

    def groups_of(self, data: Data) -> Tensor | None:
        """The group of each node by a sensitive attribute (N,), 0, 1 or −1 for neither; None: there is none."""
        return None

    def outputs(self, model: nn.Module | Predictor, batch: Any) -> Any:
        """Logits (N, classes) of all nodes of the batch's graph."""
        answer: Any = model
        weights = {"edge_weight": batch[4]} if len(batch) > 4 and _takes_weights(model) else {}
        return answer(batch[0], batch[1], **weights)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean cross-entropy over the batch's nodes."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs[batch[2]], batch[3])

    def class_logits(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        """(logits (N, classes), classes (N,)) of all nodes of the graph, -100 for those that are not the batch's."""
        classes = batch[3].new_full((len(outputs),), IGNORED)
        classes[batch[2]] = batch[3]
        return outputs, classes

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Accuracy, worst class's accuracy, calibration error (15 bins), negative log-likelihood and macro-F1."""
        if len(split) == 0:
            raise InvalidValue(f"{self.name}: the split to evaluate holds no node")
        (batch,) = batches_of(split, len(split), self.collate)
        outputs, (nodes, targets) = self.outputs(predictor, batch), (np.asarray(part) for part in batch[2:4])
        if np.shape(outputs) != (len(batch[0]), len(self.labels)):
            raise InvalidValue(
                f"{self.name}: outputs of shape {np.shape(outputs)}; logits of all nodes, "
                f"({len(batch[0])}, {len(self.labels)}), are expected"
            )
        logits = np.asarray(outputs)[nodes]
        return self.scored(logits, targets, nodes)

    def scored(self, logits: np.ndarray, targets: np.ndarray, nodes: np.ndarray) -> Evaluation:
        """The metrics of logits (n, classes) for classes (n,) of the graph's nodes of these numbers (n,)."""
        found = evaluate_classification(logits, targets, self.labels)
        f1 = macro_f1(logits.argmax(axis=1), targets, len(self.labels))
        return Evaluation({**found.metrics, "macro_f1": f1}, found.per_unit, found.by_class)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """A random graph of the task's size and ``batch`` nodes more: (x float32 (N, F), edge_index int64 (2, E)).

        Nodes are not computed apart, so a batch is no stack of samples: one graph is answered at once. ``x`` is dense,
        as runtimes other than torch take it.
        """
        import torch

        generator = torch.Generator().manual_seed(0)
        nodes = self.example_nodes + batch
        words = torch.randint(self.in_features, (nodes, self.example_nonzeros), generator=generator)
        x = torch.zeros(nodes, self.in_features).scatter_(1, words, 1.0 / self.example_nonzeros)
        return x, torch.randint(nodes, (2, self.example_edges + batch), generator=generator)

    def model_fields(self) -> Mapping[str, Any]:
        """``in_features`` and ``num_classes``."""
        return {"in_features": self.in_features, "num_classes": len(self.labels)}

    def default_model(self) -> nn.Module:
        """A graph convolutional network of two layers."""
        from sparing.core.predictor import build_model

        return build_model("gcn", self)
