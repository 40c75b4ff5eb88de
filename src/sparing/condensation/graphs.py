"""A few synthetic graphs on which a network learns nearly as much as on a large set of graphs.

DosCond (Jin, Tang, Jiang, Li, Zhang, Tang and Yin 2022, "Condensing Graphs via One-Step Gradient Matching",
arXiv:2206.07746): each synthetic graph is a matrix of edge probabilities and one of features, learned so that a network
with fresh random weights has the same gradient on them as on real graphs. With several outer steps between which the
network is trained, it is gradient matching as for images, carried over to graphs ("DCG").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, relu

from sparing.condensation.allocation import (
    LabelAllocation,
    allocate_labels,
    check_annealing,
    check_positive,
    check_size,
    rows_for_all,
)
from sparing.condensation.callbacks import Callbacks, marked
from sparing.condensation.matching import METRICS, Metric, gradient_distance
from sparing.condensation.run import Run
from sparing.core.errors import InvalidValue
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.data.graphs import PackedGraphs, class_counts, graph_data
from sparing.models.convnet import whole
from sparing.models.gnn import GraphClassifier, normalised_adjacency

if TYPE_CHECKING:
    from torch_geometric.data import Data

    from sparing.core.training.fit import Keeper

BOUND_WEIGHT = 2**-0.5
"""What the paper's experiments on molhiv multiply :func:`bound_term` with."""
EDGE_LOGIT = 5.0
"""Initial logit of an edge of a real graph; minus that where there is none."""
LOGIT_LIMIT = 10.0
UNIFORM_LIMIT = 1e-6
"""Uniform draws are kept this far from 0 and 1, where their logit would be infinite."""
INNER_BATCH = 128
"""Synthetic graphs in a batch of the inner training."""


# --- synthetic graphs as random variables ----------------------------------------------------------------------------


def symmetrised(omega: Float[Tensor, "*n N N"]) -> Float[Tensor, "*n N N"]:
    """O = (Ω + Ωᵀ)/2."""
    return (omega + omega.transpose(-1, -2)) / 2


def without_loops(adjacency: Float[Tensor, "*n N N"]) -> Float[Tensor, "*n N N"]:
    """The adjacency with a diagonal of 0."""
    return adjacency * (1 - torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device))


def anneal_temperature(drawn: int, start: float = 1.0, end: float = 0.01, steps: int = 200) -> float:
    """Temperature of a relaxed sample after ``drawn`` samples: max(start · (end/start)^(drawn/steps), end)."""
    return max(start * (end / start) ** (drawn / steps), end)


def logistic_noise(
    shape: Sequence[int], generator: torch.Generator, symmetric: bool = True, limit: float = UNIFORM_LIMIT
) -> Float[Tensor, "*n N N"]:
    """log u − log(1 − u), u ~ U(0, 1) clamped to [limit, 1 − limit], one draw for each pair of nodes if ``symmetric``.

    Args:
        shape: (…, N, N).
        generator: on the CPU, so that every device gets the same draws.
        symmetric: the lower triangle mirrors the upper one.
        limit: distance kept from 0 and 1.
    """
    u = torch.rand(tuple(shape), generator=generator)
    if symmetric:
        u = u.triu() + u.triu(1).transpose(-1, -2)
    u = u.clamp(limit, 1 - limit)
    return u.log() - (1 - u).log()


def relaxed_adjacency(
    omega: Float[Tensor, "*n N N"], noise: Float[Tensor, "*n N N"], temperature: float, symmetric: bool = True
) -> Float[Tensor, "*n N N"]:
    """A binary-concrete sample of graphs with edge logits Ω (arXiv:2206.07746, section 3.2): σ((O + noise)/t).

    Args:
        omega: edge logits (…, N, N), row = target.
        noise: from :func:`logistic_noise`, (…, N, N).
        temperature: t; the closer to 0, the closer is the sample to zeros and ones. The diagonal is 0.
        symmetric: O = (Ω + Ωᵀ)/2, else O = Ω.
    """
    logits = symmetrised(omega) if symmetric else omega
    return without_loops(torch.sigmoid((logits + noise) / temperature))


def edge_probabilities(omega: Float[Tensor, "*n N N"], symmetric: bool = True) -> Float[Tensor, "*n N N"]:
    """P = σ(O), no loops: (…, N, N)."""
    return without_loops(torch.sigmoid(symmetrised(omega) if symmetric else omega))


def discrete_adjacency(omega: Float[Tensor, "*n N N"], symmetric: bool = True) -> Float[Tensor, "*n N N"]:
    """The final graphs: an edge where its probability is above ½, zeros and ones (…, N, N)."""
    return (edge_probabilities(omega, symmetric) > 0.5).to(omega.dtype)


def sparsity_penalty(omega: Float[Tensor, "*n N N"], sparsity: float) -> Float[Tensor, ""]:
    """relu(mean σ(Ω) − s), over all entries of Ω as they are."""
    return relu(torch.sigmoid(omega).mean() - sparsity)


def bound_term(
    x: Float[Tensor, "n N F"],
    adjacency: Float[Tensor, "n N N"],
    num_classes: int,
    depth: int,
    pooling: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """The second term of Theorem 1's bound (arXiv:2206.07746): (3/2)/√100 · (C − 1)/C / n · ‖pool(Âᴷ X)‖.

    Together with the distance of the gradients at the initial weights it bounds the loss on the real data after
    training on the synthetic ones, for linear networks.

    Args:
        x: features (n, N, F).
        adjacency: (n, N, N).
        num_classes: C.
        depth: K, number of propagations.
        pooling: over the N nodes.
    """
    smooth = normalised_adjacency(adjacency)
    for _ in range(depth):
        x = smooth @ x
    pooled = x.mean(1) if pooling == "mean" else x.sum(1)
    return 1.5 / math.sqrt(100) * (num_classes - 1) / num_classes / len(x) * pooled.norm()


# --- real graphs ------------------------------------------------------------------------------------------------------


def padded(
    graphs: PackedGraphs, rows: Int[Tensor, " k"], nodes: int
) -> tuple[Float[Tensor, "k N F"], Float[Tensor, "k N N"]]:
    """(features (k, N, F), 0/1 adjacencies (k, N, N), row = target) of graphs, padded with zeros or cut to N nodes.

    Of a larger graph the first N nodes stay, and the edges among them. Loops are left out.

    Args:
        graphs: the real graphs.
        rows: numbers of those that are wanted, (k,).
        nodes: N.
    """
    batch = graphs.take(rows)
    sizes = graphs.sizes[rows]
    first = sizes.cumsum(0) - sizes
    place = torch.arange(len(batch.x), device=batch.x.device) - first[batch.batch]
    stays = place < nodes
    x = batch.x.new_zeros(len(rows), nodes, batch.x.shape[1])
    x[batch.batch[stays], place[stays]] = batch.x[stays]
    source, target = batch.edge_index
    kept = stays[source] & stays[target] & (source != target)
    adjacency = batch.x.new_zeros(len(rows), nodes, nodes)
    adjacency[batch.batch[source[kept]], place[target[kept]], place[source[kept]]] = 1
    return x, adjacency


def one_way_edges(source: Int[Tensor, " e"], target: Int[Tensor, " e"], nodes: int) -> Int[Tensor, " k"]:
    """Numbers of the edges (E,) between nodes 0…N − 1 that do not run back as well, (k,)."""
    return (~torch.isin(source * nodes + target, target * nodes + source)).nonzero().flatten()


def check_undirected(graphs: PackedGraphs) -> None:
    """:class:`InvalidValue` naming the first graph with an edge that does not run back as well."""
    owner = torch.repeat_interleave(torch.arange(len(graphs), device=graphs.y.device), graphs.edge_ptr.diff())
    source, target = graphs.edge_index + graphs.node_ptr[owner]
    for edge in one_way_edges(source, target, len(graphs.x))[:1].tolist():
        ends = graphs.edge_index[:, edge].tolist()
        raise InvalidValue(
            f"graph {int(owner[edge])}: its edge from {ends[0]} to {ends[1]} does not run back; undirected graphs are "
            "expected, or symmetric=False"
        )


def draw_initial(
    graphs: PackedGraphs,
    allocation: LabelAllocation,
    nodes: int,
    generator: torch.Generator,
    oversize: Literal["raise", "truncate"] = "raise",
) -> Int[Tensor, " n"]:
    """Numbers of real graphs of the allocated classes to begin with, (n,), drawn without repetition.

    They have at most N ``nodes``. Where a class has too few such graphs, "truncate" adds its smallest larger ones,
    which :func:`padded` cuts.

    Raises:
        InvalidValue: too few graphs of a class.
    """
    sizes, y = graphs.sizes.cpu(), graphs.y.cpu()
    chosen = torch.empty(len(allocation.labels), dtype=torch.int64)
    for number, (first, last) in enumerate(allocation.ranges):
        wanted, members = last - first, (y == number).nonzero().flatten()
        fitting = members[sizes[members] <= nodes]
        if wanted > len(members):
            raise InvalidValue(
                f"class {number}: {wanted} graphs to begin with, but it has {len(members)}; fewer, or init='noise'"
            )
        if wanted > len(fitting) and oversize == "raise":
            raise InvalidValue(
                f"class {number}: {wanted} graphs of at most {nodes} nodes to begin with, but it has {len(fitting)}; "
                "oversize='truncate' cuts larger ones, and n_nodes sets another size"
            )
        fitting = fitting[torch.randperm(len(fitting), generator=generator)]
        larger = members[sizes[members] > nodes]
        larger = larger[sizes[larger].argsort(stable=True)]
        chosen[first:last] = torch.cat([fitting, larger])[:wanted]
    return chosen.to(graphs.y.device)


# --- matching ---------------------------------------------------------------------------------------------------------


def graph_loss(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of logits (n, C) in nats; of a single logit (n, 1) the binary one, labels 0 and 1."""
    if logits.shape[1] == 1:
        return binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return cross_entropy(logits, labels)


def real_gradient(network: nn.Module, graphs: PackedGraphs, rows: Int[Tensor, " k"]) -> list[Tensor]:
    """Gradient of the loss on the real graphs ``rows`` (k,), one tensor for each parameter of ``network``."""
    batch = graphs.take(rows)
    forward: Callable[..., Tensor] = network.forward_sparse  # type: ignore[assignment]
    weights = {} if batch.edge_weight is None else {"edge_weight": batch.edge_weight}
    loss = graph_loss(forward(batch.x, batch.edge_index, batch.batch, **weights), batch.y)
    return list(torch.autograd.grad(loss, list(network.parameters())))


def synthetic_gradient(
    network: nn.Module, x: Float[Tensor, "n N F"], adjacency: Float[Tensor, "n N N"], labels: Int[Tensor, " n"]
) -> list[Tensor]:
    """Gradient of the loss on synthetic graphs, one tensor for each parameter, differentiable in x and adjacency."""
    forward: Callable[..., Tensor] = network.forward_dense  # type: ignore[assignment]
    loss = graph_loss(forward(x, adjacency), labels)
    return list(torch.autograd.grad(loss, list(network.parameters()), create_graph=True))


def graph_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], metric: Metric) -> Float[Tensor, ""]:
    """The distance of gradients; "mse" divided by ‖real‖², as for all sets of graphs."""
    return gradient_distance(synthetic, real, metric, relative=metric == "mse")


@dataclass(kw_only=True)
class GraphSetCondenser:
    """Condenses a set of graphs with classes into a few synthetic ones (arXiv:2206.07746, algorithm 1).

    >>> condenser = GraphSetCondenser(n_per_class=1, lr_adj=0.1, max_iter=200)  # doctest: +SKIP
    >>> condenser.fit(graphs).condensed_  # doctest: +SKIP

    An iteration draws a network with fresh weights and one relaxed sample of all synthetic graphs; for each class, the
    loss is the distance of the gradient on its synthetic graphs from that on a batch of its real ones; one step of Adam
    changes edge logits Ω and features X.

    After :meth:`fit`: ``condensed_`` (list of PyG ``Data``: x (N, F), edge_index, y (1,), and edge_weight if not
    ``discrete``), ``edge_probabilities_`` (n, N, N), ``labels_`` (n,), ``features_`` (n, N, F), ``omega_`` (n, N, N),
    ``sparsity_`` (s, or None), ``initial_`` (numbers of the real graphs begun with, or None), ``loss_curve_`` (mean of
    each iteration's losses) and ``cost_``.
    """

    n_per_class: int | None = None
    """Synthetic graphs of each class; None, and no rate: 10."""
    rate: float | None = None
    """Or their share of the real graphs, see :func:`~sparing.condensation.allocation.allocate_labels`."""
    n_nodes: int | Literal["mean"] = "mean"
    """N, nodes of each synthetic graph; "mean": those of the real graphs on average, rounded."""
    init: Literal["real", "noise"] = "real"
    """Begin with real graphs, or with σ(Ω) and X uniform in (0, 1)."""
    oversize: Literal["raise", "truncate"] = "raise"
    """Where too few graphs have at most N nodes: refuse, or begin with larger ones, cut."""
    distance: Metric = "mse"
    match: Literal["per_class", "joint"] = "per_class"
    """"joint": one distance for all classes together."""
    outer_steps: int = 1
    """Updates of the synthetic graphs in an iteration."""
    inner_steps: int = 0
    """Epochs that the network is trained on the synthetic graphs between two updates."""
    inner_lr: float = 0.005
    """Adam's, in that training."""
    discrete: bool = True
    """Learn edge probabilities; False: Ω is the weighted adjacency itself, clamped to [0, 1]."""
    symmetric: bool = True
    """Graphs are undirected."""
    beta: float = 0.1
    """Weight of :func:`sparsity_penalty`; of weighted adjacencies, of relu(mean Ω − s)."""
    sparsity: float | None = None
    """s; None: the mean entry of the real adjacencies begun with, or, with noise, of the real graphs on average."""
    bound_weight: float = 0.0
    """Weight of :func:`bound_term`; the paper's is :data:`BOUND_WEIGHT`."""
    lr_adj: float = 0.01
    lr_feat: float = 0.01
    lr_drop_at: float = 0.4
    """Share of the iterations after which both learning rates are divided by 10; 1: never."""
    reset_at_drop: bool = True
    """Adam begins anew there."""
    max_iter: int = 1000
    batch_real: int = 256
    """Most real graphs of a class in a batch."""
    temperature_start: float = 1.0
    temperature_end: float = 0.01
    anneal_steps: int = 200
    """Samples after which the temperature is down to its end."""
    network: Callable[[], nn.Module] | None = None
    """Makes a fresh network with ``forward_dense(x, adj)`` and ``forward_sparse(x, edge_index, batch)``, its parameters
    shared, that gives logits; None: :class:`~sparing.models.gnn.GraphClassifier`. A single logit is a binary class."""
    random_state: int = 0
    callbacks: Sequence[Any] = ()
    """See :class:`~sparing.condensation.callbacks.Callbacks`; the data they get is the data set given to :meth:`fit`.
    One that changes graphs later returns :class:`~sparing.data.graphs.PackedGraphs`, which are read in place."""
    checkpoint_every: int = 20
    """Iterations between two states that are kept, where :meth:`fit` is given a keeper."""

    def __post_init__(self) -> None:
        check_size("GraphSetCondenser", self.n_per_class, self.rate)
        check_annealing("GraphSetCondenser", self.temperature_start, self.temperature_end, self.anneal_steps)
        if self.n_nodes != "mean":
            whole("GraphSetCondenser", 2, n_nodes=self.n_nodes)
        choices = {
            "init": ("real", "noise"),
            "oversize": ("raise", "truncate"),
            "match": ("per_class", "joint"),
            "distance": METRICS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InvalidValue(f"{name} = {getattr(self, name)!r}; one of {', '.join(allowed)} is expected")
        whole(
            "GraphSetCondenser",
            outer_steps=self.outer_steps,
            max_iter=self.max_iter,
            batch_real=self.batch_real,
            checkpoint_every=self.checkpoint_every,
        )
        whole("GraphSetCondenser", 0, inner_steps=self.inner_steps, random_state=self.random_state)
        check_positive(
            lr_adj=self.lr_adj,
            lr_feat=self.lr_feat,
            inner_lr=self.inner_lr,
        )
        check_positive(True, beta=self.beta, bound_weight=self.bound_weight)
        if self.sparsity is not None:
            check_positive(True, sparsity=self.sparsity)
        if not 0 < self.lr_drop_at <= 1:
            raise InvalidValue(f"lr_drop_at = {self.lr_drop_at!r}; 0 < lr_drop_at ≤ 1 is expected")

    def settings(self) -> dict[str, Any]:
        """The hyper-parameters as plain JSON, without the network and the callbacks."""
        left_out = ("network", "callbacks", "checkpoint_every")
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in left_out}

    @property
    def provenance_(self) -> dict[str, Any]:
        """How the graphs were made, as plain JSON: settings, what they began with, losses, cost, what callbacks say."""
        return {
            "settings": self.settings(),
            "initial": self.initial_,
            "sparsity": self.sparsity_,
            "loss_curve": self.loss_curve_,
            "cost": self.cost_,
            **Callbacks(self.callbacks).provenance(),
        }

    def fit(self, dataset: Any, *, keeper: Keeper | None = None) -> GraphSetCondenser:
        """Condense ``dataset``, a sequence of PyG ``Data`` with x (N, F), edge_index (2, E) and y, on their device.

        Args:
            dataset: the training graphs.
            keeper: keeps unfinished work, so that a killed condensation ends with the same bits; a store's ``Progress``
                is one.

        Raises:
            InvalidValue: a graph that is not as :meth:`~sparing.data.graphs.PackedGraphs.of` expects it; a class
                without graphs, or with fewer than are needed to begin with; N below 2; directed graphs with
                ``symmetric``; a rate that leaves a class without synthetic graphs.
            TrainingDiverged: the loss is not finite any more.
        """
        watching = Callbacks(self.callbacks)
        with isolated_rng("graphs to condense", self.random_state):
            real = PackedGraphs.of(watching.data_ready(dataset))
        counts = class_counts(real.y, "y")
        if self.symmetric:
            check_undirected(real)
        per_class = 10 if self.n_per_class is None and self.rate is None else self.n_per_class
        allocation = rows_for_all(allocate_labels(counts, per_class=per_class, rate=self.rate))
        nodes = round(float(real.sizes.double().mean())) if self.n_nodes == "mean" else int(self.n_nodes)
        if nodes < 2:
            raise InvalidValue(f"synthetic graphs of {nodes} node, as the real ones have; n_nodes = 2 or more")
        x, omega, sparsity, initial = self._initial(real, allocation, nodes)
        matcher = _Matcher(self, real, allocation, x, omega, sparsity, watching)
        settings = self.settings() | {"data": [list(real.x.shape), real.edge_index.shape[1], counts]}
        learned = {"x": matcher.x, "omega": matcher.omega}
        with Run(learned, matcher.optimizer, watching, settings, self.max_iter, keeper, self.checkpoint_every) as run:
            for iteration in run.left():
                with isolated_rng("condensing graphs", self.random_state, iteration):
                    run.end(iteration, matcher.iteration(iteration))
        self.features_, self.omega_ = matcher.x.detach(), matcher.omega.detach()
        self.labels_, self.sparsity_, self.initial_ = matcher.labels, sparsity, initial
        if self.discrete:
            self.edge_probabilities_ = edge_probabilities(self.omega_, self.symmetric)
            adjacency = discrete_adjacency(self.omega_, self.symmetric)
        else:
            adjacency = without_loops(symmetrised(self.omega_) if self.symmetric else self.omega_)
            self.edge_probabilities_ = adjacency
        self.condensed_ = [
            _graph(self.features_[i], adjacency[i], self.labels_[i], weighted=not self.discrete)
            for i in range(len(adjacency))
        ]
        self.loss_curve_ = run.losses
        after = [value for item in self.condensed_ for value in item.to_dict().values()]
        self.cost_ = run.cost(tuple(real.tensors().values()), tuple(after))
        marked(self.condensed_, watching.provenance())
        return self

    def _initial(
        self, real: PackedGraphs, allocation: LabelAllocation, nodes: int
    ) -> tuple[Tensor, Tensor, float, list[int] | None]:
        """(X, Ω, s, numbers of the real graphs begun with)."""
        draws = torch.Generator().manual_seed(derive_seed(self.random_state, "graphs", "initial"))
        if self.init == "real":
            rows = draw_initial(real, allocation, nodes, draws, self.oversize)
            x, adjacency = padded(real, rows, nodes)
            sparsity = float(adjacency.mean()) if self.sparsity is None else self.sparsity
            omega = EDGE_LOGIT * (2 * adjacency - 1) if self.discrete else adjacency
            return x, omega, sparsity, rows.tolist()
        n, device = len(allocation.labels), real.x.device
        u = torch.rand(n, nodes, nodes, generator=draws).to(device)
        omega = torch.logit(u).clamp(-LOGIT_LIMIT, LOGIT_LIMIT) if self.discrete else u
        x = torch.rand(n, nodes, real.x.shape[1], generator=draws).to(real.x)
        density = (real.edge_ptr.diff() / real.sizes.square()).mean()
        return x, omega.to(real.x), float(density) if self.sparsity is None else self.sparsity, None

    def sample(self, k: int = 1, random_state: int = 0) -> list[Data]:
        """``k`` draws of each synthetic graph from its edge probabilities: graphs 0…n − 1, then again, k · n in all."""
        whole("GraphSetCondenser.sample", k=k)
        whole("GraphSetCondenser.sample", 0, random_state=random_state)
        draws = torch.Generator().manual_seed(derive_seed(random_state, "graphs", "sample"))
        found = []
        for _ in range(k):
            noise = logistic_noise(self.edge_probabilities_.shape, draws, self.symmetric, limit=0.0)
            drawn = torch.sigmoid(noise).to(self.edge_probabilities_) < self.edge_probabilities_
            found += [_graph(self.features_[i], drawn[i].float(), self.labels_[i]) for i in range(len(drawn))]
        return found


def _graph(x: Tensor, adjacency: Tensor, label: Tensor, weighted: bool = False) -> Data:
    """One synthetic graph; adjacency (N, N), row = target."""
    target, source = adjacency.nonzero().unbind(1)
    weight = adjacency[target, source] if weighted else None
    return graph_data(x, torch.stack([source, target]), label.reshape(1), weight)


class _Matcher:
    """One condensation under way."""

    def __init__(
        self,
        settings: GraphSetCondenser,
        real: PackedGraphs,
        allocation: LabelAllocation,
        x: Tensor,
        omega: Tensor,
        sparsity: float,
        callbacks: Callbacks,
    ) -> None:
        self.settings, self.real, self.sparsity, self.callbacks = settings, real, sparsity, callbacks
        self.ranges, self.num_classes = allocation.ranges, len(allocation.ranges)
        self.labels = allocation.labels.to(real.x.device)
        self.members = [(real.y == number).nonzero().flatten() for number in range(self.num_classes)]
        self.x, self.omega = x.clone().requires_grad_(), omega.clone().requires_grad_()
        self.optimizer = torch.optim.Adam(
            [{"params": [self.omega], "lr": settings.lr_adj}, {"params": [self.x], "lr": settings.lr_feat}]
        )
        self.drop_at = math.ceil(settings.lr_drop_at * settings.max_iter)

    def network(self) -> nn.Module:
        """A fresh one, of torch's global generator."""
        make = self.settings.network or (lambda: GraphClassifier(self.real.x.shape[1], self.num_classes))
        return make().to(self.real.x.device).train()

    def drop(self) -> None:
        """Divide the learning rates by 10."""
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.1
        if self.settings.reset_at_drop:
            self.optimizer.state.clear()

    def iteration(self, number: int) -> float:
        """Match a fresh network's gradients; the mean loss of the outer steps."""
        if number == self.drop_at:
            self.drop()
        network, losses, inner = self.network(), [], None
        for outer in range(self.settings.outer_steps):
            self.callbacks.before_synthetic_update(number, outer)
            draws = torch.Generator().manual_seed(
                derive_seed(self.settings.random_state, "graphs", "draws", number, outer)
            )
            adjacency = self.adjacency(number * self.settings.outer_steps + outer, draws)
            loss = self.matching_loss(network, adjacency, draws)
            self.omega.grad, self.x.grad = torch.autograd.grad(loss, [self.omega, self.x])
            self.optimizer.step()
            if not self.settings.discrete:
                with torch.no_grad():
                    self.omega.clamp_(0, 1)
            losses.append(float(loss.detach()))
            if self.settings.inner_steps and outer + 1 < self.settings.outer_steps:
                if inner is None:
                    inner = torch.optim.Adam(network.parameters(), lr=self.settings.inner_lr)
                self.train(network, adjacency.detach(), inner, draws)
                self.callbacks.after_network_update(network)
        return sum(losses) / len(losses)

    def adjacency(self, drawn: int, draws: torch.Generator) -> Tensor:
        """A relaxed sample of all synthetic graphs after ``drawn`` others, or the weighted graphs."""
        chosen = self.settings
        if not chosen.discrete:
            return without_loops(symmetrised(self.omega) if chosen.symmetric else self.omega)
        temperature = anneal_temperature(drawn, chosen.temperature_start, chosen.temperature_end, chosen.anneal_steps)
        noise = logistic_noise(self.omega.shape, draws, chosen.symmetric).to(self.omega)
        return relaxed_adjacency(self.omega, noise, temperature, chosen.symmetric)

    def matching_loss(self, network: nn.Module, adjacency: Tensor, draws: torch.Generator) -> Tensor:
        """Distances of the gradients, and the regularisers."""
        batches = [
            members[torch.randperm(len(members), generator=draws)[: self.settings.batch_real].to(members.device)]
            for members in self.members
        ]
        rows = [slice(first, last) for first, last in self.ranges]
        if self.settings.match == "joint":
            batches, rows = [torch.cat(batches)], [slice(None)]
        loss = self.omega.new_zeros(())
        for batch, mine in zip(batches, rows, strict=True):
            real = real_gradient(network, self.real, batch)
            synthetic = synthetic_gradient(network, self.x[mine], adjacency[mine], self.labels[mine])
            loss = loss + graph_distance(synthetic, real, self.settings.distance)
        if self.settings.beta:
            discrete = self.settings.discrete
            over = sparsity_penalty(self.omega, self.sparsity) if discrete else relu(self.omega.mean() - self.sparsity)
            loss = loss + self.settings.beta * over
        if self.settings.bound_weight:
            depth, pooling = (getattr(network, name, None) for name in ("depth", "pooling"))
            if not isinstance(depth, int) or pooling not in ("mean", "sum"):
                raise InvalidValue(
                    f"bound_weight: the network's depth = {depth!r} and pooling = {pooling!r}; attributes with the "
                    'number of its convolutions and "mean" or "sum" are expected'
                )
            loss = loss + self.settings.bound_weight * bound_term(self.x, adjacency, self.num_classes, depth, pooling)
        return loss

    def train(
        self, network: nn.Module, adjacency: Tensor, optimizer: torch.optim.Optimizer, draws: torch.Generator
    ) -> None:
        """Epochs on the synthetic graphs as they are now."""
        forward: Callable[..., Tensor] = network.forward_dense  # type: ignore[assignment]
        x = self.x.detach()
        for _ in range(self.settings.inner_steps):
            for rows in torch.randperm(len(x), generator=draws).to(x.device).split(INNER_BATCH):
                optimizer.zero_grad()
                graph_loss(forward(x[rows], adjacency[rows]), self.labels[rows]).backward()
                optimizer.step()
