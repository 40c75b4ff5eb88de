from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import sparing
from sparing.compression.pruning import BlockMagnitudePruner, BlockPrune
from sparing.compression.ptq import quantize_ptq
from sparing.compression.shrinking import Shrink, find_groups, shrink
from sparing.core.errors import InvalidValue, NoEffect
from sparing.core.predictor import ModulePredictor, build_model, load, spec_of
from sparing.engine.compiler import compile_encoder
from sparing.testing import QUICK, tiny_task

CASES: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "mlp": ({"in_features": 10, "num_classes": 3, "widths": [16, 8], "dropout": 0.1}, (torch.randn(3, 10),)),
    "convnet": ({"image_size": 8, "widths": [4, 8], "depths": [1, 2]}, (torch.randn(3, 1, 8, 8),)),
    "convnet flat": (
        {"image_size": 8, "widths": [4, [8, 6]], "depths": [1, 2], "head": "flatten", "downsample": "stride"},
        (torch.randn(3, 1, 8, 8),),
    ),
    "mobilenet": ({"image_size": 32, "widths": [4, 6, 8, 8]}, (torch.randn(3, 3, 32, 32),)),
    "vit": ({"image_size": 16, "dim": 16, "depth": 2, "heads": 4}, (torch.randn(3, 3, 16, 16),)),
    "bert": (
        {"vocab_size": 30, "dim": 16, "depth": 2, "heads": 4, "hidden": 32, "max_length": 8, "num_classes": 3},
        (torch.tensor([[4, 9, 7, 3, 0], [5, 6, 3, 0, 0], [8, 9, 10, 11, 3]]),),
    ),
}
"""Name → (fields, example input)."""


def built(name: str, seed: int = 0) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(seed)
    fields, example = CASES[name]
    model = build_model(name.split()[0], **fields)
    for module in model.modules():  # as a trained model has them
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        elif isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model, example


@pytest.mark.parametrize("name", CASES)
def test_a_smaller_model_that_its_builder_makes(name, tmp_path) -> None:
    model, example = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made, report = shrink(model, example, 0.5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert report.groups
    assert all(group.after == group.before - group.before // 2 for group in report.groups)
    assert report.parameters[1] == sum(p.numel() for p in made.parameters()) < 0.7 * report.parameters[0]
    assert report.macs is not None
    assert report.macs[1] < 0.7 * report.macs[0]
    assert report.rebuilt
    assert made.training == model.training
    spec = spec_of(made)
    assert spec is not None
    assert spec.builder == name.split()[0]
    again = load(ModulePredictor(made).save(tmp_path / "model"))
    np.testing.assert_array_equal(again(*example), ModulePredictor(made)(*example))
    made(*example).sum().backward()  # it can be trained on
    assert all(parameter.grad is not None for parameter in made.parameters())
    twice, second = shrink(made, example, 0.5)
    assert second.parameters[0] == report.parameters[1] > second.parameters[1]
    assert spec_of(twice) is not None


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("side", ["made", "read"])
def test_units_without_effect_leave_and_nothing_changes(name, side) -> None:
    """Those whose reader is zero, and those that are made by zeros: what they still give, the reader's bias takes."""
    model, example = built(name)
    silenced = 0
    for group in find_groups(model, example).groups:
        item = group.made_by if side == "made" else group.read_by
        if side == "made":
            constant = group.constant(model.eval())
            reader = model.get_submodule(group.read_by.module)
            if not bool(constant.isfinite().all()) or (isinstance(reader, nn.Conv2d) and reader.padding != (0, 0)):
                continue  # tested below: at a border a constant is none
            if getattr(reader, "bias", None) is None:
                continue
        with torch.no_grad():
            weight = item.of(model)
            weight.index_fill_(item.dim, item.entries(torch.tensor([1, 2]), group.size), 0.0)
        silenced += 2
    if not silenced:
        assert (name, side) == ("mobilenet", "made")  # all its readers are convolutions without a bias
        return
    made, report = shrink(model, example, 0.0)
    assert sum(group.idle for group in report.groups) == sum(g.before - g.after for g in report.groups) == silenced
    expected = model.eval()(*example).detach()
    torch.testing.assert_close(made.eval()(*example), expected, rtol=0, atol=1e-6 * max(1, float(expected.abs().max())))


def test_at_a_border_a_constant_is_none() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1] = 0
        model[0].bias[0], model[0].bias[1] = 1.0, -1.0
    made, report = shrink(model, torch.randn(2, 1, 6, 6), 0.0)
    assert [(group.after, group.idle) for group in report.groups] == [(3, 1)]  # ReLU(−1) is 0 everywhere, ReLU(1) is 1
    x = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(made(x), model(x))


def test_constants_go_on_from_layer_to_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[2].weight[1] = 0
    made, report = shrink(model, torch.randn(2, 3), 0.0)
    assert [(group.name, group.after) for group in report.groups] == [("0", 2), ("2", 3)]
    x = torch.randn(9, 3)
    torch.testing.assert_close(made(x), model(x))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_smallest_leave_counting_what_reads_them(norm) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 4, 2, 3])[:, None].expand(4, 3))
        model[2].weight.copy_(torch.tensor([9.0, 0, 0.1, 0.1]).expand(2, 4))
    made, _ = shrink(model, torch.randn(2, 3), 0.5, norm)  # type: ignore[arg-type]
    # unit 1 is not read; then unit 2, for unit 0 is small but read with large weights
    assert made[0].weight[:, 0].tolist() == [1.0, 3.0]  # type: ignore[index]
    assert made[2].weight[0].tolist() == pytest.approx([9.0, 0.1])  # type: ignore[index]
    assert made[0].out_features == made[2].in_features == 2  # type: ignore[index]


def test_counts_can_be_rounded_and_groups_left_alone() -> None:
    model, example = built("bert")
    made, report = shrink(model, example, 0.5, multiple_of=12, kinds=("neurons",))
    assert {group.kind for group in report.groups} == {"neurons"}
    assert made.blocks[0].up.out_features == 24  # type: ignore[index,union-attr]
    assert report.passed_over["blocks.0"] == "heads are not asked for"
    made, report = shrink(model, example, 0.5, exclude=("blocks.0*",))
    assert spec_of(made).config["heads"] == [4, 2]  # type: ignore[union-attr]
    assert spec_of(made).config["hidden"] == [32, 16]  # type: ignore[union-attr]
    assert report.passed_over["blocks.0.up"] == "excluded"


class Own(nn.Module):
    """A network of functions, as users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3, padding=1)
        self.f1, self.f2, self.f3 = nn.Linear(72, 20), nn.Linear(20, 20), nn.Linear(20, 3)
        self.norm = nn.LayerNorm(20)

    def forward(self, x):
        x = functional.max_pool2d(functional.relu(self.c1(x)), 2)
        x = functional.relu(self.c2(x), inplace=True).flatten(1)
        x = functional.gelu(self.f1(x), approximate="tanh")
        return self.f3(x + self.norm(self.f2(x)))


def test_a_network_of_functions_is_followed_as_far_as_it_is_safe() -> None:
    torch.manual_seed(0)
    model, x = Own(), torch.randn(2, 1, 8, 8)
    made, report = shrink(model, x)
    assert [(group.name, group.before, group.after) for group in report.groups] == [("c1", 6, 5), ("c2", 8, 6)]
    assert report.passed_over == {
        "f1": "2 others read it (f2, add)",
        "f2": "norm, a LayerNorm, is not known to act on each unit alone",
        "f3": "it gives the outputs",
    }
    assert not report.rebuilt
    assert spec_of(made) is None
    assert made.f1.in_features == 54
    assert shrink(model, {"x": x})[1].macs is None


def test_what_is_shared_or_used_elsewhere_stays() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.d.weight = self.c.weight

        def forward(self, x):
            x = functional.relu(self.a(x))
            x = functional.relu(self.a(x))  # twice
            x = functional.relu(self.b(x)) + self.b.weight.sum()
            return self.d(functional.relu(self.c(x)))

    with pytest.raises(NoEffect, match=r"nothing of Shared.*a \(a is called 2 times\).*c .*used elsewhere"):
        shrink(Shared(), torch.randn(2, 4))
    masked = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    BlockMagnitudePruner(masked)
    with pytest.raises(NoEffect, match=r"0, 2 \(it is parametrised; fold what is on it first\)"):
        shrink(masked, torch.randn(2, 4))


def test_a_model_that_knows_its_own_sizes_is_not_broken() -> None:
    class Knows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.first(x)
            if x.shape[1] != 8:
                raise ValueError("8 units are expected")
            return self.third(torch.relu(self.second(torch.relu(x))))

    made, report = shrink(Knows(), torch.randn(2, 4))
    assert [group.name for group in report.groups] == ["second"]
    assert report.passed_over["first"] == "without some of its units the model does not run: 8 units are expected"
    assert made(torch.randn(2, 4)).shape == (2, 2)


def test_transformers_encoders_lose_neurons() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=16)
    model = transformers.DistilBertForSequenceClassification(config)
    made, report = shrink(model, {"input_ids": torch.randint(4, 30, (2, 6))}, 0.5)
    assert [group.name for group in report.groups][:2] == [f"distilbert.transformer.layer.{i}.ffn.lin1" for i in (0, 1)]
    assert made.distilbert.transformer.layer[0].ffn.lin2.in_features == 8


def test_bad_input_names_the_values() -> None:
    model, example = built("mlp")
    with pytest.raises(InvalidValue, match=r"ratio = 1\.0"):
        shrink(model, example, 1.0)
    with pytest.raises(InvalidValue, match="norm = 'l3'"):
        shrink(model, example, norm="l3")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="multiple_of = 0"):
        shrink(model, example, multiple_of=0)
    with pytest.raises(InvalidValue, match="kinds = 'heads'"):
        shrink(model, example, kinds="heads")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match=r"'layers.2' matches nothing.*There are: layers.1, layers.4"):
        shrink(model, example, exclude=("layers.2",))
    with pytest.raises(NoEffect, match=r"ratio = 0; .*layers.1 \(all its 16 neurons stay\); layers.4"):
        shrink(model, example, 0.0)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan  # type: ignore[index,union-attr]
    with pytest.raises(InvalidValue, match=r"head\.weight holds NaN"):
        shrink(model, example)


def test_the_engine_takes_fewer_neurons() -> None:
    model, example = built("bert")
    made, report = shrink(model, example, 0.3, kinds=("neurons",), multiple_of=4)
    assert [group.after for group in report.groups] == [24, 24]
    int8, _ = quantize_ptq(made, [example])
    engine = compile_encoder(int8, max_batch=4, max_length=8)
    np.testing.assert_allclose(engine.run(example[0].numpy()), int8(*example).detach().numpy(), rtol=0, atol=5e-3)


# --- the step


def test_after_pruning_shrink_takes_what_is_zero_first_and_then_it_is_trained(tmp_path) -> None:
    fast: dict[str, Any] = {"epochs": 4, "batch_size": 16, "lr": 0.01}
    done = sparing.run(
        task=tiny_task(),
        model={"name": "mlp", "image_size": 8, "num_classes": 3, "widths": [32, 16]},
        steps=[
            BlockPrune(block=(1, 64), sparsity=0.5, exclude=("layers.3",)),
            sparing.Train(**fast),
            Shrink(ratio=0, multiple_of=4),
            sparing.Train(id="again", **fast),
        ],
        meter=QUICK,
        store=tmp_path / "store",
        out=tmp_path / "out",
    )
    rows = {row.id: row for row in done.ledger.rows}
    shrunk = rows["shrink"]
    assert shrunk.figures["neurons cut"].value == 16
    assert "layers.1 32 → 16 neurons; 16 of the 16 units that left had no effect" in " ".join(shrunk.remarks)
    assert shrunk.figures["accuracy"].value == rows["train"].figures["accuracy"].value
    assert shrunk.figures["model bytes"].value < 0.7 * rows["train"].figures["model bytes"].value
    assert shrunk.figures["parameters cut"].value == 16 * (64 + 1 + 16)
    assert load(tmp_path / "out" / "model").describe().parameters == sum(p.numel() for p in done.job.model.parameters())


def test_a_model_of_ones_own_is_said_to_be_saved_as_a_graph_only(tmp_path) -> None:
    task = tiny_task()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    done = sparing.run(
        task=task, model=model, steps=[sparing.Train(epochs=1), Shrink()], meter=QUICK, store=tmp_path / "store"
    )
    assert any("saved as an ONNX graph only" in remark for remark in done.ledger.rows[-1].remarks)
    with pytest.raises(InvalidValue, match="kinds = "):
        Shrink(kinds=())
