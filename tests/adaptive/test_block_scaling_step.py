"""The step ``block_scaling``: what it saves and reports, limits, composition, refusals, the commands on its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import Subset

import sparing
from sparing.adaptive.block_profile import environments
from sparing.adaptive.lego_predictor import LegoPredictor
from sparing.adaptive.scaling import InfeasibleError
from sparing.cli import main
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, NoEffect, RecipeError
from sparing.core.pipeline import Run
from sparing.testing import QUICK, tiny_task

TRAIN = sparing.Train(id="first", epochs=6, batch_size=16, lr=0.02)
MODEL = {"name": "resnet", "in_channels": 1, "num_classes": 3, "widths": [8, 12], "depths": 1}
QUICKLY: dict[str, Any] = {"sparsities": (0, 0.4, 0.8), "epochs": 2, "batch_size": 16, "lr": 0.01, "runs": 3}
LIMIT = 14_000


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all runs, so that what they begin with is made once."""
    return tmp_path_factory.mktemp("lego") / "store"


@pytest.fixture(scope="module")
def ran(store: Path) -> Run:
    return scaled(store, model=MODEL, out=store.parent / "run", max_bytes=LIMIT, epochs=4)


def scaled(store: Path, *before: sparing.Step, model: Any = None, out: Path | None = None, **fields: Any) -> Run:
    """A run that ends in the step, behind a training or the steps given; the task's own model has one block."""
    steps = [*(before or (TRAIN,)), sparing.BlockScaling(**{**QUICKLY, **fields})]
    return sparing.run(task=tiny_task(), model=model, steps=steps, out=out, store=store, meter=QUICK)


def lego(run: Run) -> LegoPredictor:
    assert isinstance(run.predictor, LegoPredictor)
    return run.predictor


def images(count: int) -> np.ndarray:
    return np.random.RandomState(0).randn(count, 1, 8, 8).astype(np.float32)


# --- what it makes


def test_the_row_says_what_was_chosen_saved_and_lost(ran: Run) -> None:
    first, row = ran.ledger.rows
    predictor = lego(ran)
    figures = {name: figure.value for name, figure in row.figures.items()}
    assert (row.kind, row.runtime) == ("lego", "onnxruntime")
    assert figures["blocks"] == 2
    assert figures["selections"] == 3**2
    assert figures["selection bytes"] <= LIMIT < first.figures["parameters"].value * 4  # type: ignore[operator]
    assert figures["bytes on disk"] == figures["model bytes"] == sum(map(len, predictor.graphs.values()))
    assert figures["bytes loaded"] == predictor.loaded_bytes < figures["bytes on disk"]  # type: ignore[operator]
    assert figures["limits raised"] == "no"
    assert figures["latency, estimated"] > 0 < figures["latency, measured"]  # type: ignore[operator]
    assert row.figures["latency, estimated"].how == row.figures["val accuracy, estimated"].how == "est"
    lost = predictor.profile.accuracy - figures["val accuracy, measured"]  # type: ignore[operator]
    assert figures["val accuracy lost"] == pytest.approx(lost)
    sizes = predictor.profile.sparsities[list(predictor.current)]
    assert row.outcome == "blocks at sparsity " + ", ".join(f"{s:g}" for s in sizes)
    assert [entry["name"] for entry in row.candidates] == [
        "all blocks at 0", "all blocks at 0.4", "all blocks at 0.8", "the selection",
    ]  # fmt: skip
    assert [entry["chosen"] for entry in row.candidates] == [False, False, False, True]
    best = max(entry["val accuracy, estimated"] for entry in row.candidates if entry["selection bytes"] <= LIMIT)
    assert row.candidates[-1]["val accuracy, estimated"] == best
    for sparsity in ("0.4", "0.8"):
        losses = [value for _, value in row.curves[f"block loss at sparsity {sparsity}"]]
        assert len(losses) == 4
        assert losses[-1] < losses[0]


def test_losses_are_those_on_the_validation_data(ran: Run) -> None:
    predictor, task, val = lego(ran), ran.job.task, ran.job.val
    before, profile = predictor.current, predictor.profile

    def accuracy(options: Any) -> float:
        predictor.apply([max(int(option), 0) for option in options])
        return float(np.mean([predictor(x[None].numpy()).argmax() == int(y) for x, y in val]))

    try:
        assert profile.accuracy == accuracy((0, 0))
        for b, s in ((0, 2), (1, 1)):
            losses = []
            for row in environments(2, 3):
                with_original, with_this = row.copy(), row.copy()
                with_original[b], with_this[b] = 0, s
                losses.append(accuracy(with_original) - accuracy(with_this))
            assert profile.drops[b, s] == pytest.approx(np.mean(losses))
        chosen = ran.ledger.rows[-1].figures["val accuracy, measured"].value
        assert chosen == pytest.approx(accuracy(before))
        assert task.evaluate(predictor, Subset(val, range(6))).metrics["accuracy"] >= 0
    finally:
        predictor.apply(before)


def test_the_saved_folder_answers_and_chooses_anew_without_torch(ran: Run) -> None:
    assert ran.folder is not None
    predictor, x = lego(ran), images(4)
    again = sparing.load(ran.folder / "model")
    np.testing.assert_array_equal(again(x), predictor(x))
    program = f"""
import sys
import numpy as np
import sparing
model = sparing.load({str(ran.folder / "model")!r})
before = model.current
found = model.choose(max_bytes={int(predictor.profile.bytes.min(1).sum() + predictor.profile.frame_bytes)})
model(np.zeros((2, 1, 8, 8), np.float32))
print(before, found.options)
assert "torch" not in sys.modules and "lightning" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{predictor.current} (2, 2)", done.stderr


def test_trained_in_processes_the_blocks_are_the_same(ran: Run, store: Path) -> None:
    apart = lego(scaled(store, model=MODEL, max_bytes=LIMIT, epochs=4, n_jobs=2))
    assert apart.graphs.keys() == lego(ran).graphs.keys()
    assert all(bytes(apart.graphs[name]) == bytes(content) for name, content in lego(ran).graphs.items())


@pytest.mark.parametrize("residency", ["disk", "memory"])
def test_residency_is_kept_in_the_folder(store: Path, residency: str, tmp_path: Path) -> None:
    run = scaled(store, out=tmp_path / "run", residency=residency)
    again = sparing.load(tmp_path / "run" / "model")
    assert isinstance(again, LegoPredictor)
    assert again.residency == lego(run).residency == residency
    assert len(again._ready) == (3 if residency == "memory" else 0)


def test_blocks_of_ones_own(store: Path) -> None:
    run = scaled(store, model=MODEL, boundaries=[["stages.0.0.conv1", "stages.0.0.conv2"]], freeze_bn=True, scorer="l2")
    assert lego(run).profile.bytes.shape == (1, 3)
    with pytest.raises(InvalidValue, match="'nowhere' is no node"):
        scaled(store, model=MODEL, boundaries=[("stem.0", "nowhere")])


# --- limits


def test_limits_that_cannot_be_kept_are_refused_or_raised(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = lego(scaled(store)).profile
    least = int(profile.frame_bytes + profile.bytes.min(1).sum())
    with monkeypatch.context() as patch:
        patch.setattr("sparing.adaptive.block_distillation.distill_blocks", None)  # refused before anything is trained
        with pytest.raises(InfeasibleError, match=rf"max_bytes = 100 cannot .* smallest selection takes {least} bytes"):
            scaled(store, max_bytes=100)
    with pytest.raises(InfeasibleError, match=r"max_latency = 1e-12 s cannot be kept"):
        scaled(store, max_latency_ms=1e-9)
    run = scaled(store, max_bytes=100, relax=True)
    row = run.ledger.rows[-1]
    assert row.figures["limits raised"].value == "yes"
    assert row.figures["selection bytes"].value == least
    assert row.outcome == f"blocks at sparsity 0.8; limits raised to {least} bytes"
    row = scaled(store, max_latency_ms=1e-6, relax=True).ledger.rows[-1]
    assert "limits raised to" in row.outcome
    assert row.outcome.endswith(" ms")


def test_limits_that_everything_keeps_change_nothing_of_the_network(store: Path) -> None:
    run = scaled(store, max_bytes=10**9, max_latency_ms=1e6)
    row = run.ledger.rows[-1]
    assert row.figures["val accuracy, estimated"].value >= lego(run).profile.accuracy  # type: ignore[operator]
    assert row.figures["limits raised"].value == "no"


# --- with other steps


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(
            (TRAIN, sparing.Distil(teacher="first", epochs=2, batch_size=16)),
            id="distil",
        ),
        pytest.param(
            (sparing.Leap(rho=0.2), sparing.WarmupCosine(warmup_share=0.2), sparing.Ema(decay=0.9), TRAIN),
            id="leap and schedule and average",
        ),
        pytest.param(
            (
                TRAIN,
                sparing.BlockPrune(sparsity=0.3, convolutions=True),
                sparing.Train(id="pruned", epochs=1, batch_size=16, lr=0.01),
                sparing.Shrink(),
            ),
            id="prune and shrink",
        ),
        pytest.param((TRAIN, sparing.Export()), id="export"),
        pytest.param((sparing.SmoothLabels(), TRAIN), id="smoothed labels"),
    ],
)
def test_behind_other_steps(before: tuple[sparing.Step, ...], store: Path) -> None:
    run = scaled(store, *before)
    assert run.ledger.ids == (*(step.id for step in before), "block_scaling")
    predictor = lego(run)
    assert predictor.options == 3 ** len(predictor.current)
    predictor.apply([0] * len(predictor.current))
    x = images(5)
    model = run.job.fresh_model().eval()
    import torch

    with torch.no_grad():
        np.testing.assert_allclose(predictor(x), model(torch.from_numpy(x)).numpy(), atol=1e-4)


INT8 = sparing.Quantize(id="int8", goal="bytes", max_loss=1.0, samples=16)
EXITS = sparing.PredictiveExit(codewords=2, epochs=1, batch_size=16, max_loss=0.9)


@pytest.mark.parametrize(
    ("before", "kind", "reason"),
    [
        ((), RecipeError, "'block_scaling' needs 'trained'"),
        ((TRAIN, INT8), IncompatibleStep, "int8.*would be lost: leave the quantisation out"),
        ((TRAIN, EXITS), RecipeError, "'block_scaling' needs 'module'.*'predictive_exit' at .* takes it away"),
        ((TRAIN, sparing.BlockScaling(id="lego")), RecipeError, "needs 'module'.*'lego' at .* takes it away"),
        (
            (TRAIN, sparing.BlockPrune(convolutions=True), sparing.Train(id="again")),
            RecipeError,
            "'block_prune' promises sparsity, which no later step realises",
        ),
        ((TRAIN, sparing.Leap()), RecipeError, "'leap' promises training"),
    ],
)
def test_behind_what_it_refuses(before: Any, kind: type[Exception], reason: str, store: Path) -> None:
    steps = [*before, sparing.BlockScaling(**QUICKLY)]
    with pytest.raises(kind, match=reason):
        sparing.run(task=tiny_task(), steps=steps, store=store, meter=QUICK)


def test_a_compiled_network_is_refused(store: Path) -> None:
    texts = sparing.TextClassification("words", ["good", "bad", "so good", "so bad"] * 12, [0, 1] * 24, length=8)
    model = {"name": "bert", "dim": 16, "depth": 1, "heads": 2}
    steps = [TRAIN, sparing.Compile(max_batch=4, samples=8, tolerance=0.9), sparing.BlockScaling(**QUICKLY)]
    with pytest.raises(IncompatibleStep, match="'block_scaling' cuts a module or onnx predictor; the job has a"):
        sparing.run(task=texts, model=model, steps=steps, store=store, meter=QUICK)


@pytest.mark.parametrize(
    ("after", "kind", "reason"),
    [
        (sparing.Train(id="more"), RecipeError, "'more' needs 'module'.*'block_scaling' at .* takes it away"),
        (EXITS, RecipeError, "'predictive_exit' needs 'module'"),
        (sparing.Shrink(), RecipeError, "'shrink' needs 'module'"),
        (INT8, IncompatibleStep, "'int8' quantises a module or onnx predictor; the job has one of kind 'lego'"),
        (sparing.Export(), Exception, "kind 'lego'"),
    ],
)
def test_what_cannot_follow(after: sparing.Step, kind: type[Exception], reason: str, store: Path) -> None:
    steps = [TRAIN, sparing.BlockScaling(**QUICKLY), after]
    with pytest.raises(kind, match=reason):
        sparing.run(task=tiny_task(), steps=steps, store=store, meter=QUICK)


def test_a_network_without_blocks_is_named(store: Path) -> None:
    one = {"name": "convnet", "num_classes": 3, "image_size": 8, "widths": [4]}
    steps = [TRAIN, sparing.BlockScaling(**QUICKLY)]
    with pytest.raises(NoEffect, match="ConvNet has 1 convolutions"):
        sparing.run(task=tiny_task(), model=one, steps=steps, store=store, meter=QUICK)
    with pytest.raises(NoEffect, match="larger sparsities"):
        scaled(store, sparsities=(0, 0.01))


def test_validation_data_without_a_figure_are_refused(tmp_path: Path) -> None:
    from sparing.core.task import Evaluation

    task = tiny_task()
    usual = task.evaluate

    def evaluate(predictor: Any, split: Any) -> Evaluation:
        found = usual(predictor, split)
        nan = predictor.kind == "lego"
        return Evaluation({**found.metrics, "accuracy": float("nan")}, None) if nan else found

    task.evaluate = evaluate  # type: ignore[method-assign]
    with pytest.raises(DataError, match="accuracy = nan"):
        sparing.run(task=task, steps=[TRAIN, sparing.BlockScaling(**QUICKLY)], store=tmp_path, meter=QUICK)


# --- fields


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_ratio": 0}, "max_ratio"),
        ({"max_ratio": 1.5}, "max_ratio"),
        ({"sparsities": (0, 1.0)}, "sparsity = 1.0"),
        ({"sparsities": (0, -0.1)}, "sparsity = -0.1"),
        ({"sparsities": (0, 0.4, 0.4)}, "each once"),
        ({"sparsities": (0.2, 0.4)}, "0 first"),
        ({"sparsities": ()}, "0 first"),
        ({"boundaries": []}, "boundaries"),
        ({"boundaries": [["a"]]}, "boundaries"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0}, "lr"),
        ({"n_jobs": 0}, "n_jobs = 0"),
        ({"n_jobs": 2, "device": "cuda"}, "device = 'cuda' with n_jobs = 2"),
        ({"device": "abacus"}, "device = 'abacus'"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"max_latency_ms": 0}, "max_latency_ms"),
        ({"residency": "cloud"}, "residency"),
        ({"scorer": "l3"}, "scorer"),
    ],
)
def test_fields_are_checked(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        sparing.BlockScaling(**fields)


def test_fields_are_checked_without_torch() -> None:
    program = "import sys, sparing; sparing.BlockScaling(sparsities=(0, 0.5)); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- commands


def test_run_report_and_bench_from_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text(
        """
task: digits
model: {name: convnet, widths: [4, 8]}
meter: {min_seconds: 0, max_seconds: 0.05, memory: false}
steps:
  - train: {epochs: 1}
  - block_scaling: {epochs: 1, sparsities: [0, 0.5], runs: 2, samples: 50}
"""
    )
    assert main(["run", str(tmp_path / "mine.yaml"), "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "bytes loaded" in (tmp_path / "out" / "report.html").read_text()
    assert main(["explain", str(tmp_path / "out"), "block_scaling"]) == 0
    assert "all blocks at 0.5" in capfd.readouterr().out
    assert main(["bench", str(tmp_path / "out" / "model"), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["description"]["kind"] == "lego"
    assert document["figures"]["accuracy"]["value"] > 0
    assert document["figures"]["latency p50"]["value"] > 0
    assert document["figures"]["peak memory"]["value"] > 0
    assert document["description"]["fetched_bytes"] < document["description"]["model_bytes"]
    assert document["figures"]["model bytes"]["value"] == document["description"]["model_bytes"]
