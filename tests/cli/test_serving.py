"""``sparing bench --max-latency-ms``, and what ``bench`` measures on a compiled text model whose data are not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparing.cli import main
from sparing.compression.ptq import quantize_ptq
from sparing.core.predictor import ModulePredictor, build_model, to_onnx
from sparing.engine.compiler import compile_encoder
from sparing.engine.predictor import EnginePredictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    bert = build_model("bert", vocab_size=50, dim=16, depth=1, heads=2, max_length=12)
    quantised, _ = quantize_ptq(bert, [torch.randint(4, 50, (4, 12))])
    source = ModulePredictor(bert, example=(torch.randint(4, 50, (2, 12)),)).describe()
    predictor = EnginePredictor(compile_encoder(quantised, 4, 12), source=source)
    return predictor.save(tmp_path_factory.mktemp("served") / "model")


def test_the_best_combination_within_a_limit(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder), "--max-latency-ms", "10000", "--length", "7", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["tokens"] == 7
    assert {row["batch"] for row in document["table"]} == {1, 2, 4}
    assert document["best"]["throughput"] == max(row["throughput"] for row in document["table"])
    assert main(["bench", str(folder), "--max-latency-ms", "10000"]) == 0
    assert "sequences a second" in capfd.readouterr().out


def test_a_limit_that_nothing_keeps_names_the_smallest_latency(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder), "--max-latency-ms", "0.000001"]) == 1
    assert "no combination stays within 1e-06 ms: the smallest p99 is" in capfd.readouterr().err
    assert main(["bench", str(folder), "--max-latency-ms", "5", "--length", "13"]) == 2
    assert "length must be in 1…12, not 13" in capfd.readouterr().err
    assert main(["bench", str(folder), "--max-latency-ms", "5", "--batch", "3"]) == 2
    assert "leave out all but --length" in capfd.readouterr().err
    assert main(["bench", str(folder), "--length", "5"]) == 2
    assert "--length 5 is for --max-latency-ms" in capfd.readouterr().err


def test_a_model_that_is_not_compiled_cannot_be_served_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    onnx = to_onnx(nn.Linear(3, 2), (torch.randn(2, 3),))
    onnx.save(tmp_path / "model")
    assert main(["bench", str(tmp_path / "model"), "--max-latency-ms", "5"]) == 2
    assert "kind 'onnx'; --max-latency-ms is for compiled ones" in capfd.readouterr().err


def test_inputs_are_made_up_for_an_engine_without_preprocessing(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(folder), "--batch", "3", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["description"]["kind"] == "engine"
    assert document["figures"]["latency p50"]["value"] > 0
    assert document["figures"]["throughput"]["note"].startswith("batch 3")
