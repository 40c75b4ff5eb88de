"""Some nodes of one graph with their labels, as a data set: every node sees the whole graph, and no other's label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparing.core.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

NodeItem = tuple["Tensor", ...]
"""(x (N, F), edge_index (2, E), number of the node (), its label (), and weights of the edges (E,) if there are); of a
batch (…, …, (n,), (n,), …)."""


class NodeSet:
    """The nodes of one split: a map-style data set whose items are :data:`NodeItem`.

    It holds the graph, and the labels of its own nodes only: training on one split cannot reach a label of another.

    Args:
        x: features of all nodes, float (N, F), dense or sparse COO.
        edge_index: source and target of each edge, int64 (2, E).
        nodes: numbers of this split's nodes, int64 (n,).
        labels: their classes, int64 (n,).
        edge_weight: float (E,), or None: all edges weigh the same.
        sens: the group of every node of the graph by a sensitive attribute, int64 (N,): 0 or 1, −1 for neither; or
            None. It is no label, and known of all nodes.
    """

    edge_weight: Tensor | None = None
    sens: Tensor | None = None

    def __init__(
        self,
        x: Tensor,
        edge_index: Tensor,
        nodes: Tensor,
        labels: Tensor,
        edge_weight: Tensor | None = None,
        sens: Tensor | None = None,
    ) -> None:
        if x.ndim != 2 or edge_index.ndim != 2 or len(edge_index) != 2:
            raise DataError(
                f"x of shape {tuple(x.shape)} and edge_index of shape {tuple(edge_index.shape)}; (N, F) and (2, E) are "
                "expected"
            )
        if nodes.ndim != 1 or labels.shape != nodes.shape:
            raise DataError(
                f"{tuple(nodes.shape)} nodes and {tuple(labels.shape)} labels; one label for each node is expected"
            )
        if edge_weight is not None and edge_weight.shape != edge_index.shape[1:]:
            raise DataError(f"edge_weight of shape {tuple(edge_weight.shape)}; ({edge_index.shape[1]},) is expected")
        if sens is not None and sens.shape != x.shape[:1]:
            raise DataError(f"sens of shape {tuple(sens.shape)}; ({len(x)},), one group for each node, is expected")
        for name, numbers in (("edge_index", edge_index), ("nodes", nodes)):
            if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(x):
                raise DataError(
                    f"{name} holds {int(numbers.min())} … {int(numbers.max())}; x has the nodes 0 … {len(x) - 1}"
                )
        self.x, self.edge_index, self.nodes, self.labels = x, edge_index, nodes, labels
        self.edge_weight, self.sens = edge_weight, sens

    def __len__(self) -> int:
        """Nodes in the split, n."""
        return len(self.nodes)

    def __getitem__(self, index: int) -> NodeItem:
        weights = () if self.edge_weight is None else (self.edge_weight,)
        return self.x, self.edge_index, self.nodes[index], self.labels[index], *weights

    def fingerprint(self) -> list[Any]:
        """The graph, the nodes, their labels and groups."""
        return [self.x, self.edge_index, self.nodes, self.labels, self.edge_weight, self.sens]


def join_nodes(items: Sequence[NodeItem]) -> NodeItem:
    """Items of one :class:`NodeSet` → a batch: the graph once, nodes (n,) and labels (n,), weights once."""
    import torch

    x, edge_index = items[0][:2]
    return (
        x,
        edge_index,
        torch.stack([item[2] for item in items]),
        torch.stack([item[3] for item in items]),
        *items[0][4:],
    )
