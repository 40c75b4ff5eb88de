from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparing.compression.pruning import BlockMagnitudePruner, CubicSchedule
from sparing.compression.ptq import DynamicInt8Linear, calibration_inputs, quantize_ptq
from sparing.core.errors import DataError, InvalidValue, NoEffect
from sparing.core.predictor import build_model, spec_of
from sparing.engine import arithmetic
from sparing.engine.compiler import compile_encoder
from sparing.engine.linear import Int8Linear
from sparing.testing import tiny_task

PARTS = ("query", "key", "value", "attention_out", "up", "down")


@pytest.fixture
def bert() -> nn.Module:
    torch.manual_seed(0)
    return build_model("bert", vocab_size=40, dim=16, depth=2, heads=2, hidden=32, max_length=8, num_classes=3)


@pytest.fixture
def ids() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(4, 40, (8, 8), generator=draw) for _ in range(3)]


def test_the_blocks_of_an_encoder_are_in_int8_and_answer_nearly_the_same(bert, ids) -> None:
    before = {name: value.clone() for name, value in bert.state_dict().items()}
    made, report = quantize_ptq(bert, ids)
    assert all(torch.equal(before[name], value) for name, value in bert.state_dict().items())
    assert bert.training
    assert not made.training
    assert report.quantised == tuple(f"blocks.{i}.{part}" for i in range(2) for part in PARTS)
    assert report.in_float == {"head.classifier": "outside the encoder's blocks"}
    assert all(isinstance(made.get_submodule(name), Int8Linear) for name in report.quantised)
    assert made.blocks[0].query.output_scale is not None  # type: ignore[index,union-attr]
    assert made.blocks[0].up.output_scale is None  # type: ignore[index,union-attr]
    assert spec_of(made) is None  # its builder makes another network
    x = torch.cat(ids)
    reference = bert.eval()(x).detach()
    assert float((made(x).detach() - reference).square().mean() / reference.var()) < 0.01
    assert not torch.equal(made(x), reference)


def test_its_arithmetic_is_that_of_the_engine(bert, ids) -> None:
    made, report = quantize_ptq(bert, ids, method="percentile")
    seen: list[torch.Tensor] = []
    bert.eval().blocks[1].up.register_forward_hook(lambda _, given, out: seen.append(given[0].detach()))
    for item in ids:
        bert(item)
    values = torch.cat(seen).numpy()
    limits = arithmetic.activation_range(values, "percentile", 0.1)
    assert report.ranges["blocks.1.up"] == pytest.approx(limits)
    scale, zero = arithmetic.activation_scale(*limits)
    weight, w_scale = arithmetic.quantize_weight(bert.blocks[1].up.weight.detach().numpy())
    expected = arithmetic.int8_linear(
        arithmetic.quantize_activation(values, scale, zero),
        scale,
        zero,
        weight,
        w_scale,
        bert.blocks[1].up.bias.detach().numpy(),
    )
    found = made.blocks[1].up(torch.from_numpy(values)).numpy()  # type: ignore[index,operator,union-attr]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["minmax", "percentile", "kl"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_ranges_and_grains(bert, ids, method, per_channel) -> None:
    made, report = quantize_ptq(bert, ids, per_channel, method, integer_attention=False)
    scale = made.blocks[0].down.weight_scale  # type: ignore[index,union-attr]
    assert (len(set(scale.tolist())) == 1) != per_channel  # type: ignore[union-attr,operator]
    assert made.blocks[0].query.output_scale is None  # type: ignore[index,union-attr]
    x = torch.cat(ids)
    assert float((made(x) - bert.eval()(x)).detach().abs().max()) < 0.5
    low, high = report.ranges["blocks.0.down"]
    assert low < 0 < high  # GELU's outputs


def test_zeros_of_a_pruned_model_stay(bert, ids) -> None:
    pruner = BlockMagnitudePruner(bert, sparsity=0.75, schedule=CubicSchedule(0, 1, initial=0.75))
    masked, _ = quantize_ptq(bert, ids)  # with the masks on
    pruner.apply_()
    folded, _ = quantize_ptq(bert, ids)
    for made in (masked, folded):
        layer = made.blocks[1].down  # type: ignore[index,union-attr]
        assert torch.equal(layer.weight == 0, bert.blocks[1].down.weight == 0)  # type: ignore[union-attr]
        assert layer.block_sparsity == 0.75  # type: ignore[union-attr]


def test_ranges_may_be_each_calls_own(bert, ids) -> None:
    made, report = quantize_ptq(bert, [], mode="dynamic")
    assert all(isinstance(made.get_submodule(name), DynamicInt8Linear) for name in report.quantised)
    assert not report.ranges
    x = torch.cat(ids)
    reference = bert.eval()(x).detach()
    assert float((made(x).detach() - reference).square().mean() / reference.var()) < 0.01
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    values = torch.randn(5, 8)
    static = Int8Linear.of(layer, (float(values.min()), float(values.max())))
    torch.testing.assert_close(DynamicInt8Linear(layer)(values), static(values))
    assert DynamicInt8Linear(layer)(torch.zeros(0, 8)).shape == (0, 4)


def test_any_other_model_and_any_form_of_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(32, 3, 4)
    made, report = quantize_ptq(model, (np.asarray(part) for part in x.split(8)))
    assert report.quantised == ("1", "3")
    assert report.in_float == {"5": "it gives the outputs"}
    by_name, _ = quantize_ptq(model, [{"input": x}])
    torch.testing.assert_close(made(x), by_name(x))
    torch.testing.assert_close(quantize_ptq(model, [(x,)])[0](x), made(x))
    kept, report = quantize_ptq(model, [x], exclude=("3",))
    assert report.quantised == ("1",)
    assert report.in_float["3"] == "excluded"
    assert "1 linear layers in INT8; in floating point: 3 (excluded); 5 (it gives the outputs)" in str(report)
    assert type(kept[3]) is nn.Linear  # type: ignore[index]


def test_transformers_encoders() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
    model = transformers.DistilBertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(4, 30, (4, 6)), "attention_mask": torch.ones(4, 6, dtype=torch.long)}
    made, report = quantize_ptq(model, [batch])
    assert len(report.quantised) == 12
    assert made.distilbert.transformer.layer[0].attention.q_lin.output_scale is not None  # type: ignore[index,union-attr]
    torch.testing.assert_close(made(**batch).logits, model(**batch).logits, rtol=0, atol=0.02)


def test_layers_return_to_float_in_order_of_damage_until_the_score_is_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())], nn.Linear(8, 2))
    with torch.no_grad():  # one outlier, so that this layer's inputs have a range nobody else's have
        model[2].weight[0] *= 1000
        model[4].weight[:, 0] /= 1000
    x = torch.randn(64, 8)
    reference = model(x).detach()

    def score(candidate: nn.Module) -> float:
        return 1 - float((candidate(x) - reference).square().mean() / reference.var())

    plain, loose = quantize_ptq(model, [x])
    assert loose.score is None
    assert score(plain) < 0.999
    made, report = quantize_ptq(model, [x], tolerance=1e-3, score=score)
    assert report.score_float == pytest.approx(1)
    assert report.score == pytest.approx(score(made))
    assert report.score >= 0.999
    worst = max(report.damage, key=report.damage.__getitem__)
    assert worst == "4"
    assert report.in_float[worst].startswith("returned: alone it changes the outputs by ")
    assert [count for count, _ in report.candidates] == list(range(len(report.candidates)))
    assert "4" not in report.quantised
    assert report.quantised  # only as many as are needed
    error, exact = quantize_ptq(model, [x], tolerance=0, score=lambda m: -score(m), better="lower")
    assert not exact.quantised
    torch.testing.assert_close(error(x), reference)
    with pytest.raises(InvalidValue, match="score returned nan"):
        quantize_ptq(model, [x], score=lambda _: float("nan"))


def test_a_layer_no_input_reaches_is_passed_over() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.used(x))

    _, report = quantize_ptq(Spare(), [torch.randn(3, 4)])
    assert report.quantised == ("used",)
    assert report.in_float["spare"] == "the calibration inputs do not reach it"
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    )
    with pytest.raises(NoEffect, match=r"layers.0.linear1.*torch's TransformerEncoderLayer takes its weight"):
        quantize_ptq(encoder, [torch.randn(2, 3, 8)])


def test_bad_input_names_the_layer_and_the_values(bert, ids) -> None:
    with pytest.raises(InvalidValue, match="calibration is empty"):
        quantize_ptq(bert, [])
    with pytest.raises(InvalidValue, match="method = 'median'"):
        quantize_ptq(bert, ids, method="median")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="tolerance = -1"):
        quantize_ptq(bert, ids, tolerance=-1)
    with torch.no_grad():
        bert.blocks[0].output_norm.bias[3] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(InvalidValue, match=r"blocks.1.query: its input holds NaN"):
        quantize_ptq(bert, ids)
    with torch.no_grad():
        bert.blocks[0].output_norm.bias[3] = 0  # type: ignore[index,union-attr]
        bert.blocks[1].down.weight[0, 0] = torch.inf  # type: ignore[index,union-attr]
    with pytest.raises(InvalidValue, match=r"blocks.1.down: weight must be finite; inf at \[0, 0\]"):
        quantize_ptq(bert, ids)
    with pytest.raises(NoEffect, match="no linear layer of ReLU"):
        quantize_ptq(nn.ReLU(), [torch.ones(1)])


def test_calibration_inputs_are_what_the_task_feeds() -> None:
    task = tiny_task()
    splits = task.splits(None)
    found = calibration_inputs(task, task.default_model(), splits.calibration, samples=10)
    assert [len(item[0]) for item in found] == [10]
    assert torch.equal(found[0][0][0], splits.calibration[0][0])
    with pytest.raises(DataError, match="the calibration split is empty"):
        calibration_inputs(task, task.default_model(), [])


def test_the_engine_compiles_what_comes_out(bert, ids) -> None:
    made, _ = quantize_ptq(bert, ids)
    engine = compile_encoder(made, max_batch=8, max_length=8)
    np.testing.assert_allclose(engine.run(ids[0].numpy()), made(ids[0]).detach().numpy(), rtol=0, atol=2e-3)
