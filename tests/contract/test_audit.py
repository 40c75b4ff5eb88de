"""Guest: an audit that condenses and trains inside: forks, nested steps, a sub-ledger."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from harness import METER, Points, go, survives_kills
from pydantic import Field
from torch.utils.data import Subset, TensorDataset

from sparing.core.errors import InvalidValue, RecipeError, SparingError
from sparing.core.job import Job
from sparing.core.pipeline import begin, run, run_inner
from sparing.core.recipe import parse_recipe
from sparing.core.step import Stage, Step, step
from sparing.core.store import JSON, Store
from sparing.core.training import Train


@step("herd")
class Herd(Step):
    """Keep the samples of each class that are closest to its mean."""

    stage = Stage.DATA
    needs = frozenset({"classification"})
    gives = frozenset({"condensed"})

    per_class: int = Field(8, ge=1)

    def apply(self, job: Job) -> Job:
        x, y = (torch.stack([torch.as_tensor(item[i]) for item in job.train]) for i in (0, 1))
        chosen = job.store.once("chosen", lambda: self.choose(x, y), JSON)
        job.record("training points", len(chosen), "")
        return job.replace(train=Subset(job.train, chosen))

    def choose(self, x: Any, y: Any) -> list[int]:
        chosen: list[int] = []
        for label in y.unique():
            members = (y == label).nonzero().squeeze(1)
            distance = (x[members] - x[members].mean(0)).norm(dim=1)
            chosen += members[distance.argsort()[: self.per_class]].tolist()
        return chosen


def triggered(x: Any) -> Any:
    return torch.cat([x[:, :-1], torch.full((len(x), 1), 6.0)], 1)


@step("backdoor_exposure")
class BackdoorExposure(Step):
    """Does condensation pass a backdoor on? Condense clean and poisoned data, train on both, pull the trigger."""

    stage = Stage.AUDIT
    needs = frozenset({"classification"})

    condense: Step = Herd()
    train: Train = Train(epochs=3, batch_size=8, lr=0.03)
    then: tuple[Step, ...] = ()
    share: float = Field(0.3, gt=0, lt=1)

    def apply(self, job: Job) -> Job:
        splits = job.task.splits(job.root)  # an audit may see all of them
        x, y = splits.train.tensors
        bad = torch.rand(len(x), generator=torch.Generator().manual_seed(job.seed)) < self.share
        poisoned = TensorDataset(torch.where(bad[:, None], triggered(x), x), torch.where(bad, torch.zeros_like(y), y))
        for arm, data in {"clean": splits.train, "poisoned": poisoned}.items():
            end = run_inner(job.fork(arm, train=data), [self.condense, self.train, *self.then])
            test, labels = splits.test.tensors
            hits = np.asarray(end.predictor(triggered(test[labels != 0]))).argmax(1) == 0
            job.record(f"attack success, {arm}", float(hits.mean()), "")
        job.illustrate("Poisoned samples", np.uint8([255 * bad.numpy()]), "One pixel a sample, white where poisoned")
        return job


TRAIN = Train(epochs=3, batch_size=16, lr=0.02, checkpoint_every_batches=3)


def test_an_audit_runs_pipelines_of_its_own_and_survives_kills(tmp_path):
    done = survives_kills(go(Points(), TRAIN, BackdoorExposure()), tmp_path, deaths=4)
    audit = done.ledger.rows[1]
    assert {reason: [row.id for row in rows] for reason, rows in audit.sub.items()} == {
        "clean": ["herd", "train"],
        "poisoned": ["herd", "train"],
    }
    inner = audit.sub["poisoned"][1]
    assert inner.runtime == "onnxruntime"
    assert 0 <= inner.figures["accuracy"].value <= 1
    assert audit.sub["clean"][0].figures["training points"].value == 24
    assert audit.figures["attack success, poisoned"].value > audit.figures["attack success, clean"].value
    assert audit.config["condense"] == {"herd": {"id": "herd", "per_class": 8}}
    assert audit.pictures["Poisoned samples"].caption == "One pixel a sample, white where poisoned"
    assert done.job.train is not None
    assert len(done.job.train) == 96  # what happened inside stays inside
    assert done.ledger.ids == ("train", "backdoor_exposure")
    assert re.search(
        r"backdoor_exposure: attack success, clean [\d.]+; attack success, poisoned", done.ledger.to_markdown()
    )


def test_what_an_audit_spends_is_counted_in_its_row(tmp_path):
    done = go(Points(), TRAIN, BackdoorExposure())(tmp_path)
    audit = done.ledger.rows[1]
    inner = sum(row.figures["wall"].value for rows in audit.sub.values() for row in rows)
    assert audit.figures["wall"].value >= inner > 0


def test_nested_steps_in_a_recipe_and_their_problems(tmp_path, register):
    register("steps", Herd, BackdoorExposure)
    register("tasks", Points)
    text = """
task: points
meter: {min_seconds: 0, max_seconds: 0.01, memory: false, energy: "off"}
steps:
  - train: {epochs: 1}
  - backdoor_exposure:
      condense: {herd: {per_class: 4}}
      train: {train: {epochs: 1}}
"""
    recipe = parse_recipe(text)
    assert recipe.steps[1].condense == Herd(per_class=4)
    assert recipe.steps[1].train == Train(epochs=1)
    done = run(recipe)
    assert done.ledger.rows[1].sub["clean"][0].config["per_class"] == 4
    with pytest.raises(RecipeError, match=r"<text>:7: herd: per_class = 0: .*greater than or equal to 1"):
        parse_recipe(text.replace("per_class: 4", "per_class: 0"))
    with pytest.raises(RecipeError, match=r"<text>:7: unknown step 'heard'\. Did you mean 'herd'\?"):
        parse_recipe(text.replace("herd:", "heard:"))


@step("needs_condensed")
class NeedsCondensed(Step):
    """Stands for a step that works on condensed data and a trained model only."""

    stage = Stage.MODEL
    needs = frozenset({"condensed", "trained"})

    def apply(self, job: Job) -> Job:
        job.record("reached", 1, "")
        return job


def test_nested_steps_are_planned_as_a_sequence_of_their_own(tmp_path):
    done = go(Points(), BackdoorExposure(then=(NeedsCondensed(),)))(tmp_path / "inside")
    assert done.ledger.rows[0].sub["clean"][2].figures["reached"].value == 1
    with pytest.raises(RecipeError) as caught:
        go(Points(), BackdoorExposure(condense=NeedsCondensed()), NeedsCondensed(id="outside"))(tmp_path / "outside")
    first, second, *rest = caught.value.problems
    assert "steps[0] 'backdoor_exposure'.condense: 'needs_condensed' needs 'condensed'" in first
    assert "needs 'trained'" in second
    assert all("'outside' needs" in problem for problem in rest)  # the inside gives the outside nothing
    assert len(rest) == 2


@step("careless")
class Careless(Step):
    """Two mistakes an author can make."""

    stage = Stage.AUDIT
    mistake: str = "fork"

    def apply(self, job: Job) -> Job:
        if self.mistake == "fork":
            job.fork("arm")
            job.fork("arm")
        else:
            job.store.once("result", lambda: job.record("lost", 1, ""), JSON)
        return job


@pytest.mark.parametrize("name", ["accuracy", "model bytes", "wall", ""])
def test_columns_of_the_meter_cannot_be_recorded(tmp_path, name):
    job = begin(Points(), store=Store(tmp_path / "store"), meter=METER)
    with pytest.raises(InvalidValue, match="that column is the meter's; give the figure another name"):
        job.record(name, 1.0, "")
    job.record("mine", 1.0, "")
    assert job.notes.figures["mine"].value == 1.0


def test_a_picture_has_a_name_of_its_own(tmp_path):
    job = begin(Points(), store=Store(tmp_path / "store"), meter=METER)
    job.illustrate("mine", np.zeros((2, 3, 3), np.uint8), "two by three")
    for name in ("mine", ""):
        with pytest.raises(InvalidValue, match="a name that no other of its row has"):
            job.illustrate(name, np.zeros((2, 3), np.uint8), "two by three")
    assert list(job.notes.pictures) == ["mine"]


def test_mistakes_of_an_author_are_told(tmp_path):
    with pytest.raises(InvalidValue, match="'arm'"):
        go(Points(), Careless())(tmp_path / "a")
    with pytest.raises(SparingError, match=r"record\(\) was called while job.store.once computes"):
        go(Points(), Careless(mistake="record"))(tmp_path / "b")
