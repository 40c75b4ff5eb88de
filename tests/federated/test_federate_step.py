"""The step federate: who has what, what of a training plan is honoured, refusals, and company of other steps."""

from __future__ import annotations

import shutil
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
import torch

import sparing
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue
from sparing.core.job import TrainingPlan
from sparing.core.pipeline import apply_steps, begin
from sparing.core.predictor import build_model
from sparing.core.randomness import isolated_rng
from sparing.core.step import Stage, Step, step
from sparing.core.store import Progress
from sparing.federated.rounds import run_federated
from sparing.federated.step import Federate, _record, blocks_of, class_labels, client_optimizer
from sparing.tasks.continual import Continual
from sparing.testing import tiny_task

METER = {"min_seconds": 0, "max_seconds": 0.2, "memory": False}
SMALL = {
    "clients": 3,
    "fraction": 1.0,
    "rounds_per_task": 2,
    "local_epochs": 1,
    "batch_size": 16,
    "optimizer": "SGD",
    "lr": 0.1,
    "weight_decay": 0.0,
    "engine": "inprocess",
}


def stream() -> Continual:
    return Continual(of="digits", tasks=2)


def weights_after(*steps: Step, task=None, seed: int = 0, tmp_path=None) -> dict[str, torch.Tensor]:
    job = begin(task or stream(), {"name": "mlp", "widths": [8]}, seed=seed, store=tmp_path)
    return apply_steps(job, steps).model.state_dict()


def test_shares_are_disjoint_and_of_their_task():
    task = stream()
    labels = class_labels(task.splits().train)
    for fields in ({"classes_per_client": 5}, {"partition": "dirichlet", "alpha": 1.0}, {"partition": "iid"}):
        federate = Federate(**{**SMALL, "clients": 5, "samples_per_client": 50}, **fields)
        shares = federate.shares(labels, blocks_of(task), seed=3)
        rows = np.concatenate([part for parts in shares for part in parts])
        assert len(np.unique(rows)) == len(rows)
        for block, parts in zip(blocks_of(task), shares, strict=True):
            assert len(parts) == 5
            for part in parts:
                assert 0 < len(part) <= 50
                assert set(labels[part]) <= set(block)
                assert fields.get("classes_per_client", 0) in (0, len(np.unique(labels[part])))
        again = federate.shares(labels, blocks_of(task), seed=3)
        assert all(
            np.array_equal(a, b) for one, two in zip(shares, again, strict=True) for a, b in zip(one, two, strict=True)
        )


def test_a_client_without_a_sample_is_refused_before_anything_is_trained():
    with pytest.raises(InvalidValue, match="federate: task 1 of 2: n_clients = 2000 for 1080 samples"):
        weights_after(Federate(**{**SMALL, "clients": 2000, "partition": "iid"}))


def test_orders_are_each_clients_own_and_the_same_every_time():
    assert Federate(**SMALL).orders(4, 0) is None
    orders = Federate(**{**SMALL, "clients": 8, "order": "own"}).orders(4, 0)
    assert len(orders) == 8
    assert len(set(orders)) > 1
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert orders == Federate(**{**SMALL, "clients": 8, "order": "own"}).orders(4, 0)


def test_local_epochs_are_dealt_in_turn():
    federate = Federate(**{**SMALL, "local_epochs": [1, 4]})
    assert [federate.method_settings(number).local_epochs for number in range(4)] == [1, 4, 1, 4]


def test_a_task_that_is_no_stream_is_one_block():
    assert blocks_of(tiny_task()) == (range(3),)
    assert blocks_of(stream()) == (range(10), range(10, 20))


def test_labels_are_read_where_a_data_set_does_not_tell_them():
    assert class_labels([(torch.zeros(1), 2), (torch.zeros(1), torch.tensor(1))]).tolist() == [2, 1]
    with pytest.raises(DataError, match="sample 1 has no class"):
        class_labels([(torch.zeros(1), 2), (torch.zeros(1), torch.tensor([0.5, 0.5]))])
    with pytest.raises(DataError, match="sample 0 has no class"):
        class_labels([torch.zeros(())])


def test_a_fleet_travels_to_other_processes():
    task = stream()
    model = build_model("mlp", task, widths=[8])
    plan = TrainingPlan().adding(wrap_optimizer=lambda optimizer: sparing.LEAP(optimizer, rho=0.5, generator=7))
    federate = Federate(**{**SMALL, "local_epochs": (1, 3)})
    fleet = federate.fleet(model, task.splits().train, blocks_of(task), plan, seed=0)
    again = cloudpickle.loads(cloudpickle.dumps(fleet))
    updates = []
    for each in (fleet, again):
        client = each.make_client(1)
        client.start_task(0, *each.stream(1, 0))
        updates.append(client.train_round(each.weights, 0))
    assert updates[0].metrics["steps"] == 3 * -(-len(fleet.data_of(1, 0)) // 16)
    assert all(torch.equal(updates[0].weights[name], updates[1].weights[name]) for name in fleet.weights)


def test_a_plain_task_is_an_ordinary_fleet(tmp_path):
    run = sparing.run(
        task=tiny_task(),
        steps=[Federate(**{**SMALL, "method": "fedavg", "classes_per_client": 2, "rounds_per_task": 2})],
        meter=METER,
        store=tmp_path,
    )
    row = run.ledger.rows[0]
    assert row.figures["rounds"].value == 2
    assert "validation accuracy" in row.figures
    assert not any("forgetting" in name for name in row.figures)
    assert len(row.curves["validation accuracy"]) == 1


# --- the training plan


def test_leap_gives_every_client_and_round_noise_of_its_own():
    model = torch.nn.Linear(4, 2)
    plan = TrainingPlan().adding(wrap_optimizer=lambda optimizer: sparing.LEAP(optimizer, rho=0.5, generator=7))

    def moved(*who: int) -> torch.Tensor:
        start = torch.nn.Linear(4, 2)
        start.load_state_dict(model.state_dict())
        with isolated_rng(*who):
            optimizer = client_optimizer(Federate(**SMALL), plan, start)
        start(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        return start.weight.detach()

    assert torch.equal(moved(0, 1), moved(0, 1))
    assert not torch.equal(moved(0, 1), moved(0, 2))
    assert not torch.equal(moved(0, 1), moved(1, 1))


def test_leap_changes_what_the_fleet_learns(tmp_path):
    plain = weights_after(Federate(**SMALL), tmp_path=tmp_path)
    noisy = weights_after(sparing.Leap(rho=0.5), Federate(**SMALL), tmp_path=tmp_path)
    silent = weights_after(sparing.Leap(rho=0), Federate(**SMALL), tmp_path=tmp_path)
    assert not torch.equal(plain["head.weight"], noisy["head.weight"])
    assert torch.equal(plain["head.weight"], silent["head.weight"])


@step("plan_of_test")
class PlanOfTest(Step):
    """Puts a batch transform and an optimizer of its own into the plan."""

    stage = Stage.TRAINING
    promises = frozenset({"training"})
    slots = frozenset({"optimizer"})
    source = "ours"

    def apply(self, job):
        """With images of zeros and plain gradient descent."""
        return job.replace(
            training=job.training.adding(
                optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.5),
                batch_transforms=lambda: lambda batch: (torch.zeros_like(batch[0]), batch[1]),
            )
        )


def test_optimizer_and_batch_transforms_of_the_plan_are_used(tmp_path):
    fields = {name: value for name, value in SMALL.items() if name not in ("optimizer", "lr", "weight_decay")}
    with isolated_rng("model", 0):
        first = build_model("mlp", stream(), widths=[8]).state_dict()
    blind = weights_after(PlanOfTest(), Federate(**fields), tmp_path=tmp_path)
    # the first layer sees zeros only: its weights stay, its biases learn the classes' shares
    assert torch.allclose(blind["layers.1.weight"], first["layers.1.weight"], atol=1e-6)
    assert not torch.allclose(blind["layers.1.bias"], first["layers.1.bias"], atol=1e-3)


def test_two_optimizers_are_refused_before_anything_runs():
    with pytest.raises(sparing.RecipeError, match="'federate' sets the training plan's optimizer"):
        sparing.run(task=stream(), model={"name": "mlp", "widths": [8]}, steps=[PlanOfTest(), Federate(**SMALL)])


@pytest.mark.parametrize(
    ("before", "what"),
    [
        (sparing.SmoothLabels(), "loss_terms"),
        (sparing.WarmupCosine(), "scheduler"),
        (sparing.WeightNormalization(), "model_wraps"),
        (sparing.Ema(), "callbacks"),
    ],
    ids=["loss", "schedule", "wrap", "callback"],
)
def test_what_clients_would_not_do_is_refused_with_the_reason(before, what):
    with pytest.raises(IncompatibleStep, match=rf"{what} into the training plan.*only optimizer, wrap_optimizer"):
        weights_after(before, Federate(**SMALL))


# --- refusals of fields


def test_packnet_is_told_the_number_of_tasks_and_another_is_refused():
    task = stream()
    model, data, blocks = build_model("mlp", task, widths=[8]), task.splits().train, blocks_of(task)
    for settings in ({"extractor": "packnet"}, {"extractor": "packnet", "tasks": 2}):
        fleet = Federate(**SMALL, settings=settings).fleet(model, data, blocks, TrainingPlan(), seed=0)
        assert fleet.make_client(0).settings.tasks == 2
    with pytest.raises(InvalidValue, match="federate: settings has tasks = 3, but there are 2"):
        Federate(**SMALL, settings={"extractor": "packnet", "tasks": 3}).fleet(model, data, blocks, TrainingPlan(), 0)


def test_clients_are_made_on_the_device_and_the_shared_weights_stay_on_the_cpu(monkeypatch):
    task = stream()
    fleet = Federate(**SMALL).fleet(
        build_model("mlp", task, widths=[8]), task.splits().train, blocks_of(task), TrainingPlan(), seed=0
    )
    monkeypatch.setattr("sparing.federated.step.device_named", lambda name: torch.device("meta"))
    assert {each.device.type for each in fleet.make_client(0).model.parameters()} == {"meta"}
    assert {each.device.type for each in fleet.weights.values()} == {"cpu"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"local_epochs": 0}, "local_epochs = 0"),
        ({"local_epochs": []}, r"local_epochs = \(\)"),
        ({"local_epochs": [2, 0]}, r"local_epochs = \(2, 0\)"),
        ({"method": "fedavg", "rho": 0.2}, "rho = 0.2 is a field of fedknow; the method is fedavg"),
        ({"method": "lwf", "margin": 0.0}, "margin = 0.0 is a field of fedknow, gem"),
        ({"rho": 0}, "rho = 0"),
        ({"rho": 1.1}, "rho = 1.1"),
        ({"k": 0}, "k = 0"),
        ({"margin": -0.1}, "margin = -0.1"),
        ({"partition": "iid", "classes_per_client": 2}, "classes_per_client = 2 is for partition = shards; it is iid"),
        ({"alpha": 1.0}, "alpha = 1.0 is for partition = dirichlet; it is shards"),
        ({"optimizer": "Adagard"}, "Did you mean 'Adagrad'"),
        ({"settings": {"rho": 0.2}}, "settings has rho, which is a field of the step"),
        ({"settings": {"colour": 1}}, "colour"),
        ({"engine": "carrier pigeon"}, "engine"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_fields_are_refused(fields, says):
    with pytest.raises(InvalidValue, match=says):
        Federate(**fields)


def test_texts_are_refused():
    base = sparing.TextClassification("t", ["a b", "c d"] * 20, [0, 1] * 20, length=8, vocab_size=60)
    with pytest.raises(sparing.RecipeError, match="puts its batches together by a function of its own"):
        sparing.run(task=base, model={"name": "bert", "dim": 8, "depth": 1, "heads": 1}, steps=[Federate(**SMALL)])


# --- company


def test_a_fleet_learns_and_says_what_it_sent(tmp_path):
    run = sparing.run(
        task=stream(),
        model={"name": "mlp", "widths": [32]},
        steps=[Federate(**{**SMALL, "method": "fedavg", "rounds_per_task": 4, "local_epochs": (2, 4)})],
        meter=METER,
        store=tmp_path,
    )
    row = run.ledger.rows[0]
    figures = {name: figure.value for name, figure in row.figures.items()}
    assert figures["accuracy"] > 0.4  # of ten classes
    assert figures["accuracy"] == pytest.approx((figures["accuracy of task 1"] + figures["accuracy of task 2"]) / 2)
    assert figures["rounds"] == 8
    assert figures["updates averaged"] == 24
    assert figures["updates dropped"] == 0
    weights = figures["parameters"] * 4 * 24
    assert weights < figures["bytes to clients"] < 1.3 * weights
    curves = row.curves
    assert [x for x, _ in curves["validation accuracy of task 1"]] == [4, 8]
    assert [x for x, _ in curves["validation accuracy of task 2"]] == [8]
    after_one, after_two = (y for _, y in curves["validation accuracy of task 1"])
    assert figures["validation forgetting"] == pytest.approx(after_one - after_two)
    assert figures["validation backward transfer"] == pytest.approx(after_two - after_one)
    assert curves["bytes sent"][-1][1] == pytest.approx(
        figures["bytes to clients"] + figures["bytes from clients"], rel=0.1
    )
    assert [x for x, _ in curves["bytes of a task"]] == [4, 8]
    assert [y for _, y in curves["bytes of a task"]] == [
        curves["bytes sent"][3][1], curves["bytes sent"][7][1] - curves["bytes sent"][3][1]
    ]  # fmt: skip
    assert figures["seconds of rounds"] / 8 <= figures["seconds of the longest round"] <= figures["seconds of rounds"]
    assert figures["peak memory of a process with clients"] > 0
    assert "QP fall-backs" not in figures


def test_fall_backs_are_told_beside_activations(tmp_path):
    run = sparing.run(task=stream(), model={"name": "mlp", "widths": [8]}, steps=[Federate(**SMALL)], meter=METER)
    figures = run.ledger.rows[0].figures
    assert figures["QP activations"].value > 0
    assert figures["QP fall-backs"].value == 0


def test_slow_clients_are_left_out_and_counted(tmp_path):
    with pytest.raises(InvalidValue, match=r"none of 3 clients answered rightly: client 0 slow"):
        weights_after(Federate(**{**SMALL, "time_limit": 1e-9}), tmp_path=tmp_path)


@step("one_dies_of_test")
class OneDiesOfTest(Step):
    """Puts a batch transform into the plan by which the client that draws a large number fails."""

    stage = Stage.TRAINING
    promises = frozenset({"training"})
    source = "ours"

    def apply(self, job):
        """As said."""

        def fails(batch):
            if float(torch.rand(())) > 0.97:
                raise RuntimeError("no more battery")
            return batch

        return job.replace(training=job.training.adding(batch_transforms=lambda: fails))


def test_what_was_dropped_is_in_the_ledger(tmp_path):
    run = sparing.run(
        task=stream(),
        model={"name": "mlp", "widths": [8]},
        steps=[OneDiesOfTest(), Federate(**{**SMALL, "clients": 6, "samples_per_client": 100})],
        meter=METER,
        store=tmp_path,
    )
    row = run.ledger.rows[-1]
    dropped = row.figures["updates dropped"].value
    told = [remark for remark in row.remarks if "RuntimeError: no more battery" in remark]
    assert 0 < dropped == row.figures["updates dropped: raised"].value == len(told)
    at_the_end = sum(remark.startswith("at the end: ") for remark in told)
    assert 0 < at_the_end < dropped
    assert row.figures["updates averaged"].value == 24 - (dropped - at_the_end)


def test_a_lost_state_is_in_the_remarks(tmp_path):
    federate = Federate(**{**SMALL, "rounds_per_task": 1})
    job = begin(stream(), {"name": "mlp", "widths": [8]}, store=tmp_path)
    fleet = replace(federate.fleet_of(job), time_limit=60.0)
    keeper, measure = Progress(tmp_path / "progress"), federate.task_figures(job)

    def lose(position, *more):
        if position == 0:
            shutil.rmtree(tmp_path / "progress" / "clients" / "1")
        return measure(position, *more)

    record = _record(run_federated(fleet, keeper=keeper, on_task_end=lose))
    assert record["lost"] == [
        "times that a client's state was lost or damaged, so that it went on from an older one or anew: 1"
    ]


def test_local_clients_send_weights_only_to_be_measured_and_the_row_says_whose_it_is(tmp_path):
    run = sparing.run(
        task=stream(),
        model={"name": "mlp", "widths": [8]},
        steps=[Federate(**{**SMALL, "method": "local", "order": "own"})],
        meter=METER,
        store=tmp_path,
    )
    row = run.ledger.rows[0]
    weights = row.figures["parameters"].value * 4
    assert 3 * weights < row.figures["bytes to clients"].value < 4.5 * weights  # to each client once, in four rounds
    assert row.figures["bytes from clients"].value > 4 * 3 * weights
    assert any("that of client 1" in remark for remark in row.remarks)


def test_before_it_augment_and_leap_after_it_distil_shrink_and_quantize(tmp_path):
    run = sparing.run(
        task=stream(),
        model={"name": "convnet", "widths": [4, 8]},
        steps=[
            sparing.Augment(crop="off", flip=0.5),
            sparing.Leap(rho=0.1),
            Federate(**{**SMALL, "order": "own"}),
            sparing.Distil(teacher="federate", model={"name": "convnet", "widths": [4]}, epochs=1),
            sparing.Shrink(ratio=0.5),
            sparing.Quantize(goal="bytes", max_loss=1.0, samples=16),
        ],
        meter=METER,
        store=tmp_path,
        out=tmp_path / "out",
    )
    assert [row.id for row in run.ledger.rows] == ["augment", "leap", "federate", "distil", "shrink", "quantize"]
    raw = stream().splits().test.raw(range(4))
    answers = sparing.load(tmp_path / "out" / "model").predict(raw)
    assert np.asarray(answers).shape == (4, 20)


def test_a_pruned_model_is_not_trained_full_again_by_a_fleet():
    with pytest.raises(sparing.RecipeError, match="sparsity"):
        sparing.run(
            task=stream(),
            model={"name": "mlp", "widths": [32]},
            steps=[sparing.BlockPrune(sparsity=0.5), sparing.Train(epochs=1), Federate(**SMALL), sparing.Shrink()],
        )
