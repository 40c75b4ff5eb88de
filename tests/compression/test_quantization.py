from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sparing.compression.quantization import (
    KEPT_FP32,
    Quantize,
    Scheme,
    calibration_feeds,
    float_operators,
    layer_sensitivity,
    layers_of,
    prepare,
    products_saturate,
    quantize_onnx,
)
from sparing.core.clock import Timing
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, NoEffect
from sparing.core.job import Job
from sparing.core.meter import Meter
from sparing.core.predictor import ModulePredictor, OnnxPredictor, build_model, load, to_onnx
from sparing.core.store import Store
from sparing.core.task import Evaluation, Metric, Splits, Task


class Blobs(Task):
    """Which of four noisy patterns an 8×8 image holds. Its test split may not be touched."""

    name = "blobs"
    metrics = (Metric("accuracy"),)
    labels = tuple("abcd")
    capabilities = frozenset({"classification"})

    def __init__(self) -> None:
        self.patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def part(self, rows: int, seed: int) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(rows) % 4
        return TensorDataset(self.patterns[labels] + torch.randn(rows, 1, 8, 8, generator=generator), labels)

    def splits(self, root: Path | None) -> Splits:
        return Splits(self.part(256, 1), self.part(200, 2), self.part(64, 3), None)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        images, labels = split.tensors
        right = (predictor(images).argmax(1) == labels.numpy()).astype(float)
        return Evaluation({"accuracy": float(right.mean())}, right)

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return (self.part(batch, 4).tensors[0],)

    def default_model(self) -> nn.Module:
        return build_model("convnet", self, widths=[16, 32])

    def model_fields(self) -> Mapping[str, Any]:
        return {"num_classes": 4, "image_size": 8, "in_channels": 1}

    def fingerprint(self) -> str:
        return "blobs"


def trained(task: Blobs, model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    images, labels = task.splits(None).train.tensors
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def task() -> Blobs:
    return Blobs()


@pytest.fixture(scope="module")
def conv(task: Blobs) -> ModulePredictor:
    torch.manual_seed(0)
    return ModulePredictor(trained(task, task.default_model()), task)


@pytest.fixture(scope="module")
def linear(task: Blobs) -> ModulePredictor:
    torch.manual_seed(0)
    return ModulePredictor(trained(task, build_model("mlp", task)), task)


@pytest.fixture(scope="module")
def fp32(conv: ModulePredictor) -> OnnxPredictor:
    return to_onnx(conv)


def job_of(task: Blobs, predictor: Any, tmp_path: Path, **changes: Any) -> Job:
    splits = task.splits(None)
    job = Job(
        task=task,
        train=splits.train,
        val=splits.val,
        calibration=splits.calibration,
        model=getattr(predictor, "model", None),  # type: ignore[arg-type]
        seed=0,
        store=Store(tmp_path / "steps").bind("test", seed=0),
        predictor=predictor,
    )
    return job.replace(**changes)


def clocked(monkeypatch: pytest.MonkeyPatch, **p50_ms: float) -> list[list[str]]:
    """Replace the clock: latency by the first word of a candidate's name."""
    asked = []

    def latency(self: Meter, predictors: Mapping[str, Any], task: Task, batch: int = 1) -> dict[str, Timing]:
        asked.append(list(predictors))
        return {name: Timing(p50_ms[name.split()[0].lower()] / 1e3, None, None, None, 9, 9, "") for name in predictors}

    monkeypatch.setattr(Meter, "latency", latency)
    return asked


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("method", ["minmax", "percentile", "kl"])
def test_weights_and_activations_become_integers(
    task: Blobs, fp32: OnnxPredictor, per_channel: bool, method: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    model = prepare(fp32.content)
    feeds = calibration_feeds(task, fp32, task.splits(None).calibration, 64)
    quantised = quantize_onnx(model, Scheme("static", per_channel, method), feeds)
    kinds = {tensor.name: tensor.data_type for tensor in quantised.graph.initializer if len(tensor.dims) > 1}
    assert set(kinds.values()) == {3}  # int8
    scales = [t for t in quantised.graph.initializer if t.name.endswith("weight_scale") and len(t.dims)]
    assert bool(scales) is per_channel
    assert float_operators(model, quantised) == []
    val = task.splits(None).val
    made = fp32.with_graph(quantised.SerializeToString())
    assert task.evaluate(made, val).metrics["accuracy"] > task.evaluate(fp32, val).metrics["accuracy"] - 0.03
    assert capfd.readouterr().out == ""


def test_convolutions_run_in_integer_kernels(task: Blobs, fp32: OnnxPredictor, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    feeds = calibration_feeds(task, fp32, task.splits(None).calibration, 64)
    content = quantize_onnx(prepare(fp32.content), Scheme(), feeds).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "run.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2
    assert "Conv" not in kinds


def test_kept_layers_stay_float_and_are_reported(task: Blobs, fp32: OnnxPredictor) -> None:
    model = prepare(fp32.content)
    feeds = calibration_feeds(task, fp32, task.splits(None).calibration, 64)
    name = layers_of(model)[0].name
    quantised = quantize_onnx(model, Scheme(keep_float=(name,)), feeds)
    assert f"{name} (Conv)" in float_operators(model, quantised)
    assert not any("Gemm" in entry for entry in float_operators(model, quantised))
    with pytest.raises(InvalidValue, match="calibration"):
        quantize_onnx(model, Scheme())


def test_calibration_is_spread_over_the_split(task: Blobs, fp32: OnnxPredictor) -> None:
    dataset = task.splits(None).calibration
    feeds = calibration_feeds(task, fp32, dataset, 3)
    np.testing.assert_array_equal(feeds[0]["input0"], dataset.tensors[0][[0, 32, 63]].numpy())
    assert sum(len(feed["input0"]) for feed in calibration_feeds(task, fp32, dataset, 1000)) == 64
    with pytest.raises(DataError, match="calibration split is empty"):
        calibration_feeds(task, fp32, TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0)), 3)


def fragile(task: Blobs) -> ModulePredictor:
    """A network whose first convolution quantises badly: one channel is huge and is cancelled afterwards."""
    torch.manual_seed(0)
    model = trained(task, task.default_model())
    with torch.no_grad():
        norm, following = model.stages[0][1], model.stages[1][1]  # type: ignore[index]
        norm.weight[0] *= 3000
        norm.bias[0] = 3000
        following.weight[:, 0] = 0
    return ModulePredictor(model, task)


def test_sensitivity_finds_the_layer_that_quantises_badly(task: Blobs) -> None:
    predictor = to_onnx(fragile(task))
    model = prepare(predictor.content)
    feeds = calibration_feeds(task, predictor, task.splits(None).calibration, 64)
    found = layer_sensitivity(model, Scheme(per_channel=False), feeds)
    assert list(found) == [node.name for node in layers_of(model)]
    conv1, conv2 = list(found)[:2]
    assert found[conv2] > 10 * found[list(found)[2]]
    assert conv1 != conv2


def test_layers_fall_back_to_float_until_the_loss_is_accepted(
    task: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocked(monkeypatch, fp32=1.0, int8=0.5)
    job = job_of(task, fragile(task), tmp_path)
    after = Quantize(max_loss=0.02).apply(job)
    first, *_ = tried = job.notes.candidates[1:]
    assert first["loss"] > 0.02
    assert "loses more than max_loss" in first["note"]
    assert tried[-1]["loss"] <= 0.02
    assert tried[-1]["chosen"]
    assert "in float: stages" in job.notes.outcome
    assert job.notes.figures["operators in float"].value > 0  # type: ignore[operator]
    assert any(remark.startswith("operators in float: stages") for remark in job.notes.remarks)
    assert after.predictor is not None
    formats = [layer["format"] for layer in after.predictor.describe().layers if "format" in layer]
    assert set(formats) == {"fp32", "int8"}


def test_a_real_quantisation_shrinks_the_folder_and_keeps_what_users_need(
    task: Blobs, conv: ModulePredictor, tmp_path: Path
) -> None:
    job = job_of(task, conv, tmp_path)
    after = Quantize(goal="bytes", max_loss=0.02).apply(job)
    assert after.predictor is not None
    assert job.predictor is conv
    made = load(after.predictor.save(tmp_path / "model"))
    described, before = made.describe(), to_onnx(conv).describe()
    assert described.model_bytes < 0.5 * before.model_bytes
    assert (described.macs, described.macs_rule) == (before.macs, before.macs_rule)
    assert described.parameters == before.parameters
    assert made.labels == task.labels
    assert described.precision.startswith("int8 (QDQ static")
    assert job.notes.outcome == described.precision
    names = [entry["name"] for entry in job.notes.candidates]
    assert names == ["FP32", "int8 (QDQ static, per channel)", "int8 (QDQ static, per tensor)"]
    assert [entry["name"] for entry in job.notes.candidates if entry["chosen"]] == [job.notes.outcome]
    val = job.val
    assert task.evaluate(made, val).metrics["accuracy"] == pytest.approx(
        next(entry for entry in job.notes.candidates if entry["chosen"])["val accuracy"]
    )
    json.dumps(job.notes.candidates, allow_nan=False)


@pytest.mark.parametrize(("int8", "kept"), [(0.5, False), (0.949, False), (0.951, True), (2.0, True)])
def test_latency_must_win_by_the_margin(
    task: Blobs, conv: ModulePredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, int8: float, kept: bool
) -> None:
    clocked(monkeypatch, fp32=1.0, int8=int8)
    job = job_of(task, conv, tmp_path)
    after = Quantize(max_loss=0.02).apply(job)
    assert (job.notes.outcome == KEPT_FP32) is kept
    assert after.predictor is not None
    assert (after.predictor.describe().precision == "fp32") is kept
    assert [entry["p50 ms"] for entry in job.notes.candidates] == pytest.approx([1.0, int8])


def test_the_choice_is_made_once(
    task: Blobs, conv: ModulePredictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = clocked(monkeypatch, fp32=1.0, int8=0.5)
    first = job_of(task, conv, tmp_path)
    Quantize(max_loss=0.02).apply(first)
    clocked(monkeypatch, fp32=1.0, int8=5.0)
    second = job_of(task, conv, tmp_path)
    Quantize(max_loss=0.02).apply(second)
    assert len(asked) == 1
    assert second.notes.candidates == first.notes.candidates
    assert second.notes.outcome == first.notes.outcome != KEPT_FP32


def test_a_loss_that_is_not_accepted_keeps_fp32_with_figures(
    task: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = clocked(monkeypatch, fp32=1.0, int8=0.1)
    monkeypatch.setattr("sparing.compression.quantization.attempts", lambda layers: [])
    job = job_of(task, fragile(task), tmp_path)
    after = Quantize(max_loss=0.0).apply(job)
    assert job.notes.outcome == KEPT_FP32
    assert asked == []  # nothing left to time
    assert job.notes.candidates[1]["loss"] > 0
    assert after.predictor is not None
    assert after.predictor is not job.predictor


def test_the_accepted_loss_may_be_a_share_of_the_score(task: Blobs, tmp_path: Path) -> None:
    job = job_of(task, fragile(task), tmp_path)
    Quantize(goal="bytes", max_loss=1.0, max_relative_loss=0.02).apply(job)
    fp32, first, *more = job.notes.candidates
    assert first["note"] == "loses more than max_relative_loss = 0.02"
    assert first["loss"] > 0.02 * fp32[f"val {task.headline.name}"] >= more[-1]["loss"]
    assert Quantize(max_relative_loss=0.01).accepted(-0.5) == pytest.approx(0.005)
    assert Quantize(max_loss=0.25).accepted(0.9) == 0.25
    with pytest.raises(InvalidValue, match=r"max_relative_loss = -0\.1"):
        Quantize(max_relative_loss=-0.1)


def test_linear_models_try_dynamic_too(task: Blobs, linear: ModulePredictor, tmp_path: Path) -> None:
    job = job_of(task, linear, tmp_path)
    Quantize(goal="bytes", max_loss=0.02, per_channel=True).apply(job)
    names = [entry["name"] for entry in job.notes.candidates]
    assert names == ["FP32", "int8 (QDQ static, per channel)", "int8 (dynamic, per channel)"]
    only = job_of(task, linear, tmp_path / "only")
    after = Quantize(goal="bytes", mode="dynamic", max_loss=0.02, per_channel=True).apply(only)
    assert only.notes.outcome == "int8 (dynamic, per channel)"
    assert "calibrated" in job.notes.remarks[0]
    assert not any("calibrated" in remark for remark in only.notes.remarks)
    assert after.predictor is not None
    assert after.predictor.payload()[1]["origin"]["calibrated"] == ""
    kinds = {node.op_type for node in after.predictor.graph().graph.node}  # type: ignore[attr-defined]
    assert "MatMulInteger" in kinds
    assert after.predictor.describe().model_bytes < 0.5 * to_onnx(linear).describe().model_bytes


def test_lower_is_better_is_understood(task: Blobs, conv: ModulePredictor, tmp_path: Path) -> None:
    class Errors(Blobs):
        metrics = (Metric("error", "lower"),)

        def evaluate(self, predictor: Any, split: Any) -> Evaluation:
            return Evaluation({"error": 1 - super().evaluate(predictor, split).metrics["accuracy"]})

    job = job_of(Errors(), fragile(task), tmp_path)
    Quantize(goal="bytes", max_loss=1.0).apply(job)
    assert job.notes.candidates[1]["loss"] > 0.02


def test_nothing_to_quantise_is_an_error_that_lists_what_was_seen(
    task: Blobs, conv: ModulePredictor, tmp_path: Path
) -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4].relu()

    with pytest.raises(NoEffect, match=r"Relu ×1.*Conv, Gemm and MatMul"):
        Quantize().apply(job_of(task, ModulePredictor(Sum(), task), tmp_path))
    already = Quantize(goal="bytes", max_loss=0.02).apply(job_of(task, conv, tmp_path))
    with pytest.raises(NoEffect, match=r"already.*QuantizeLinear"):
        Quantize(id="again").apply(already.replace(store=Store(tmp_path / "other").bind(1, seed=0)))
    names = [node.name for node in layers_of(prepare(to_onnx(conv).content))]
    with pytest.raises(NoEffect, match="keep_float holds"):
        Quantize(keep_float=tuple(names)).apply(
            job_of(task, conv, tmp_path, store=Store(tmp_path / "third").bind(1, seed=0))
        )


def test_wrong_fields_and_jobs(task: Blobs, conv: ModulePredictor, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="head/Gemm"):
        Quantize(keep_float=("head/Gem",)).apply(job_of(task, conv, tmp_path))
    with pytest.raises(IncompatibleStep, match="none yet"):
        Quantize().apply(job_of(task, None, tmp_path))
    for fields in ({"goal": "size"}, {"max_loss": -1}, {"margin": 0.01}, {"samples": 0}, {"method": "mse"}):
        with pytest.raises(InvalidValue, match=next(iter(fields))):
            Quantize(**fields)


def test_seven_bits_where_products_saturate(task: Blobs, fp32: OnnxPredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnx import numpy_helper

    feeds = calibration_feeds(task, fp32, task.splits(None).calibration, 64)
    largest = {}
    for saturate in (True, False):
        monkeypatch.setattr("sparing.compression.quantization.products_saturate", lambda saturate=saturate: saturate)
        graph = quantize_onnx(prepare(fp32.content), Scheme(), feeds).graph
        weights = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == 3 and len(t.dims) > 1]
        largest[saturate] = max(int(np.abs(array.astype(int)).max()) for array in weights)
    assert largest == {True: 64, False: 127}


def test_the_processor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform

    for machine, flags, expected in (
        ("aarch64", "", False),
        ("x86_64", "flags: avx2 avx512_vnni", False),
        ("x86_64", "flags: avx2", True),
    ):
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        monkeypatch.setattr(Path, "read_text", lambda *_, flags=flags, **__: flags)
        assert products_saturate.__wrapped__() is expected
