"""Condensing sets of graphs: its equations, refusals, callbacks, repetition and resumption."""

from __future__ import annotations

import math

import pytest
import torch
from graph_cases import FEATURES, Kept, Killed, Listener, graphs, ring, star, undirected
from torch_geometric.data import Data

from sparing.condensation.allocation import allocate_labels
from sparing.condensation.graphs import (
    GraphSetCondenser,
    anneal_temperature,
    bound_term,
    discrete_adjacency,
    edge_probabilities,
    logistic_noise,
    padded,
    relaxed_adjacency,
    sparsity_penalty,
)
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.store import Progress
from sparing.data.graphs import PackedGraphs
from sparing.models.gnn import GraphClassifier

SMALL = {"n_per_class": 2, "n_nodes": 5, "max_iter": 4, "batch_real": 6}


def network(classes: int = 2, **fields) -> GraphClassifier:
    return GraphClassifier(FEATURES, classes, hidden=6, depth=2, **fields)


def condenser(**fields) -> GraphSetCondenser:
    return GraphSetCondenser(**{**SMALL, "network": network, **fields})


# --- labels


def test_a_rate_serves_the_rarest_first_and_the_most_frequent_last() -> None:
    found = allocate_labels([40, 3, 40, 7], rate=0.1)
    assert found.labels.tolist() == [1, 3, 0, 0, 0, 0, 2, 2, 2]  # of equals the lower number first
    assert found.ranges == ((2, 6), (0, 1), (6, 9), (1, 2))
    assert allocate_labels([5, 9], per_class=2).labels.tolist() == [0, 0, 1, 1]


def test_what_is_left_for_the_last_class_may_be_nothing_but_not_less() -> None:
    assert allocate_labels([3, 40, 7], rate=0.05).ranges == ((0, 1), (2, 2), (1, 2))
    with pytest.raises(InvalidValue, match=r"makes 1, fewer than one for each of the other 2"):
        allocate_labels([3, 40, 7], rate=0.02)
    with pytest.raises(InvalidValue, match=r"rate = 1.5; 0 < rate ≤ 1"):
        allocate_labels([3, 4], rate=1.5)
    with pytest.raises(InvalidValue, match="one of the two"):
        allocate_labels([3, 4])


# --- random graphs


def test_temperature_falls_to_its_end_and_stays() -> None:
    assert [anneal_temperature(k) for k in (0, 100, 200, 900)] == pytest.approx([1, 0.1, 0.01, 0.01])
    assert anneal_temperature(5, 2.0, 0.5, 10) == pytest.approx(1.0)


def test_noise_is_logistic_and_mirrored() -> None:
    draws = torch.Generator().manual_seed(0)
    noise = logistic_noise((50, 20, 20), draws)
    assert torch.equal(noise, noise.mT)
    assert float(noise.std()) == pytest.approx(math.pi / math.sqrt(3), rel=0.03)
    directed = logistic_noise((20, 20), draws, symmetric=False)
    assert not torch.equal(directed, directed.mT)


def test_cold_samples_are_edges_with_the_probabilities() -> None:
    omega = torch.tensor([[3.0, 1.0, -9.0], [0.0, 3.0, -2.0], [-1.0, -2.0, 3.0]])
    draws = torch.Generator().manual_seed(1)
    cold = relaxed_adjacency(omega.expand(3000, 3, 3), logistic_noise((3000, 3, 3), draws), 1e-6)
    assert set(cold.unique().tolist()) == {0.0, 1.0}
    wanted = edge_probabilities(omega)
    assert wanted[0, 1] == pytest.approx(1 / (1 + math.exp(-0.5)))  # of the mean of 1 and 0
    assert (cold.mean(0) - wanted).abs().max() < 0.04
    assert torch.equal(discrete_adjacency(omega), torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]))
    assert torch.equal(discrete_adjacency(omega, symmetric=False)[0], torch.tensor([0.0, 1, 0]))


def test_regularisers_are_their_formulas() -> None:
    omega = torch.tensor([[[0.0, 2.0], [-2.0, 0.0]]])
    assert float(sparsity_penalty(omega, 0.2)) == pytest.approx(0.3)
    assert float(sparsity_penalty(omega, 0.6)) == 0
    x, path = torch.tensor([[[2.0], [0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    # Â of a pair is ½ everywhere, so both rows are 1 whatever the depth
    assert float(bound_term(x, path, 3, 2)) == pytest.approx(0.15 * 2 / 3 * 1)
    assert float(bound_term(x, path, 3, 2, "sum")) == pytest.approx(0.15 * 2 / 3 * 2)


def test_graphs_are_padded_and_cut() -> None:
    looped = Data(
        x=torch.eye(4), edge_index=torch.cat([undirected([(0, 1), (2, 3), (1, 2)]), torch.tensor([[1], [1]])], 1),
        y=torch.tensor([0]),
    )  # fmt: skip
    packed = PackedGraphs.of([Data(x=torch.ones(2, 4), edge_index=undirected([(0, 1)]), y=torch.tensor([1])), looped])
    x, adjacency = padded(packed, torch.tensor([1, 0]), 3)
    assert torch.equal(x[0], torch.eye(4)[:3])
    assert adjacency[0].tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]  # no loop, and the edge to node 3 is gone
    assert x[1].tolist() == [[1] * 4, [1] * 4, [0] * 4]
    assert adjacency[1].sum() == 2


def test_directed_edges_keep_their_direction() -> None:
    one = Data(x=torch.ones(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]), y=torch.tensor([0]))
    other = Data(x=torch.ones(3, 2), edge_index=torch.tensor([[0], [2]]), y=torch.tensor([1]))
    with pytest.raises(InvalidValue, match=r"graph 0: its edge from 0 to 1 does not run back"):
        GraphSetCondenser(n_per_class=1, max_iter=1).fit([one, other])
    made = GraphSetCondenser(n_per_class=1, max_iter=1, symmetric=False, lr_adj=1e-6).fit([one, other]).condensed_
    assert made[0].edge_index.tolist() == [[0, 1], [1, 2]]
    assert made[1].edge_index.tolist() == [[0], [2]]


# --- condensing


def test_condensed_graphs_are_few_of_one_size_and_of_every_class() -> None:
    done = condenser().fit(graphs())
    assert [int(item.y) for item in done.condensed_] == [0, 0, 1, 1]
    assert {tuple(item.x.shape) for item in done.condensed_} == {(5, FEATURES)}
    assert all(not item.has_self_loops() and item.is_undirected() for item in done.condensed_)
    assert len(done.loss_curve_) == 4
    assert done.cost_["bytes_after"] < done.cost_["bytes_before"]
    real = graphs()
    assert [int(real[i].y) for i in done.initial_] == [0, 0, 1, 1]
    assert done.provenance_["settings"]["n_per_class"] == 2


def test_the_mean_size_is_that_of_the_real_graphs() -> None:
    real = graphs()
    mean = sum(item.x.shape[0] for item in real) / len(real)
    assert condenser(n_nodes="mean", max_iter=1).fit(real).features_.shape[1] == round(mean)


def test_matching_brings_the_gradients_closer() -> None:
    done = condenser(max_iter=40, lr_adj=0.1, lr_feat=0.1, init="noise", beta=0.0).fit(graphs())
    first, last = done.loss_curve_[:5], done.loss_curve_[-5:]
    assert sum(last) < 0.5 * sum(first)


def test_repeats_under_a_seed_and_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, again = condenser().fit(graphs()), condenser().fit(graphs())
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.omega_, again.omega_)
    assert torch.equal(one.features_, again.features_)
    other = condenser(random_state=1).fit(graphs())
    assert not torch.equal(one.features_, other.features_)


@pytest.mark.parametrize("states", [1, 3])
def test_goes_on_after_a_kill_to_the_same_bits(states: int) -> None:
    fields = {"outer_steps": 2, "inner_steps": 2, "max_iter": 6, "checkpoint_every": 1, "lr_adj": 0.1}
    whole = condenser(**fields).fit(graphs())
    keeper = Kept(states)
    with pytest.raises(Killed):
        condenser(**fields).fit(graphs(), keeper=keeper)
    done = condenser(**fields).fit(graphs(), keeper=keeper)
    assert torch.equal(done.omega_, whole.omega_)
    assert torch.equal(done.features_, whole.features_)
    assert done.loss_curve_ == whole.loss_curve_
    with pytest.raises(InvalidValue, match="the kept state is of"):
        condenser(**{**fields, "lr_adj": 0.2}).fit(graphs(), keeper=keeper)


def test_a_store_keeps_the_state(tmp_path) -> None:
    class Dies:
        def __init__(self, at=None):
            self.at = at

        def on_iteration_end(self, iteration, loss):
            if iteration == self.at:
                raise Killed

    fields = {"max_iter": 6, "checkpoint_every": 1, "lr_drop_at": 0.3}
    with pytest.raises(Killed):
        condenser(**fields, callbacks=[Dies(3)]).fit(graphs(), keeper=Progress(tmp_path / "kept"))
    done = condenser(**fields, callbacks=[Dies()]).fit(graphs(), keeper=Progress(tmp_path / "kept"))
    assert torch.equal(done.omega_, condenser(**fields).fit(graphs()).omega_)


def test_callbacks_are_called_in_order() -> None:
    one = Listener()
    condenser(max_iter=2, callbacks=[one]).fit(graphs())
    assert one.heard == ["data", ("update", 0, 0), ("end", 0), ("update", 1, 0), ("end", 1)]
    several = Listener()
    condenser(max_iter=1, outer_steps=3, inner_steps=1, callbacks=[several]).fit(graphs())
    updates = [("update", 0, outer) for outer in range(3)]
    assert several.heard == ["data", updates[0], "network", updates[1], "network", updates[2], ("end", 0)]


def test_what_a_callback_returns_is_condensed() -> None:
    class Fewer:
        def on_data_ready(self, data):
            return data[:4]

    assert max(condenser(callbacks=[Fewer()], oversize="truncate").fit(graphs()).initial_) < 4


def test_learning_rates_fall_once_and_adam_begins_anew() -> None:
    # Adam's first step moves every entry by its learning rate, whatever the gradient
    moved = {}

    for iterations in (2, 3):
        done = condenser(max_iter=iterations, lr_drop_at=2 / 3 if iterations == 3 else 1, lr_feat=0.1)
        moved[iterations] = done.fit(graphs()).features_
    step = (moved[3] - moved[2]).abs()
    assert float(step.max()) == pytest.approx(0.01, rel=1e-3)


def test_weighted_graphs_stay_within_their_limits() -> None:
    done = condenser(discrete=False, lr_adj=0.3, max_iter=6).fit(graphs())
    assert 0 <= float(done.omega_.min()) <= float(done.omega_.max()) <= 1
    weights = torch.cat([item.edge_weight for item in done.condensed_])
    assert ((weights > 0) & (weights < 1)).any()


def test_a_joint_batch_and_a_single_logit() -> None:
    done = condenser(match="joint", network=lambda: network(1), bound_weight=0.7).fit(graphs())
    assert len(done.loss_curve_) == 4


def test_the_bound_needs_to_know_the_network() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.forward_dense, self.forward_sparse = self.inner.forward_dense, self.inner.forward_sparse

    with pytest.raises(InvalidValue, match="bound_weight: the network's depth = None"):
        condenser(network=Plain, bound_weight=0.7).fit(graphs())


def test_samples_follow_the_probabilities() -> None:
    done = condenser(n_per_class=1, lr_adj=2.0, max_iter=6).fit(graphs())
    drawn = done.sample(400, random_state=2)
    assert len(drawn) == 800
    assert all(item.is_undirected() and not item.has_self_loops() for item in drawn[:20])
    wanted = float(done.edge_probabilities_[1].sum())
    mean = sum(item.edge_index.shape[1] for item in drawn[1::2]) / 400
    assert mean == pytest.approx(wanted, abs=0.5)
    assert torch.equal(done.sample(1)[0].edge_index, done.sample(1)[0].edge_index)


# --- refusals


def test_too_few_graphs_to_begin_with() -> None:
    real = graphs(8, small=6, large=7)
    with pytest.raises(InvalidValue, match=r"class 0: 3 graphs of at most 5 nodes .* it has 0; oversize"):
        condenser(n_per_class=3).fit(real)
    done = condenser(n_per_class=3, oversize="truncate", lr_adj=1e-6).fit(real)
    sizes = [real[i].x.shape[0] for i in done.initial_]
    assert sizes == sorted(sizes[:3]) + sorted(sizes[3:])  # of each class the smallest come first
    with pytest.raises(InvalidValue, match="class 0: 5 graphs to begin with, but it has 4"):
        condenser(n_per_class=5, oversize="truncate").fit(real)
    assert len(condenser(n_per_class=5, init="noise").fit(real).condensed_) == 10


def refused() -> dict[str, tuple[Data, str]]:
    plain = {"x": torch.ones(3, FEATURES), "edge_index": ring(3), "y": torch.tensor([0])}
    bad = torch.ones(3, FEATURES)
    bad[2, 1] = math.nan
    return {
        "no features": (Data(**{**plain, "x": None}), "graph 1: no features x"),
        "no nodes": (Data(**{**plain, "x": torch.ones(0, FEATURES)}), "graph 1: no nodes"),
        "other features": (Data(**{**plain, "x": torch.ones(3, 9)}), f"graph 1: 9 features; {FEATURES}"),
        "not finite": (Data(**{**plain, "x": bad}), "graph 1: the features of node 2 are not finite"),
        "edges to nowhere": (Data(**{**plain, "edge_index": star(4)}), r"graph 1: edge 2 joins \[0, 3\]; .* 0…2"),
        "real label": (Data(**{**plain, "y": torch.tensor([0.5])}), "graph 1: y is tensor"),
        "negative label": (Data(**{**plain, "y": torch.tensor([-1])}), "graph 1: y is tensor"),
        "two labels": (Data(**{**plain, "y": torch.tensor([0, 1])}), "graph 1: y is tensor"),
        "a class apart": (Data(**{**plain, "y": torch.tensor([5])}), "no sample of class 2"),
    }


@pytest.mark.parametrize("case", sorted(refused()))
def test_refuses_graphs_naming_the_culprit(case: str) -> None:
    wrong, message = refused()[case]
    with pytest.raises(InvalidValue, match=message):
        condenser().fit([graphs()[0], wrong, *graphs()[1:]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 0.1}, "n_per_class = 2 and rate = 0.1"),
        ({"n_per_class": None, "rate": 0.0}, r"rate = 0.0; 0 < rate ≤ 1"),
        ({"n_nodes": 1}, "n_nodes = 1; a whole number of at least 2"),
        ({"distance": "l1"}, "distance = 'l1'; one of mse"),
        ({"init": "zeros"}, "init = 'zeros'; one of real, noise"),
        ({"lr_adj": -1.0}, r"lr_adj = -1.0; a number > 0"),
        ({"temperature_end": 3.0}, "temperature_end = 3.0 is above"),
        ({"lr_drop_at": 0.0}, "lr_drop_at = 0.0"),
    ],
)
def test_refuses_arguments(fields: dict, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        condenser(**fields)


def test_a_rate_that_leaves_a_class_without_graphs() -> None:
    lopsided = [*graphs(8)[::2], *graphs(40)[1::2]]
    with pytest.raises(InvalidValue, match="class 1 gets no synthetic sample"):
        condenser(n_per_class=None, rate=0.06).fit(lopsided)


def test_says_when_it_diverges() -> None:
    class Broken(GraphClassifier):
        def forward_dense(self, x, adj):
            return super().forward_dense(x, adj) * math.inf

    with pytest.raises(TrainingDiverged, match="iteration 0 is nan"):
        condenser(network=lambda: Broken(FEATURES, 2, 6, 2)).fit(graphs())
