"""What ``run`` is called with wrongly is told at once, before anything is computed or written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from harness import METER, Net, Points, go

import sparing
from sparing.core.pipeline import begin
from sparing.core.store import Store

TRAIN = sparing.Train(epochs=1, batch_size=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": None}, "a task and at least one step"),
        ({"steps": []}, "a task and at least one step"),
        ({"steps": TRAIN}, r"steps = Train\(.*: a list of steps is needed"),
        ({"steps": [TRAIN, "quantize"]}, "steps holds 'quantize', which is no Step"),
        ({"task": Points}, "task = <class 'harness.Points'>: a registered task's name, .* or a Task object"),
        ({"model": {"widths": [8]}}, r"model = \{'widths': \[8\]\}: the key 'name' is needed"),
        ({"model": Net}, "model = <class 'harness.Net'>: an nn.Module object"),
        ({"recipe": "quickstart"}, "run takes a recipe, or task"),
        ({"seeds": 0}, "seeds = 0: how many"),
        ({"seeds": 1.5}, "seeds = 1.5: how many"),
        ({"seeds": [1, 1]}, r"seeds = \[1, 1\]: .* different whole numbers"),
        ({"seeds": [-1]}, r"seeds = \[-1\]: .* 0 … 2³¹−1"),
        ({"seeds": True}, "seeds = True"),
        ({"out": Path(__file__)}, "is a file; a folder is needed"),
    ],
    ids=str,
)
def test_wrong_arguments_are_told(arguments, message, store_folder):
    with pytest.raises(sparing.InvalidValue, match=message):
        sparing.run(**{"task": Points(), "steps": [TRAIN], "meter": METER} | arguments)
    assert not store_folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "digit"}, r"unknown task 'digit'\. Did you mean 'digits'\?"),
        ({"model": "convnett"}, r"unknown model 'convnett'\. Did you mean 'convnet'\?"),
        ({"model": {"name": "convnet", "width": 3}}, "the model 'convnet' has no field 'width'"),
        ({"model": Path("nowhere")}, "nowhere is missing"),
        ({"meter": {"thread": 1}}, r"meter: unknown field 'thread'\. Did you mean 'threads'\?"),
    ],
    ids=str,
)
def test_names_and_fields_are_told_by_planning_and_nothing_else_is(arguments, message):
    with pytest.raises(sparing.RecipeError, match=message) as caught:
        sparing.run(**{"task": Points(), "steps": [TRAIN], "meter": METER} | arguments)
    assert len(caught.value.problems) == 1


def test_a_model_is_given_by_name_and_fields_as_in_a_recipe():
    task, model = {"name": "digits"}, {"name": "mlp", "widths": [5]}
    job = begin(task, model, meter=METER)
    assert [p.shape[0] for name, p in job.model.named_parameters() if name.endswith("weight")] == [5, 10]


def test_a_folder_with_other_files_where_the_model_would_go_is_refused_before_the_work(tmp_path, store_folder):
    notes = tmp_path / "out" / "model-seed1" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(sparing.InvalidValue, match="model-seed1 in it is no saved model"):
        sparing.run(task=Points(), steps=[TRAIN], meter=METER, out=tmp_path / "out", seeds=2)
    assert notes.read_text() == "mine"
    assert not store_folder.exists()


def test_a_saved_model_can_be_named_by_its_folder_as_text(tmp_path):
    folder = go(Points(), TRAIN)(tmp_path).folder / "model"
    done = sparing.run(task=Points(), model=str(folder), steps=[sparing.Quantize(goal="bytes")], meter=METER)
    assert done.ledger.ids == ("given", "quantize")


def test_a_model_that_cannot_be_saved_costs_the_model_not_the_run(tmp_path, caplog):
    """Built by hand and measured in torch: the ledger is whole and says why there is no model beside it."""
    by_hand = torch.nn.Sequential(torch.nn.Linear(6, 3))
    done = sparing.run(
        task=Points(), model=by_hand, steps=[TRAIN], meter=METER | {"runtime": "module"}, out=tmp_path / "out"
    )
    assert not (tmp_path / "out" / "model").exists()
    assert "the model is not saved: the model Sequential was built by hand" in caplog.text
    kept = sparing.Ledger.load(tmp_path / "out")
    assert "the model is not saved" in kept.rows[-1].remarks[-1]
    assert done.predictor is not None
    assert not kept.stopped


def test_a_run_that_is_interrupted_says_so_in_its_ledger(tmp_path):
    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparing.run(task=Points(), steps=[TRAIN], meter=METER, out=tmp_path / "out", on_row=stop)
    kept = sparing.Ledger.load(tmp_path / "out")
    assert kept.ids == ("train",)
    assert "KeyboardInterrupt" in kept.stopped


def test_a_job_to_try_steps_on_by_hand(tmp_path):
    from sparing.core.pipeline import advance, begin

    job = begin(Points(), store=Store(tmp_path / "store"), meter=METER)
    after, row, outcomes = advance(job, TRAIN, job.task.splits(None).test)
    assert row.figures["accuracy"].value == outcomes.mean()
    assert after.predictor is not None
    assert job.predictor is None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (sparing.Train(accelerator="gpus"), r"steps\[1\]: 'train': Lightning refuses accelerator = 'gpus'"),
        (sparing.Train(precision="16bit"), r"steps\[1\]: 'train': Lightning refuses .*precision = '16bit'"),
        (
            sparing.Distil(teacher="first", model={"name": "mlp", "width": [3]}),
            r"steps\[1\]: 'distil': the model 'mlp' has no field 'width'\. Did you mean 'widths'\?",
        ),
    ],
    ids=["accelerator", "precision", "student"],
)
def test_what_a_step_can_know_beforehand_is_told_by_planning(step, message, store_folder):
    first = sparing.Train(id="first", epochs=10_000)  # would take hours
    with pytest.raises(sparing.RecipeError, match=message):
        sparing.run(task=Points(), steps=[first, step], meter=METER)
    assert not store_folder.exists()


def test_the_store_can_be_named_by_its_folder(tmp_path):
    sparing.run(task=Points(), steps=[TRAIN], meter=METER, store=str(tmp_path / "mine"))
    assert list(Store(tmp_path / "mine").entries())


def test_a_model_that_looks_at_values_while_it_is_built_is_planned_all_the_same(tmp_path):
    class Looking(Points):
        def default_model(self):
            return torch.nn.Sequential(torch.nn.Linear(6, 3), torch.nn.Dropout(torch.linspace(0, 0.1, 3)[1].item()))

    assert go(Looking(), TRAIN)(tmp_path).ledger.ids == ("train",)


class Odd(Points):
    """Points with something wrong about them."""

    def __init__(self, **changes) -> None:
        super().__init__()
        self.changes = changes
        self.name = changes.get("name", "odd")
        self.metrics = changes.get("metrics", Points.metrics)

    def splits(self, root):
        parts = {name: value for name, value in self.changes.items() if name in ("train", "val", "calibration", "test")}
        return dataclasses.replace(super().splits(root), **parts)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"val": []}, sparing.DataError, "task 'odd': val is empty; at least one item is needed"),
        ({"test": None}, sparing.DataError, "task 'odd': test is missing; a data set with __len__ and __getitem__"),
        ({"calibration": iter([1])}, sparing.DataError, "task 'odd': calibration is a list_iterator"),
        ({"name": ""}, sparing.RecipeError, "task Odd: name = ''; a text is needed"),
        ({"metrics": ()}, sparing.RecipeError, "task odd: it declares no metrics"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_task_lacks_is_told_before_anything_runs(changes, error, message):
    with pytest.raises(error, match=message):
        sparing.run(task=Odd(**changes), steps=[sparing.Train(epochs=10_000)], meter=METER)
