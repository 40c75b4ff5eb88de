"""The moving average of weights: its equation, what is handed on, exact resumption, and a script of one's own."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparing
from sparing.core.errors import InvalidValue, RecipeError
from sparing.core.job import TrainingPlan
from sparing.core.store import Progress, Store
from sparing.core.task import Evaluation, Metric, Splits, Task
from sparing.core.training import FitResult, Train, fit
from sparing.optimization.averaging import Ema, warmed_decay
from sparing.optimization.averaging_lightning import WeightAverage
from sparing.testing import QUICK, tiny_task
from sparing.testing.kills import survives_kills

SETTINGS = Train(epochs=3, batch_size=16, lr=0.05, optimizer="SGD", checkpoint_every_batches=1)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


class Pairs(Task):
    """Two classes of points. ``scores``: what validations find, in turn, in place of the accuracy."""

    name = "pairs"
    metrics = (Metric("accuracy"),)
    capabilities = frozenset({"classification"})
    labels = ("no", "yes")

    def __init__(self, scores: tuple[float, ...] = ()) -> None:
        self.script = list(scores)

    def splits(self, root: Any = None) -> Splits:
        def part(count: int, seed: int) -> TensorDataset:
            x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
            return TensorDataset(x, (x[:, 0] > 0).long())

        return Splits(part(80, 0), part(40, 1), part(40, 2), part(40, 3))

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        x, y = split.tensors
        right = (torch.as_tensor(predictor(x.numpy())).argmax(1) == y).double().numpy()
        return Evaluation({"accuracy": self.script.pop(0) if self.script else float(right.mean())}, right)

    def example_input(self, batch: int = 2) -> tuple[torch.Tensor]:
        return (torch.zeros(batch, 4),)

    def default_model(self) -> nn.Module:
        return network()


def average(average: WeightAverage, settings: Train = SETTINGS, task: Task | None = None, **more: Any) -> FitResult:
    task = task or Pairs()
    data = task.splits(None)
    plan = TrainingPlan().adding(callbacks=lambda: average)
    return fit(network(), task, data.train, more.pop("val", data.val), settings, plan, seed=3, **more)


class Track(pl.Callback):
    """The states of the network after each optimizer step."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.step = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        if trainer.global_step > self.step:
            self.step = trainer.global_step
            self.states.append({name: value.clone() for name, value in pl_module.model.state_dict().items()})


def by_hand(states: list[dict[str, torch.Tensor]], decay: Any) -> dict[str, torch.Tensor]:
    mean = {name: value.clone().double() for name, value in states[0].items()}
    for t, state in enumerate(states[1:], start=1):
        for name, value in state.items():
            mean[name] = decay(t) * mean[name] + (1 - decay(t)) * value.double()
    return {name: states[-1][name] if "num_batches" in name else value for name, value in mean.items()}


def assert_state(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-5, atol=1e-6, msg=name)


def test_the_decay_grows_to_what_is_asked():
    assert [warmed_decay(0.9998, t) for t in (0, 1, 8, 90)] == pytest.approx([0.1, 2 / 11, 0.5, 0.91])
    assert warmed_decay(0.9998, 44_000) < 0.9998
    assert warmed_decay(0.9998, 45_000) == 0.9998
    with pytest.raises(InvalidValue, match="decay = 1"):
        warmed_decay(1, 0)
    with pytest.raises(InvalidValue, match="use = 'mean'"):
        WeightAverage(use="mean")


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("warmup", [True, False])
def test_it_is_the_average_of_all_steps_running_statistics_included(warmup, accumulate):
    track, callback = Track(), WeightAverage(0.7, warmup=warmup, use="raw")
    result = average(callback, replace(SETTINGS, accumulate=accumulate), callbacks=[track])
    assert len(track.states) == result.steps == (15 if accumulate == 1 else 9)
    assert callback.updates == result.steps
    expected = by_hand(track.states, lambda t: min(0.7, (1 + t) / (10 + t)) if warmup else 0.7)
    assert_state(callback.averaged, expected)
    assert_state(result.model, track.states[-1])  # raw
    assert not torch.equal(expected["1.running_mean"], track.states[-1]["1.running_mean"].double())


def test_a_fixed_high_decay_hardly_leaves_the_first_step():
    """Why the warm-up is on by default."""
    first, last = Track(), None
    fixed, warmed = WeightAverage(0.9998, warmup=False, use="raw"), WeightAverage(0.9998, use="raw")
    average(fixed, callbacks=[first])
    average(warmed)
    first, last = first.states[0]["0.weight"], first.states[-1]["0.weight"]
    way = (last - first).norm()
    assert (fixed.averaged[0].weight - first).norm() < 0.01 * way
    assert (warmed.averaged[0].weight - last).norm() < 0.5 * way


@pytest.mark.parametrize("use", ["ema", "raw", "best"])
def test_both_are_scored_and_the_chosen_one_is_handed_on(use):
    # three validations, the trained weights before the average each time
    for last, better in (((0.5, 0.6), "ema"), ((0.6, 0.5), "raw"), ((0.5, 0.5), "raw")):
        callback, track = WeightAverage(0.8, use=use), Track()
        task = Pairs((0.1, 0.9, 0.9, 0.1, *last))
        result = average(callback, task=task, callbacks=[track])
        assert [value for _, value in result.curves["val_accuracy"]] == [0.1, 0.9, last[0]]
        assert [value for _, value in result.curves["val_ema_accuracy"]] == [0.9, 0.1, last[1]]
        chosen = better if use == "best" else use
        assert_state(result.model, dict((callback.averaged if chosen == "ema" else track_model(track)).state_dict()))
        assert result.best_value == 0.9
        assert result.best_epoch == (1 if use in ("ema", "best") else 2)
        said = " ".join(result.remarks)
        assert said == {
            ("best", "ema"): "the weights 'ema' were the best on the validation data and are handed on",
            ("best", "raw"): "the trained weights were the best on the validation data and are handed on",
        }.get((use, chosen), "")


def track_model(track: Track) -> nn.Module:
    model = network()
    model.load_state_dict(track.states[-1])
    return model


@pytest.mark.parametrize(("use", "epoch", "which"), [("ema", 1, "ema"), ("raw", 2, "raw"), ("best", 2, "raw")])
def test_restore_best_and_early_stopping_go_by_what_is_handed_on(use, epoch, which):
    class Ends(pl.Callback):
        def __init__(self) -> None:
            self.ema: list[Any] = []
            self.raw: list[Any] = []

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            for kept, model in ((self.ema, callback.averaged), (self.raw, pl_module.model)):
                kept.append({name: value.clone() for name, value in model.state_dict().items()})

    callback, ends = WeightAverage(0.8, use=use), Ends()
    task = Pairs((0.3, 0.8, 0.9, 0.2, 0.1, 0.2))
    settings = replace(SETTINGS, restore_best=True, early_stopping=2, epochs=9)
    result = average(callback, settings, task, callbacks=[ends])
    assert result.best_epoch == epoch
    assert result.epochs == epoch + 2
    assert_state(result.model, getattr(ends, which)[epoch - 1])


def test_the_loss_is_scored_for_both():
    result = average(WeightAverage(0.9), replace(SETTINGS, monitor="loss"))
    assert len(result.curves["val_loss"]) == len(result.curves["val_ema_loss"]) == 3
    assert result.curves["val_loss"] != result.curves["val_ema_loss"]
    assert result.best_value == min(value for _, value in result.curves["val_ema_loss"])


def test_without_validation_data_there_is_an_average_and_no_choice():
    callback = WeightAverage(0.8)
    assert_state(average(callback, val=None).model, dict(callback.averaged.state_dict()))
    with pytest.raises(InvalidValue, match="choice between the trained and ema weights needs validation data"):
        average(WeightAverage(use="best"), val=None)


@pytest.mark.parametrize("use", ["ema", "best"])
def test_two_processes_bring_the_same_average_home(use):
    settings = replace(SETTINGS, accelerator="cpu", batch_size=20)
    data = Pairs().splits()

    def trained(devices: int) -> FitResult:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        plan = TrainingPlan().adding(callbacks=lambda: WeightAverage(0.9, use=use))
        return fit(model, Pairs(), data.train, data.val, replace(settings, devices=devices), plan, seed=3)

    one, two = trained(1), trained(2)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(two.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert one.remarks == two.remarks
    assert len(one.remarks) == (use == "best")


# --------------------------------------------------------------------------------------------------------- resumption


class Deadly(Pairs):
    """Kills its process at the given call of ``loss`` or ``evaluate``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        self._count()
        return super().loss(outputs, batch)

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        self._count()
        return super().evaluate(predictor, split)


class Forgetful(WeightAverage):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def killed(run: Any) -> bool:
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(1)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("use", ["ema", "best"])
def test_killed_anywhere_it_ends_with_the_same_bits(use, tmp_path):
    whole = average(WeightAverage(0.9, use=use))
    # 5 batches and 2 validations in each of 3 epochs
    for at in (0, 1, 4, 5, 6, 7, 9, 13, 20):
        folder = tmp_path / str(at)
        run = lambda: average(WeightAverage(0.9, use=use), task=Deadly(at), progress=Progress(folder))  # noqa: B023, E731
        assert killed(run)
        again = average(WeightAverage(0.9, use=use), progress=Progress(folder))
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, again.model.state_dict()[name]), (at, name)
        assert whole.record() == again.record()


def test_the_state_is_what_makes_it_resume(tmp_path):
    whole = average(WeightAverage(0.9))
    assert killed(lambda: average(Forgetful(0.9), task=Deadly(9), progress=Progress(tmp_path)))
    again = average(Forgetful(0.9), progress=Progress(tmp_path))
    assert not torch.equal(whole.model[0].weight, again.model[0].weight)


def test_in_a_run_that_is_killed(tmp_path):
    steps = [Ema(decay=0.9, use="best"), Train(epochs=2, batch_size=16, checkpoint_every_batches=1)]
    done = survives_kills(
        lambda place: sparing.run(
            task=tiny_task(), steps=steps, meter=QUICK, store=Store(place / "store"), out=place / "out"
        ),
        tmp_path,
        deaths=4,
    )
    curves = done.ledger.rows[-1].curves
    assert len(curves["val_accuracy"]) == len(curves["val_ema_accuracy"]) == 2


# ------------------------------------------------------------------------------------------- elsewhere, and the step


class Script(pl.LightningModule):
    """Somebody's own Lightning module."""

    def __init__(self, name: str = "model") -> None:
        super().__init__()
        setattr(self, name, network())
        self.net = name

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(getattr(self, self.net)(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


def script(module: Script, *callbacks: pl.Callback, **more: Any) -> Script:
    trainer = pl.Trainer(
        max_epochs=3, callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", **more,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Pairs().splits().train, 16))
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", ["ema", "raw"])
def test_in_anybodys_lightning_script(use):
    callback, track = WeightAverage(0.6, warmup=False, use=use), Track()
    module = script(Script(), callback, track)
    expected = by_hand(track.states, lambda t: 0.6)
    assert_state(callback.averaged, expected)
    assert_state(module.model, expected if use == "ema" else track.states[-1])


@pytest.mark.filterwarnings("ignore")
def test_what_a_script_lacks_is_named():
    with pytest.raises(InvalidValue, match="network = 'model': Script has no such module"):
        script(Script("net_"), WeightAverage())
    callback = WeightAverage(network="net_")
    assert_state(script(Script("net_"), callback).net_, dict(callback.averaged.state_dict()))
    with pytest.raises(InvalidValue, match="needs a training of Sparing"):
        script(Script(), WeightAverage(use="best"))
    with pytest.raises(InvalidValue, match="no average yet"):
        _ = WeightAverage().averaged


def test_the_step_puts_it_into_a_run():
    steps = [Ema(decay=0.95), Train(epochs=2, batch_size=16)]
    run = sparing.run(task=tiny_task(), steps=steps, meter=QUICK, store=None)
    curves = run.ledger.rows[-1].curves
    assert len(curves["val_ema_accuracy"]) == 2
    raw = sparing.run(task=tiny_task(), steps=[Ema(use="raw"), steps[1]], meter=QUICK, store=None)
    plain = sparing.run(task=tiny_task(), steps=[steps[1]], meter=QUICK, store=None)
    for name, value in plain.job.model.state_dict().items():
        assert torch.equal(value, raw.job.model.state_dict()[name])  # looking at an average changes nothing
    assert any(
        not torch.equal(value, run.job.model.state_dict()[name]) for name, value in plain.job.model.state_dict().items()
    )
    assert not math.isnan(curves["val_ema_accuracy"][-1][1])


def test_two_averages_are_refused():
    with pytest.raises(RecipeError, match="average of weights, which 'ema'"):
        sparing.run(task=tiny_task(), steps=[Ema(), Ema(id="b"), Train(epochs=1)], meter=QUICK, store=None)
