"""Networks on graphs: their equations, sparse features, refusals, repetition."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sparing.core.errors import InvalidValue, MissingDependency
from sparing.core.predictor import ModulePredictor, build_model
from sparing.models.gnn import GAT, GCN, GraphSAGE, feature_dropout
from sparing.testing import TinyGraph

KINDS = (GCN, GAT, GraphSAGE)


def graph(nodes: int = 30, features: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with many zeros and undirected edges; the last node has none."""
    draw = torch.Generator().manual_seed(3)
    x = torch.rand(nodes, features, generator=draw) * (torch.rand(nodes, features, generator=draw) < 0.3)
    pairs = torch.triu_indices(nodes - 1, nodes - 1, 1)
    pairs = pairs[:, torch.rand(pairs.shape[1], generator=draw) < 0.15]
    return x, torch.cat([pairs, pairs.flip(0)], dim=1)


def made(kind: type, **fields) -> nn.Module:
    torch.manual_seed(5)
    model = kind(12, 4, **fields)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # zero biases would hide what is done with them
    return model.eval()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_gcn_is_its_equation(depth: int) -> None:
    """Z = Â·ReLU(Â X W₀ + b₀)·W₁ + b₁, Â = D^−½ (A + I) D^−½, in dense float64."""
    x, edges = graph()
    model = made(GCN, hidden=6, depth=depth)
    adjacency = np.eye(30)
    adjacency[edges[0], edges[1]] += 1
    scale = np.diag(adjacency.sum(1) ** -0.5)
    smooth = scale @ adjacency @ scale
    hidden = x.numpy().astype(np.float64)
    for number, layer in enumerate(model.layers):
        weight, bias = (p.detach().numpy().astype(np.float64) for p in (layer.lin.weight, layer.bias))
        hidden = smooth @ (np.maximum(hidden, 0) if number else hidden) @ weight.T + bias
    np.testing.assert_allclose(model(x, edges).detach().numpy(), hidden, rtol=1e-5, atol=1e-6)


def test_gcn_takes_weights_of_edges() -> None:
    x, edges = graph()
    model = made(GCN, hidden=6)
    weights = torch.rand(edges.shape[1])
    assert torch.allclose(model(x, edges, torch.ones_like(weights)), model(x, edges), atol=1e-6)
    assert not torch.allclose(model(x, edges, weights), model(x, edges), atol=1e-3)
    kept = weights > 0.5
    assert torch.allclose(model(x, edges, kept.float()), model(x, edges[:, kept]), atol=1e-6)


def test_sage_is_its_equation() -> None:
    """W₁ · mean of the neighbours + W₂ x + b; a node without neighbours has the mean 0."""
    x, edges = graph()
    model = made(GraphSAGE, depth=1)
    (layer,) = model.layers
    adjacency = torch.zeros(30, 30).index_put((edges[1], edges[0]), torch.tensor(1.0))
    mean = adjacency @ x / adjacency.sum(1, keepdim=True).clamp(min=1)
    expected = mean @ layer.lin_l.weight.T + layer.lin_l.bias + x @ layer.lin_r.weight.T
    torch.testing.assert_close(model(x, edges), expected, rtol=1e-5, atol=1e-6)


def test_gat_is_its_equation() -> None:
    """Equations 1 to 5, with self loops; inner heads side by side."""
    x, edges = graph()
    model = made(GAT, hidden=3, heads=2)
    allowed = torch.eye(30).index_put((edges[1], edges[0]), torch.tensor(1.0)).bool()
    hidden = x
    for number, (layer, heads) in enumerate(zip(model.layers, (2, 1), strict=True)):
        hidden = nn.functional.elu(hidden) if number else hidden
        sent = layer.lin(hidden).view(30, heads, -1)
        score = (sent * layer.att_dst).sum(-1)[:, None] + (sent * layer.att_src).sum(-1)[None]
        score = nn.functional.leaky_relu(score, 0.2).masked_fill(~allowed[..., None], -math.inf)
        hidden = torch.einsum("ijh,jhc->ihc", score.softmax(1), sent).flatten(1) + layer.bias
    torch.testing.assert_close(model(x, edges), hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_renamed_nodes_get_the_same_answers(kind: type) -> None:
    x, edges = graph()
    model = made(kind)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(30))  # old number → new
    shuffled = place[edges][:, torch.randperm(edges.shape[1])]
    torch.testing.assert_close(model(x[order], shuffled), model(x, edges)[order], rtol=1e-4, atol=1e-5)
    other = place[torch.randint(30, edges.shape)]
    assert not torch.allclose(model(x[order], other), model(x, edges)[order], atol=1e-3)  # edges do matter


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_and_dense_features_are_one(kind: type) -> None:
    x, edges = graph()
    gradients, answers = [], []
    for features in (x, x.to_sparse()):
        model = made(kind)  # in evaluation mode: dropout draws other numbers for other layouts
        answers.append(model(features, edges))
        cross_entropy(answers[-1], torch.arange(30) % 4).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_dropout_acts_on_non_zeros() -> None:
    x = torch.ones(200, 50) * (torch.arange(50) % 5 == 0)
    torch.manual_seed(0)
    dropped = feature_dropout(x.to_sparse(), 0.25)
    assert dropped.layout == torch.sparse_coo
    assert torch.equal(dropped.indices(), x.to_sparse().indices())
    values = dropped.values()
    assert set(values.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((values == 0).float().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    torch.manual_seed(0)
    assert torch.equal(values, nn.functional.dropout(torch.ones(2000), 0.25))  # one draw for each non-zero, no more
    for same in (feature_dropout(x, 0.25, training=False), feature_dropout(x, 0.0)):
        assert same is x


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_comes_before_every_layer_in_training_only(kind: type) -> None:
    x, edges = graph()
    model = made(kind, dropout=0.5, depth=3)
    before = torch.get_rng_state()
    assert torch.equal(model(x, edges), model(x, edges))
    assert torch.equal(torch.get_rng_state(), before)
    seen: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.train()(x + 1, edges)
    for inputs in seen:
        share = (inputs == 0).float().mean()
        assert 0.3 < share < 0.9, share  # ReLU leaves zeros of its own
    assert (seen[0] == 0).float().mean() < 0.7  # x + 1 has none


def test_weights_begin_as_the_paper_has_them() -> None:
    torch.manual_seed(0)
    model = GCN(1433, 7)
    assert [tuple(layer.lin.weight.shape) for layer in model.layers] == [(16, 1433), (7, 16)]
    for layer in model.layers:
        limit = math.sqrt(6 / sum(layer.lin.weight.shape))
        weights = layer.lin.weight.detach()
        assert weights.abs().max() <= limit
        assert weights.std() == pytest.approx(limit / math.sqrt(3), rel=0.15)  # that of a uniform distribution
        assert not layer.bias.any()
    assert sum(p.numel() for p in model.parameters()) == 23063


@pytest.mark.parametrize("kind", KINDS)
def test_training_repeats_bit_for_bit(kind: type) -> None:
    x, edges = graph()
    x, y, ends = x.to_sparse(), torch.arange(30) % 4, []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(2)
            model = kind(12, 4)
            optimizer = torch.optim.Adam(model.parameters(), 0.05)
            for _ in range(5):
                optimizer.zero_grad()
                cross_entropy(model(x, edges), y).backward()
                optimizer.step()
            ends.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(*ends)


def test_a_cached_adjacency_is_that_of_the_first_graph() -> None:
    x, edges = graph()
    plain, cached = made(GCN), made(GCN, cached=True)
    torch.testing.assert_close(cached(x, edges), plain(x, edges))
    torch.testing.assert_close(cached(x, edges[:, :4]), plain(x, edges))
    assert not torch.allclose(plain(x, edges[:, :4]), plain(x, edges), atol=1e-3)
    cached.layers[0].reset_parameters()


def test_a_cached_network_that_has_seen_a_graph_is_not_saved(tmp_path) -> None:
    task = TinyGraph()
    model = build_model("gcn", task, cached=True).eval()
    data = task.read(None)
    model(data.x, data.edge_index)
    with pytest.raises(InvalidValue, match="answers differently"):
        ModulePredictor(model, task).save(tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 0}, "hidden = 0; a whole number of at least 1"),
        ({"depth": 0}, "depth = 0"),
        ({"dropout": 1.0}, r"dropout = 1\.0; 0 ≤ dropout < 1"),
        ({"dropout": "half"}, "dropout = 'half'"),
    ],
)
def test_impossible_networks_are_refused(kind: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=f"{kind.__name__}: {message}"):
        kind(12, 4, **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_inputs_name_both_shapes(kind: type) -> None:
    x, edges = graph()
    with pytest.raises(InvalidValue, match=r"\(30, 11\); \(N, 12\) is expected"):
        made(kind)(x[:, :11], edges)
    with pytest.raises(InvalidValue, match=r"int64 and shape \(5, 2\); whole numbers \(2, E\)"):
        made(kind)(x, edges.T[:5])
    with pytest.raises(InvalidValue, match=r"edges of type torch\.float32"):
        made(kind)(x, edges.float())
    with pytest.raises(InvalidValue, match="heads = 0"):
        GAT(12, 4, heads=0)


def test_without_pyg_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("torch_geometric"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingDependency, match=r"pip install 'sparing\[graphs\]'"):
        GCN(12, 4)
