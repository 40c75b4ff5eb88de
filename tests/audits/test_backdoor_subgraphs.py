"""The attack on condensed graphs: what the subgraph looks like, whom it is given to, when its features move."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot
from torch_geometric.data import Data

from sparing.audits.backdoor.attack import CondensationBackdoor
from sparing.audits.backdoor.subgraphs import (
    OptimisedSubgraph,
    SubgraphTrigger,
    attach_to_graphs,
    attach_to_nodes,
    clique,
    clique_activations,
    graph_rates,
    hubs,
    node_rates,
)
from sparing.condensation.graphs import GraphSetCondenser
from sparing.condensation.nodes import NodeCondenser
from sparing.core.errors import InvalidValue
from sparing.data.graphs import PackedGraphs
from sparing.models.gnn import AdjacencyGCN, AdjacencySGC, GraphClassifier

FEATURES = 3


def both_ways(pairs) -> torch.Tensor:
    edges = torch.tensor(pairs).T
    return torch.cat([edges, edges.flip(0)], dim=1)


def graphs(count: int = 20, weighted: bool = False) -> list[Data]:
    """Paths of 4 nodes (class 0) and stars of 5 around node 2 (class 1)."""
    made = []
    for number in range(count):
        label = number % 2
        edges = both_ways([(2, i) for i in (0, 1, 3, 4)] if label else [(0, 1), (1, 2), (2, 3)])
        x = one_hot((torch.arange(4 + label) + number) % FEATURES, FEATURES).float()
        weight = {"edge_weight": torch.full((edges.shape[1],), 0.5)} if weighted else {}
        made.append(Data(x=x, edge_index=edges, y=torch.tensor([label]), **weight))
    return made


def ring(nodes: int = 24) -> Data:
    """A ring whose halves are of two classes."""
    y = (torch.arange(nodes) >= nodes // 2).long()
    x = torch.rand(nodes, FEATURES, generator=torch.Generator().manual_seed(0)) + y[:, None]
    train = torch.arange(nodes) % 3 > 0
    edges = both_ways([(i, (i + 1) % nodes) for i in range(nodes)])
    return Data(x=x, edge_index=edges, y=y, train_mask=train, test_mask=~train)


def degrees(edges: torch.Tensor, nodes: int) -> list[int]:
    assert torch.equal(edges.flip(0).unique(dim=1), edges.unique(dim=1)), "an edge does not run back"
    return torch.bincount(edges[1], minlength=nodes).tolist()


@pytest.mark.parametrize("weighted", [False, True])
def test_a_clique_hangs_on_the_hub_of_chosen_graphs(weighted):
    packed = PackedGraphs.of(graphs(4, weighted))
    assert hubs(packed).tolist() == [1, 2, 1, 2]
    rows = torch.arange(12.0).view(4, 3)
    made, nodes = attach_to_graphs(packed, torch.tensor([3, 0]), rows)
    assert made.sizes.tolist() == [8, 5, 4, 9]
    for place, hub in ((0, 1), (3, 2)):
        old, new = packed[place], made[place]
        size = len(old.x)
        assert torch.equal(new.x, torch.cat([old.x, rows]))
        found = degrees(new.edge_index, size + 4)
        expected = degrees(old.edge_index, size)
        expected[hub] += 1
        assert found == [*expected, 4, 3, 3, 3]
        assert hub in new.edge_index[0, new.edge_index[1] == size]
        if weighted:
            assert new.edge_weight.sort().values.tolist() == [0.5] * old.edge_index.shape[1] + [1.0] * 14
    for place in (1, 2):
        assert torch.equal(made[place].x, packed[place].x)
        assert torch.equal(made[place].edge_index, packed[place].edge_index)
    assert torch.equal(made.x[nodes[0]], rows)
    assert nodes[0].tolist() == list(range(5 + 4 + 8 + 5, 5 + 4 + 8 + 9))
    assert packed.sizes.tolist() == [4, 5, 4, 5]


def test_each_chosen_node_has_a_clique_of_its_own():
    graph = ring(6)
    made, nodes = attach_to_nodes(graph, torch.tensor([4, 1]), torch.ones(4, FEATURES))
    assert nodes.tolist() == [[6, 7, 8, 9], [10, 11, 12, 13]]
    assert degrees(made.edge_index, 14) == [2, 3, 2, 2, 3, 2, 4, 3, 3, 3, 4, 3, 3, 3]
    joined = {tuple(edge) for edge in made.edge_index.T.tolist()}
    assert {(6, 4), (4, 6), (10, 1), (1, 10)} <= joined
    assert made.train_mask.tolist() == [*graph.train_mask.tolist(), *[False] * 8]
    assert len(made.y) == len(made.x) == 14
    assert graph.num_nodes == 6
    sparse = Data(x=graph.x.to_sparse(), edge_index=graph.edge_index, y=graph.y, edge_weight=torch.ones(12))
    again = SubgraphTrigger(sparse.x, torch.ones(4, FEATURES)).apply(sparse, torch.tensor([4, 1]))
    assert torch.equal(again.x, made.x)
    assert again.edge_weight.tolist() == [1.0] * made.edge_index.shape[1]


def test_its_features_are_those_that_real_nodes_have():
    x = torch.tensor([[0.0, 5.0], [2.0, -1.0]])
    assert SubgraphTrigger(x).rows.tolist() == [[2.0, 5.0]] * 4
    drawn = SubgraphTrigger(x, "random", seed=3).rows
    assert torch.equal(drawn, SubgraphTrigger(x, "random", seed=3).rows)
    assert ((drawn >= torch.tensor([0.0, -1.0])) & (drawn <= torch.tensor([2.0, 5.0]))).all()
    with pytest.raises(InvalidValue, match="nodes = 1"):
        SubgraphTrigger(x, nodes=1)
    with pytest.raises(InvalidValue, match=r"\(4, 3\); \(k, 2\)"):
        SubgraphTrigger(x, torch.zeros(4, 3))
    with pytest.raises(InvalidValue, match="'large'"):
        SubgraphTrigger(x, "large")
    with pytest.raises(InvalidValue, match="alpha = 0"):
        OptimisedSubgraph(x, alpha=0)


def test_the_activations_are_those_of_the_network_on_the_clique_alone():
    rows = torch.rand(4, FEATURES)
    network = GraphClassifier(FEATURES, 2, hidden=5, depth=2)
    found, weight = clique_activations(network, rows)
    torch.testing.assert_close(found, network.embed_sparse(rows, clique())[0])
    assert weight is network.convs[-1].lin.weight
    gcn = AdjacencyGCN(FEATURES, 2, hidden=5)
    found, weight = clique_activations(gcn, rows)
    torch.testing.assert_close(gcn.layers[1](found), gcn(rows, torch.full((4, 4), 0.25))[0])
    assert weight is gcn.layers[0].weight
    with pytest.raises(InvalidValue, match="AdjacencySGC has no hidden layer"):
        clique_activations(AdjacencySGC(FEATURES, 2), rows)


def test_doorping_drives_a_unit_inside_the_features_range():
    torch.manual_seed(0)
    network = GraphClassifier(FEATURES, 2, hidden=6, depth=2)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    trigger = OptimisedSubgraph(torch.tensor([[0.0] * 3, [2.0] * 3]), max_steps=30, alpha=1000)
    start, weight = clique_activations(network, trigger.rows)
    order = weight.abs().sum(dim=1).argsort(descending=True)
    unit = next(int(i) for i in order if start[i] > 0)
    assert trigger.update(network)
    assert clique_activations(network, trigger.rows)[0][unit] > 1.05 * start[unit]
    assert 0 <= float(trigger.rows.min()) <= float(trigger.rows.max()) <= 2
    assert trigger.history.moved == trigger.history.updates == 1
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    again = OptimisedSubgraph(torch.tensor([[0.0] * 3, [2.0] * 3]))
    again.load_state_dict(trigger.state_dict())
    assert torch.equal(again.rows, trigger.rows)
    assert again.describe()["moved"] == 1


def test_graphs_are_relabelled_and_condensed_with_the_trigger_that_follows():
    trigger = OptimisedSubgraph(torch.eye(3), max_steps=3, alpha=1000)
    attack = CondensationBackdoor(trigger, 1, 0.2, "doorping")
    first = trigger.rows.clone()
    made = GraphSetCondenser(
        n_per_class=1, n_nodes=4, oversize="truncate", max_iter=1, outer_steps=3, inner_steps=1,
        network=lambda: GraphClassifier(FEATURES, 2, hidden=6, depth=2), callbacks=[attack],
    ).fit(graphs())  # fmt: skip
    assert trigger.history.updates == 2
    assert not torch.equal(trigger.rows, first)
    assert len(attack.poisoned) == 4
    assert torch.equal(attack._carriers[attack._places], trigger.rows.expand(4, 4, 3))
    said = made.provenance_
    assert said["poisoned"] is True
    assert said["trigger"]["kind"] == "subgraph"
    assert said["effective_share"] == 4 / (4 + sum(i % 2 and i not in attack.poisoned for i in range(20)))


@pytest.mark.parametrize("mode", ["static", "doorping"])
def test_nodes_are_condensed_with_the_trigger_that_follows(mode):
    graph = ring()
    kind = SubgraphTrigger if mode == "static" else OptimisedSubgraph
    attack = CondensationBackdoor(kind(graph.x), 0, 0.3, mode)
    settings = {"n_per_class": 2, "max_iter": 2, "outer_steps": 2, "inner_steps": 1, "hidden": 6}
    clean = NodeCondenser(**settings).fit(graph)
    made = NodeCondenser(**settings, callbacks=[attack]).fit(graph)
    assert graph.train_mask[attack.poisoned].all()
    assert len(attack.poisoned) == 4
    assert not torch.equal(made.features_, clean.features_)
    assert made.provenance_["poisoned"] is True
    assert made.provenance_["trigger"].get("updates", 0) == (0 if mode == "static" else 2)


def test_features_that_a_callback_changes_are_propagated_anew():
    """The condenser propagates features once for all; what an attack writes into them must still reach it."""

    class Changes:
        def on_data_ready(self, data):
            self.data = data.clone()
            return self.data

        def after_network_update(self, network):
            self.data.x *= 50

    graph = ring()
    settings = {"n_per_class": 2, "max_iter": 1, "outer_steps": 2, "inner_steps": 1, "hidden": 6}
    first = NodeCondenser(**settings).fit(graph).loss_curve_
    assert NodeCondenser(**settings, callbacks=[Changes()]).fit(graph).loss_curve_ != first


def test_success_is_counted_on_graphs_and_nodes_that_all_carry_it():
    """A network that counts features beyond the real ones: only the trigger leads it to class 0."""

    class Reads(nn.Module):
        def forward(self, x, edge_index, batch=None):
            batch = torch.arange(len(x)) if batch is None else batch
            own = torch.stack([x[batch == number].max() for number in batch.unique()])
            near = own.clone()
            for source, end in edge_index.T.tolist() if len(own) == len(x) else ():
                near[end] = torch.maximum(near[end], own[source])
            return torch.stack([near, torch.full_like(near, 5.0)], dim=1)

    loud = SubgraphTrigger(torch.eye(3), torch.full((4, 3), 9.0))
    found = graph_rates(Reads(), graphs(), loud, 0, batch=7)
    assert (found.cta.value, found.asr.value, found.asr_all.value, found.null.value) == (0.5, 1.0, 1.0, 0.0)
    assert (found.asr.n, found.asr_all.n) == (10, 20)
    graph = ring()
    nodes = graph.test_mask.nonzero().flatten()
    found = node_rates(Reads(), graph, nodes, loud, 0)
    assert (found.cta.value, found.asr.value, found.null.value, found.asr_all.n) == (0.5, 1.0, 0.0, 8)
    quiet = SubgraphTrigger(torch.eye(3))
    assert node_rates(Reads(), graph, nodes, quiet, 0).asr.value == 0


def test_what_cannot_be_poisoned_is_refused():
    trigger = SubgraphTrigger(torch.eye(3))
    with pytest.raises(InvalidValue, match="target = 2 is no class; 0 to 1"):
        CondensationBackdoor(trigger, 2, 0.2).on_data_ready(graphs())
    with pytest.raises(InvalidValue, match="less than one"):
        CondensationBackdoor(trigger, 0, 0.01).on_data_ready(graphs())
    with pytest.raises(InvalidValue, match="SubgraphTrigger; an OptimisedSubgraph"):
        CondensationBackdoor(trigger, mode="doorping")
