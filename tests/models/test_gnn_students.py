"""Students of graph networks: label propagation, simple convolutions, perceptrons, a proxy in front."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.nn import SGConv
from torch_geometric.utils import add_remaining_self_loops

from sparing.core.errors import InvalidValue
from sparing.core.predictor import build_model
from sparing.models.gnn import GAT, GCN, GraphSAGE, normalised_sparse
from sparing.models.gnn_students import CPFStudent, FairStudent, GLNNStudent, SGCStudent, propagated
from sparing.testing import TinyGraph


def graph() -> tuple[torch.Tensor, torch.Tensor]:
    data = TinyGraph().read(None)
    return data.x.to_dense(), add_remaining_self_loops(data.edge_index)[0]


def cpf(**fields) -> CPFStudent:
    torch.manual_seed(0)
    student = CPFStudent(24, 3, 120, **({"num_layers": 4, "hidden": 5} | fields))
    student.set_labels(torch.tensor([3, 40]), torch.tensor([0, 1]))
    return student.eval()


def test_attention_sums_to_one_over_the_edges_to_a_node():
    x, edges = graph()
    for transductive in (False, True):
        alpha = cpf(transductive=transductive).attention(x, edges)
        total = torch.zeros(120).index_add(0, edges[1], alpha)
        torch.testing.assert_close(total, torch.ones(120))


def test_labelled_nodes_keep_their_labels_and_others_begin_unsure():
    x, edges = graph()
    student = cpf()
    found = student(x, edges)
    assert found[3].tolist() == [1, 0, 0]
    assert found[40].tolist() == [0, 1, 0]
    assert student.labels_init[0].tolist() == pytest.approx([1 / 3] * 3)
    assert not torch.allclose(found[0], found[1])
    student.set_labels(torch.tensor([0]), torch.tensor([2]))
    assert student.labelled.nonzero().flatten().tolist() == [0]
    assert student(x, edges)[3].tolist() != [1, 0, 0]


def test_without_a_perceptron_labels_are_only_spread():
    x, edges = graph()
    student = cpf(mlp_layers=0)
    found = student(x, edges)
    torch.testing.assert_close(found.sum(1), torch.ones(120))
    assert set(dict(student.named_parameters())) == {"scores"}


def test_each_layer_draws_its_own_dropout_and_none_draws_without():
    x, edges = graph()
    student = cpf(feat_drop=0.5, attn_drop=0.0).train()
    calls = []
    attention = CPFStudent.attention

    def counted(self, *inputs):
        calls.append(attention(self, *inputs))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPFStudent, "attention", counted)
        student(x, edges)
        assert len(calls) == 3
        assert not torch.equal(calls[0], calls[1])
        calls.clear()
        cpf(feat_drop=0, attn_drop=0).train()(x, edges)
        assert len(calls) == 1


def test_a_node_of_a_larger_graph_has_no_balance_or_label_yet():
    x, edges = graph()
    student = cpf()
    more = torch.cat([x, x[:1]])
    wider = torch.cat([edges, torch.tensor([[120, 0], [120, 120]])], 1)
    found = student(more, wider)
    torch.testing.assert_close(found[:120], student(x, edges))
    assert found.shape == (121, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, e: cpf()(x, e[:, e[1] != 7]), r"no edge leads to node 7 \(1 such nodes\).*loop"),
        (lambda x, e: cpf()(x[:100], e[:, (e < 100).all(0)]), "a graph of 100 nodes; the 120 it has learned"),
        (lambda x, e: cpf()(x[:, :5], e), r"features of shape \(120, 5\)"),
        (lambda x, e: cpf()(x.to_sparse(), e), "dense"),
        (lambda x, e: cpf()(x, e.float()), "edges of type torch.float32"),
        (lambda x, e: cpf().set_labels(torch.tensor([120]), torch.tensor([0])), "the node 120; 0…119"),
        (lambda x, e: cpf().set_labels(torch.tensor([1]), torch.tensor([3])), "the label 3; 0…2"),
        (lambda x, e: cpf().set_labels(torch.tensor([1, 1]), torch.tensor([0, 1])), "two labels"),
        (lambda x, e: cpf(num_layers=1), "num_layers = 1; a whole number of at least 2"),
        (lambda x, e: GLNNStudent(2, 3, proxy_dim=2), "proxy_dim = 2 of in_features = 2"),
    ],
)
def test_what_cannot_be_propagated_is_refused(call, message):
    with pytest.raises(InvalidValue, match=message):
        call(*graph())


def test_sgc_is_pygs():
    x, edges = graph()
    torch.manual_seed(0)
    student = SGCStudent(24, 3, hidden=6, propagations=2).eval()
    h = x
    for number, (layer, k) in enumerate(zip(student.layers, (1, 2, 1), strict=True)):
        conv = SGConv(layer.in_features, layer.out_features, K=k)
        conv.lin.load_state_dict(layer.state_dict())
        if number == 2:
            torch.testing.assert_close(student.embed(x, edges), h)
        h = conv(h, edges)
        h = h if number == 2 else h.relu()
    torch.testing.assert_close(student(x, edges), h)


def test_a_perceptron_on_a_neighbourhood_leaves_the_proxy_where_it_is():
    x, edges = graph()
    torch.manual_seed(0)
    student = GLNNStudent(26, 3, hidden=6, hops=2, proxy_dim=2).eval()
    proxy = torch.rand(120, 2)
    smooth = normalised_sparse(edges, 120).to_dense()
    alone = GLNNStudent(26, 3, hidden=6).eval()
    alone.load_state_dict(student.state_dict())
    expected = alone(torch.cat([smooth @ smooth @ x, proxy], 1), edges)
    torch.testing.assert_close(student(torch.cat([x, proxy], 1), edges), expected)
    torch.testing.assert_close(alone(torch.cat([x, proxy], 1), edges[:, :1]), alone(torch.cat([x, proxy], 1), edges))


def test_what_is_kept_of_a_graph_is_that_graphs():
    x, edges = graph()
    with torch.inference_mode():  # leaves nothing that a training could trip over
        first = propagated(x, edges, 1)
    weight = torch.ones(24, 1, requires_grad=True)
    propagated(x @ weight, edges, 1).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(propagated(x, edges, 1), first.clone())
    other = edges.clone()
    other[:, :200] = other[:, :200].flip(0)[:, torch.randperm(200)]
    assert not torch.allclose(propagated(x, other, 1), first)
    edges.copy_(other)  # changed in place
    torch.testing.assert_close(propagated(x, edges, 1), propagated(x, other, 1))


def test_all_nodes_have_the_proxys_mean():
    x, edges = graph()
    torch.manual_seed(0)
    model = build_model(FairStudent, student={"name": "glnn", "hidden": 4}, in_features=24, num_classes=3, proxy_dim=2)
    model.get_buffer("proxy").copy_(torch.tensor([0.25, 0.75]))
    columns = torch.tensor([0.25, 0.75]).expand(120, 2)
    torch.testing.assert_close(model(x, edges), model.student(torch.cat([x, columns], 1), edges))
    assert model.student.in_features == 26


@pytest.mark.parametrize(
    ("network", "width"),
    [(GCN(24, 3, 6, 3), 6), (GAT(24, 3, 4, 2, heads=2), 8), (GraphSAGE(24, 3, 5, aggregator="gcn"), 5)],
    ids=["gcn", "gat", "sage"],
)
def test_an_embedding_is_what_the_first_layer_gives(network, width):
    x, edges = graph()
    network.eval()
    found = network.embed(x, edges)
    assert found.shape == (120, width)
    torch.testing.assert_close(network.embed(x.to_sparse(), edges), found)
    torch.testing.assert_close(network(x.to_sparse(), edges), network(x, edges))


def test_one_layer_has_no_embedding():
    with pytest.raises(InvalidValue, match="depth = 1"):
        GCN(24, 3, depth=1).embed(*graph())
