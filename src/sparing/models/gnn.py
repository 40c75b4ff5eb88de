"""Graph neural networks for the classes of nodes: GCN, GAT and GraphSAGE, of PyG's layers.

All take node features and edges and give the logits of all nodes. Features may be dense or a sparse COO tensor, as bags
of words are: the first layer then costs as much as there are non-zeros, and dropout draws for the non-zeros only, which
leaves zeros zero as dropout on the dense matrix does. PyG is needed when a model is built, not to import this module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import dropout, elu, linear, relu

from sparing.core.errors import InvalidValue, MissingDependency
from sparing.models.convnet import whole

if TYPE_CHECKING:
    from torch_geometric.nn import SAGEConv


def feature_dropout(x: Float[Tensor, "n f"], p: float, training: bool = True) -> Float[Tensor, "n f"]:
    """Dropout on x (N, F); of a sparse COO tensor on its non-zeros, which has the same distribution."""
    if not training or p == 0:
        return x
    if x.layout == torch.sparse_coo:
        x = x.coalesce()
        values = dropout(x.values(), p)
        return torch.sparse_coo_tensor(x.indices(), values, x.shape, is_coalesced=True, check_invariants=False)
    return dropout(x, p)


def _layers() -> Any:
    """PyG's layers."""
    try:
        import torch_geometric.nn
    except ModuleNotFoundError as error:
        raise MissingDependency("torch_geometric", "graphs", "a graph neural network") from error
    return torch_geometric.nn


class _NodeClassifier(nn.Module, ABC):
    """[dropout → layer → activation] × (depth − 1), dropout → layer."""

    def __init__(self, in_features: int, num_classes: int, hidden: int, depth: int, dropout: float) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "num_classes": num_classes, "hidden": hidden, "depth": depth}
        whole(type(self).__name__, **sizes)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise InvalidValue(f"{type(self).__name__}: dropout = {dropout!r}; 0 ≤ dropout < 1 is expected")
        self.in_features, self.dropout = in_features, float(dropout)
        self.layers = nn.ModuleList()

    def _check(self, x: Tensor, edge_index: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise InvalidValue(
                f"{type(self).__name__}: features of shape {tuple(x.shape)}; (N, {self.in_features}) is expected"
            )
        if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
            raise InvalidValue(
                f"{type(self).__name__}: edges of type {edge_index.dtype} and shape {tuple(edge_index.shape)}; whole "
                "numbers (2, E) are expected"
            )

    @abstractmethod
    def forward(self, x: Any, edge_index: Any) -> Any:
        """Logits of all nodes."""


class GCN(_NodeClassifier):
    """Graph convolutional network (Kipf and Welling 2017, arXiv:1609.02907).

    A layer is D^−½ (A + I) D^−½ X W + b (equation 2), D the degrees of A + I, with ReLU and dropout between layers. W
    begins Glorot-uniform, b zero. The defaults are the paper's for citation graphs (section 5.2).

    Shapes: x (N, in_features), edge_index (2, E) [, edge_weight (E,)] → logits (N, num_classes).

    Args:
        in_features: features of a node.
        num_classes: number of logits.
        hidden: units of each inner layer.
        depth: number of layers.
        dropout: share of a layer's inputs dropped in training, 0 ≤ dropout < 1.
        cached: keep the normalised adjacency of the first graph that is seen, and use it from then on, whatever edges
            are given: for loops of your own over one graph only.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int = 16,
        depth: int = 2,
        dropout: float = 0.5,
        cached: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes, hidden, depth, dropout)
        conv = _layers().GCNConv
        widths = [in_features, *[hidden] * (depth - 1), num_classes]
        for number in range(depth):
            self.layers.append(conv(widths[number], widths[number + 1], cached=cached))

    def forward(
        self,
        x: Float[Tensor, "..."],
        edge_index: Shaped[Tensor, "..."],
        edge_weight: Float[Tensor, " e"] | None = None,
    ) -> Float[Tensor, "n classes"]:
        """Features (N, in_features), dense or sparse COO, edges (2, E), weights of the edges → logits (N, classes)."""
        self._check(x, edge_index)
        for number, layer in enumerate(self.layers):
            x = layer(
                feature_dropout(x if number == 0 else relu(x), self.dropout, self.training), edge_index, edge_weight
            )
        return x


class GAT(_NodeClassifier):
    """Graph attention network (Veličković et al. 2018, arXiv:1710.10903).

    Inner layers have ``heads`` heads of ``hidden`` units each, one after the other (equation 5), and ELU; the last
    layer has one head. Dropout acts on inputs and on attention. The defaults are the paper's for Cora and Citeseer
    (section 3.3).

    Shapes: x (N, in_features), edge_index (2, E) → logits (N, num_classes).

    Args:
        in_features: features of a node.
        num_classes: number of logits.
        hidden: units of each head of an inner layer.
        depth: number of layers.
        dropout: share of a layer's inputs and of its attention dropped in training, 0 ≤ dropout < 1.
        heads: heads of each inner layer.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int = 8,
        depth: int = 2,
        dropout: float = 0.6,
        heads: int = 8,
    ) -> None:
        super().__init__(in_features, num_classes, hidden, depth, dropout)
        whole("GAT", heads=heads)
        conv = _layers().GATConv
        widths = [in_features, *[hidden * heads] * (depth - 1)]
        for number in range(depth - 1):
            self.layers.append(conv(widths[number], hidden, heads=heads, dropout=dropout))
        self.layers.append(conv(widths[-1], num_classes, heads=1, dropout=dropout))

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Features (N, in_features), dense or sparse COO, and edges (2, E) → logits (N, classes)."""
        self._check(x, edge_index)
        for number, layer in enumerate(self.layers):
            x = layer(feature_dropout(x if number == 0 else elu(x), self.dropout, self.training), edge_index)
        return x


class GraphSAGE(_NodeClassifier):
    """GraphSAGE averaging over all neighbours (Hamilton, Ying and Leskovec 2017, arXiv:1706.02216).

    A layer is W₁ · mean of the neighbours + W₂ · the node itself + b (algorithm 1, the concatenation written as a sum),
    with ReLU and dropout between layers. Sparse features are multiplied by W₁ before the mean, which commutes.

    Shapes: x (N, in_features), edge_index (2, E) → logits (N, num_classes).

    Args:
        in_features: features of a node.
        num_classes: number of logits.
        hidden: units of each inner layer.
        depth: number of layers.
        dropout: share of a layer's inputs dropped in training, 0 ≤ dropout < 1.
    """

    def __init__(
        self, in_features: int, num_classes: int, hidden: int = 16, depth: int = 2, dropout: float = 0.5
    ) -> None:
        super().__init__(in_features, num_classes, hidden, depth, dropout)
        conv = _layers().SAGEConv
        widths = [in_features, *[hidden] * (depth - 1), num_classes]
        for number in range(depth):
            self.layers.append(conv(widths[number], widths[number + 1]))

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Features (N, in_features), dense or sparse COO, and edges (2, E) → logits (N, classes)."""
        self._check(x, edge_index)
        for number, layer in enumerate(self.layers):
            x = feature_dropout(x if number == 0 else relu(x), self.dropout, self.training)
            x = layer(x, edge_index) if x.layout == torch.strided else _sparse_sage(layer, x, edge_index)
        return x


def _sparse_sage(layer: SAGEConv, x: Tensor, edge_index: Tensor) -> Tensor:
    """The layer on sparse x: of W₁ · mean(x) the product comes first, so that no sparse row is gathered."""
    projected = linear(x, layer.lin_l.weight)
    return layer.propagate(edge_index, x=(projected, projected), size=None) + layer.lin_l.bias + layer.lin_r(x)
