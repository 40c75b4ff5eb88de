"""What a network costs: counts by two rules, memory while it runs, time."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import sparing
from sparing.core.cost import RULES, mac_count, peak_activation_bytes
from sparing.core.errors import InvalidValue, NotExportable
from sparing.core.predictor import ModulePredictor, build_model
from sparing.models.emo import EMO
from sparing.models.vit import ViT

QUICK = {"min_seconds": 0.0, "max_seconds": 0.05}


def test_a_convolutional_network_counted_by_hand() -> None:
    model = build_model("convnet", image_size=8, widths=[4, 6])
    images = (torch.zeros(1, 1, 8, 8),)
    conv, linear = 64 * 9 * 4 + 16 * 9 * 4 * 6, 6 * 10
    norm = 2 * (64 * 4 + 16 * 6)
    strict, fvcore = mac_count(model, images), mac_count(model, images, "fvcore")
    assert dict(strict.by_operator) == {"conv": conv, "linear": linear}
    assert dict(fvcore.by_operator) == {"conv": conv, "linear": linear, "batch_norm": norm}
    assert (strict.total, fvcore.total) == (conv + linear, conv + linear + norm)
    assert fvcore.by_module["stages.0"] == 64 * 9 * 4 + 2 * 64 * 4
    assert fvcore.by_module["stages.0.1"] == 2 * 64 * 4
    assert fvcore.by_module["head"] == linear
    assert (strict.rule, fvcore.rule) == (RULES["strict"], RULES["fvcore"])


def test_the_strict_rule_is_the_predictors() -> None:
    model = build_model("convnet", image_size=8, widths=[4, 6])
    images = (torch.zeros(1, 1, 8, 8),)
    assert ModulePredictor(model, example=images).describe().macs == mac_count(model, images).total


@pytest.mark.parametrize(
    ("norm", "operator", "each"),
    [
        (nn.BatchNorm2d(4), "batch_norm", 2),
        (nn.BatchNorm2d(4, affine=False), "batch_norm", 1),
        (nn.BatchNorm2d(4, track_running_stats=False), "batch_norm", 5),
        (nn.InstanceNorm2d(4), "batch_norm", 4),
        (nn.LayerNorm([4, 5, 3]), "layer_norm", 5),
        (nn.LayerNorm([4, 5, 3], elementwise_affine=False), "layer_norm", 4),
        (nn.GroupNorm(2, 4), "group_norm", 5),
        (nn.GroupNorm(2, 4, affine=False), "group_norm", 4),
    ],
    ids=str,
)
def test_norms_by_fvcores_rule(norm: nn.Module, operator: str, each: int) -> None:
    example = (torch.randn(2, 4, 5, 3),)
    assert dict(mac_count(norm, example, "fvcore").by_operator) == {operator: each * 60}
    assert mac_count(norm, example).total == 0


def test_attention_is_counted_by_its_two_products() -> None:
    count = mac_count(ViT(1, 10, 8, patch_size=2, dim=8, depth=1, heads=2), (torch.zeros(3, 1, 8, 8),), "fvcore")
    assert count.by_operator["matmul"] == 2 * 16 * 16 * 8
    assert count.by_operator["layer_norm"] == 3 * 5 * 16 * 8
    assert count.by_operator["linear"] == 16 * (8 * 24 + 8 * 8 + 2 * 8 * 32) + 8 * 10


def test_the_batch_does_not_count() -> None:
    model = EMO("0.14M", 10)
    one, five = (mac_count(model, (torch.zeros(n, 3, 64, 64),), "fvcore") for n in (1, 5))
    assert one == five
    assert (one.total, mac_count(model, (torch.zeros(1, 3, 64, 64),)).total) == (17_960_192, 17_217_536)


def test_memory_of_a_chain_is_its_widest_step() -> None:
    chain = nn.Sequential(nn.Linear(100, 1000), nn.ReLU(), nn.Linear(1000, 10), nn.ReLU(), nn.Linear(10, 500))
    # ReLU's input and output, and the chain's input, which the caller keeps
    assert peak_activation_bytes(chain, (torch.zeros(1, 100),)) == 4 * (100 + 1000 + 1000)
    assert peak_activation_bytes(chain, (torch.zeros(3, 100),)) == 3 * 4 * (100 + 1000 + 1000)
    # in place, a ReLU takes none
    chain[1] = nn.ReLU(inplace=True)
    assert peak_activation_bytes(chain, (torch.zeros(1, 100),)) == 4 * (100 + 1000 + 10)


def test_a_residual_keeps_its_input_alive() -> None:
    class Residual(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            return y + (y * 2).exp()

    # y, y·2 and its exponential; then, y·2 gone, y, the exponential and the sum: beside the input four at the most
    assert peak_activation_bytes(Residual(), (torch.zeros(1, 1000),)) == 4 * 4 * 1000


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_the_report_of_an_emo(runtime: str) -> None:
    model = EMO("0.14M", 10)
    report = sparing.cost_report(model, 64, runtime=runtime, **QUICK)  # type: ignore[arg-type]
    assert (report.parameters, report.buffers, report.inputs) == (135_642, 2_203, ((1, 3, 64, 64),))
    # statistics are single precision, batch norm's counters are eight bytes each
    counters = sum(name.endswith("num_batches_tracked") for name in model.state_dict())
    assert report.bytes == 4 * 135_642 + 4 * (2_203 - counters) + 8 * counters
    assert report.macs["fvcore"].total == 17_960_192
    assert report.peak_activation_bytes > 4 * 2 * 64 * 64 * 64  # 64 channels before and after an activation
    assert 0 < report.latency.p50 < 1
    assert report.runtime == runtime
    assert model.training  # the caller's model stays as it is
    text = str(report)
    for shown in ("EMO on 1×3×64×64", "135,642 + 2,203", "17,217,536 (strict)", "17,960,192 (fvcore)", runtime, "p50"):
        assert shown in text
    assert json.loads(json.dumps(report.to_dict()))["macs"]["strict"]["total"] == 17_217_536


def test_the_report_of_any_module_on_any_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return self.layer(one) @ other

    report = sparing.cost_report(Two(), example=(torch.zeros(1, 5, 6), torch.zeros(1, 4, 3)), **QUICK)  # type: ignore[arg-type]
    assert report.inputs == ((1, 5, 6), (1, 4, 3))
    assert report.macs["strict"].total == 5 * 6 * 4 + 5 * 4 * 3
    conv = sparing.cost_report(build_model("convnet"), (1, 28, 28), **QUICK)  # type: ignore[arg-type]
    assert conv.latency.p95 is None or conv.latency.p95 >= conv.latency.p50


def test_what_no_graph_can_hold_is_measured_in_torch() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvals(x).abs()

    with pytest.raises(NotExportable):
        sparing.cost_report(Odd(), (4, 4), **QUICK)  # type: ignore[arg-type]
    assert sparing.cost_report(Odd(), (4, 4), runtime="torch", **QUICK).latency.p50 > 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either input_size"),
        ({"input_size": 8, "example": (torch.zeros(1, 3, 8, 8),)}, "give either input_size"),
        ({"input_size": (3, 0, 8)}, r"input_size = \(3, 0, 8\)"),
        ({"input_size": (3, 8.5)}, r"input_size = \(3, 8.5\)"),
        ({"example": (torch.zeros(2, 3, 8, 8),)}, r"first dimensions \[2\]; a batch of 1"),
        ({"input_size": 64, "runtime": "paper"}, "runtime = 'paper'"),
        ({"input_size": 15}, "images of 15 × 15 pixels; at least 16 × 16"),
    ],
)
def test_impossible_reports_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        sparing.cost_report(EMO("0.14M", 10), **arguments)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="rule = 'mine'"):
        mac_count(nn.ReLU(), (torch.zeros(1, 2),), "mine")  # type: ignore[arg-type]
