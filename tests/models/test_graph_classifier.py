"""Networks on whole graphs and on adjacency matrices: both forms agree, the equation, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.core.predictor import to_onnx
from sparing.models.gnn import (
    GCN,
    AdjacencyGCN,
    AdjacencySGC,
    GraphClassifier,
    normalised_adjacency,
    normalised_edges,
    normalised_sparse,
)
from sparing.testing import TinyGraphs

NODES, FEATURES = 6, 5


def batch(count: int = 4, loops: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(x (n, N, F), adjacencies (n, N, N), the same as nodes, edges, graph of each node); the last node is alone."""
    draw = torch.Generator().manual_seed(2)
    x = torch.rand(count, NODES, FEATURES, generator=draw)
    upper = (torch.rand(count, NODES, NODES, generator=draw) < 0.4).float().triu(1)
    upper[:, :, -1] = 0
    adjacency = upper + upper.mT
    if loops:
        adjacency[:, 1, 1] = 1
    graph, target, source = adjacency.nonzero().unbind(1)
    edges = torch.stack([graph * NODES + source, graph * NODES + target])
    return x, adjacency, x.flatten(0, 1), edges, torch.arange(count).repeat_interleave(NODES)


def pointer(count: int) -> Tensor:
    """First node of each of these graphs, and the number of nodes."""
    return torch.arange(count + 1) * NODES


@pytest.mark.parametrize("loops", [False, True])
@pytest.mark.parametrize("fields", [{}, {"pooling": "sum"}, {"norm": "instance"}, {"depth": 1}], ids=str)
def test_dense_and_sparse_agree_in_answers_and_gradients(fields: dict, loops: bool) -> None:
    x, adjacency, nodes, edges, owner = batch(loops=loops)
    torch.manual_seed(0)
    model = GraphClassifier(FEATURES, 3, hidden=7, **fields)
    for conv in model.convs:
        nn.init.normal_(conv.bias)
    dense, sparse = model.forward_dense(x, adjacency), model.forward_sparse(nodes, edges, owner)
    torch.testing.assert_close(model(nodes, edges, pointer(len(x))), sparse, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dense, sparse, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(dense.square().sum(), parameters),
        torch.autograd.grad(sparse.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    alone = model.forward_sparse(nodes[:NODES], edges[:, (edges < NODES).all(0)])
    torch.testing.assert_close(alone, dense[:1], rtol=1e-5, atol=1e-6)


def test_a_layer_is_that_of_pyg() -> None:
    _, _, nodes, edges, owner = batch(loops=True)
    torch.manual_seed(0)
    model, known = GraphClassifier(FEATURES, 2, hidden=4, depth=2), GCN(FEATURES, 4, hidden=4, depth=2).eval()
    known.load_state_dict(
        {f"layers.{k.removeprefix('convs.')}": v for k, v in model.state_dict().items() if "convs" in k}
    )

    def pooled(*graph: Tensor) -> Tensor:
        return torch.stack([rows.mean(0) for rows in known(nodes, *graph).relu().split(NODES)])

    torch.testing.assert_close(model.embed_sparse(nodes, edges, owner), pooled(edges), rtol=1e-5, atol=1e-6)
    plain = edges[:, edges[0] != edges[1]]
    weights = torch.rand(plain.shape[1])
    found = model.embed_sparse(nodes, plain, owner, weights)
    torch.testing.assert_close(found, pooled(plain, weights), rtol=1e-5, atol=1e-6)


def test_normalisation_is_the_equation() -> None:
    adjacency = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 1, 0]])
    looped = np.array([[1.0, 1, 0], [1, 1, 1], [0, 1, 1]])
    scale = np.diag(looped.sum(1) ** -0.5)
    expected = torch.tensor(scale @ looped @ scale, dtype=torch.float32)
    torch.testing.assert_close(normalised_adjacency(adjacency), expected)
    edges = adjacency.nonzero().T
    torch.testing.assert_close(normalised_sparse(edges, 3).to_dense(), expected)
    assert normalised_edges(edges, 4)[0].shape == (2, 9)  # each of 4 nodes has a loop, also the one without edges


def test_gradients_flow_into_dense_graphs_twice() -> None:
    x, adjacency, *_ = batch()
    adjacency.requires_grad_()
    model = GraphClassifier(FEATURES, 3, hidden=7)
    (first, *_) = torch.autograd.grad(
        model.forward_dense(x, adjacency).square().sum(), list(model.parameters()), create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), adjacency)
    assert second.abs().sum() > 0


def test_networks_on_an_adjacency_are_their_equations() -> None:
    x, adjacency, *_ = batch(1)
    x, smooth = x[0], normalised_adjacency(adjacency[0])
    torch.manual_seed(0)
    gcn, sgc = AdjacencyGCN(FEATURES, 3, hidden=4), AdjacencySGC(FEATURES, 3)
    (a, b), (c,) = gcn.layers, sgc.layers
    hidden = (smooth @ x @ a.weight.T + a.bias).relu()
    torch.testing.assert_close(gcn(x, smooth), smooth @ hidden @ b.weight.T + b.bias)
    torch.testing.assert_close(sgc(x, smooth), smooth @ smooth @ x @ c.weight.T + c.bias)
    torch.testing.assert_close(sgc(smooth @ smooth @ x, [None, None]), sgc(x, smooth))
    torch.testing.assert_close(gcn(smooth @ x, [None, smooth.to_sparse()]), gcn(x, smooth))


def test_refuses_what_does_not_fit() -> None:
    x, adjacency, nodes, edges, owner = batch()
    model = GraphClassifier(FEATURES, 3, hidden=4)
    for call, message in (
        (lambda: model.forward_dense(nodes, adjacency), r"features of shape \(24, 5\); \(n, N, 5\)"),
        (lambda: model.forward_dense(x, adjacency[:, :2]), r"adjacencies of shape \(4, 2, 6\); \(4, 6, 6\)"),
        (lambda: model(nodes[:, :2], edges, pointer(4)), r"features of shape \(24, 2\); \(nodes, 5\)"),
        (lambda: model(nodes, edges.float(), pointer(4)), "edges of type torch.float32"),
        (lambda: model(nodes, edges, pointer(4).float()), r"node_ptr of type torch.float32 and shape \(5,\)"),
        (lambda: model(nodes, edges, pointer(4)[:1]), r"shape \(1,\); whole numbers \(graphs \+ 1,\)"),
        (lambda: model.forward_sparse(nodes, edges, owner[:3]), r"batch of shape \(3,\); \(24,\)"),
        (lambda: GraphClassifier(FEATURES, 3, depth=0), "depth = 0"),
        (lambda: GraphClassifier(FEATURES, 3, pooling="max"), "pooling = 'max'"),
        (lambda: AdjacencySGC(FEATURES, 3)(x[0], [None]), "1 blocks; one for each of 2 propagations"),
        (lambda: AdjacencyGCN(FEATURES, 3)(x, adjacency), r"features of shape \(4, 6, 5\)"),
    ):
        with pytest.raises(InvalidValue, match=message):
            call()


def test_exports_for_any_number_of_graphs_without_sparse_matrices() -> None:
    *_, nodes, edges, _ = batch()
    model = GraphClassifier(FEATURES, 3, hidden=4).eval()
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (nodes, edges, pointer(4)), dynamic_shapes=({0: free}, {1: free}, {0: free}))
    assert not [node for node in program.graph.nodes if "sparse" in str(node.target)]
    *_, nodes, edges, _ = batch(7)
    torch.testing.assert_close(program.module()(nodes, edges, pointer(7)), model(nodes, edges, pointer(7)))


@pytest.mark.parametrize("fields", [{}, {"pooling": "sum", "norm": "instance"}], ids=str)
def test_an_onnx_graph_answers_any_graphs(fields: dict) -> None:
    """One node, no edge, one graph of many and many graphs, though two and three graphs were its examples."""
    torch.manual_seed(0)
    model = GraphClassifier(2, 2, hidden=4, **fields).eval()
    graph = to_onnx(model, task=TinyGraphs())
    assert graph.origin["exporter"] == "trace"
    scatters = [node for node in graph.graph().graph.node if node.op_type.startswith("Scatter")]
    assert {node.op_type for node in scatters} == {"ScatterElements"}
    none = torch.empty(2, 0, dtype=torch.int64)
    for x, edges, ptr in (
        (torch.rand(1, 2), none, [0, 1]),
        (torch.rand(6, 2), none, [0, 1, 2, 6]),
        (torch.rand(9, 2), torch.randint(9, (2, 40)), [0, 9]),
        (torch.rand(40, 2), torch.randint(2, (2, 30)), list(range(0, 41, 2))),
    ):
        expected = model(x, edges, torch.tensor(ptr)).detach().numpy()
        np.testing.assert_allclose(graph(x, edges, torch.tensor(ptr)), expected, rtol=1e-4, atol=1e-6)
