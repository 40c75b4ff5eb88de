"""The step ``train``: fields, store, ledger notes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from points import PointTask, killed, network
from torch import nn

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.job import Job, TrainingPlan
from sparing.core.registry import name_of, resolve
from sparing.core.step import step
from sparing.core.store import Store
from sparing.core.training import Train

QUICK = Train(epochs=3, batch_size=16, lr=0.01, checkpoint_every_batches=1)


class CountingTask(PointTask):
    """Counts the losses computed; kills its process before the given one."""

    calls = 0
    kill_at = -1

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        if type(self).calls == type(self).kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        type(self).calls += 1
        return super().loss(outputs, batch)


@pytest.fixture
def job(store_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(CountingTask, "calls", 0)
    monkeypatch.setattr(CountingTask, "kill_at", -1)
    task = CountingTask()
    splits = task.splits(None)
    bound = Store(store_folder).bind("points", seed=5).child("train")
    return Job(task, splits.train, splits.val, splits.calibration, network(), 5, bound)


def test_registered_and_cheap_to_import() -> None:
    assert resolve("steps", "train") is Train
    assert name_of("steps", Train) == "train"
    code = (
        "import sys; from sparing.core.training import Train, Batches, fit; Train(scheduler='cosine');"
        "print({'torch', 'lightning'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_applied_once_and_read_back(job: Job) -> None:
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    made = QUICK.apply(job)
    assert CountingTask.calls == 18
    again = QUICK.apply(replace(job, notes=type(job.notes)()))
    assert CountingTask.calls == 18
    for name, value in job.model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the job's own model is untouched
        assert torch.equal(made.model.state_dict()[name], again.model.state_dict()[name])
    assert not torch.equal(made.model[0].weight, job.model[0].weight)
    assert made.training == TrainingPlan()
    x = job.val.x.numpy()
    assert (made.predictor(x) == again.predictor(x)).all()  # type: ignore[misc]
    assert job.notes.figures["training samples"].value == 270
    assert job.notes.figures["optimizer steps"].value == 18
    assert list(job.notes.curves) == ["train_loss", "lr", "val_accuracy", "val_error"]


def test_killed_inside_the_step(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = QUICK.apply(replace(job, store=Store(tmp_path / "other").bind("points", seed=5).child("train")))
    monkeypatch.setattr(CountingTask, "calls", 0)
    monkeypatch.setattr(CountingTask, "kill_at", 10)
    assert killed(lambda: QUICK.apply(job))
    monkeypatch.setattr(CountingTask, "kill_at", -1)
    resumed = QUICK.apply(job)
    assert CountingTask.calls == 8  # of 18: the first ten were kept
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@step("halving")
class Halving(Train):
    """A training economy by subclassing: another model and a loss term."""

    weight: float = 0.5

    def prepare(self, job: Job) -> tuple[nn.Module, TrainingPlan]:
        model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 3))

        def term() -> Any:
            return lambda loss, outputs, batch, model: loss * self.weight

        return model, job.training.adding(loss_terms=term)


def test_a_subclass_swaps_the_model_and_adds_a_term(job: Job) -> None:
    halving = Halving(epochs=2, batch_size=16, optimizer="SGD", lr=0.1)
    one = halving.apply(job)
    assert [tuple(value.shape) for value in one.model.state_dict().values()] == [(4, 8), (4,), (3, 4), (3,)]
    # half the loss at twice the rate is the same training
    twin = Halving(epochs=2, batch_size=16, optimizer="SGD", lr=0.2, weight=0.25)
    other = twin.apply(replace(job, store=job.store.child("twin")))
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name])
    assert halving.name == "halving"


def test_a_wrap_must_undo_what_it_changed(job: Job) -> None:
    def grow(model: nn.Module) -> Any:
        grown = nn.Sequential(*model, nn.Linear(3, 3))
        return grown, lambda: grown

    with pytest.raises(IncompatibleStep, match=r"(?s)another structure .*undo.*5\.weight"):
        QUICK.apply(replace(job, training=TrainingPlan().adding(model_wraps=grow)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adm"}, "unknown optimizer 'adm'. Did you mean 'Adam'?"),
        ({"optimizer": "SGD", "optimizer_args": {"momentm": 1}}, "no argument 'momentm'. Did you mean 'momentum'?"),
        ({"scheduler": "cosin"}, "unknown scheduler 'cosin'. Did you mean 'cosine'?"),
        ({"scheduler": "StepLR", "scheduler_args": {"T_max": 3}}, "no argument 'T_max'. Arguments: step_size, gamma"),
        ({"scheduler": "LambdaLR"}, "LambdaLR is made of Python objects"),
        ({"scheduler_args": {"T_max": 3}}, "no scheduler is named"),
        ({"decay": "matrices"}, "decay = 'matrices' says what weight_decay acts on, but weight_decay = 0"),
        ({"decay": "norms", "weight_decay": 0.1}, "decay = 'norms'"),
        ({"epochs": 0}, "epochs = 0: Input should be greater than or equal to 1"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"epoch": 3}, "unknown field 'epoch'. Did you mean 'epochs'?"),
    ],
)  # fmt: skip
def test_fields_are_checked_when_the_step_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        Train(**fields)
    assert message in str(caught.value)
    assert str(caught.value).startswith("train: ")
