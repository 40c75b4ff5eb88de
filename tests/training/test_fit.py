"""What a training does, apart from surviving kills."""

from __future__ import annotations

import logging
import math
import random
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from points import CLASSES, FEATURES, Points, PointTask, assert_same, network
from torch import nn
from torch.utils.data import TensorDataset

from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, TrainingDiverged
from sparing.core.job import TrainingPlan
from sparing.core.task import Evaluation, Metric, Splits
from sparing.core.training import Batches, Train, decay_groups, fit

QUICK = Train(epochs=2, batch_size=16, lr=0.01)


def test_weights_are_those_of_a_plain_loop(data: Splits) -> None:
    plain = Points(90, 0)
    settings = Train(
        epochs=3, batch_size=16, optimizer="sgd", lr=0.1, optimizer_args={"momentum": 0.9}, weight_decay=0.01,
        scheduler="cosine", gradient_clip=0.5,
    )  # fmt: skip
    result = fit(network(dropout=0.0), PointTask(), plain, None, settings, seed=4)
    model = network(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    batches = Batches(plain, 16, 4)
    for epoch in range(3):
        batches.set_epoch(epoch)
        for indices in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(plain.x[indices]), plain.y[indices]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, result.model.state_dict()[name]), name
    assert (result.samples, result.steps, result.epochs) == (270, 18, 3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_batches_are_one_large_batch(reduction: str) -> None:
    data = Points(90, 0)  # 6 batches of 16 and a short one against 2 of 48 and a short one
    small = Train(epochs=2, batch_size=16, accumulate=3, optimizer="SGD", lr=0.01)
    one = fit(network(False, 0.0), PointTask(reduction), data, None, small, seed=1)
    large = replace(small, batch_size=48, accumulate=1)
    other = fit(network(False, 0.0), PointTask(reduction), data, None, large, seed=1)
    assert one.steps == other.steps == 4
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], rtol=1e-5, atol=1e-6)
    ends = [result.curves["train_loss"][-1][1] for result in (one, other)]
    assert all(0.2 < end < 2 for end in ends)  # per sample, for a sum too


def test_max_steps_counts_optimizer_steps(data: Splits) -> None:
    result = fit(network(), PointTask(), data.train, data.val, Train(max_steps=8, batch_size=16, epochs=1))
    assert (result.steps, result.epochs, result.samples) == (8, 2, 90 + 32)
    assert result.curves["val_accuracy"][-1][0] == 8
    accumulated = fit(network(), PointTask(), data.train, None, Train(max_steps=5, batch_size=16, accumulate=2))
    assert (accumulated.steps, accumulated.samples) == (5, 90 + 64)


def test_early_stopping_and_best_epoch(data: Splits) -> None:
    class Falling(PointTask):
        """Accuracy rises to the second epoch and falls after it."""

        def __init__(self) -> None:
            super().__init__()
            self.values = iter([0.5, 0.9, 0.8, 0.7, 0.6, 0.5])
            self.seen: list[torch.Tensor] = []

        def evaluate(self, predictor: Any, split: Any) -> Evaluation:
            self.seen.append(predictor.model[0].weight.detach().clone())
            return Evaluation({"accuracy": next(self.values), "error": 0.0})

    task = Falling()
    settings = Train(epochs=6, batch_size=16, early_stopping=2, restore_best=True)
    result = fit(network(), task, data.train, data.val, settings)
    assert (result.best_epoch, result.best_value, result.stopped_early, result.restored) == (2, 0.9, True, True)
    assert (result.epochs, len(task.seen)) == (4, 4)
    assert torch.equal(result.model[0].weight, task.seen[1])
    task = Falling()
    last = fit(network(), task, data.train, data.val, replace(settings, early_stopping=None, restore_best=False))
    assert (last.epochs, last.best_epoch, last.restored) == (6, 2, False)
    assert torch.equal(last.model[0].weight, task.seen[-1])


def test_monitored_loss_and_a_metric_where_less_is_better(data: Splits) -> None:
    result = fit(network(), PointTask(), data.train, data.val, replace(QUICK, monitor="loss", validate_every=2))
    assert [step for step, _ in result.curves["val_loss"]] == [12]
    model = result.model.eval()
    expected = nn.functional.cross_entropy(model(data.val.x), data.val.y).item()
    assert result.best_value == pytest.approx(expected, rel=1e-5)

    class Error(PointTask):
        metrics = (Metric("error", "lower"), Metric("accuracy"))

    result = fit(network(), Error(), data.train, data.val, replace(QUICK, epochs=4))
    assert result.best_value == min(value for _, value in result.curves["val_error"])


def test_plateau_goes_by_the_headline(data: Splits) -> None:
    class Flat(PointTask):
        def evaluate(self, predictor: Any, split: Any) -> Evaluation:
            return Evaluation({"accuracy": 0.5, "error": 0.5})

    settings = replace(QUICK, epochs=4, scheduler="ReduceLROnPlateau", scheduler_args={"patience": 0, "factor": 0.1})
    result = fit(network(), Flat(), data.train, data.val, settings)
    rates = dict(result.curves["lr"])
    assert [rates[step] for step in (6, 12, 18, 24)] == pytest.approx([0.01, 0.01, 0.001, 0.0001])


def test_warmup_then_schedule(data: Splits) -> None:
    settings = Train(epochs=2, batch_size=16, lr=0.1, warmup_steps=4, scheduler="cosine")
    rates = [rate for _, rate in fit(network(), PointTask(), data.train, None, settings).curves["lr"]]
    # after each of 12 steps: fifths up to the full rate, then a cosine over the other 8 down to zero
    expected = [0.04, 0.06, 0.08, 0.1] + [0.05 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)]
    assert rates == pytest.approx(expected, abs=1e-9)
    with pytest.raises(InvalidValue, match="warmup_steps = 12; the whole training has 12"):
        fit(network(), PointTask(), data.train, None, replace(settings, warmup_steps=12))


@dataclass
class Graph:
    """Stands for a graph object: knows how to move, and cannot be collated by torch."""

    x: torch.Tensor
    adjacency: torch.Tensor
    y: torch.Tensor
    train: torch.Tensor

    def to(self, device: Any, non_blocking: bool = False) -> Graph:
        return Graph(*(value.to(device) for value in (self.x, self.adjacency, self.y, self.train)))


class GraphTask(PointTask):
    name = "graph"
    collate = staticmethod(lambda items: items[0])  # type: ignore[assignment]

    def outputs(self, model: Any, batch: Graph) -> Any:
        return model(batch.adjacency @ batch.x)

    def loss(self, outputs: Any, batch: Graph) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs[batch.train], batch.y[batch.train])

    def evaluate(self, predictor: Any, split: Any) -> Evaluation:
        graph = split[0]
        right = self.outputs(predictor, graph).argmax(1) == graph.y.numpy()
        return Evaluation({"accuracy": float(right[~graph.train.numpy()].mean())})


def test_one_big_graph_is_a_dataset_of_one_item() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, FEATURES, generator=generator)
    graph = Graph(x, torch.eye(120), x[:, :CLASSES].argmax(1), torch.arange(120) < 80)
    result = fit(network(dropout=0.0), GraphTask(), [graph], [graph], Train(epochs=60, lr=0.05))
    assert result.steps == result.samples == 60
    assert result.best_value is not None
    assert result.best_value > 0.8


def test_batches_of_dicts(data: Splits) -> None:
    class DictTask(PointTask):
        def outputs(self, model: Any, batch: Any) -> Any:
            return model(batch["in"]["x"])

        def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(outputs, batch["y"])

    items = [{"in": {"x": x}, "y": y} for x, y in Points(40, 0)]  # type: ignore[attr-defined]
    assert fit(network(), DictTask(), items, None, QUICK).samples == 80


def test_plan_order_and_the_callers_surroundings(data: Splits) -> None:
    seen: list[str] = []

    def note(text: str, value: Any) -> Any:
        seen.append(text)
        return value

    plan = (
        TrainingPlan()
        .adding(model_wraps=lambda m: (note("wrap", m), lambda: note("undo", m)))
        .adding(model_wraps=lambda m: (note("wrap 2", m), lambda: note("undo 2", m)))
        .adding(optimizer=lambda m: note("optimizer", torch.optim.SGD(m.parameters(), 0.1)))
        .adding(wrap_optimizer=lambda o: note("outer", o))
        .adding(scheduler=lambda o, total: note(f"schedule {total}", torch.optim.lr_scheduler.ConstantLR(o)))
        .adding(batch_transforms=lambda: lambda batch: note("transform", batch))
        .adding(loss_terms=lambda: lambda loss, outputs, batch, model: note("term 1", loss))
        .adding(loss_terms=lambda: lambda loss, outputs, batch, model: note("term 2", loss))
        .adding(batch_sampler=lambda dataset, size, seed: note("batches", Batches(dataset, size, seed, shuffle=False)))
    )
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    level, filters = logging.getLogger("lightning.pytorch").level, list(warnings.filters)
    fit(network(), PointTask(), Points(16, 0), None, Train(epochs=1, batch_size=16), plan)
    assert seen == [
        "batches", "wrap", "wrap 2", "optimizer", "outer", "schedule 1",
        "transform", "term 1", "term 2", "undo 2", "undo",
    ]  # fmt: skip
    with pytest.raises(DataError):
        fit(network(), PointTask(), TensorDataset(torch.zeros(9, 5), torch.zeros(9)), None, QUICK)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert (logging.getLogger("lightning.pytorch").level, list(warnings.filters)) == (level, filters)


def test_training_flags_come_back_as_they_were(data: Splits) -> None:
    model = network()
    model[1].eval()
    result = fit(model, PointTask(), data.train, data.val, QUICK)
    assert [layer.training for layer in result.model] == [True, False, True, True, True]
    assert result.model[1].num_batches_tracked == 12  # trained all the same


def test_validation_leaves_no_trace(data: Splits) -> None:
    class Curious(PointTask):
        def evaluate(self, predictor: Any, split: Any) -> Evaluation:
            assert not predictor.model.training
            assert not torch.is_grad_enabled()
            random.random(), np.random.rand(), torch.rand(7)
            return super().evaluate(predictor, split)

    one = fit(network(), PointTask(), data.train, data.val, QUICK)
    other = fit(network(), Curious(), data.train, data.val, QUICK)
    assert_same(one, other)


def test_csv_logger(data: Splits, tmp_path: Path) -> None:
    fit(network(), PointTask(), data.train, data.val, replace(QUICK, logger="csv", log_folder=str(tmp_path)))
    lines = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert {"train_loss", "val_accuracy", "lr"} <= set(lines[0].split(","))
    assert len(lines) > 12


def test_quiet_when_not_on_a_terminal(tmp_path: Path) -> None:
    code = (
        "from points import *; from sparing.core.training import Train, fit\n"
        "s = PointTask().splits(None); fit(network(), PointTask(), s.train, s.val, Train(epochs=2, workers=1))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "default::UserWarning", "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_bar_on_a_terminal(data: Splits, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    without = fit(network(), PointTask(), data.train, data.val, QUICK)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    fit(network(), PointTask(), data.train, data.val, QUICK)
    assert capsys.readouterr().err == ""  # too short for one
    monkeypatch.setattr("sparing.core.bar.AFTER_S", -1.0)
    with_bar = fit(network(), PointTask(), data.train, data.val, QUICK)
    assert "epoch 1/2, loss" in capsys.readouterr().err
    assert_same(without, with_bar)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions(precision: str, data: Splits) -> None:
    result = fit(network(), PointTask(), data.train, data.val, replace(QUICK, epochs=20, precision=precision))
    assert result.best_value is not None
    assert result.best_value > 0.6


def test_a_metric_that_is_not_finite_leaves_a_gap(data: Splits) -> None:
    class Sometimes(PointTask):
        def evaluate(self, predictor: Any, split: Any) -> Evaluation:
            return Evaluation({"accuracy": 0.5, "error": math.nan})

    result = fit(network(), Sometimes(), data.train, data.val, QUICK)
    assert "val_error" not in result.curves
    assert result.remarks == ("val_error was not finite 2 times; its curve leaves these points out",)


def test_ctrl_c_is_a_keyboard_interrupt(data: Splits) -> None:
    class Impatient(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(network(), PointTask(), data.train, None, QUICK, callbacks=[Impatient()])
    assert signal.getsignal(signal.SIGINT) is handler


# --- errors


class Poisoned(PointTask):
    """The loss is NaN in the given calls."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.calls, self.bad = 0, calls

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        loss = super().loss(outputs, batch)
        self.calls += 1
        return loss * math.nan if self.calls - 1 in self.bad else loss


def test_a_single_nan_is_skipped_and_counted(data: Splits) -> None:
    result = fit(network(), Poisoned(3, 7), data.train, None, QUICK)
    assert result.skipped == 2
    assert "2 of 12 batches were skipped" in result.remarks[0]
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


class NaNBatch(PointTask):
    """The given batches hold NaN."""

    def __init__(self, *calls: int) -> None:
        super().__init__()
        self.calls, self.bad = 0, calls

    def outputs(self, model: Any, batch: Any) -> Any:
        spoilt = self.calls in self.bad and model.training
        self.calls += bool(model.training)
        return model(batch[0] * math.nan if spoilt else batch[0])


def test_running_statistics_are_as_before_a_skipped_batch(data: Splits) -> None:
    states: list[dict[str, torch.Tensor]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            states.append({name: value.clone() for name, value in pl_module.model.named_buffers()})

    result = fit(network(), NaNBatch(0, 4), data.train, None, QUICK, callbacks=[Look()])
    assert result.skipped == 2
    start = dict(network().named_buffers())
    for before, after in ((start, states[0]), (states[3], states[4])):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(states[0]["1.running_mean"], states[1]["1.running_mean"])
    assert states[-1]["1.num_batches_tracked"] == 10  # of 12
    assert all(torch.isfinite(value).all() for value in result.model.state_dict().values())


def test_buffers_that_a_module_replaces_are_put_back_and_large_or_sparse_ones_left_alone(data: Splits) -> None:
    class Odd(nn.Module):
        """Replaces one buffer in each pass, writes into a large one, and holds one that is sparse."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.register_buffer("last", torch.zeros(8))
            self.register_buffer("large", torch.zeros(1 << 17))
            self.register_buffer("links", torch.eye(8).to_sparse())
            self.register_buffer("none", None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x.detach().mean(0)
            self.large += 1
            return self.inner(x)

    model = Odd()
    fit(model, NaNBatch(5), data.train, None, replace(QUICK, max_steps=6))
    assert torch.isfinite(model.last).all()
    assert model.last.any()
    assert model.large[0] == 6


def test_nan_for_long_ends_the_training(data: Splits) -> None:
    with pytest.raises(
        TrainingDiverged,
        match=r"not finite \(nan\) for 3 batches in a row: batches 5 … 7 .* batch 1 of epoch 1 \(step 8\)",
    ):
        fit(network(), Poisoned(*range(5, 12)), data.train, None, replace(QUICK, nan_patience=3))


def test_a_training_without_one_finite_loss_is_no_training(data: Splits) -> None:
    with pytest.raises(TrainingDiverged, match="not finite in any of the 3 batches, so nothing was learned"):
        fit(network(), Poisoned(*range(3)), data.train, None, replace(QUICK, max_steps=3, nan_patience=10))


def test_a_layer_that_refuses_a_batch_is_named() -> None:
    wrong = TensorDataset(torch.zeros(20, 5), torch.zeros(20, dtype=torch.long))
    with pytest.raises(
        DataError, match=r"batch 0 of epoch 0 .*the layer '0' \(Linear.*refused its input of shape \(16, 5\) float32"
    ):
        fit(network(), PointTask(), wrong, None, QUICK)
    labels = TensorDataset(torch.zeros(20, FEATURES), torch.full((20,), 7))
    with pytest.raises(DataError, match=r"the loss refused outputs of shape \(16, 3\) float32: IndexError: Target 7"):
        fit(network(), PointTask(), labels, None, QUICK)
    with pytest.raises(DataError, match=r"the layer '1' \(BatchNorm1d.*drop_last = True"):
        fit(network(), PointTask(), Points(17, 0), None, QUICK)


def test_unreadable_sample_in_a_worker(data: Splits) -> None:
    class Broken(Points):
        def __getitem__(self, index: int) -> Any:
            if index == 13:
                raise OSError("torn page")
            return super().__getitem__(index)

    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^sample 13 of the training data cannot be read: OSError: torn page$"):
            fit(network(), PointTask(), Broken(40, 0), None, replace(QUICK, workers=workers))


def test_nothing_to_train(data: Splits) -> None:
    with pytest.raises(IncompatibleStep, match="Sequential has nothing to train: all its 6 parameters are frozen"):
        fit(network().requires_grad_(False), PointTask(), data.train, None, QUICK)
    with pytest.raises(IncompatibleStep, match="it has no parameters"):
        fit(nn.Sequential(nn.ReLU()), PointTask(), data.train, None, QUICK)


def test_a_schedule_of_its_own_beside_that_of_the_plan_is_refused(data: Splits) -> None:
    plan = TrainingPlan().adding(scheduler=lambda o, total: torch.optim.lr_scheduler.ConstantLR(o))
    for more in ({"scheduler": "cosine"}, {"warmup_steps": 2}):
        with pytest.raises(IncompatibleStep, match="an earlier step has set the schedule") as caught:
            fit(network(), PointTask(), data.train, None, replace(QUICK, **more), plan)
        assert repr(next(iter(more.values()))) in str(caught.value)


# --- weight decay


class Mixed(nn.Module):
    """Every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 3), nn.LayerNorm(8)
        self.scale, self.frozen = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.grid = nn.ParameterDict({"bias": nn.Parameter(torch.ones(3, 3)), "weight": nn.Parameter(torch.ones(3, 3))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.norm(x)) * self.scale
        return y + 0 * (self.grid["bias"].sum() + self.grid["weight"].sum())


def test_decay_groups() -> None:
    model = Mixed()
    decayed, free = decay_groups(model, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == ["linear.weight", "grid.weight"]
    assert [names[id(p)] for p in free["params"]] == ["scale", "linear.bias", "norm.weight", "norm.bias", "grid.bias"]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert len(decay_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_what_weight_decay_acts_on(decay: str, data: Splits) -> None:
    """Where no gradient flows, AdamW only shrinks: by lr × decay in each step."""
    model = Mixed()
    settings = Train(epochs=1, batch_size=90, lr=0.1, weight_decay=0.5, decay=decay)  # type: ignore[arg-type]
    fit(model, PointTask(), data.train, None, settings)
    assert model.grid["weight"].unique().tolist() == pytest.approx([0.95])
    assert model.grid["bias"].unique().tolist() == pytest.approx([0.95 if decay == "all" else 1.0])
    assert model.frozen.unique().tolist() == [1.0]


def test_settings_that_cannot_be(data: Splits) -> None:
    with pytest.raises(DataError, match="empty"):
        fit(network(), PointTask(), Points(0, 0), None, QUICK)
    with pytest.raises(InvalidValue, match="need validation data"):
        fit(network(), PointTask(), data.train, None, replace(QUICK, early_stopping=1))
    with pytest.raises(InvalidValue, match="precision = '7-true'"):
        fit(network(), PointTask(), data.train, None, replace(QUICK, precision="7-true"))
    with pytest.raises(InvalidValue, match="accelerator = 'abacus'"):
        fit(network(), PointTask(), data.train, None, replace(QUICK, accelerator="abacus"))
    with pytest.raises(InvalidValue, match=r"SGD\(lr=0.01, momentum=-1, .*\): Invalid momentum value: -1"):
        fit(network(), PointTask(), data.train, None, replace(QUICK, optimizer="SGD", optimizer_args={"momentum": -1}))
    with pytest.raises(InvalidValue, match="Rprop has no weight decay"):
        fit(network(), PointTask(), data.train, None, replace(QUICK, optimizer="Rprop", weight_decay=0.1))

    class Unreduced(PointTask):
        def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
            return outputs.square()

    with pytest.raises(InvalidValue, match=r"the loss of Unreduced has shape \(16, 3\); a scalar, reduced by 'mean'"):
        fit(network(), Unreduced(), data.train, None, QUICK)
