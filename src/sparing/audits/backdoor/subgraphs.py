"""Subgraphs that switch a backdoor on: the attack carried over to condensed graphs (our extension, not in the paper).

A trigger is a clique of four new nodes, joined by one edge to a graph's node of highest degree or, where nodes are
classified, to the node itself. Its rows of features take the place of the patch's pixels. For evaluating defences on
one's own data.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparing.audits.backdoor.metrics import BackdoorRates, backdoor_rates
from sparing.audits.backdoor.triggers import TriggerHistory, check_driving, drive_units
from sparing.core.errors import InvalidValue
from sparing.data.graphs import PackedGraphs
from sparing.models.gnn import normalised_adjacency
from sparing.models.surgery import evaluating

if TYPE_CHECKING:
    from torch_geometric.data import Data

NODES = 4
MASKS = ("train_mask", "val_mask", "test_mask")


def clique(nodes: int = NODES) -> Int[Tensor, "2 e"]:
    """Edges among nodes 0 … ``nodes`` - 1, both ways, without loops."""
    return (1 - torch.eye(nodes)).nonzero().T


def hubs(graphs: PackedGraphs) -> Int[Tensor, " n"]:
    """Number of the node with most edges in each graph, the first of equals, (n,)."""
    owner = torch.repeat_interleave(torch.arange(len(graphs), device=graphs.y.device), graphs.edge_ptr.diff())
    degree = torch.bincount(graphs.edge_index[1] + graphs.node_ptr[owner], minlength=len(graphs.x))
    bounds = zip(graphs.node_ptr[:-1].tolist(), graphs.node_ptr[1:].tolist(), strict=True)
    return torch.stack([degree[first:last].argmax() for first, last in bounds])


def attach_to_graphs(
    graphs: PackedGraphs, places: Int[Tensor, " p"], rows: Float[Tensor, "k f"]
) -> tuple[PackedGraphs, Int[Tensor, "p k"]]:
    """(a copy in which the graphs at ``places`` carry the clique with these features, its nodes' rows in ``x``)."""
    device, count = graphs.y.device, len(rows)
    chosen = torch.zeros(len(graphs), dtype=torch.long, device=device)
    chosen[places] = 1
    sizes, edges = graphs.sizes, graphs.edge_ptr.diff()
    inner = clique(count).to(device)
    join = inner.new_tensor([[1, 0], [0, 1]])  # first row: which end is the clique's

    def moved(pointer: Tensor, added: int) -> tuple[Tensor, Tensor]:
        """(the new pointer, where each old item goes)."""
        grown = pointer.diff() + added * chosen
        start = torch.cat([pointer.new_zeros(1), grown.cumsum(0)])
        owner = torch.repeat_interleave(torch.arange(len(graphs), device=device), pointer.diff())
        return start, torch.arange(int(pointer[-1]), device=device) + (start[:-1] - pointer[:-1])[owner]

    node_ptr, node_at = moved(graphs.node_ptr, count)
    edge_ptr, edge_at = moved(graphs.edge_ptr, inner.shape[1] + 2)
    x = graphs.x.new_zeros(int(node_ptr[-1]), graphs.x.shape[1])
    x[node_at] = graphs.x
    nodes = (node_ptr[places] + sizes[places])[:, None] + torch.arange(count, device=device)
    x[nodes] = rows.to(x)
    edge_index = graphs.edge_index.new_zeros(2, int(edge_ptr[-1]))
    edge_index[:, edge_at] = graphs.edge_index
    first, hub = sizes[places][:, None], hubs(graphs)[places][:, None]
    new = torch.stack([inner[end] + first for end in (0, 1)])
    joining = torch.stack([torch.where(join[end] == 1, first, hub) for end in (0, 1)])
    at = (edge_ptr[places] + edges[places])[:, None] + torch.arange(inner.shape[1] + 2, device=device)
    edge_index[:, at] = torch.cat([new, joining], dim=2)
    weight = None
    if graphs.edge_weight is not None:
        weight = graphs.edge_weight.new_ones(edge_index.shape[1])
        weight[edge_at] = graphs.edge_weight
    return PackedGraphs(x, node_ptr, edge_index, edge_ptr, graphs.y.clone(), weight), nodes


def attach_to_nodes(
    graph: Data, places: Int[Tensor, " p"], rows: Float[Tensor, "k f"]
) -> tuple[Data, Int[Tensor, "p k"]]:
    """(a copy in which each of the nodes at ``places`` has a clique of its own, the cliques' nodes).

    Features become dense. The new nodes are in no mask and of class 0, which nothing looks at.
    """
    made, count, old = copy.copy(graph), len(rows), graph.x.shape[0]
    device = graph.edge_index.device
    nodes = old + torch.arange(len(places) * count, device=device).view(-1, count)
    inner = clique(count).to(device)
    first = nodes[:, 0]
    new = [(inner[None] + first[:, None, None]).movedim(0, 1).flatten(1)]
    new += [torch.stack([first, places]), torch.stack([places, first])]
    made.x = torch.cat([graph.x.to_dense(), rows.to(graph.x.dtype).to(device).repeat(len(places), 1)])
    made.edge_index = torch.cat([graph.edge_index, *(edges.to(graph.edge_index) for edges in new)], dim=1)
    made.y = torch.cat([graph.y, graph.y.new_zeros(nodes.numel())])
    if graph.get("edge_weight") is not None:
        grown = made.edge_index.shape[1] - graph.edge_index.shape[1]
        made.edge_weight = torch.cat([graph.edge_weight, graph.edge_weight.new_ones(grown)])
    for name in MASKS:
        if graph.get(name) is not None:
            made[name] = torch.cat([graph[name], graph[name].new_zeros(nodes.numel())])
    return made, nodes


def is_node_graph(data: Any) -> bool:
    """Whether it is one graph whose nodes are classified, not a set of graphs."""
    return hasattr(data, "edge_index") and not isinstance(data, PackedGraphs)


class SubgraphTrigger:
    """A clique of new nodes that graphs, or nodes, are made to carry (ours).

    Args:
        features: of real nodes, (N, F), dense or sparse: what the clique's may be.
        value: "maximum": every row the largest value of each feature; "random": uniform between the smallest and the
            largest, from ``seed``; or rows (k, F).
        nodes: of the clique.
        seed: of random rows.

    Attributes:
        rows: features of the clique's nodes, (k, F).
        lowest: smallest real value of each feature, (F,).
        highest: largest, (F,).

    Raises :class:`InvalidValue` for fewer than two nodes, or rows of another number of features.
    """

    def __init__(
        self,
        features: Float[Tensor, "n f"],
        value: Literal["maximum", "random"] | Tensor = "maximum",
        nodes: int = NODES,
        seed: int = 0,
    ) -> None:
        if nodes < 2:
            raise InvalidValue(f"subgraph: nodes = {nodes}; at least 2 are expected")
        dense = features.to_dense()
        self.lowest, self.highest = dense.amin(dim=0), dense.amax(dim=0)
        if isinstance(value, Tensor):
            if value.ndim != 2 or len(value) < 2 or value.shape[1] != dense.shape[1]:
                raise InvalidValue(f"subgraph: rows of shape {tuple(value.shape)}; (k, {dense.shape[1]}) is expected")
            self.rows = value.clone()
        elif value == "maximum":
            self.rows = self.highest.repeat(nodes, 1)
        elif value == "random":
            drawn = torch.rand(nodes, dense.shape[1], generator=torch.Generator().manual_seed(seed)).to(dense)
            self.rows = self.lowest + drawn * (self.highest - self.lowest)
        else:
            raise InvalidValue(f"subgraph: value = {value!r}; maximum, random or rows of features are expected")

    def apply(self, data: Any, places: Int[Tensor, " p"] | None = None) -> Any:
        """A copy that carries the trigger: a set of graphs, or of one graph the nodes at ``places`` (None: all)."""
        return self.attached(data, places)[0]

    def attached(self, data: Any, places: Int[Tensor, " p"] | None = None) -> tuple[Any, Int[Tensor, "p k"]]:
        """:meth:`apply`, and the rows of ``x`` where the new nodes are."""
        if is_node_graph(data):
            chosen = torch.arange(data.x.shape[0], device=data.edge_index.device) if places is None else places
            return attach_to_nodes(data, chosen, self.rows)
        graphs = PackedGraphs.of(data)
        chosen = torch.arange(len(graphs), device=graphs.y.device) if places is None else places
        return attach_to_graphs(graphs, chosen, self.rows)

    def describe(self) -> dict[str, Any]:
        """Size, features and their range, for a report."""
        return {
            "kind": "subgraph",
            "nodes": len(self.rows),
            "lowest": float(self.rows.min()),
            "highest": float(self.rows.max()),
            "rows": self.rows.tolist(),
        }


def _class_logits(logits: Tensor) -> Tensor:
    """A single logit is that of class 1 against 0."""
    return logits if logits.shape[1] > 1 else torch.cat([torch.zeros_like(logits), logits], dim=1)


@torch.no_grad()
def graph_rates(
    network: nn.Module, graphs: Any, trigger: SubgraphTrigger, target: int, batch: int = 512
) -> BackdoorRates:
    """Rates of a network on real graphs without and with the trigger, which all carry."""
    clean = PackedGraphs.of(graphs)
    forward = getattr(network, "forward_sparse", network)

    def logits(packed: PackedGraphs) -> Tensor:
        found = []
        for rows in torch.arange(len(packed), device=packed.y.device).split(batch):
            part = packed.take(rows)
            weights = {} if part.edge_weight is None else {"edge_weight": part.edge_weight}
            found.append(_class_logits(forward(part.x, part.edge_index, part.batch, **weights)))
        return torch.cat(found)

    with evaluating(network):
        return backdoor_rates(logits(clean), logits(trigger.apply(clean)), clean.y, target)


@torch.no_grad()
def node_rates(
    network: nn.Module, graph: Data, nodes: Int[Tensor, " n"], trigger: SubgraphTrigger, target: int
) -> BackdoorRates:
    """Rates of a network (x, edge_index) → logits on ``nodes`` of a real graph without and with cliques at all."""
    bad = trigger.apply(graph, nodes)
    with evaluating(network):
        clean, triggered = (network(data.x.to_dense(), data.edge_index)[nodes] for data in (graph, bad))
    return backdoor_rates(_class_logits(clean), _class_logits(triggered), graph.y[nodes], target)


def clique_activations(
    network: nn.Module, rows: Float[Tensor, "k f"]
) -> tuple[Float[Tensor, " units"], Float[Tensor, "units inputs"]]:
    """(what enters the last layer for the clique alone, mean over its nodes; the weights that lead there).

    ``network`` is a :class:`~sparing.models.gnn.GraphClassifier`, an :class:`~sparing.models.gnn.AdjacencyGCN` of two
    layers or more, or has their attributes. Raises :class:`InvalidValue` for one without a hidden layer.
    """
    adjacency = (1 - torch.eye(len(rows))).to(rows)
    if hasattr(network, "embed_dense"):
        embed = cast(Any, network).embed_dense
        return embed(rows[None], adjacency[None])[0], cast(Any, network).convs[-1].lin.weight
    layers: Any = getattr(network, "layers", ())
    if len(layers) < 2 or not hasattr(network, "embed"):
        raise InvalidValue(
            f"subgraph: {type(network).__name__} has no hidden layer whose units could be driven; a GraphClassifier or "
            "an AdjacencyGCN of at least two layers is expected"
        )
    embed = cast(Any, network).embed
    return embed(rows, normalised_adjacency(adjacency)).mean(dim=0), layers[-2].weight


class OptimisedSubgraph(SubgraphTrigger):
    """A clique whose features :meth:`update` fits to a network again and again: DOORPING on graphs (ours).

    As :class:`SubgraphTrigger`, started from random rows. The objective and its settings are those of
    :func:`~sparing.audits.backdoor.triggers.update_trigger`, on the units that enter the last layer; features are
    clamped to the range of the real ones after each step.
    """

    def __init__(
        self,
        features: Float[Tensor, "n f"],
        value: Literal["maximum", "random"] | Tensor = "random",
        nodes: int = NODES,
        seed: int = 0,
        *,
        topk: int = 1,
        alpha: float = 10.0,
        max_steps: int = 1000,
        skip_dead: bool = True,
    ) -> None:
        super().__init__(features, value, nodes, seed)
        check_driving(topk, alpha, max_steps)
        self.topk, self.alpha, self.max_steps, self.skip_dead = topk, alpha, max_steps, skip_dead
        self.history = TriggerHistory()

    def update(self, network: nn.Module) -> bool:
        """Fit the rows to ``network``, which stays as it is; whether they moved."""
        before = self.rows
        rows = before.to(next(network.parameters()).device)
        lowest, highest = self.lowest.to(rows), self.highest.to(rows)
        with evaluating(network):
            done = drive_units(
                lambda moving: clique_activations(network, moving)[0],
                *(rows, clique_activations(network, rows)[1], self.topk, self.alpha, self.max_steps, self.skip_dead),
                keep=lambda moving: torch.minimum(torch.maximum(moving, lowest), highest),
            )
        self.rows = done.values.to(before.device)
        moved = bool((self.rows != before).any())
        self.history.add(self.rows, done.steps, moved)
        return moved

    def describe(self) -> dict[str, Any]:
        """Also the settings, the number of updates and how many of them moved the rows."""
        settings = {name: getattr(self, name) for name in ("topk", "alpha", "max_steps", "skip_dead")}
        return super().describe() | settings | self.history.counts()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"rows": self.rows.clone(), **self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.rows = state["rows"].clone()
        self.history = TriggerHistory.of(state)
