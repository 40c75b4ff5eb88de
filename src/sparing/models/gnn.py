"""Graph neural networks: for the classes of nodes, for those of whole graphs, and those that condensation learns with.

GCN, GAT and GraphSAGE are of PyG's layers, take node features and edges and give the logits of all nodes. Features may
be dense or a sparse COO tensor, as bags of words are: the first layer then costs as much as there are non-zeros, and
dropout draws for the non-zeros only, which leaves zeros zero as dropout on the dense matrix does. PyG is needed when
such a model is built, not to import this module.

:class:`GraphClassifier` takes whole graphs, as edges or as dense adjacencies; :class:`AdjacencyGCN` and
:class:`AdjacencySGC` take one graph as a normalised adjacency matrix. These three are differentiable twice, and in a
dense adjacency too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int, Shaped
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


def is_exporting() -> bool:
    """Whether the network is being traced, for ONNX for instance, and no value can be looked at."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def check_shares(model: str, **shares: object) -> None:
    """Raise :class:`InvalidValue` for the first of ``shares`` that is no number of at least 0 and below 1."""
    for name, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise InvalidValue(f"{model}: {name} = {value!r}; 0 ≤ {name} < 1 is expected")


def check_edges(model: str, edge_index: Tensor) -> None:
    """Raise :class:`InvalidValue` for edges that are no whole numbers (2, E)."""
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
        raise InvalidValue(
            f"{model}: edges of type {edge_index.dtype} and shape {tuple(edge_index.shape)}; whole numbers (2, E) are "
            "expected"
        )


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
        check_shares(type(self).__name__, dropout=dropout)
        self.in_features, self.dropout = in_features, float(dropout)
        self.layers = nn.ModuleList()

    def _check(self, x: Tensor, edge_index: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise InvalidValue(
                f"{type(self).__name__}: features of shape {tuple(x.shape)}; (N, {self.in_features}) is expected"
            )
        check_edges(type(self).__name__, edge_index)

    @abstractmethod
    def forward(self, x: Any, edge_index: Any) -> Any:
        """Logits of all nodes."""

    @abstractmethod
    def _first(self, x: Any, edge_index: Any) -> Tensor:
        """What the first layer gives, after its activation."""

    def embed(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n hidden"]:
        """Features (N, in_features), dense or sparse COO, and edges (2, E) → what the first layer gives, activated.

        Raises :class:`InvalidValue` where the first layer is the last.
        """
        self._check(x, edge_index)
        if len(self.layers) < 2:
            raise InvalidValue(
                f"{type(self).__name__}: depth = 1, so there is no inner layer to take an embedding from"
            )
        return self._first(x, edge_index)


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

    def _first(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return relu(self.layers[0](feature_dropout(x, self.dropout, self.training), edge_index))


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

    def _first(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return elu(self.layers[0](feature_dropout(x, self.dropout, self.training), edge_index))


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
        aggregator: "mean", or "gcn": one W for the mean over the neighbours and the node itself (the paper's section
            3.3), see :class:`SelfMeanConv`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int = 16,
        depth: int = 2,
        dropout: float = 0.5,
        aggregator: Literal["mean", "gcn"] = "mean",
    ) -> None:
        super().__init__(in_features, num_classes, hidden, depth, dropout)
        if aggregator not in ("mean", "gcn"):
            raise InvalidValue(f'GraphSAGE: aggregator = {aggregator!r}; "mean" or "gcn" is expected')
        self.aggregator = aggregator
        conv = _layers().SAGEConv if aggregator == "mean" else SelfMeanConv
        widths = [in_features, *[hidden] * (depth - 1), num_classes]
        for number in range(depth):
            self.layers.append(conv(widths[number], widths[number + 1]))

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Features (N, in_features), dense or sparse COO, and edges (2, E) → logits (N, classes)."""
        self._check(x, edge_index)
        for number, layer in enumerate(self.layers):
            x = self._convolve(layer, x if number == 0 else relu(x), edge_index)
        return x

    def _first(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return relu(self._convolve(self.layers[0], x, edge_index))

    def _convolve(self, layer: Any, x: Tensor, edge_index: Tensor) -> Tensor:
        x = feature_dropout(x, self.dropout, self.training)
        sparse = x.layout != torch.strided and self.aggregator == "mean"
        return _sparse_sage(layer, x, edge_index) if sparse else layer(x, edge_index)


class SelfMeanConv(nn.Module):
    """W · (Σ over edges u→v of x_u + x_v) / (deg_v + 1) + b: GraphSAGE's aggregator "gcn", without a root weight.

    A node with a loop counts itself twice. W and b begin as those of torch's ``Linear``.

    Shapes: x (N, in_features), dense or sparse COO, edge_index (2, E) → (N, out_features).
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_features, out_features)

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "2 e"]) -> Float[Tensor, "n out"]:
        """W comes before the mean, which commutes."""
        source, target = edge_index[0], edge_index[1]
        x = torch.sparse.mm(x, self.lin.weight.T) if x.layout == torch.sparse_coo else linear(x, self.lin.weight)
        summed = x.index_add(0, target, x[source])
        degree = x.new_ones(x.shape[0]).index_add(0, target, torch.ones_like(target, dtype=x.dtype))
        return summed / degree[:, None] + self.lin.bias


def _sparse_sage(layer: SAGEConv, x: Tensor, edge_index: Tensor) -> Tensor:
    """The layer on sparse x: of W₁ · mean(x) the product comes first, so that no sparse row is gathered."""
    projected = linear(x, layer.lin_l.weight)
    return layer.propagate(edge_index, x=(projected, projected), size=None) + layer.lin_l.bias + layer.lin_r(x)


def normalised_adjacency(adjacency: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """D^−½ (A + I) D^−½ of dense adjacencies (…, N, N), D the row sums, of at least 1 (Kipf and Welling 2017, eq. 2).

    The diagonal of A + I is 1, whatever that of A is.
    """
    eye = torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device)
    looped = adjacency * (1 - eye) + eye
    scale = looped.sum(-1).clamp(min=1).rsqrt()
    return scale[..., :, None] * looped * scale[..., None, :]


def normalised_edges(
    edge_index: Int[Tensor, "2 e"], nodes: int, edge_weight: Float[Tensor, " e"] | None = None
) -> tuple[Int[Tensor, "2 m"], Float[Tensor, " m"]]:
    """The edges and weights of D^−½ (A + I) D^−½, a loop at each of the N ``nodes`` included; loops given count once.

    Args:
        edge_index: source and target of each edge, (2, E).
        nodes: N.
        edge_weight: (E,); None: all 1.
    """
    weight = edge_weight if edge_weight is not None else torch.ones(edge_index.shape[1], device=edge_index.device)
    weight = torch.where(edge_index[0] == edge_index[1], 0.0, weight)
    loops = torch.arange(nodes, device=edge_index.device)
    edges = torch.cat([edge_index, torch.stack([loops, loops])], dim=1)
    weight = torch.cat([weight, weight.new_ones(nodes)])
    degree = weight.new_zeros(nodes).index_add(0, edges[1], weight)
    scale = degree.clamp(min=1).rsqrt()
    return edges, scale[edges[0]] * weight * scale[edges[1]]


def normalised_sparse(
    edge_index: Int[Tensor, "2 e"], nodes: int, edge_weight: Float[Tensor, " e"] | None = None
) -> Float[Tensor, "n n"]:
    """:func:`normalised_edges` as a sparse COO matrix (N, N) that multiplies features from the left."""
    edges, weight = normalised_edges(edge_index, nodes, edge_weight)
    return torch.sparse_coo_tensor(edges.flip(0), weight, (nodes, nodes), check_invariants=False).coalesce()


def graph_of_node(node_ptr: Int[Tensor, " n1"], nodes: int) -> Int[Tensor, " nodes"]:
    """The graph of each of the N ``nodes`` (N,), from the first node of each graph and N, (graphs + 1,).

    As ``repeat_interleave`` of the sizes, in operators that ONNX has.
    """
    inner = node_ptr[1:-1]
    return node_ptr.new_zeros(nodes).index_add(0, inner, torch.ones_like(inner)).cumsum(0)


class GraphConvolution(nn.Module):
    """One layer of a GCN without its propagation: X W and a bias that is added after it. W Glorot-uniform, bias 0."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.lin = nn.Linear(in_features, out_features, bias=False)
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.xavier_uniform_(self.lin.weight)


class GraphClassifier(nn.Module):
    """Graph convolutions, a pool over the nodes and a linear layer: a class for each graph.

    A layer is D^−½ (A + I) D^−½ X W + b (Kipf and Welling 2017, equation 2), a norm if asked for, and ReLU, also after
    the last. The same parameters serve dense adjacencies, through which gradients flow, and lists of edges, which cost
    as much as there are edges; both give the same for the same graphs. The defaults are those of Jin et al. 2022,
    arXiv:2206.07746.

    Shapes: x (nodes, in_features), edge_index (2, E), node_ptr (graphs + 1,) [, edge_weight (E,)] → logits
    (graphs, num_classes).

    Args:
        in_features: features of a node, F.
        num_classes: number of logits, C.
        hidden: units of each layer, H.
        depth: number of graph convolutions.
        pooling: "mean" or "sum" over a graph's nodes.
        norm: None, or "instance": each unit's mean and variance over a graph's nodes become 0 and 1.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int = 128,
        depth: int = 3,
        pooling: Literal["mean", "sum"] = "mean",
        norm: Literal["instance"] | None = None,
    ) -> None:
        super().__init__()
        whole("GraphClassifier", in_features=in_features, num_classes=num_classes, hidden=hidden, depth=depth)
        if pooling not in ("mean", "sum"):
            raise InvalidValue(f'GraphClassifier: pooling = {pooling!r}; "mean" or "sum" is expected')
        if norm not in (None, "instance"):
            raise InvalidValue(f'GraphClassifier: norm = {norm!r}; None or "instance" is expected')
        self.in_features, self.depth, self.pooling, self.norm = in_features, depth, pooling, norm
        widths = [in_features, *[hidden] * depth]
        self.convs = nn.ModuleList(GraphConvolution(widths[i], widths[i + 1]) for i in range(depth))
        self.head = nn.Linear(hidden, num_classes)

    def _check(self, x: Tensor, shape: str, rank: int) -> None:
        if x.ndim != rank or x.shape[-1] != self.in_features:
            raise InvalidValue(
                f"GraphClassifier: features of shape {tuple(x.shape)}; ({shape}, {self.in_features}) is expected"
            )

    def embed_dense(self, x: Float[Tensor, "..."], adj: Float[Tensor, "..."]) -> Float[Tensor, "graphs hidden"]:
        """Features (n, N, F) and adjacencies (n, N, N), row = target → pooled (n, H). Every row counts as a node."""
        self._check(x, "n, N", 3)
        if adj.shape != (*x.shape[:2], x.shape[1]):
            raise InvalidValue(
                f"GraphClassifier: adjacencies of shape {tuple(adj.shape)}; {(*x.shape[:2], x.shape[1])} is expected"
            )
        smooth = normalised_adjacency(adj)
        conv: Any
        for conv in self.convs:
            x = smooth @ conv.lin(x) + conv.bias
            if self.norm:
                x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = relu(x)
        return x.mean(1) if self.pooling == "mean" else x.sum(1)

    def embed_sparse(
        self,
        x: Float[Tensor, "..."],
        edge_index: Shaped[Tensor, "..."],
        batch: Shaped[Tensor, "..."] | None = None,
        edge_weight: Float[Tensor, " e"] | None = None,
    ) -> Float[Tensor, "graphs hidden"]:
        """Features (nodes, F), edges (2, E), the graph of each node (nodes,) → pooled (graphs, H).

        Without ``batch`` all nodes are of one graph. Each graph up to the last named one has at least one node.
        """
        self._check_edges(x, edge_index)
        nodes = x.shape[0]
        if batch is None:
            batch = edge_index.new_zeros(nodes)
        if batch.shape != (nodes,):
            raise InvalidValue(f"GraphClassifier: batch of shape {tuple(batch.shape)}; ({nodes},) is expected")
        # int() would make torch.export fix the number
        graphs: Any = batch.max().item() + 1 if nodes else 0
        torch._check(graphs >= 0)
        return self._embed(x, edge_index, batch, graphs, edge_weight)

    def _check_edges(self, x: Tensor, edge_index: Tensor) -> None:
        self._check(x, "nodes", 2)
        check_edges("GraphClassifier", edge_index)

    def _embed(
        self, x: Tensor, edge_index: Tensor, batch: Tensor, graphs: int, edge_weight: Tensor | None
    ) -> Float[Tensor, "graphs hidden"]:
        nodes = x.shape[0]
        count = x.new_zeros(graphs).index_add(0, batch, x.new_ones(nodes))[:, None]
        edges, weight = normalised_edges(edge_index, nodes, edge_weight)
        # ONNX has no product with a sparse matrix, which takes half the time
        exporting = is_exporting()
        if not exporting:
            smooth = torch.sparse_coo_tensor(edges.flip(0), weight, (nodes, nodes), check_invariants=False).coalesce()

        def pooled(values: Tensor) -> Tensor:
            return values.new_zeros(graphs, values.shape[1]).index_add(0, batch, values)

        conv: Any
        for conv in self.convs:
            x = conv.lin(x)
            if exporting:
                x = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * weight[:, None])
            else:
                x = torch.sparse.mm(smooth, x)
            x = x + conv.bias
            if self.norm:
                x = x - (pooled(x) / count)[batch]
                x = x / (pooled(x * x) / count + 1e-5).sqrt()[batch]
            x = relu(x)
        return pooled(x) / count if self.pooling == "mean" else pooled(x)

    def forward_dense(self, x: Float[Tensor, "..."], adj: Float[Tensor, "..."]) -> Float[Tensor, "graphs classes"]:
        """Features (n, N, F) and adjacencies (n, N, N) → logits (n, C)."""
        return self.head(self.embed_dense(x, adj))

    def forward_sparse(
        self,
        x: Float[Tensor, "..."],
        edge_index: Shaped[Tensor, "..."],
        batch: Shaped[Tensor, "..."] | None = None,
        edge_weight: Float[Tensor, " e"] | None = None,
    ) -> Float[Tensor, "graphs classes"]:
        """Features (nodes, F), edges (2, E), the graph of each node (nodes,) → logits (graphs, C)."""
        return self.head(self.embed_sparse(x, edge_index, batch, edge_weight))

    def forward(
        self,
        x: Float[Tensor, "..."],
        edge_index: Shaped[Tensor, "..."],
        node_ptr: Shaped[Tensor, "..."],
        edge_weight: Float[Tensor, " e"] | None = None,
    ) -> Float[Tensor, "graphs classes"]:
        """Features (nodes, F), edges (2, E), first node of each graph and their number (graphs + 1,) → (graphs, C)."""
        self._check_edges(x, edge_index)
        if node_ptr.ndim != 1 or node_ptr.shape[0] < 2 or node_ptr.is_floating_point():
            raise InvalidValue(
                f"GraphClassifier: node_ptr of type {node_ptr.dtype} and shape {tuple(node_ptr.shape)}; whole numbers "
                "(graphs + 1,) are expected: the first node of each graph, and the number of nodes"
            )
        return self.head(
            self._embed(x, edge_index, graph_of_node(node_ptr, x.shape[0]), node_ptr.shape[0] - 1, edge_weight)
        )


Adjacency = Tensor | Sequence[Tensor | None]
"""A normalised adjacency (N, N), dense or sparse, or one block for each propagation, first to last: (rows, columns),
or None where its product has been taken already."""


class _Propagating(nn.Module):
    """Linear layers, each followed by propagations and a bias; ReLU between layers.

    ``layers`` hold W (out, in) and b, which begin as those of torch's ``Linear``, U(±1/√in).
    """

    def __init__(self, name: str, widths: Sequence[int], hops: Sequence[int]) -> None:
        super().__init__()
        self.name, self.in_features, self.hops = name, widths[0], tuple(hops)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    @property
    def linear_hops(self) -> int:
        """Propagations before the first ReLU: these can be done once for all, on the features."""
        return self.hops[0]

    def _blocks(self, adj: Adjacency) -> Iterator[Tensor | None]:
        blocks = [adj] * sum(self.hops) if isinstance(adj, Tensor) else list(adj)
        if len(blocks) != sum(self.hops):
            raise InvalidValue(f"{self.name}: {len(blocks)} blocks; one for each of {sum(self.hops)} propagations")
        return iter(blocks)

    def embed(self, x: Float[Tensor, "..."], adj: Any) -> Float[Tensor, "n hidden"]:
        """Features (N, F) and an :data:`Adjacency` → what enters the last layer (N, hidden)."""
        return self._hidden(x, self._blocks(adj))

    def forward(self, x: Float[Tensor, "..."], adj: Any) -> Float[Tensor, "n classes"]:
        """Features (N, F) and an :data:`Adjacency` → logits (N, C), of the last block's rows."""
        blocks = self._blocks(adj)
        return self._layer(len(self.layers) - 1, self._hidden(x, blocks), blocks)

    def _hidden(self, x: Tensor, blocks: Iterator[Tensor | None]) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise InvalidValue(f"{self.name}: features of shape {tuple(x.shape)}; (N, {self.in_features}) is expected")
        for number in range(len(self.layers) - 1):
            x = relu(self._layer(number, x, blocks))
        return x

    def _layer(self, number: int, x: Tensor, blocks: Iterator[Tensor | None]) -> Tensor:
        layer: Any = self.layers[number]
        x = linear(x, layer.weight)
        for block in islice(blocks, self.hops[number]):
            x = x if block is None else block @ x
        return x + layer.bias


class AdjacencyGCN(_Propagating):
    """Graph convolutional network on an adjacency matrix: Â·ReLU(Â X W₀ + b₀)·W₁ + b₁ (Kipf and Welling 2017).

    Shapes: x (N, in_features), Â (N, N) → logits (N, num_classes).

    Args:
        in_features: features of a node.
        num_classes: number of logits.
        hidden: units of each inner layer.
        depth: number of layers.
    """

    def __init__(self, in_features: int, num_classes: int, hidden: int = 256, depth: int = 2) -> None:
        whole("AdjacencyGCN", in_features=in_features, num_classes=num_classes, hidden=hidden, depth=depth)
        super().__init__("AdjacencyGCN", [in_features, *[hidden] * (depth - 1), num_classes], [1] * depth)


class AdjacencySGC(_Propagating):
    """Simple graph convolution on an adjacency matrix: Âᴷ X W + b (Wu et al. 2019, arXiv:1902.07153, equation 8).

    Shapes: x (N, in_features), Â (N, N) → logits (N, num_classes).

    Args:
        in_features: features of a node.
        num_classes: number of logits.
        propagations: K.
    """

    def __init__(self, in_features: int, num_classes: int, propagations: int = 2) -> None:
        whole("AdjacencySGC", in_features=in_features, num_classes=num_classes, propagations=propagations)
        super().__init__("AdjacencySGC", [in_features, num_classes], [propagations])
