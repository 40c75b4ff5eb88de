"""How good condensed graphs are: fresh networks are trained on them, and tested on real ones.

The recipes are those of the papers' code (arXiv:2206.07746 and 2110.07580). Both keep the weights that were best on
real validation data, so a condensed set is never judged without some real labels; say so where figures are quoted.
"""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparing.condensation.allocation import check_positive
from sparing.condensation.evaluation import ArchitectureScore, Factories, check_kinds, score_networks
from sparing.condensation.graphs import graph_loss
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.data.graphs import PackedGraphs
from sparing.models.convnet import whole

if TYPE_CHECKING:
    from torch_geometric.data import Data

EDGE_THRESHOLDS = (0.01, 0.1, 0.5)


# --- sets of graphs


def _graph_logits(network: nn.Module, graphs: PackedGraphs, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, classes) of some graphs."""
    batch = graphs.take(rows)
    forward: Callable[..., Tensor] = getattr(network, "forward_sparse", network)
    weights = {} if batch.edge_weight is None else {"edge_weight": batch.edge_weight}
    return forward(batch.x, batch.edge_index, batch.batch, **weights), batch.y


@torch.no_grad()
def graph_accuracy(network: nn.Module, graphs: Any, batch_size: int = 512) -> float:
    """Share of graphs (a sequence of PyG ``Data``) that a network in evaluation mode classifies rightly, 0…1."""
    packed = PackedGraphs.of(graphs)
    training = network.training
    network.eval()
    right = 0
    for rows in torch.arange(len(packed), device=packed.y.device).split(batch_size):
        logits, y = _graph_logits(network, packed, rows)
        found = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
        right += int((found == y).sum())
    network.train(training)
    return right / len(packed)


@torch.no_grad()
def graph_embeddings(network: nn.Module, graphs: Any, batch_size: int = 512) -> Tensor:
    """What enters the last layer of a network with ``embed_sparse``, for each graph (n, H); core sets choose by it."""
    packed = PackedGraphs.of(graphs)
    embed: Callable[..., Tensor] = network.embed_sparse  # type: ignore[assignment]
    batches = map(packed.take, torch.arange(len(packed), device=packed.y.device).split(batch_size))
    return torch.cat([embed(part.x, part.edge_index, part.batch, part.edge_weight) for part in batches])


def train_on_graphs(
    network: nn.Module,
    train: Any,
    val: Any = None,
    *,
    epochs: int = 500,
    lr: float = 1e-3,
    batch_size: int = 128,
    validate_every: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Train a network on graphs, in place, by the paper's recipe; it is returned in evaluation mode.

    Adam on the cross-entropy; after half the epochs the learning rate falls to a tenth. The weights with the best
    accuracy on ``val`` are kept, the earliest of equals.

    Args:
        network: a fresh one, with ``forward_sparse(x, edge_index, batch)`` or callable so, → logits (graphs, classes).
        train: real or condensed graphs: a sequence of PyG ``Data``.
        val: real ones; None: the last weights are kept.
        epochs: passes over the graphs.
        lr: learning rate.
        batch_size: graphs in a step.
        validate_every: epochs between two looks at ``val``, which may take longer than all the training.
        seed: of the order. What the network itself draws comes from torch's global generator.

    Raises:
        InvalidValue: arguments outside what is allowed, or graphs that cannot be packed.
        TrainingDiverged: a loss that is not finite.
    """
    whole("train_on_graphs", epochs=epochs, batch_size=batch_size, validate_every=validate_every)
    check_positive(lr=lr)
    packed = PackedGraphs.of(train)
    val = None if val is None else PackedGraphs.of(val)
    draws = torch.Generator().manual_seed(derive_seed("training on graphs", seed))
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    best, kept = -1.0, None
    for epoch in range(epochs):
        network.train()
        for group in optimizer.param_groups:
            group["lr"] = lr if epoch < epochs // 2 else lr * 0.1
        for rows in torch.randperm(len(packed), generator=draws).to(packed.y.device).split(batch_size):
            optimizer.zero_grad()
            loss = graph_loss(*_graph_logits(network, packed, rows))
            loss.backward()
            optimizer.step()
        if not loss.isfinite():
            raise TrainingDiverged(
                f"the loss of epoch {epoch + 1} is {float(loss.detach())} at lr = {lr}; a smaller one may help"
            )
        looks = (epoch + 1) % validate_every == 0 or epoch + 1 == epochs
        if val is not None and looks and (found := graph_accuracy(network, val)) > best:
            best, kept = found, copy.deepcopy(network.state_dict())
    if kept is not None:
        network.load_state_dict(kept)
    return network.eval()


def evaluate_condensed_graphs(
    train: Any,
    val: Any,
    test: Any,
    model_factories: Factories,
    seeds: Sequence[int] = tuple(range(10)),
    *,
    whole_set: Mapping[str, float] | None = None,
    **recipe: Any,
) -> list[ArchitectureScore]:
    """Train fresh networks of each kind on a set of graphs, and test them.

    Networks with the same seed begin with the same weights, whatever they are trained on.

    Args:
        train: condensed graphs, or others to compare them with: a sequence of PyG ``Data``.
        val: real graphs that choose the epoch, or None.
        test: real graphs.
        model_factories: name → makes a fresh network.
        seeds: one network of each kind for each.
        whole_set: name → mean accuracy of that kind trained on the whole set.
        recipe: further arguments of :func:`train_on_graphs`.

    Raises:
        InvalidValue: no kinds or seeds; accuracies of kinds that are not trained here, or not above 0.
    """
    train, test = PackedGraphs.of(train), PackedGraphs.of(test)
    val = None if val is None else PackedGraphs.of(val)

    def fit(network: nn.Module, seed: int) -> None:
        train_on_graphs(network.to(train.x.device), train, val, seed=seed, **recipe)

    def score(network: nn.Module) -> float:
        return graph_accuracy(network, test)

    return score_networks("evaluating condensed graphs", model_factories, seeds, whole_set, fit, score)


# --- nodes of one graph


@dataclass(frozen=True)
class NodeScore(ArchitectureScore):
    """What networks of one kind learned from a condensed graph whose light edges were cut."""

    edge_threshold: float = 0.0
    """The cut, chosen on the validation nodes."""
    validation: float = 0.0
    """Mean accuracy on these."""

    def record(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return super().record() | {"edge_threshold": self.edge_threshold, "validation": self.validation}


def without_light_edges(graph: Data, threshold: float) -> Data:
    """A copy of a PyG graph with the edges whose weight is at least ``threshold``; without weights, all of them."""
    made = copy.copy(graph)
    weight = graph.get("edge_weight")
    if weight is not None:
        kept = weight >= threshold
        made.edge_index, made.edge_weight = graph.edge_index[:, kept], weight[kept]
    return made


def _node_logits(network: nn.Module, graph: Data) -> Tensor:
    """Logits of all nodes; networks that take weights of edges get them."""
    weight = graph.get("edge_weight")
    if weight is not None and "edge_weight" in inspect.signature(network.forward).parameters:
        return network(graph.x, graph.edge_index, edge_weight=weight)
    return network(graph.x, graph.edge_index)


@torch.no_grad()
def node_accuracy(network: nn.Module, graph: Data, mask: Tensor) -> float:
    """Share of the nodes under ``mask`` (N,) that a network in evaluation mode classifies rightly, 0…1."""
    training = network.training
    network.eval()
    found = _node_logits(network, graph)[mask].argmax(1)
    network.train(training)
    return float((found == graph.y[mask]).double().mean())


def train_on_node_graph(
    network: nn.Module,
    train: Data,
    data: Data | None = None,
    *,
    epochs: int = 600,
    lr: float = 0.01,
    weight_decay: float = 5e-4,
    validate_every: int = 1,
) -> nn.Module:
    """Train a network on all nodes of a condensed graph, in place; it is returned in evaluation mode.

    Adam on the whole graph; after half the epochs it begins anew with a tenth of the learning rate. The weights with
    the best accuracy on the real graph's ``val_mask`` are kept, the earliest of equals.

    Args:
        network: a fresh one, ``(x, edge_index)`` or ``(x, edge_index, edge_weight)`` → logits of all nodes.
        train: PyG ``Data`` with x, edge_index, y, perhaps edge_weight, and perhaps train_mask: the nodes to learn from.
        data: the real graph, with y and val_mask; None: the last weights are kept.
        epochs: steps.
        lr: learning rate.
        weight_decay: added to the gradients, as a share of the weights.
        validate_every: epochs between two looks at the real graph, which may take longer than all the training.

    Raises:
        InvalidValue: arguments outside what is allowed.
        TrainingDiverged: a loss that is not finite.
    """
    whole("train_on_node_graph", epochs=epochs, validate_every=validate_every)
    check_positive(lr=lr)
    check_positive(True, weight_decay=weight_decay)
    mask = train.get("train_mask")
    wanted = train.y if mask is None else train.y[mask]
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=weight_decay)
    best, kept = -1.0, None
    for epoch in range(epochs):
        network.train()
        if epoch == epochs // 2 > 0:
            optimizer = torch.optim.Adam(network.parameters(), lr=lr * 0.1, weight_decay=weight_decay)
        optimizer.zero_grad()
        logits = _node_logits(network, train)
        loss = cross_entropy(logits if mask is None else logits[mask], wanted)
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise TrainingDiverged(
                f"the loss of epoch {epoch + 1} is {float(loss.detach())} at lr = {lr}; a smaller one may help"
            )
        looks = (epoch + 1) % validate_every == 0 or epoch + 1 == epochs
        if data is not None and looks and (found := node_accuracy(network, data, data.val_mask)) > best:
            best, kept = found, copy.deepcopy(network.state_dict())
    if kept is not None:
        network.load_state_dict(kept)
    return network.eval()


def evaluate_condensed_nodes(
    condensed: Data,
    data: Data,
    model_factories: Factories,
    seeds: Sequence[int] = tuple(range(5)),
    *,
    edge_thresholds: Sequence[float] = EDGE_THRESHOLDS,
    whole_set: Mapping[str, float] | None = None,
    **recipe: Any,
) -> list[NodeScore]:
    """Train fresh networks of each kind on a condensed graph, and test them on the real one.

    For each kind, edges are cut where the mean accuracy on the validation nodes is best, the lowest cut of equals. The
    seconds are those of all cuts.

    Args:
        condensed: PyG ``Data``, ``condensed_`` of a :class:`~sparing.condensation.nodes.NodeCondenser`; or the real
            graph itself, for the whole set's accuracy.
        data: the real graph, with y, val_mask and test_mask.
        model_factories: name → makes a fresh network.
        seeds: one network of each kind, and of each cut, for each.
        edge_thresholds: cuts to try; where two leave the same edges the first counts.
        whole_set: name → mean accuracy of that kind trained on the real graph.
        recipe: further arguments of :func:`train_on_node_graph`.

    Raises:
        InvalidValue: no kinds, seeds or cuts; accuracies of kinds that are not trained here, or not above 0.
    """
    check_kinds(model_factories, seeds, whole_set)
    known = whole_set or {}
    if not len(edge_thresholds):
        raise InvalidValue("edge_thresholds is empty; at least one is needed")
    cuts: dict[int, float] = {}
    for threshold in sorted(edge_thresholds):
        cuts.setdefault(without_light_edges(condensed, threshold).edge_index.shape[1], threshold)
    scores = []
    for name, factory in model_factories.items():
        best: NodeScore | None = None
        seconds = 0.0
        for threshold in cuts.values():
            graph = without_light_edges(condensed, threshold)
            tested, validated = [], []
            for seed in seeds:
                with isolated_rng("evaluating a condensed graph", seed):
                    network = factory().to(graph.y.device)
                    start = time.perf_counter()
                    train_on_node_graph(network, graph, data, **recipe)
                    seconds += time.perf_counter() - start
                tested.append(node_accuracy(network, data, data.test_mask))
                validated.append(node_accuracy(network, data, data.val_mask))
            found = sum(validated) / len(validated)
            if best is None or found > best.validation:
                best = NodeScore(name, tuple(tested), 0.0, known.get(name), threshold, found)
        assert best is not None
        scores.append(NodeScore(name, best.accuracies, seconds, best.whole, best.edge_threshold, best.validation))
    return scores
