"""Two processes train like one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from points import CountingProgress, Points, PointTask, assert_same, killed, network
from torch import nn

from sparing.core.errors import TrainingDiverged
from sparing.core.task import Splits
from sparing.core.training import FitResult, Train, fit

ONE = Train(
    epochs=2, batch_size=15, optimizer="SGD", optimizer_args={"momentum": 0.9}, lr=0.1, scheduler="cosine",
    accelerator="cpu", restore_best=True,
)  # fmt: skip
TWO = replace(ONE, devices=2)


@pytest.fixture
def points() -> Splits:
    # 91 = 6 × 15 + 1: uneven shares everywhere, and a last batch of which one process gets nothing
    return Splits(Points(91, 0), Points(60, 1), Points(30, 2), Points(60, 3))


def train(settings: Train, data: Splits, task: PointTask | None = None, model: nn.Module | None = None) -> FitResult:
    model = network(norm=False, dropout=0.0) if model is None else model
    return fit(model, task or PointTask(), data.train, data.val, settings, seed=3)


def assert_close(one: FitResult, two: FitResult) -> None:
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    for name, points in one.curves.items():
        torch.testing.assert_close(torch.tensor(two.curves[name]), torch.tensor(points), rtol=1e-5, atol=1e-6)
    ours, theirs = one.record(), two.record()
    for record in (ours, theirs):
        record.pop("curves")
    assert ours == theirs


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_two_processes_make_the_weights_of_one(reduction: str, accumulate: int, points: Splits) -> None:
    change = {"accumulate": accumulate, "lr": 0.1 if reduction == "mean" else 0.002}
    one = train(replace(ONE, **change), points, PointTask(reduction))
    two = train(replace(TWO, **change), points, PointTask(reduction))
    assert one.steps == 2 * math.ceil(7 / accumulate)
    assert_close(one, two)
    assert two.remarks == ()


def test_best_epoch_comes_back_from_the_other_process(points: Splits) -> None:
    settings = replace(ONE, epochs=4, lr=3.0)  # so high that the best epoch is not the last
    one, two = train(settings, points), train(replace(settings, devices=2), points)
    assert one.best_epoch == two.best_epoch
    assert one.best_epoch is not None
    assert one.best_epoch < 4
    assert two.restored
    right = PointTask().evaluate(lambda x: two.model(torch.from_numpy(x)).detach().numpy(), points.val)
    assert right.metrics["accuracy"] == two.best_value


def test_batch_norm_and_dropout_are_named(points: Splits) -> None:
    result = train(replace(TWO, epochs=1, drop_last=True), points, model=network())
    assert len(result.remarks) == 2
    assert "batch norm (1) saw 8 samples at a time instead of 15" in result.remarks[0]
    assert "dropout (3)" in result.remarks[1]


def test_an_error_in_a_process_keeps_its_type(points: Splits) -> None:
    points.train.x[:] = math.nan
    with pytest.raises(TrainingDiverged, match="3 batches in a row"):
        train(replace(TWO, nan_patience=3), points)


def test_a_batch_skipped_by_one_process_is_skipped_by_both(points: Splits) -> None:
    points.train.x[17] = math.nan
    one, two = train(ONE, points), train(TWO, points)
    assert one.skipped == two.skipped == 2
    assert_close(one, two)


def test_started_afresh_instead_of_forked(points: Splits) -> None:
    assert_close(train(ONE, points), train(replace(TWO, strategy="ddp_spawn"), points))


def test_two_processes_print_nothing(points: Splits, capfd: pytest.CaptureFixture[str]) -> None:
    train(replace(TWO, epochs=1), points)
    assert capfd.readouterr() == ("", "")


def test_killed_and_resumed(points: Splits, tmp_path: Path) -> None:
    settings = replace(TWO, checkpoint_every_batches=2)
    whole = train(settings, points)

    def run(folder: Path, die: bool) -> tuple[FitResult, CountingProgress]:
        import os
        import signal

        class Dying(CountingProgress):
            def save(self, state: object) -> None:
                super().save(state)
                if die and self.saves == 5:
                    os.killpg(0, signal.SIGKILL)  # the trainer and both of its processes

        progress = Dying(folder)
        return fit(
            network(norm=False, dropout=0.0), PointTask(), points.train, points.val, settings, seed=3, progress=progress
        ), progress

    def alone() -> None:
        import os

        os.setpgrp()
        run(tmp_path, die=True)

    assert killed(alone)
    result, progress = run(tmp_path, die=False)
    assert progress.found[0] == {"epoch": 1, "consumed": 2}
    assert_same(whole, result)
