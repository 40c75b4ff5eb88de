"""Condensing one graph: the generator, the neighbourhood, turns, refusals, repetition and resumption."""

from __future__ import annotations

import math

import pytest
import torch
from graph_cases import Kept, Killed, Listener, citations
from torch.nn.functional import cross_entropy

from sparing.condensation.allocation import allocate_labels
from sparing.condensation.nodes import (
    NodeCondenser,
    PairwiseGenerator,
    class_weights,
    cut_edges,
    draw_initial_nodes,
    node_graph,
    receptive_blocks,
    smoothness,
)
from sparing.core.errors import InvalidValue
from sparing.models.gnn import AdjacencyGCN, AdjacencySGC, normalised_sparse

SMALL = {"rate": 0.3, "hidden": 6, "generator_hidden": 5, "max_iter": 12}


def condenser(**fields) -> NodeCondenser:
    return NodeCondenser(**{**SMALL, **fields})


def test_the_generator_is_a_network_on_all_pairs() -> None:
    torch.manual_seed(0)
    generator, x = PairwiseGenerator(3, hidden=4, edge_bias=0.3), torch.randn(5, 3)
    (first, second, last), norms = generator.layers, generator.bns
    pairs = torch.cat([x.repeat_interleave(5, 0), x.repeat(5, 1)], dim=1)
    hidden = norms[1](second(norms[0](first(pairs)).relu())).relu()
    m = last(hidden).reshape(5, 5)
    logits = (m + m.T) / 2
    torch.testing.assert_close(generator.logits(x), logits)
    made = generator(x)
    torch.testing.assert_close(made, logits.sigmoid() * (1 - torch.eye(5)))
    assert torch.equal(generator.eval()(x), made)  # its norms know no running statistics


def test_the_generator_begins_with_hardly_an_edge() -> None:
    torch.manual_seed(0)
    made = PairwiseGenerator(8, hidden=16)(torch.rand(20, 8))
    assert made.mean() < 0.05
    assert PairwiseGenerator(8, hidden=16, edge_bias=None)(torch.rand(20, 8)).mean() > 0.3


def test_smoothness_counts_edges_between_classes() -> None:
    pair = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert float(smoothness(pair, torch.tensor([0, 1]), 2)) == pytest.approx(2, abs=1e-6)
    assert float(smoothness(pair, torch.tensor([1, 1]), 2)) == pytest.approx(0, abs=1e-6)
    assert float(smoothness(torch.eye(2), torch.tensor([0, 1]), 2)) == 0


@pytest.mark.parametrize("kind", ["gcn", "sgc", "deep"])
def test_a_neighbourhood_gives_what_the_whole_graph_gives(kind: str) -> None:
    data = citations()
    torch.manual_seed(1)
    network = {
        "gcn": lambda: AdjacencyGCN(8, 3, 5),
        "sgc": lambda: AdjacencySGC(8, 3),
        "deep": lambda: AdjacencyGCN(8, 3, 5, depth=3),
    }[kind]()
    adjacency, nodes = normalised_sparse(data.edge_index, 40), torch.tensor([7, 3, 39])
    whole = network(data.x, adjacency)[nodes]
    x, left = data.x, sum(network.hops) - network.linear_hops
    for _ in range(network.linear_hops):
        x = adjacency @ x
    entering, blocks = receptive_blocks(adjacency, nodes, left)
    assert len(blocks) == left
    torch.testing.assert_close(network(x[entering], [*[None] * network.linear_hops, *blocks]), whole)


def test_initial_features_are_of_the_class_of_their_label() -> None:
    data = citations(nodes=42)
    data.y[:12] = 2  # so that the rarest class is not the first
    train = data.train_mask.nonzero().flatten()
    counts = torch.bincount(data.y[train]).tolist()
    allocation = allocate_labels(counts, rate=0.4)
    assert allocation.labels.tolist() != sorted(allocation.labels.tolist())
    chosen = draw_initial_nodes(train, data.y[train], allocation, torch.Generator().manual_seed(0))
    assert torch.equal(data.y[chosen], allocation.labels)
    assert len(set(chosen.tolist())) == len(chosen)
    done = condenser(rate=0.4, max_iter=1).fit(data)  # the first iteration changes the generator only
    assert torch.equal(done.features_, data.x[done.initial_])
    assert torch.equal(data.y[done.initial_], done.labels_)


def test_classes_weigh_by_their_synthetic_nodes() -> None:
    assert class_weights(allocate_labels([10, 40], rate=0.1)) == [0.25, 1.0]


def test_condensed_is_one_small_graph() -> None:
    done = condenser().fit(citations())
    made = done.condensed_
    assert made.x.shape == (9, 8)
    assert made.y.tolist() == sorted(made.y.tolist())
    torch.testing.assert_close(done.adjacency_, done.adjacency_.T)
    torch.testing.assert_close(done.adjacency_, done.generator_(done.features_))
    assert made.edge_index.shape[1] == 72  # light as they are, all are there
    assert node_graph(done.features_, done.adjacency_, done.labels_, 0.9).edge_index.shape[1] == 0
    assert done.provenance_["settings"]["network"] == "gcn"
    weights = cut_edges(torch.tensor([[0.0, 0.2], [0.1, 0.0]]), 0.2)
    assert weights.tolist() == [[0, pytest.approx(0.2)], [0, 0]]


def test_generator_and_features_take_turns() -> None:
    kept = {n: condenser(max_iter=n).fit(citations()) for n in (1, 10, 11, 12)}
    assert torch.equal(kept[1].features_, kept[10].features_)
    weights = [kept[n].generator_.layers[0].weight for n in (1, 10, 11, 12)]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(kept[10].features_, kept[11].features_)
    # Adam's first step of the features moves every entry by its learning rate
    step = (kept[11].features_ - kept[10].features_).abs()
    assert float(step.max()) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("distance", ["mse", "layer_cos", "cos"])
def test_features_alone_come_closer(distance: str) -> None:
    done = condenser(structure="identity", max_iter=60, lr_feat=0.05, network="sgc", distance=distance).fit(citations())
    assert done.condensed_.edge_index.shape[1] == 0
    assert sum(done.loss_curve_[-10:]) < 0.8 * sum(done.loss_curve_[:10])


def test_bernoulli_edges_are_whole() -> None:
    done = condenser(structure="bernoulli", edge_bias=0.0).fit(citations())
    assert set(done.adjacency_.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(done.adjacency_, (done.edge_probabilities_ > 0.5).float())
    assert done.adjacency_.sum() > 0


def test_features_may_be_sparse_and_batches_smaller_than_classes() -> None:
    data = citations()
    dense = condenser().fit(data)
    data.x = data.x.to_sparse()
    assert torch.allclose(condenser().fit(data).features_, dense.features_)
    assert len(condenser(batch_real=4).fit(data).loss_curve_) == 12


def test_labels_of_other_nodes_are_not_looked_at() -> None:
    data, other = citations(), citations()
    other.y[~other.train_mask] = -1
    assert torch.equal(condenser().fit(data).features_, condenser().fit(other).features_)


@pytest.mark.parametrize("structure", ["bernoulli", "identity"])
def test_goes_on_after_a_kill_to_the_same_bits(structure: str) -> None:
    # dies in a turn of the features, after one of the generator
    fields = {"structure": structure, "outer_steps": 2, "inner_steps": 2, "checkpoint_every": 11, "max_iter": 12}
    whole = condenser(**fields).fit(citations())
    keeper = Kept(1)
    with pytest.raises(Killed):
        condenser(**fields).fit(citations(), keeper=keeper)
    done = condenser(**fields).fit(citations(), keeper=keeper)
    assert torch.equal(done.features_, whole.features_)
    assert torch.equal(done.adjacency_, whole.adjacency_)
    assert done.loss_curve_ == whole.loss_curve_


def test_callbacks_are_called_in_order() -> None:
    heard = Listener()
    condenser(max_iter=1, outer_steps=2, inner_steps=1, callbacks=[heard]).fit(citations())
    assert heard.heard == ["data", ("update", 0, 0), "network", ("update", 0, 1), ("end", 0)]


def test_a_network_of_ones_own_says_how_it_propagates() -> None:
    done = condenser(network=lambda: AdjacencyGCN(8, 3, 4, depth=3)).fit(citations())
    assert done.provenance_["settings"]["network"] == "own"
    with pytest.raises(InvalidValue, match="network: hops = None"):
        condenser(network=lambda: torch.nn.Linear(8, 3)).fit(citations())


def test_training_on_the_condensed_nodes_works_for_the_real_ones() -> None:
    data = citations(60)
    done = condenser(structure="identity", network="sgc", max_iter=40, lr_feat=0.02, rate=0.2).fit(data)
    torch.manual_seed(0)
    network = AdjacencySGC(8, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(network(done.features_, [None, None]), done.labels_).backward()
        optimizer.step()
    found = network(data.x, normalised_sparse(data.edge_index, 60)).argmax(1)
    assert (found == data.y)[data.test_mask].float().mean() > 0.8


def test_refuses_graphs_naming_what_is_wrong() -> None:
    def changed(**fields):
        data = citations()
        for name, value in fields.items():
            data[name] = value
        return data

    bad = torch.ones(40, 8)
    bad[5, 2] = math.inf
    one_way = citations().edge_index[:, :1]
    cases = {
        "x is absent": changed(x=None),
        "the features of node 5 are not finite": changed(x=bad),
        r"edge 0 joins \[0, 99\]; the nodes are 0…39": changed(edge_index=torch.tensor([[0], [99]])),
        "edge 0 from .* does not run back": changed(edge_index=one_way),
        r"y is torch.float32 of shape \(40,\)": changed(y=torch.zeros(40)),
        "train_mask is": changed(train_mask=torch.zeros(40, dtype=torch.bool)),
        "no sample of class 0, but of 2": changed(y=torch.full((40,), 2)),
    }
    for message, data in cases.items():
        with pytest.raises(InvalidValue, match=message):
            condenser().fit(data)
    with pytest.raises(InvalidValue, match="class 0: 20 nodes to begin with, but it has 10"):
        condenser(rate=None, n_per_class=20).fit(citations())
    with pytest.raises(InvalidValue, match="structure = 'none'; one of generator"):
        condenser(structure="none")
