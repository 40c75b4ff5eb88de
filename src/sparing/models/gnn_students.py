"""Small networks that learn the classes of a graph's nodes from a teacher (Dong et al. 2023, arXiv:2301.01150).

All take features and edges as the networks of :mod:`sparing.models.gnn` do. :class:`CPFStudent` is that of Yang, Liu
and Shi 2021 ("Extract the Knowledge of Graph Neural Networks and Go Beyond It", arXiv:2103.02885), :class:`SGCStudent`
that of GraphAKD (He et al. 2022, arXiv:2205.11678), :class:`GLNNStudent` that of Zhang et al. 2022 (arXiv:2110.08727).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, one_hot, relu
from torch.utils.weak import WeakIdKeyDictionary

from sparing.core import registry
from sparing.core.errors import InvalidValue
from sparing.core.predictor.module import build_model, named_model
from sparing.models.convnet import whole
from sparing.models.gnn import (
    _layers,
    check_edges,
    check_shares,
    is_exporting,
    normalised_edges,
    normalised_sparse,
)


def _adjacency(edge_index: Tensor, nodes: int) -> Tensor:
    if torch.is_inference_mode_enabled():  # what is made here can take no part in a training
        return normalised_sparse(edge_index, nodes)
    kept = _smooth.get(edge_index)
    if kept is None or kept[:2] != (edge_index._version, nodes):
        with torch.no_grad():
            kept = edge_index._version, nodes, normalised_sparse(edge_index, nodes)
        _smooth[edge_index] = kept
    return kept[2]


_smooth: Any = WeakIdKeyDictionary()
"""Edges → (their version, nodes, the normalised adjacency): training asks for that of one graph again and again."""


def propagated(x: Float[Tensor, "n f"], edge_index: Shaped[Tensor, "2 e"], hops: int) -> Float[Tensor, "n f"]:
    """Ŝ^hops X, Ŝ = D^−½ A D^−½ of the edges with a loop at each node (Kipf and Welling 2017, equation 2).

    The last graph's Ŝ is kept for as long as its edges live.
    """
    if hops == 0:
        return x
    nodes = x.shape[0]
    if is_exporting():  # ONNX has no product with a sparse matrix
        edges, weight = normalised_edges(edge_index, nodes)
        for _ in range(hops):
            x = torch.zeros_like(x).index_add(0, edges[1], x[edges[0]] * weight[:, None])
        return x
    smooth = _adjacency(edge_index, nodes).to(x.dtype)
    for _ in range(hops):
        x = torch.sparse.mm(smooth, x)
    return x


def _check(model: nn.Module, in_features: int, x: Tensor, edge_index: Tensor) -> None:
    name = type(model).__name__
    if x.ndim != 2 or x.shape[1] != in_features or x.layout != torch.strided:
        raise InvalidValue(
            f"{name}: features of shape {tuple(x.shape)} and layout {x.layout}; dense (N, {in_features}) is expected"
        )
    check_edges(name, edge_index)


class CPFStudent(nn.Module):
    """Label propagation mixed with a perceptron: parameterised label propagation, PLP (Yang et al. 2021, section 3.3).

    Y⁰ is the one-hot label of nodes that :meth:`set_labels` names, 1/C for all others. A layer, repeated with the same
    weights, is

        Y_v ← ReLU( σ(β_v) · Σ over edges u→v of α_uv Y_u + σ(−β_v) · MLP(x_v) ),

    after which labelled nodes have their labels again. α_uv is the softmax over the edges to v of the source's score
    e_u = a·x_u, or of one free number for each node with ``transductive``. The answer is Y after ``num_layers`` − 1
    layers, taken for logits. In training each layer draws its own dropout.

    Labels, β and free scores are those of the first ``num_nodes`` nodes of a graph. Nodes after them have Y⁰ = 1/C,
    β = 0 and score 0.

    Shapes: x (N, in_features), edge_index (2, E) with an edge to each node → Y (N, num_classes).

    Args:
        in_features: features of a node, those of a proxy of bias included.
        num_classes: C.
        num_nodes: nodes of the graph it learns.
        num_layers: layers and 1.
        hidden: units of the perceptron's inner layers.
        mlp_layers: linear layers of the perceptron; 0: propagation alone, Y_v ← Σ α_uv Y_u.
        feat_drop: share of features dropped for scores, and of each linear layer's inputs.
        attn_drop: share of the α dropped.
        transductive: scores are free numbers.
    """

    labels_init: Float[Tensor, "n classes"]
    labelled: Bool[Tensor, " n"]

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_nodes: int,
        num_layers: int = 10,
        hidden: int = 64,
        mlp_layers: int = 2,
        feat_drop: float = 0.8,
        attn_drop: float = 0.2,
        transductive: bool = False,
    ) -> None:
        super().__init__()
        whole("CPFStudent", in_features=in_features, num_classes=num_classes, num_nodes=num_nodes, hidden=hidden)
        whole("CPFStudent", at_least=2, num_layers=num_layers)
        whole("CPFStudent", at_least=0, mlp_layers=mlp_layers)
        check_shares("CPFStudent", feat_drop=feat_drop, attn_drop=attn_drop)
        _layers()
        self.in_features, self.num_classes, self.num_nodes, self.num_layers = (
            in_features,
            num_classes,
            num_nodes,
            num_layers,
        )
        self.feat_drop, self.attn_drop = float(feat_drop), float(attn_drop)
        self.transductive = transductive
        self.scores = nn.Parameter(torch.empty(num_nodes, 1) if transductive else torch.empty(1, in_features))
        nn.init.xavier_normal_(self.scores, gain=nn.init.calculate_gain("relu"))
        widths = [in_features, *[hidden] * (mlp_layers - 1), num_classes] if mlp_layers else []
        self.mlp = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.beta = nn.Parameter(torch.zeros(num_nodes, 1)) if mlp_layers else None
        self.register_buffer("labels_init", torch.full((num_nodes, num_classes), 1 / num_classes))
        self.register_buffer("labelled", torch.zeros(num_nodes, dtype=torch.bool))

    def set_labels(self, nodes: Int[Tensor, " k"], labels: Int[Tensor, " k"]) -> None:
        """The nodes (k,) whose labels (k,) are known; all others begin with 1/C.

        Raises:
            InvalidValue: a node or label out of range, or a node named twice.
        """
        for name, given, size in (("node", nodes, self.num_nodes), ("label", labels, self.num_classes)):
            wrong = given[(given < 0) | (given >= size)]
            if len(wrong):
                raise InvalidValue(f"CPFStudent: the {name} {int(wrong[0])}; 0…{size - 1} is expected")
        if len(nodes.unique()) != len(nodes):
            raise InvalidValue("CPFStudent: a node is given two labels")
        self.labels_init.fill_(1 / self.num_classes)
        self.labels_init[nodes] = one_hot(labels, self.num_classes).to(self.labels_init)
        self.labelled.fill_(False)
        self.labelled[nodes] = True

    @property
    def balance(self) -> Float[Tensor, "n 1"]:
        """σ(β): how much of a node's answer comes from its neighbours (N, 1); 1 without a perceptron."""
        return torch.ones(self.num_nodes, 1) if self.beta is None else torch.sigmoid(self.beta)

    def attention(self, x: Float[Tensor, "n f"], edge_index: Shaped[Tensor, "2 e"]) -> Float[Tensor, " e"]:
        """α of each edge (E,), which sum to 1 over the edges to a node; draws the scores' dropout in training."""
        from torch_geometric.utils import softmax

        if self.transductive:
            score = self._padded(self.scores, x.shape[0], 0.0)
        else:
            score = linear(dropout(x, self.feat_drop, self.training), self.scores)
        return softmax(score[edge_index[0], 0], edge_index[1], num_nodes=x.shape[0])

    def features(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n classes"]:
        """The perceptron's answer (N, C)."""
        for number, layer in enumerate(self.mlp):
            x = layer(dropout(x if number == 0 else relu(x), self.feat_drop, self.training))
        return x

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Features (N, in_features) and edges (2, E) → Y (N, C).

        Raises :class:`InvalidValue` for fewer than ``num_nodes`` nodes, and for a node without an edge to it.
        """
        _check(self, self.in_features, x, edge_index)
        nodes = x.shape[0]
        if nodes < self.num_nodes:
            raise InvalidValue(
                f"CPFStudent: a graph of {nodes} nodes; the {self.num_nodes} it has learned are expected"
            )
        if not is_exporting():
            check_incoming(edge_index, nodes)
        first = self._padded(self.labels_init, nodes, 1 / self.num_classes)
        # padded as numbers: the exporter joins no truth values
        labelled = self._padded(self.labelled[:, None].to(first.dtype), nodes, 0.0) > 0
        beta = None if self.beta is None else self._padded(self.beta, nodes, 0.0)
        y, source, target = first, edge_index[0], edge_index[1]
        alike = not self.training or (self.feat_drop == 0 and self.attn_drop == 0)  # no layer draws anything
        for number in range(self.num_layers - 1):
            if number == 0 or not alike:
                alpha = dropout(self.attention(x, edge_index), self.attn_drop, self.training)
                own = self.features(x) if self.mlp else None
            spread = torch.zeros_like(y).index_add(0, target, y[source] * alpha[:, None])
            if beta is None or own is None:
                y = spread
            else:
                y = relu(torch.sigmoid(beta) * spread + torch.sigmoid(-beta) * own)
            y = torch.where(labelled, first, y)
        return y

    def _padded(self, table: Tensor, nodes: int, value: float) -> Tensor:
        """Rows of a table of the known nodes, and of all further ones ``value``."""
        return torch.cat([table, table.new_full((nodes - self.num_nodes, table.shape[1]), value)])


def check_incoming(edge_index: Shaped[Tensor, "2 e"], nodes: int) -> None:
    """Raise :class:`InvalidValue` for the first of the ``nodes`` to which no edge leads, not even a loop of its own."""
    counts = np.bincount(edge_index[1].cpu().numpy(), minlength=nodes)
    bare = np.flatnonzero(counts == 0)
    if len(bare):
        raise InvalidValue(
            f"no edge leads to node {bare[0]} ({len(bare)} such nodes), so that no label reaches it: add a loop to "
            "each node, as torch_geometric.utils.add_remaining_self_loops does"
        )


class SGCStudent(nn.Module):
    """Three simple graph convolutions: SGC(1), ReLU, SGC(propagations), ReLU, SGC(1), dropout before the last two.

    SGC(k) is Ŝᵏ X W + b (Wu et al. 2019, arXiv:1902.07153, equation 8). It is the student of GraphAKD, whose
    discriminators compare its second layer with the teacher's first.

    Shapes: x (N, in_features), edge_index (2, E) → logits (N, num_classes).

    Args:
        in_features: features of a node, those of a proxy of bias included.
        num_classes: number of logits.
        hidden: units of both inner layers; the width of the teacher's embedding.
        propagations: k of the second layer.
        dropout: share of an inner layer's units dropped in training.
    """

    def __init__(
        self, in_features: int, num_classes: int, hidden: int = 64, propagations: int = 1, dropout: float = 0.5
    ) -> None:
        super().__init__()
        sizes = {"in_features": in_features, "num_classes": num_classes, "hidden": hidden}
        whole("SGCStudent", **sizes, propagations=propagations)
        check_shares("SGCStudent", dropout=dropout)
        self.in_features, self.hops, self.dropout = in_features, (1, propagations, 1), float(dropout)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([in_features, hidden, hidden, num_classes]))

    def embed(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n hidden"]:
        """Features (N, in_features) and edges (2, E) → what the second layer gives, after ReLU (N, hidden)."""
        _check(self, self.in_features, x, edge_index)
        inner = relu(self._layer(0, x, edge_index))
        return relu(self._layer(1, dropout(inner, self.dropout, self.training), edge_index))

    def head(self, embedding: Float[Tensor, "n hidden"], edge_index: Shaped[Tensor, "2 e"]) -> Float[Tensor, "n c"]:
        """What :meth:`embed` gives (N, hidden) → logits (N, C)."""
        return self._layer(2, dropout(embedding, self.dropout, self.training), edge_index)

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Features (N, in_features) and edges (2, E) → logits (N, C)."""
        return self.head(self.embed(x, edge_index), edge_index)

    def _layer(self, number: int, x: Tensor, edge_index: Tensor) -> Tensor:
        layer: Any = self.layers[number]
        return propagated(linear(x, layer.weight), edge_index, self.hops[number]) + layer.bias


class GLNNStudent(nn.Module):
    """A perceptron on each node's own features, or on those of its neighbourhood with ``hops``.

    Without hops it is GLNN's student (Zhang et al. 2022): no graph is needed to answer. With hops it is a perceptron on
    Ŝ^hops X, which is computed once for a graph.

    Shapes: x (N, in_features), edge_index (2, E) → logits (N, num_classes).

    Args:
        in_features: features of a node, those of a proxy of bias included.
        num_classes: number of logits.
        hidden: units of each inner layer.
        depth: number of linear layers.
        dropout: share of an inner layer's units dropped in training.
        hops: propagations of the features.
        proxy_dim: so many features at the end are taken as they are, whatever the hops: the columns of a proxy of bias.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        hidden: int = 64,
        depth: int = 2,
        dropout: float = 0.0,
        hops: int = 0,
        proxy_dim: int = 0,
    ) -> None:
        super().__init__()
        whole("GLNNStudent", in_features=in_features, num_classes=num_classes, hidden=hidden, depth=depth)
        whole("GLNNStudent", at_least=0, hops=hops, proxy_dim=proxy_dim)
        if proxy_dim >= in_features:
            raise InvalidValue(
                f"GLNNStudent: proxy_dim = {proxy_dim} of in_features = {in_features}; at least one feature of the "
                "nodes is expected"
            )
        check_shares("GLNNStudent", dropout=dropout)
        self.in_features, self.hops, self.proxy_dim, self.dropout = in_features, hops, proxy_dim, float(dropout)
        widths = [in_features, *[hidden] * (depth - 1), num_classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Features (N, in_features) and edges (2, E) → logits (N, C)."""
        _check(self, self.in_features, x, edge_index)
        if self.hops:
            own = self.in_features - self.proxy_dim
            x = torch.cat([propagated(x[:, :own], edge_index, self.hops), x[:, own:]], 1)
        for number, layer in enumerate(self.layers):
            x = layer(x if number == 0 else dropout(relu(x), self.dropout, self.training))
        return x


class FairStudent(nn.Module):
    """A student behind the mean of its proxy of bias: it takes features alone (Dong et al. 2023, RELIANT).

    The mean, ``proxy`` (q,), is the same for every node, seen or not, and part of the model.

    Shapes: x (N, in_features), edge_index (2, E) → what the student makes of [x, proxy] (N, in_features + q).

    Args:
        student: a registered model: {name: …, field: value}. It is told the number of its features and classes.
        in_features: features of a node, without the proxy's.
        num_classes: number of logits.
        proxy_dim: q.
    """

    def __init__(
        self, student: str | Mapping[str, Any], in_features: int, num_classes: int, proxy_dim: int = 2
    ) -> None:
        super().__init__()
        whole("FairStudent", in_features=in_features, num_classes=num_classes, proxy_dim=proxy_dim)
        name, own = named_model(student, "student")
        self.student = build_model(name, **student_fields(name, in_features, num_classes, proxy_dim) | own)
        self.register_buffer("proxy", torch.zeros(proxy_dim))

    def forward(self, x: Float[Tensor, "..."], edge_index: Shaped[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Features (N, in_features) and edges (2, E) → logits (N, C)."""
        return self.student(with_columns(x, self.get_buffer("proxy")), edge_index)


def student_fields(name: str, in_features: int, num_classes: int, proxy_dim: int, **more: Any) -> dict[str, Any]:
    """What a registered model is told as a student: its features, those of the proxy included, its classes, and of
    ``proxy_dim`` and ``more`` what it has a field for."""
    known = inspect.signature(registry.resolve("models", name) if ":" not in name else object).parameters
    offered = {"proxy_dim": proxy_dim, **more}
    told = {field: value for field, value in offered.items() if field in known}
    return {"in_features": in_features + proxy_dim, "num_classes": num_classes, **told}


def with_columns(x: Float[Tensor, "n f"], columns: Float[Tensor, "*n q"]) -> Float[Tensor, "n fq"]:
    """[X, P]: features (N, F) and columns behind them, one row (q,) for all nodes or a row for each (N, q).

    Raises :class:`InvalidValue` for columns of other nodes.
    """
    if columns.ndim == 2 and len(columns) != len(x):
        raise InvalidValue(
            f"columns for {len(columns)} nodes behind the features of {len(x)}; one row each is expected"
        )
    return torch.cat([x, columns if columns.ndim == 2 else columns.expand(x.shape[0], -1)], 1)
