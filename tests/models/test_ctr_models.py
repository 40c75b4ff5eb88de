"""Models of click-through data: their equations in plain loops, unknown ids, sizes, and rows that are dropped."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparing
from sparing.core.errors import InvalidValue
from sparing.core.predictor import build_model
from sparing.core.predictor.torch_to_onnx import export
from sparing.models.ctr import (
    FNN,
    CrossLayer,
    CTRModel,
    DCNv2,
    DeepFM,
    FactorizationMachine,
    LogisticRegression,
    RemappedIds,
    without_zero_rows,
)
from sparing.models.xdeepint import MultiHeadInteraction, PolynomialInteraction, XDeepInt
from sparing.optimization.ftrl import combined_optimizer

SIZES = (5, 1, 7)
KINDS: dict[str, dict[str, Any]] = {
    "lr": {"name": LogisticRegression},
    "fm": {"name": FactorizationMachine, "dim": 4},
    "fnn": {"name": FNN, "dim": 4, "widths": [6], "dropout": 0.2},
    "deepfm": {"name": DeepFM, "dim": 4, "widths": [6], "dropout": 0.2},
    "deepfm without": {"name": DeepFM, "dim": 4, "widths": []},
    "dcnv2": {"name": DCNv2, "dim": 4, "widths": [6], "layers": 2},
    "dcnv2 low rank": {"name": DCNv2, "dim": 4, "widths": [], "layers": 2, "rank": 3},
    "xdeepint": {"name": XDeepInt, "dim": 4, "num_layers": 2, "num_subspaces": 2},
    "xdeepint plain": {"name": XDeepInt, "dim": 4, "num_layers": 2, "residual": False, "activation": "tanh"},
}


def made(kind: str, sizes: tuple[int, ...] = SIZES) -> CTRModel:
    """A model whose every weight is random."""
    fields = {key: value for key, value in KINDS[kind].items() if key != "name"}
    torch.manual_seed(0)
    model = build_model(KINDS[kind]["name"], cardinalities=list(sizes), **fields).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    assert isinstance(model, CTRModel)
    return model


def some_ids(count: int = 40, unknown: bool = True, seed: int = 0) -> Tensor:
    draw = np.random.RandomState(seed)
    return torch.from_numpy(np.stack([draw.randint(-unknown, size, count) for size in SIZES], 1).astype(np.int64))


# --- equations


@settings(max_examples=25)
@given(
    fields=st.integers(1, 4),
    parts=st.integers(1, 3),
    width=st.integers(1, 3),
    layers=st.integers(1, 3),
    residual=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_interaction_is_what_the_paper_writes(
    fields: int, parts: int, width: int, layers: int, residual: bool, seed: int
) -> None:
    """Against loops over rows, with W_l[f, g] = the layer's weight transposed."""
    torch.manual_seed(seed)
    dim = parts * width
    pin = PolynomialInteraction(fields, dim, layers, parts, "relu", residual=residual).double()
    x = torch.randn(2, fields, dim, dtype=torch.float64)
    rows = [(chunk, field) for chunk in range(parts) for field in range(fields)]
    first = [x[:, field, chunk * width : (chunk + 1) * width] for chunk, field in rows]
    states = [first]
    for layer in pin.layers:
        kernel = layer.weight.T
        mixed = [sum(kernel[f, g] * first[f] for f in range(len(rows))).relu() for g in range(len(rows))]
        states.append([(p + residual) * z for p, z in zip(mixed, states[-1], strict=True)])
    kept = states[-1] if residual else list(itertools.chain(*states))
    height = len(kept) // parts
    expected = torch.stack([torch.cat([kept[c * height + r] for c in range(parts)], 1) for r in range(height)], 1)
    torch.testing.assert_close(pin(x), expected)
    assert pin(x).shape == (2, pin.rows, dim)


@given(order=st.integers(1, 4))
def test_orders_are_bounded(order: int) -> None:
    """With the identity, a PIN of L layers along x = t·v is a polynomial of degree L + 1 in t: no more, no less."""
    torch.manual_seed(order)
    pin = PolynomialInteraction(3, 4, order, 2).double()
    v = torch.randn(1, 3, 4, dtype=torch.float64)
    t = torch.arange(1.0, 9.0, dtype=torch.float64)
    along = torch.stack([pin(v * step).flatten() for step in t])
    fitted = np.linalg.lstsq(np.vander(t.numpy(), order + 2), along.detach().numpy(), rcond=None)
    np.testing.assert_allclose(np.vander(t.numpy(), order + 2) @ fitted[0], along.detach().numpy(), atol=1e-7)
    assert abs(fitted[0][0]).max() > 1e-6  # degree L + 1 is there
    np.testing.assert_allclose(fitted[0][-1], 0, atol=1e-7)  # and no constant


def test_the_bias_counts_once_for_each_number() -> None:
    model = made("xdeepint")
    before = model(some_ids())
    assert isinstance(model, XDeepInt)
    with torch.no_grad():
        model.head.bias += 1
    torch.testing.assert_close(model(some_ids()) - before, torch.full((40,), 4.0), atol=1e-4, rtol=0)


def test_the_others_by_hand() -> None:
    ids = some_ids(unknown=False)
    w, v = (lambda m: [m.weights.field(f)[ids[:, f], 0] for f in range(3)]), None
    model = made("lr")
    assert isinstance(model, LogisticRegression)
    torch.testing.assert_close(model(ids), model.bias + sum(w(model)))
    fm = made("fm")
    assert isinstance(fm, FactorizationMachine)
    v = [fm.factors.field(f)[ids[:, f]] for f in range(3)]
    pairs = sum((v[i] * v[j]).sum(1) for i, j in itertools.combinations(range(3), 2))
    torch.testing.assert_close(fm(ids), fm.bias + sum(w(fm)) + pairs)
    fnn = made("fnn")
    assert isinstance(fnn, FNN)
    fnn.begin_with(fm)
    x = torch.cat([part for f in range(3) for part in (w(fm)[f][:, None], v[f])], 1)
    hidden = (x @ fnn.deep[0].weight.T + fnn.deep[0].bias).relu()
    torch.testing.assert_close(fnn(ids), (hidden @ fnn.head.weight.T + fnn.head.bias)[:, 0])
    deep = made("deepfm")
    assert isinstance(deep, DeepFM)
    v = [deep.factors.field(f)[ids[:, f]] for f in range(3)]
    pairs = sum((v[i] * v[j]).sum(1) for i, j in itertools.combinations(range(3), 2))
    hidden = (torch.cat(v, 1) @ deep.deep[0].weight.T + deep.deep[0].bias).relu()
    torch.testing.assert_close(deep(ids), sum(w(deep)) + pairs + (hidden @ deep.head.weight.T + deep.head.bias)[:, 0])
    for kind in ("dcnv2", "dcnv2 low rank"):
        dcn = made(kind)
        assert isinstance(dcn, DCNv2)
        first = x = torch.cat([dcn.embedding.field(f)[ids[:, f]] for f in range(3)], 1)
        for layer in dcn.cross:
            product: Any = layer.product
            low = "rank" in kind
            matrix = product[1].weight @ product[0].weight if low else product.weight
            x = first * (x @ matrix.T + (product[1] if low else product).bias) + x
        hidden = first if low else (first @ dcn.deep[0].weight.T + dcn.deep[0].bias).relu()
        torch.testing.assert_close(dcn(ids), (torch.cat([x, hidden], 1) @ dcn.head.weight.T + dcn.head.bias)[:, 0])


def test_a_head_is_a_pin_on_its_share_of_the_projection() -> None:
    torch.manual_seed(0)
    net = MultiHeadInteraction(3, 5, 8, [1, 2], [2, 4], ["relu", None])
    x = torch.randn(2, 3, 5)
    shares = (x @ net.projection.weight.T).split(4, 2)
    expected = torch.cat([net.heads[0](shares[0]), net.heads[1](shares[1])], 1)
    torch.testing.assert_close(net(x), expected)
    assert expected.shape == (2, 6, 4)


# --- sizes


def test_parameters_and_multiply_adds_are_those_of_the_formula() -> None:
    model = XDeepInt([10, 20, 30], dim=8, num_layers=3, num_subspaces=4)
    assert sum(p.numel() for p in model.parameters()) == 60 * 8 + 3 * (3 * 4) ** 2 + 3 + 1
    assert model.multiply_adds() == 3 * 12**2 * 2 + 2 * 3 * 3 * 8 + 3 * 8


def test_initial_values() -> None:
    torch.manual_seed(0)
    model = XDeepInt([4000], dim=16, num_subspaces=2)
    assert float(model.embedding.weight.std()) == pytest.approx(0.25 * 0.8796, rel=0.02)  # cut at two deviations
    assert float(model.embedding.weight.abs().max()) <= 0.5
    limit = (6 / 4) ** 0.5
    assert 0.5 * limit < float(max(layer.weight.abs().max() for layer in model.interaction.layers)) <= limit
    assert float(model.head.bias) == 0
    assert float(FactorizationMachine([4000], init_std=0.01).factors.weight.abs().max()) <= 0.02


# --- ids


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_unknown_id_is_a_row_of_zeros_and_is_not_trained(kind: str) -> None:
    model = made(kind)
    ids = some_ids()
    with torch.no_grad():
        for table in model.tables:
            table.field(0)[2] = 0
    twin = torch.where((ids[:, :1] == -1) & (torch.arange(3) == 0), 2, ids)
    assert torch.equal(model(ids), model(twin))
    unknown = torch.full((2, 3), -1)
    model(unknown).sum().backward()
    assert all(float(table.weight.grad.abs().sum()) == 0 for table in model.tables if table.weight.grad is not None)


@pytest.mark.parametrize("kind", ["lr", "fm", "xdeepint"])
def test_sparse_gradients_are_the_dense_ones(kind: str) -> None:
    model, ids = made(kind), some_ids()
    gradients = []
    for sparse in (False, True):
        for table in model.tables:
            table.sparse, table.weight.grad = sparse, None
        model(ids).square().sum().backward()
        gradients.append([table.weight.grad for table in model.tables])
    for dense, sparse_one in zip(*gradients, strict=True):
        assert sparse_one.is_sparse
        torch.testing.assert_close(sparse_one.to_dense(), dense)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 0, 7]], r"ids\[0, 2\] = 7; −1 \(unknown\) or one of the field's 7 ids"),
        ([[0, 0, 0], [-2, 0, 0]], r"ids\[1, 0\] = -2"),
        ([[0, 1, 0]], r"ids\[0, 1\] = 1; .* the field's 1 ids"),
        ([[0, 0]], r"shape \(1, 2\); whole numbers \(B, 3\)"),
        ([0, 0, 0], r"shape \(3,\)"),
        ([[0.0, 0.0, 0.0]], r"torch\.float32"),
    ],
)
def test_wrong_ids_are_refused(ids: list[Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        made("lr").forward(torch.tensor(ids))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PolynomialInteraction(3, 6, 2, 4),
        lambda: PolynomialInteraction(0, 6),
        lambda: PolynomialInteraction(3, 4, activation="relx"),
        lambda: PolynomialInteraction(3, 4, dropout=1.0),
        lambda: PolynomialInteraction(3, 4, residual=1),  # type: ignore[arg-type]
        lambda: PolynomialInteraction(3, 4)(torch.zeros(2, 4, 3)),
        lambda: MultiHeadInteraction(3, 4, 9, [1, 1], [1, 1]),
        lambda: MultiHeadInteraction(3, 4, 8, [1, 1], [1]),
        lambda: XDeepInt([]),
        lambda: XDeepInt([3, -1]),
        lambda: XDeepInt("33"),  # type: ignore[arg-type]
        lambda: XDeepInt([3], dim=4, num_subspaces=3),
        lambda: FactorizationMachine([3], dim=0),
        lambda: FactorizationMachine([3], init_std=-1),
        lambda: DeepFM([3], widths=[0]),
        lambda: DeepFM([3], dropout=1),
        lambda: DCNv2([3], layers=0),
        lambda: CrossLayer(3, rank=0),
        lambda: FNN([3], dim=4).begin_with(FactorizationMachine([3], dim=5)),
        lambda: FNN([3], dim=4).begin_with(FactorizationMachine([4], dim=4)),
    ],
)
def test_wrong_arguments_are_refused(make: Any) -> None:
    with pytest.raises(InvalidValue):
        make()


# --- zeros


def zeroed(model: CTRModel, rows: list[int]) -> CTRModel:
    with torch.no_grad():
        for table in model.tables:
            table.weight[rows] = 0
    return model


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rows", [[], [0, 3, 5, 9], [5], list(range(6, 13)), list(range(13))])
def test_dropping_rows_of_zeros_changes_no_bit_of_an_answer(kind: str, rows: list[int]) -> None:
    model, ids = zeroed(made(kind), rows), some_ids()
    smaller, maps = model.prune()
    assert type(smaller) is type(model)
    assert sum(smaller.cardinalities) == 13 - len(rows)
    assert [len(part) for part in maps] == list(SIZES)
    assert np.flatnonzero(np.concatenate(maps) < 0).tolist() == rows
    moved = torch.stack(
        [torch.where(c >= 0, torch.from_numpy(m)[c.clamp(min=0)], -1) for c, m in zip(ids.T, maps, strict=True)], 1
    )
    assert torch.equal(smaller(moved), model(ids))
    remapped = without_zero_rows(model)
    assert torch.equal(remapped(ids), model(ids))
    assert not remapped.training
    with pytest.raises(InvalidValue, match=r"the field's 5 ids"):
        remapped(torch.tensor([[5, 0, 0]]))


def test_a_row_is_kept_while_one_table_has_it() -> None:
    model = made("fm")
    assert isinstance(model, FactorizationMachine)
    with torch.no_grad():
        model.weights.weight[[1, 2]] = 0
        model.factors.weight[2] = 0
    assert model.zero_rows().nonzero()[:, 0].tolist() == [2]
    assert model.sparsity() == {"zero_rows": 1 / 13, "zero_weights": (2 + 4) / (13 + 52)}


def test_sparsity_names_what_is_zero() -> None:
    model = zeroed(made("xdeepint"), [0, 1])
    assert isinstance(model, XDeepInt)
    with torch.no_grad():
        model.embedding.weight[5, 0] = 0
        for layer in model.interaction.layers:
            layer.weight.zero_()
        model.interaction.layers[1].weight[4, 1] = -3.0  # W_2[1, 4]: chunk 0 of field 1 into chunk 1 of field 1
        model.interaction.layers[0].weight[2, 3] = 2.0
    found = model.sparsity()
    assert found == {"zero_rows": 2 / 13, "zero_weights": 9 / 52, "zero_interactions": 70 / 72}
    assert [tuple(entry) for entry in model.interactions()] == [(3, 1, 0, 1, 1, -3.0), (2, 0, 1, 2, 0, 2.0)]
    assert len(model.interactions(1)) == 1


def test_what_is_saved_without_zero_rows_is_smaller_and_answers_alike(tmp_path: Any) -> None:
    model = XDeepInt([3000, 4], dim=16, num_layers=2)
    optimizer = combined_optimizer(model)
    ids = torch.stack([torch.arange(64), torch.arange(64) % 4], 1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(ids), (ids[:, 0] % 2).float(), reduction="sum").backward()
        optimizer.step()
    model.eval()
    assert 0.9 < model.sparsity()["zero_rows"] < 1
    spec = build_model(XDeepInt, cardinalities=[3000, 4], dim=16, num_layers=2).eval()
    spec.load_state_dict(model.state_dict())
    sizes, answers = [], []
    for number, saved in enumerate((spec, without_zero_rows(model))):
        predictor = export(saved, example=(ids[:2],))
        predictor.save(tmp_path / str(number))
        sizes.append(sum(file.stat().st_size for file in (tmp_path / str(number)).rglob("*") if file.is_file()))
        answers.append(np.asarray(sparing.load(tmp_path / str(number))(ids)))
    assert sizes[1] < 0.2 * sizes[0]
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-6)
    np.testing.assert_allclose(answers[0], model(ids).detach().numpy(), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(KINDS))
def test_traced_and_exported_programs_answer_alike(kind: str) -> None:
    model = without_zero_rows(zeroed(made(kind), [0, 3, 5]))
    ids = some_ids(7)
    traced = torch.jit.trace(model, (some_ids(2),))
    program = torch.export.export(model, (some_ids(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    beyond = torch.tensor([[-1, 0, 3], [9, 0, 3], [-1, -1, -1]])
    unknown = beyond.clamp(max=4)
    unknown[1, 0] = -1
    for scorer in (traced, program):
        torch.testing.assert_close(scorer(ids), model(ids))
        torch.testing.assert_close(scorer(beyond), model(unknown))


def test_an_exported_graph_takes_ids_beyond_its_tables_as_unknown() -> None:
    model = made("xdeepint")
    graph = export(model, example=(some_ids(2),))
    unknown = np.array([[-1, 0, 3]])
    np.testing.assert_allclose(
        graph(np.array([[5, 0, 3]])), model(torch.from_numpy(unknown)).detach(), rtol=1e-4, atol=1e-6
    )
    assert isinstance(
        build_model(
            RemappedIds,
            model={"name": "sparing.models.ctr:LogisticRegression", "cardinalities": [2]},
            cardinalities=[4],
        ),
        RemappedIds,
    )
