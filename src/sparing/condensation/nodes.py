"""A small synthetic graph on which a network learns to classify nodes nearly as well as on a large one.

GCond (Jin, Zhao, Zhang, Liu, Tang and Shah 2022, "Graph Condensation for Graph Neural Networks", arXiv:2110.07580)
learns features of synthetic nodes and a generator that makes their edges of them, by matching the gradients of networks
while these are trained; one-step matching (Jin et al. 2022, arXiv:2206.07746) at fresh random weights only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, one_hot, relu

from sparing.condensation.allocation import (
    LabelAllocation,
    allocate_labels,
    check_annealing,
    check_positive,
    check_size,
    rows_for_all,
)
from sparing.condensation.callbacks import Callbacks, marked
from sparing.condensation.graphs import (
    anneal_temperature,
    discrete_adjacency,
    edge_probabilities,
    logistic_noise,
    one_way_edges,
    relaxed_adjacency,
    symmetrised,
    without_loops,
)
from sparing.condensation.matching import METRICS, Metric, gradient_distance
from sparing.condensation.run import Run
from sparing.core.errors import InvalidValue, shown
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.data.graphs import class_counts, graph_data
from sparing.models.convnet import whole
from sparing.models.gnn import AdjacencyGCN, AdjacencySGC, normalised_adjacency, normalised_sparse

if TYPE_CHECKING:
    from torch_geometric.data import Data

    from sparing.core.training.fit import Keeper

Structure = Literal["generator", "bernoulli", "identity"]
EDGE_BIAS = -4.0
"""Initial bias of the generator's last layer. With 0 it begins at ½ everywhere, a complete graph that makes all nodes
one; with this it begins near 0.018."""
CYCLE, GENERATOR_TURNS = 50, 10
"""Of each 50 iterations the first 10 change the generator, the others the features (arXiv:2110.07580, algorithm 1)."""


class PairwiseGenerator(nn.Module):
    """Edges from features (arXiv:2110.07580, equation 8): σ((M + Mᵀ)/2), M_ij = MLP([x_i ; x_j]), no loops.

    The MLP is Linear, batch norm, ReLU, twice, and Linear. Batch norm takes its statistics from all N² pairs, always.
    The first layer on [x_i ; x_j] is W_a x_i + W_b x_j, computed once for each node.

    Shapes: (N, in_features) → (N, N).

    Args:
        in_features: features of a node, F.
        hidden: units of each inner layer.
        edge_bias: initial bias of the last layer; None: as torch draws it.
    """

    def __init__(self, in_features: int, hidden: int = 128, edge_bias: float | None = EDGE_BIAS) -> None:
        super().__init__()
        whole("PairwiseGenerator", in_features=in_features, hidden=hidden)
        self.in_features = in_features
        widths = [2 * in_features, hidden, hidden, 1]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.bns = nn.ModuleList(nn.BatchNorm1d(hidden, track_running_stats=False) for _ in range(2))
        if edge_bias is not None:
            nn.init.constant_(cast(nn.Linear, self.layers[2]).bias, edge_bias)

    def logits(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n n"]:
        """(M + Mᵀ)/2 of features (N, F): (N, N)."""
        first, second, last = cast(list[nn.Linear], list(self.layers))
        left, right = first.weight.split(self.in_features, dim=1)
        pairs = linear(x, left)[:, None] + linear(x, right) + first.bias
        h = relu(self.bns[0](pairs.flatten(0, 1)))
        h = relu(self.bns[1](second(h)))
        return symmetrised(last(h).reshape(len(x), len(x)))

    def forward(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n n"]:
        """Weights of the edges between nodes with features (N, F): (N, N)."""
        return without_loops(torch.sigmoid(self.logits(x)))


def smoothness(adjacency: Float[Tensor, "n n"], labels: Int[Tensor, " n"], num_classes: int) -> Float[Tensor, ""]:
    """tr(Yᵀ L Y): how much the edges join nodes of different classes (arXiv:2110.07580, section 3.4, its code).

    L = (D + 10⁻⁸)^−½ (D − B) (D + 10⁻⁸)^−½ of B = (A + Aᵀ)/2 without loops and its row sums D; Y the one-hot labels.
    """
    b = without_loops(symmetrised(adjacency))
    degree = b.sum(1)
    scale = (degree + 1e-8).rsqrt()
    laplacian = scale[:, None] * (torch.diag(degree) - b) * scale
    y = one_hot(labels, num_classes).to(b)
    return (y * (laplacian @ y)).sum()


def class_weights(allocation: LabelAllocation) -> list[float]:
    """What each class's distance counts: its synthetic nodes over those of the class that has most."""
    sizes = [last - first for first, last in allocation.ranges]
    return [size / max(sizes) for size in sizes]


def node_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], metric: Metric) -> Float[Tensor, ""]:
    """The distance of gradients; "mse" as it is, not divided."""
    return gradient_distance(synthetic, real, metric)


def receptive_blocks(
    adjacency: Float[Tensor, "n n"], nodes: Int[Tensor, " k"], hops: int
) -> tuple[Int[Tensor, " m"], list[Tensor]]:
    """What the answers for some nodes depend on: no more of the graph than this need be computed.

    Args:
        adjacency: sparse COO (N, N).
        nodes: whose answers are wanted, (k,).
        hops: propagations.

    Returns (numbers of the nodes whose features enter, (m,); sparse blocks, first propagation first: each (nodes that
    are left after it, nodes that enter it), the last with the rows ``nodes``).
    """
    blocks: list[Tensor] = []
    for _ in range(hops):
        rows = adjacency.index_select(0, nodes).coalesce()
        entering, place = rows.indices()[1].unique(return_inverse=True)
        indices = torch.stack([rows.indices()[0], place])
        block = torch.sparse_coo_tensor(indices, rows.values(), (len(nodes), len(entering)), check_invariants=False)
        blocks.insert(0, block.coalesce())
        nodes = entering
    return nodes, blocks


def cut_edges(adjacency: Float[Tensor, "n n"], threshold: float) -> Float[Tensor, "n n"]:
    """The weights of at least ``threshold``; the others are 0."""
    return torch.where(adjacency >= threshold, adjacency, 0.0)


def node_graph(
    x: Float[Tensor, "n f"], adjacency: Float[Tensor, "n n"], labels: Int[Tensor, " n"], edge_threshold: float = 0.0
) -> Data:
    """A synthetic graph as PyG ``Data``: x (n, F), edge_index (2, E), edge_weight (E,), y (n,).

    Args:
        x: features.
        adjacency: weights of the edges, row = target.
        labels: classes.
        edge_threshold: edges of a smaller weight, or of weight 0, are left out.
    """
    kept = cut_edges(adjacency, edge_threshold)
    target, source = kept.nonzero().unbind(1)
    return graph_data(x, torch.stack([source, target]), labels, kept[target, source])


@dataclass(kw_only=True)
class NodeCondenser:
    """Condenses one graph with classes of nodes into a small synthetic one.

    The defaults are one-step matching; GCond is ``NodeCondenser(network="sgc", distance="layer_cos", outer_steps=20,
    inner_steps=15, lr_feat=1e-4, lr_adj=1e-4, max_iter=600)``.

    An iteration draws a network with fresh weights; for each class, the loss is the distance of the gradient on its
    synthetic nodes from that on its real training nodes, each seen with its whole neighbourhood; a step of Adam changes
    the generator of the edges or the features, see :data:`CYCLE`.

    After :meth:`fit`: ``condensed_`` (PyG ``Data``: x (n, F), edge_index, edge_weight, y (n,), all edges of weight
    above 0; :func:`node_graph` cuts the light ones), ``features_`` (n, F), ``adjacency_`` (n, n), ``labels_`` (n,),
    ``edge_probabilities_`` (n, n), ``generator_`` (or None), ``initial_`` (real nodes begun with), ``loss_curve_``
    (mean of each iteration's losses) and ``cost_``.
    """

    n_per_class: int | None = None
    """Synthetic nodes of each class."""
    rate: float | None = None
    """Or their share of the training nodes, see :func:`~sparing.condensation.allocation.allocate_labels`; None, and no
    n_per_class: 0.5."""
    structure: Structure = "generator"
    """"generator": weighted edges; "bernoulli": its logits are those of edge probabilities, sampled as in
    :func:`~sparing.condensation.graphs.relaxed_adjacency`, and an edge is where they are above 0 (ours); "identity":
    features only, no edges (GCond-X)."""
    network: Literal["gcn", "sgc"] | Callable[[], nn.Module] = "gcn"
    """What is matched, or what makes it: a module ``(x, adjacency)`` → logits with ``hops``, the propagations of each
    layer, and ``linear_hops``, those before anything that is not linear, as
    :class:`~sparing.models.gnn.AdjacencyGCN` is."""
    hidden: int = 256
    """Units of the "gcn"."""
    generator_hidden: int = 128
    edge_bias: float | None = EDGE_BIAS
    """See :class:`PairwiseGenerator`."""
    distance: Metric = "mse"
    outer_steps: int = 1
    """Updates of the synthetic graph in an iteration."""
    inner_steps: int = 0
    """Epochs that the network is trained on the synthetic graph between two updates."""
    inner_lr: float = 0.01
    """Adam's, in that training."""
    smoothness_weight: float = 0.0
    """α, weight of :func:`smoothness`."""
    lr_adj: float = 1e-3
    lr_feat: float = 1e-3
    max_iter: int = 1000
    batch_real: int = 256
    """Most training nodes of a class in a batch."""
    temperature_start: float = 1.0
    temperature_end: float = 0.01
    anneal_steps: int = 200
    """Samples after which the temperature of "bernoulli" is down to its end."""
    random_state: int = 0
    callbacks: Sequence[Any] = ()
    """See :class:`~sparing.condensation.callbacks.Callbacks`; the data they get is the graph given to :meth:`fit`. One
    that changes features later returns a graph whose ``x`` is dense, which is read in place."""
    checkpoint_every: int = 20
    """Iterations between two states that are kept, where :meth:`fit` is given a keeper."""

    def __post_init__(self) -> None:
        check_size("NodeCondenser", self.n_per_class, self.rate)
        check_annealing("NodeCondenser", self.temperature_start, self.temperature_end, self.anneal_steps)
        for name, allowed in {
            "structure": ("generator", "bernoulli", "identity"),
            "distance": METRICS,
            "network": ("gcn", "sgc"),
        }.items():
            value = getattr(self, name)
            if value not in allowed and not (name == "network" and callable(value)):
                raise InvalidValue(f"{name} = {value!r}; one of {', '.join(allowed)} is expected")
        whole(
            "NodeCondenser",
            hidden=self.hidden,
            generator_hidden=self.generator_hidden,
            outer_steps=self.outer_steps,
            max_iter=self.max_iter,
            batch_real=self.batch_real,
            checkpoint_every=self.checkpoint_every,
        )
        whole("NodeCondenser", 0, inner_steps=self.inner_steps, random_state=self.random_state)
        check_positive(
            inner_lr=self.inner_lr,
            lr_adj=self.lr_adj,
            lr_feat=self.lr_feat,
        )
        check_positive(True, smoothness_weight=self.smoothness_weight)

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters as plain JSON, without callbacks; of a network of one's own only that it is one."""
        left_out = ("network", "callbacks", "checkpoint_every")
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in left_out}
        return plain | {"network": "own" if callable(self.network) else self.network}

    @property
    def provenance_(self) -> dict[str, Any]:
        """How the graph was made, as plain JSON: settings, what it began with, losses, cost, what callbacks say."""
        return {
            "settings": self.settings(),
            "initial": self.initial_,
            "loss_curve": self.loss_curve_,
            "cost": self.cost_,
            **Callbacks(self.callbacks).provenance(),
        }

    def fit(self, data: Data, *, keeper: Keeper | None = None) -> NodeCondenser:
        """Condense a PyG graph on its device: x (N, F), dense or sparse COO, edge_index (2, E), y and train_mask (N,).

        Features are taken as they are; bags of words are usually divided by their sums first.

        Args:
            data: the graph; labels of other nodes than the training nodes are not looked at.
            keeper: keeps unfinished work, so that a killed condensation ends with the same bits; a store's ``Progress``
                is one.

        Raises:
            InvalidValue: features that are absent or not finite; edges between nodes that are not there, or in one
                direction only; no training nodes; a class without any, or with fewer than are needed to begin with; a
                rate that leaves a class without synthetic nodes.
            TrainingDiverged: the loss is not finite any more.
        """
        watching = Callbacks(self.callbacks)
        with isolated_rng("graph to condense", self.random_state):
            data = watching.data_ready(data)
        check_node_data(data)
        train = data.train_mask.nonzero().flatten()
        counts = class_counts(data.y[train].long(), "y of the training nodes")
        rate = 0.5 if self.rate is None and self.n_per_class is None else self.rate
        allocation = rows_for_all(allocate_labels(counts, per_class=self.n_per_class, rate=rate))
        x = data.x.to_dense()
        initial = draw_initial_nodes(
            train.cpu(),
            data.y[train].cpu(),
            allocation,
            torch.Generator().manual_seed(derive_seed(self.random_state, "nodes", "initial")),
        ).to(x.device)
        matcher = _Matcher(self, data, x, train, allocation, x[initial], watching)
        settings = self.settings() | {"data": [list(x.shape), data.edge_index.shape[1], counts]}
        with Run(
            matcher.learned(), matcher.optimizer, watching, settings, self.max_iter, keeper, self.checkpoint_every
        ) as run:
            for iteration in run.left():
                with isolated_rng("condensing nodes", self.random_state, iteration):
                    run.end(iteration, matcher.iteration(iteration))
        self.features_, self.labels_, self.generator_ = matcher.x.detach(), matcher.labels, matcher.generator
        self.adjacency_, self.edge_probabilities_ = matcher.final()
        self.initial_ = initial.tolist()
        self.condensed_ = node_graph(self.features_, self.adjacency_, self.labels_)
        self.loss_curve_ = run.losses
        before = (data.x.coalesce().values(), data.x.coalesce().indices()) if data.x.is_sparse else (data.x,)
        after = tuple(self.condensed_.to_dict().values())
        self.cost_ = run.cost((*before, data.edge_index, data.y), after)
        marked(self.condensed_, watching.provenance())
        return self


def check_node_data(data: Data) -> None:
    """:class:`InvalidValue` for a graph that :class:`NodeCondenser` cannot take, naming what is wrong with it."""
    x, edges, y, mask = (data.get(name) for name in ("x", "edge_index", "y", "train_mask"))
    if x is None or x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        found = "absent" if x is None else f"{x.dtype} of shape {tuple(x.shape)}"
        raise InvalidValue(f"x is {found}; float features (N, F) are expected")
    values = x.coalesce().values() if x.layout == torch.sparse_coo else x
    if not values.isfinite().all():
        bad = (~x.to_dense().isfinite()).any(1).nonzero().flatten()
        raise InvalidValue(f"the features of node {int(bad[0])} are not finite")
    if edges is None or edges.ndim != 2 or edges.shape[0] != 2 or edges.is_floating_point():
        found = "absent" if edges is None else f"{edges.dtype} of shape {tuple(edges.shape)}"
        raise InvalidValue(f"edge_index is {found}; whole numbers (2, E) are expected")
    for edge in ((edges < 0) | (edges >= x.shape[0])).any(0).nonzero().flatten()[:1].tolist():
        raise InvalidValue(f"edge {edge} joins {edges[:, edge].tolist()}; the nodes are 0…{x.shape[0] - 1}")
    for edge in one_way_edges(edges[0], edges[1], x.shape[0])[:1].tolist():
        raise InvalidValue(
            f"edge {edge} from {int(edges[0, edge])} to {int(edges[1, edge])} does not run back; an undirected graph "
            "is expected (torch_geometric.utils.to_undirected makes one)"
        )
    if y is None or y.shape != (x.shape[0],) or y.is_floating_point():
        found = "absent" if y is None else f"{y.dtype} of shape {tuple(y.shape)}"
        raise InvalidValue(f"y is {found}; whole numbers ({x.shape[0]},) are expected")
    if mask is None or mask.shape != (x.shape[0],) or mask.dtype != torch.bool or not mask.any():
        raise InvalidValue(f"train_mask is {shown(mask)}; truth values ({x.shape[0]},), some true, are expected")


def draw_initial_nodes(
    nodes: Int[Tensor, " t"], labels: Int[Tensor, " t"], allocation: LabelAllocation, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """Training nodes to begin with, (n,), of the classes that the allocation says, drawn without repetition.

    Args:
        nodes: numbers of the training nodes, (T,).
        labels: their classes, (T,).
        allocation: how many of which class.
        generator: draws them.

    Raises:
        InvalidValue: too few nodes of a class.
    """
    chosen = torch.empty(len(allocation.labels), dtype=torch.int64)
    for number, (first, last) in enumerate(allocation.ranges):
        members = nodes[labels == number]
        if last - first > len(members):
            raise InvalidValue(
                f"class {number}: {last - first} nodes to begin with, but it has {len(members)} training nodes"
            )
        chosen[first:last] = members[torch.randperm(len(members), generator=generator)[: last - first]]
    return chosen


class _Matcher:
    """One condensation under way."""

    def __init__(
        self,
        settings: NodeCondenser,
        data: Data,
        features: Tensor,
        train: Tensor,
        allocation: LabelAllocation,
        x: Tensor,
        callbacks: Callbacks,
    ) -> None:
        self.settings, self.callbacks, self.num_classes = settings, callbacks, len(allocation.ranges)
        self.ranges, self.weights = allocation.ranges, class_weights(allocation)
        self.labels = allocation.labels.to(x.device)
        self.members = [train[data.y[train] == number] for number in range(self.num_classes)]
        self.x = x.clone().requires_grad_()
        self.generator: PairwiseGenerator | None = None
        if settings.structure != "identity":
            with isolated_rng(settings.random_state, "nodes", "generator"):
                made = PairwiseGenerator(x.shape[1], settings.generator_hidden, settings.edge_bias)
            self.generator = made.to(x.device)
        groups: list[dict[str, Any]] = [{"params": [self.x], "lr": settings.lr_feat}]
        if self.generator is not None:
            groups.append({"params": list(self.generator.parameters()), "lr": settings.lr_adj})
        self.optimizer = torch.optim.Adam(groups)
        self.adjacency = normalised_sparse(data.edge_index.long(), len(features), data.get("edge_weight"))
        with isolated_rng("hops of the network", settings.random_state):
            hops, linear_hops = self._hops(self.network())
        self.hops, self.left = hops, hops - linear_hops
        self.features, self.linear_hops = features, linear_hops
        self._propagated: Tensor | None = None
        self.known: dict[int, tuple[Tensor, list[Tensor]]] = {}

    @staticmethod
    def _hops(network: nn.Module) -> tuple[int, int]:
        hops, linear_hops = getattr(network, "hops", None), getattr(network, "linear_hops", None)
        if not isinstance(hops, tuple) or not isinstance(linear_hops, int) or not 0 <= linear_hops <= sum(hops):
            raise InvalidValue(
                f"network: hops = {hops!r} and linear_hops = {linear_hops!r}; the propagations of each layer, and "
                "those before the first that is not linear, are expected"
            )
        return sum(hops), linear_hops

    def network(self) -> nn.Module:
        """A fresh one, of torch's global generator."""
        chosen, features = self.settings, self.x.shape[1]
        if callable(chosen.network):
            made = chosen.network()
        elif chosen.network == "sgc":
            made = AdjacencySGC(features, self.num_classes)
        else:
            made = AdjacencyGCN(features, self.num_classes, chosen.hidden)
        return made.to(self.x.device).train()

    def propagated(self) -> Tensor:
        """Features after the first layer's propagations, which commute with its weights: computed once.

        Callbacks that get the network may change the features, which are then propagated anew.
        """
        if self._propagated is None:
            self._propagated = self.features
            for _ in range(self.linear_hops):
                self._propagated = torch.sparse.mm(self.adjacency, self._propagated)
        return self._propagated

    def learned(self) -> dict[str, Tensor]:
        """Name → what is learned."""
        generator = {} if self.generator is None else dict(self.generator.named_parameters())
        return {"x": self.x, **{f"generator.{name}": tensor for name, tensor in generator.items()}}

    def final(self) -> tuple[Tensor, Tensor]:
        """(adjacency (n, n), edge probabilities (n, n))."""
        n = len(self.x)
        if self.generator is None:
            return self.x.new_zeros(n, n), self.x.new_zeros(n, n)
        with torch.no_grad():
            logits = self.generator.logits(self.x)
        weights = edge_probabilities(logits)
        return (discrete_adjacency(logits) if self.settings.structure == "bernoulli" else weights), weights

    def synthetic_adjacency(self, drawn: int, draws: torch.Generator) -> Tensor | None:
        """(n, n) as the network sees it, before it is normalised; None: no edges."""
        chosen = self.settings
        if self.generator is None:
            return None
        if chosen.structure == "generator":
            return self.generator(self.x)
        temperature = anneal_temperature(drawn, chosen.temperature_start, chosen.temperature_end, chosen.anneal_steps)
        logits = self.generator.logits(self.x)
        return relaxed_adjacency(logits, logistic_noise(logits.shape, draws).to(logits), temperature)

    def real_gradient(self, network: nn.Module, number: int, draws: torch.Generator) -> list[Tensor]:
        """Gradient of the mean loss on a batch of a class's training nodes."""
        members, most = self.members[number], self.settings.batch_real
        if len(members) > most:
            members = members[torch.randperm(len(members), generator=draws)[:most].to(members.device)]
            entering, blocks = receptive_blocks(self.adjacency, members, self.left)
        else:
            if number not in self.known:
                self.known[number] = receptive_blocks(self.adjacency, members, self.left)
            entering, blocks = self.known[number]
        logits = network(self.propagated()[entering], [*[None] * (self.hops - self.left), *blocks])
        loss = cross_entropy(logits, torch.full((len(members),), number, device=logits.device))
        return list(torch.autograd.grad(loss, list(network.parameters())))

    def iteration(self, number: int) -> float:
        """Match a network's gradients; the mean loss of the outer steps."""
        chosen = self.settings
        network, losses, inner = self.network(), [], None
        turn_of_generator = number % CYCLE < GENERATOR_TURNS
        for outer in range(chosen.outer_steps):
            self.callbacks.before_synthetic_update(number, outer)
            draws = torch.Generator().manual_seed(derive_seed(chosen.random_state, "nodes", "draws", number, outer))
            drawn = number * chosen.outer_steps + outer
            loss = self.matching_loss(network, self.synthetic_adjacency(drawn, draws), draws)
            turned = [self.x] if self.generator is None or not turn_of_generator else list(self.generator.parameters())
            self.optimizer.zero_grad()  # what has no gradient stays as it is, its moments too
            for parameter, gradient in zip(turned, torch.autograd.grad(loss, turned), strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            losses.append(float(loss.detach()))
            if chosen.inner_steps and outer + 1 < chosen.outer_steps:
                if inner is None:
                    inner = torch.optim.Adam(network.parameters(), lr=chosen.inner_lr)
                with torch.no_grad():
                    adjacency = self.synthetic_adjacency(drawn, draws)
                self.train(network, adjacency, inner)
                self.callbacks.after_network_update(network)
                if self.callbacks.callbacks:
                    self._propagated = None
        return sum(losses) / len(losses)

    def _seen(self, adjacency: Tensor | None) -> Tensor | list[None]:
        return [None] * self.hops if adjacency is None else normalised_adjacency(adjacency)

    def matching_loss(self, network: nn.Module, adjacency: Tensor | None, draws: torch.Generator) -> Tensor:
        """Weighted distances of the gradients, and the regulariser."""
        parameters = list(network.parameters())
        logits = network(self.x, self._seen(adjacency))
        loss = self.x.new_zeros(())
        for number, (first, last) in enumerate(self.ranges):
            real = self.real_gradient(network, number, draws)
            mine = cross_entropy(logits[first:last], self.labels[first:last])
            synthetic = torch.autograd.grad(mine, parameters, create_graph=True)
            loss = loss + self.weights[number] * node_distance(synthetic, real, self.settings.distance)
        if self.settings.smoothness_weight and adjacency is not None:
            loss = loss + self.settings.smoothness_weight * smoothness(adjacency, self.labels, self.num_classes)
        return loss

    def train(self, network: nn.Module, adjacency: Tensor | None, optimizer: torch.optim.Optimizer) -> None:
        """Epochs on the synthetic graph as it is now."""
        x, seen = self.x.detach(), self._seen(adjacency)
        for _ in range(self.settings.inner_steps):
            optimizer.zero_grad()
            cross_entropy(network(x, seen), self.labels).backward()
            optimizer.step()
