"""The steps export and transfer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import guests
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, NotExportable
from sparing.core.export import Export
from sparing.core.job import Job, TrainingPlan
from sparing.core.predictor import ModulePredictor, build_model, load, to_onnx
from sparing.core.store import Store
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.core.transfer import Transfer, transfer_model


class Sealed:
    """A test split that nobody may look at."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the test split was asked for {name}")

    def __len__(self) -> int:
        raise AssertionError("the test split was counted")


class Shapes(Task):
    metrics = (Metric("accuracy"),)
    capabilities = frozenset({"classification"})

    def __init__(self, name: str = "shapes", classes: int = 3, channels: int = 1) -> None:
        self.name, self.labels, self.channels = name, tuple("abcdefgh"[:classes]), channels

    def splits(self, root: Path | None) -> Splits:
        def part(rows: int) -> TensorDataset:
            return TensorDataset(torch.zeros(rows, self.channels, 8, 8), torch.zeros(rows, dtype=torch.long))

        return Splits(part(4), part(2), part(2), Sealed())

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        raise AssertionError("not here")

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return (torch.zeros(batch, self.channels, 8, 8),)

    def default_model(self) -> nn.Module:
        return build_model(guests.SmallNet, self)

    def model_fields(self) -> Mapping[str, Any]:
        return {"classes": len(self.labels), "num_classes": len(self.labels), "in_channels": self.channels}

    def fingerprint(self) -> str:
        return f"{self.name} {len(self.labels)} {self.channels}"


def job_of(task: Task, model: nn.Module, tmp_path: Path, predictor: Any = None) -> Job:
    splits = task.splits(None)
    return Job(
        task=task,
        train=splits.train,
        val=splits.val,
        calibration=splits.calibration,
        model=model,
        seed=0,
        store=Store(tmp_path / "steps").bind("test", seed=0),
        predictor=predictor or ModulePredictor(model, task),
    )


def test_export_makes_an_onnx_predictor(tmp_path: Path, images: np.ndarray) -> None:
    task = Shapes()
    job = job_of(task, task.default_model(), tmp_path)
    after = Export().apply(job)
    assert after.predictor is not None
    assert (after.predictor.kind, job.predictor.kind) == ("onnx", "module")  # type: ignore[union-attr]
    np.testing.assert_allclose(after.predictor(images), job.predictor(images), atol=1e-5)  # type: ignore[misc]
    assert after.predictor.labels == ("a", "b", "c")
    assert job.notes.figures["largest difference from the module"].value < 1e-5  # type: ignore[operator]
    with pytest.raises(NoEffect, match="already"):
        Export().apply(after)
    with pytest.raises(IncompatibleStep, match="'onnx'"):
        Export(format="torch_export").apply(after)
    with pytest.raises(InvalidValue, match="torch_export"):
        Export(format="tflite")


@pytest.mark.slow
def test_torch_export_lies_beside_the_model_and_runs_elsewhere(tmp_path: Path, images: np.ndarray) -> None:
    task = Shapes()
    job = job_of(task, task.default_model(), tmp_path)
    after = Export(format="torch_export").apply(job)
    assert after.predictor is not None
    folder = to_onnx(after.predictor, task=task).save(tmp_path / "model")
    assert (folder / "model.pt2").stat().st_size == job.notes.figures["model.pt2 bytes"].value
    assert load(folder).attachments["model.pt2"] == (folder / "model.pt2").read_bytes()
    np.save(tmp_path / "images.npy", images)
    code = (  # what a receiver does, in a process of his own that knows nothing of the model's class
        "import torch, numpy as np\n"
        f"program = torch.export.load({str(folder / 'model.pt2')!r})\n"
        f"images = torch.from_numpy(np.load({str(tmp_path / 'images.npy')!r}))\n"
        f"np.save({str(tmp_path / 'answer.npy')!r}, program.module()(images).detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "answer.npy"), job.predictor(images), atol=1e-5)  # type: ignore[misc]


def test_torch_export_says_why_not(tmp_path: Path) -> None:
    task = Shapes()
    with pytest.raises(NotExportable, match="data-dependent"):
        Export(format="torch_export").apply(job_of(task, guests.Branching(), tmp_path))


def test_transfer_keeps_the_trunk_and_begins_a_head_of_another_size(tmp_path: Path) -> None:
    old, new = Shapes("old", 3), Shapes("new", 5)
    model = build_model(guests.SmallNet, old, width=6)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    job = job_of(old, model, tmp_path)
    after = Transfer(task=new).apply(job)
    assert (after.task, after.predictor, len(after.train)) == (new, None, 4)
    moved = after.model.state_dict()
    assert moved["head.weight"].shape == (5, 6)
    assert all(torch.equal(moved[name], state[name]) for name in state if not name.startswith("head"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert job.notes.remarks == ["old → new; begun anew: head"]
    torch.manual_seed(99)
    again = Transfer(task=new).apply(job)
    assert torch.equal(again.model.state_dict()["head.weight"], moved["head.weight"])


def test_transfer_between_equal_heads_keeps_everything(tmp_path: Path) -> None:
    job = job_of(Shapes("old"), build_model(guests.SmallNet), tmp_path)
    after = Transfer(task=Shapes("new")).apply(job)
    assert all(torch.equal(tensor, after.model.state_dict()[name]) for name, tensor in job.model.state_dict().items())
    assert job.notes.remarks == ["old → new; begun anew: no layer"]


def test_a_trunk_that_does_not_fit_is_refused_with_both_shapes() -> None:
    model = build_model("convnet", Shapes(), widths=[4, 8], image_size=8)
    with pytest.raises(IncompatibleStep, match=r"\(4, 1, 3, 3\).*\(4, 3, 3, 3\)"):
        transfer_model(model, Shapes("old"), Shapes("new", channels=3))


def test_models_built_by_hand_get_a_new_linear_head_or_are_refused() -> None:
    by_hand = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))
    moved, begun = transfer_model(by_hand, Shapes("old", 3), Shapes("new", 5))
    assert (moved[3].out_features, begun, by_hand[3].out_features) == (5, ["3"], 3)
    assert torch.equal(moved[1].weight, by_hand[1].weight)
    with pytest.raises(IncompatibleStep, match="build_model"):
        transfer_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 9)), Shapes("old", 3), Shapes("new", 5))
    with pytest.raises(IncompatibleStep, match="does not run"):
        transfer_model(by_hand, Shapes("old", 3), Shapes("new", 3, channels=2))


def test_transfer_checks_its_fields_and_the_plan(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="'digits'"):
        Transfer(task="digit")
    with pytest.raises(InvalidValue, match="colour"):
        Transfer(task={"name": "digits", "colour": True})
    with pytest.raises(InvalidValue, match="name is needed"):
        Transfer(task={"classes": 3})
    job = job_of(Shapes(), build_model(guests.SmallNet), tmp_path)
    planned = job.replace(training=TrainingPlan().adding(callbacks=lambda: None))
    with pytest.raises(IncompatibleStep, match="train first"):
        Transfer(task=Shapes("new")).apply(planned)
