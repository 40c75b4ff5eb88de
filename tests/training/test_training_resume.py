"""A training that is killed and started again ends with the bits of one that was never interrupted."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from points import CountingProgress, KillingTask, PointTask, assert_same, killed, network
from torch import nn

from sparing.core.errors import InvalidValue
from sparing.core.job import TrainingPlan
from sparing.core.task import Splits
from sparing.core.training import FitResult, Train, fit

# 90 samples in batches of 16: 6 batches, the last short; with 4 epochs 24 calls of the loss and 4 of evaluate
SETTINGS = {
    "sgd": Train(
        epochs=4, batch_size=16, optimizer="SGD", lr=0.1, optimizer_args={"momentum": 0.9}, scheduler="cosine",
        warmup_steps=3, gradient_clip=1.0, checkpoint_every_batches=1,
    ),
    "adam": Train(
        epochs=4, batch_size=16, lr=0.02, weight_decay=0.1, scheduler="one_cycle", accumulate=4, restore_best=True,
        checkpoint_every_batches=1,
    ),
    "stopping": Train(
        epochs=6, batch_size=16, lr=0.2, scheduler="ReduceLROnPlateau", scheduler_args={"patience": 0},
        early_stopping=2, restore_best=True, checkpoint_every_batches=4,
    ),
    "steps": Train(max_steps=15, batch_size=16, lr=0.05, monitor="loss", restore_best=True, checkpoint_every_batches=5),
}  # fmt: skip


class Averager(Callback):
    """Keeps a running mean of the weights in its own state and puts it in place at the end."""

    def __init__(self) -> None:
        self.mean: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for name, value in pl_module.model.named_parameters():
            old = self.mean.get(name, torch.zeros_like(value))
            self.mean[name] = old * 0.8 + value.detach() * 0.2 + 1e-3 * torch.randn_like(value)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for name, value in pl_module.model.named_parameters():
            value.data.copy_(self.mean[name])

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


class Lookahead(torch.optim.Optimizer):
    """An optimizer around another one, with a state of its own (Zhang et al. 2019)."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self.calls = 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.inner.step(closure)
        self.calls += 1
        if self.calls % 3 == 0:
            for slow, p in zip(self.slow, (p for group in self.param_groups for p in group["params"]), strict=True):
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
        return loss

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        return {"inner": self.inner.state_dict(), "slow": self.slow, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # type: ignore[override]
        self.inner.load_state_dict(state["inner"])
        self.param_groups = self.inner.param_groups
        self.slow, self.calls = state["slow"], state["calls"]


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.rand(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x * self.scale)


def wrapped(model: nn.Module) -> Any:
    outer = Scaled(model)

    def undo() -> nn.Module:
        with torch.no_grad():
            model[0].weight.mul_(outer.scale)
        return model

    return outer, undo


ECONOMIES = (
    TrainingPlan()
    .adding(model_wraps=wrapped)
    .adding(wrap_optimizer=Lookahead)
    .adding(batch_transforms=lambda: lambda batch: (batch[0] * torch.rand(1), batch[1]))
    .adding(loss_terms=lambda: lambda loss, outputs, batch, model: loss + 0.01 * outputs.square().mean())
    .adding(callbacks=Averager)
)


def train(settings: Train, data: Splits, task: PointTask, folder: Path | None, plan: TrainingPlan | None = None) -> Any:
    progress = None if folder is None else CountingProgress(folder)
    return fit(network(), task, data.train, data.val, settings, plan, seed=7, progress=progress), progress


def resumed(
    settings: Train, data: Splits, folder: Path, kills: tuple[int, ...], plan: TrainingPlan | None = None
) -> tuple[FitResult, CountingProgress]:
    """Killed at each of these calls, counted from each start; then to the end."""
    for at in kills:
        assert killed(lambda at=at: train(settings, data, KillingTask(at), folder, plan))  # type: ignore[misc]
    return train(settings, data, PointTask(), folder, plan)


@pytest.mark.parametrize("name", SETTINGS)
def test_killed_anywhere(name: str, data: Splits, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    whole, _ = train(settings, data, PointTask(), None)
    positions = set()
    # 5: last batch of an epoch, 6: in its validation, 7 and 8: after its end; and later ones
    for at in (0, 1, 3, 5, 6, 7, 8, 12, 13, 17):
        result, progress = resumed(settings, data, tmp_path / str(at), (at,))
        assert_same(whole, result)
        positions.add(str(progress.found[0]))
    assert len(positions) > 3  # not all went on from the same state


def test_killed_at_every_moment_of_the_last_epoch(data: Splits, tmp_path: Path) -> None:
    settings = SETTINGS["sgd"]
    whole, _ = train(settings, data, PointTask(), None)
    for at in range(21, 28):
        result, progress = resumed(settings, data, tmp_path / str(at), (at,))
        assert progress.found[0]["epoch"] == 3
        assert_same(whole, result)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twice_in_a_row(workers: int, data: Splits, tmp_path: Path) -> None:
    from dataclasses import replace

    settings = replace(SETTINGS["adam"], workers=workers)
    whole, _ = train(SETTINGS["adam"], data, PointTask(), None)
    result, progress = resumed(settings, data, tmp_path, (6, 9))
    assert progress.found[0]["epoch"] == 2
    assert_same(whole, result)


def test_all_slots_of_the_plan(data: Splits, tmp_path: Path) -> None:
    settings = SETTINGS["sgd"]
    whole, _ = train(settings, data, PointTask(), None, ECONOMIES)
    assert not any(isinstance(layer, Scaled) for layer in whole.model.modules())
    without, _ = train(settings, data, PointTask(), None)
    assert not torch.equal(whole.model[0].weight, without.model[0].weight)
    for at in (4, 6, 14, 27):
        assert_same(whole, resumed(settings, data, tmp_path / str(at), (at,), ECONOMIES)[0])


def test_saving_changes_nothing_and_the_end_is_not_saved(data: Splits, tmp_path: Path) -> None:
    settings = SETTINGS["sgd"]
    result, progress = train(settings, data, PointTask(), tmp_path)
    assert_same(train(settings, data, PointTask(), None)[0], result)
    assert progress.saves == 4 * 6 + 3  # every batch, and every epoch's end but the last
    state = progress.load()
    assert state["position"] == {"epoch": 3, "consumed": 6}
    # a kill after the training but before its result is stored: the end is lived through again
    assert_same(result, train(settings, data, PointTask(), tmp_path)[0])


def test_damaged_newest_state_falls_back(data: Splits, tmp_path: Path) -> None:
    settings = SETTINGS["sgd"]
    whole, _ = train(settings, data, PointTask(), None)
    assert killed(lambda: train(settings, data, KillingTask(10), tmp_path))
    newest = max(tmp_path.glob("*.state"))
    newest.write_bytes(newest.read_bytes()[:-7])
    result, progress = train(settings, data, PointTask(), tmp_path)
    assert_same(whole, result)
    assert progress.found[0] is not None


def test_saves_by_the_clock(data: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("sparing.core.training.loop.time.monotonic", lambda: float(next(ticks)))
    _, progress = train(Train(epochs=2, batch_size=16, checkpoint_every_s=4), data, PointTask(), tmp_path)
    assert 1 <= progress.saves < 12


def test_same_result_for_any_number_of_workers_and_another_for_another_seed(data: Splits) -> None:
    results = [
        fit(network(), PointTask(), data.train, data.val, Train(epochs=2, batch_size=16, workers=workers), seed=seed)
        for workers, seed in ((0, 1), (2, 1), (0, 2))
    ]
    assert_same(results[0], results[1])
    assert not torch.equal(results[0].model[0].weight, results[2].model[0].weight)


@pytest.mark.parametrize(
    "scheduler",
    ["ConstantLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "ExponentialLR", "LinearLR",
     "MultiStepLR", "OneCycleLR", "PolynomialLR", "ReduceLROnPlateau", "StepLR"],
)  # fmt: skip
def test_every_schedule_survives(scheduler: str, data: Splits, tmp_path: Path) -> None:
    needed = {
        "CosineAnnealingWarmRestarts": {"T_0": 5}, "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},
        "ExponentialLR": {"gamma": 0.9}, "MultiStepLR": {"milestones": [3, 6]}, "StepLR": {"step_size": 2},
    }  # fmt: skip
    settings = Train(
        epochs=2, batch_size=16, optimizer="SGD", optimizer_args={"momentum": 0.9}, lr=0.1, scheduler=scheduler,
        scheduler_args=needed.get(scheduler, {}), checkpoint_every_batches=2,
    )  # fmt: skip
    whole, _ = train(settings, data, PointTask(), None)
    result, progress = resumed(settings, data, tmp_path, (8,))
    assert progress.found[0] == {"epoch": 1, "consumed": 0}
    assert_same(whole, result)


@pytest.mark.parametrize(
    "optimizer",
    ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop",
     "Rprop", "SGD"],
)  # fmt: skip
def test_every_optimizer_survives(optimizer: str, data: Splits, tmp_path: Path) -> None:
    settings = Train(epochs=2, batch_size=30, optimizer=optimizer, lr=0.01, checkpoint_every_batches=1)
    calls = 25 if optimizer == "LBFGS" else 5
    whole, _ = train(settings, data, PointTask(), None)
    result, progress = resumed(settings, data, tmp_path, (calls,))
    assert progress.found[0] is not None
    assert_same(whole, result)


class Hoarder(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"deep": [{"thing": object()}]}


def test_a_state_that_cannot_be_kept_is_named(data: Splits, tmp_path: Path) -> None:
    plan = TrainingPlan().adding(callbacks=Hoarder)
    with pytest.raises(InvalidValue, match=r"holds a object at callbacks\.Hoarder\.deep\[0\]\.thing"):
        train(SETTINGS["sgd"], data, PointTask(), tmp_path, plan)
