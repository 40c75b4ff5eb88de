"""Tasks with groups: gaps in every row, columns that tell the answer, a user's own table, the step distil_fair."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sparing
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, SparingError
from sparing.core.fairness import delta_eo, delta_sp
from sparing.core.meter import Meter
from sparing.core.predictor import ModulePredictor
from sparing.core.registry import resolve
from sparing.data.node_tables import save_node_table
from sparing.testing import QUICK, TinyGraph, TinyPeople

TEACHER = sparing.Train(id="teacher", epochs=40, optimizer="Adam", lr=0.02, validate_every=20)
STUDENT = {"name": "glnn", "hidden": 8, "hops": 1}


def own(folder: Path, **fields):
    """A task on 120 people, whose third column is the answer."""
    draw = np.random.default_rng(0)
    y, region = draw.integers(0, 2, 120), draw.integers(0, 3, 120)
    x = np.stack([region, draw.standard_normal(120) + y, y * draw.uniform(1, 9, 120)], 1)
    path = folder / "people.npz"
    save_node_table(path, x, ["region", "merit", "until"], 5 + 2 * y, draw.integers(0, 120, (2, 500)))
    return resolve("tasks", "node_table")(str(path), **({"sensitive": "region", "groups": [0, 2]} | fields))


def test_gaps_are_those_of_the_predictions():
    task = TinyPeople()
    splits, data = task.splits(), task.read(None)
    predictor = ModulePredictor(task.default_model(), task)
    found = task.evaluate(predictor, splits.test)
    predicted = predictor(data.x, data.edge_index).argmax(1)[90:]
    y, sens = data.y[90:].numpy(), data.sens[90:].numpy()
    assert found.metrics["delta_sp"] == delta_sp(predicted, sens)
    assert found.metrics["delta_eo"] == delta_eo(predicted, y, sens)
    for group, name in enumerate(task.group_names):
        share = float((predicted == y)[sens == group].mean())
        assert found.metrics[f"accuracy of {name}"] == pytest.approx(share)
    assert task.groups.tolist() == [task.group_names[s] for s in sens]
    lower = {metric.name for metric in task.metrics if metric.better == "lower"}
    assert {"delta_sp", "delta_eo"} <= lower


def test_a_group_without_anybody_has_no_gap():
    class Alone(TinyPeople):
        def read(self, root):
            data = super().read(root)
            data.sens[90:] = torch.where(torch.arange(30) < 3, -1, 0)
            return data

    task = Alone()
    found = task.evaluate(ModulePredictor(task.default_model(), task), task.splits().test)
    assert np.isnan(found.metrics["delta_sp"])
    assert np.isnan(found.metrics["accuracy of b"])
    assert np.isfinite(found.metrics["accuracy of a"])
    assert task.groups.tolist() == [None] * 3 + ["a"] * 27
    rows = sparing.run(task=Alone(), steps=[sparing.Train(epochs=1)], meter=QUICK).ledger.rows
    figure = rows[-1].figures["accuracy gap between groups"]
    assert figure.how == "n.a."
    assert figure.note == "a gap needs two groups; all nodes that are compared are in 'a'"


def test_people_in_neither_group_stay_out_of_the_gap():
    class Some(TinyPeople):
        def read(self, root):
            data = super().read(root)
            data.sens[90:96] = -1
            return data

    task = Some()
    test = task.splits().test
    found = Meter(**QUICK).quality(task, ModulePredictor(task.default_model(), task), test)
    sens = test.sens[test.nodes].numpy()
    shares = [found.outcomes[sens == group].mean() for group in (0, 1)]
    figure = found.figures["accuracy gap between groups"]
    assert figure.value == pytest.approx(abs(shares[0] - shares[1]))
    assert figure.note.count("(n=12)") == 2
    assert len(found.outcomes) == 30


def test_groups_are_those_of_the_graph_that_was_asked_for_last():
    class Two(TinyPeople):
        def read(self, root):
            data = super().read(root)
            if root is not None:
                data.test_mask[:95] = False
            return data

    task = Two()
    for root, count in ((None, 30), (Path("elsewhere"), 25), (None, 30)):
        task.splits(root)
        assert len(task.groups) == count


def test_groups_must_be_there_and_be_two():
    class Without(TinyPeople):
        def read(self, root):
            data = super().read(root)
            del data.sens
            return data

    class Third(TinyPeople):
        def read(self, root):
            data = super().read(root)
            data.sens[5] = 2
            return data

    with pytest.raises(DataError, match="the graph has no sens"):
        Without().splits()
    with pytest.raises(DataError, match="node 5 is in group 2; 0, 1 or −1"):
        Third().splits()
    task = TinyPeople()
    with pytest.raises(SparingError, match="once splits"):
        task.evaluate(ModulePredictor(task.default_model(), task), TinyPeople().splits().test)


def test_every_row_has_the_gaps_and_the_saved_model_those_of_its_row(tmp_path: Path):
    steps = [
        TEACHER,
        sparing.DistilFair(id="plain", teacher="teacher", student=STUDENT, alpha=0, proxy=False, epochs=60),
        sparing.DistilFair(id="fair", teacher="teacher", student=STUDENT, alpha=30, epochs=60),
        sparing.Export(id="exported"),
    ]
    done = sparing.run(task=TinyPeople(), steps=steps, meter=QUICK, out=tmp_path / "run")
    rows = {row.id: row.figures for row in done.ledger.rows}
    for figures in rows.values():
        assert {"delta_sp", "delta_eo", "accuracy of a", "accuracy of b", "accuracy gap between groups"} <= set(figures)
    assert rows["plain"]["accuracy"].value > 0.8
    assert rows["exported"]["delta_sp"].value == rows["fair"]["delta_sp"].value
    # two columns more for each of 8 units; the proxy's mean is stored, and may be counted
    assert rows["fair"]["parameters"].value - rows["plain"]["parameters"].value in (16, 18)
    loaded = sparing.load(done.folder / "model")
    task = TinyPeople()
    again = task.evaluate(loaded, task.splits().test)
    assert again.metrics["delta_sp"] == rows["exported"]["delta_sp"].value


@pytest.mark.parametrize(
    ("framework", "student"),
    [("cpf", {"name": "cpf", "num_layers": 3, "hidden": 4}), ("graphakd", {"name": "sgc_student", "hidden": 16})],
)
def test_other_frameworks_by_name(framework: str, student: dict, tmp_path: Path):
    fair = sparing.DistilFair(teacher="teacher", framework=framework, student=student, epochs=3)
    done = sparing.run(task=TinyPeople(), steps=[TEACHER, fair], meter=QUICK, out=tmp_path / "run")
    assert done.ledger.rows[-1].runtime == "onnxruntime"
    task = TinyPeople()
    loaded = sparing.load(done.folder / "model")
    found = task.evaluate(loaded, task.splits().test).metrics["accuracy"]
    assert found == done.ledger.rows[-1].figures["accuracy"].value


def test_a_teacher_of_a_condensed_graph_teaches_on_the_whole_one():
    steps = [
        sparing.Condense(method="random", per_class=6),
        TEACHER,
        sparing.DistilFair(id="fair", teacher="teacher", student=STUDENT, epochs=5),
    ]
    done = sparing.run(task=TinyPeople(), steps=steps, meter=QUICK)
    assert "the student learned on the task's own graph of 120 nodes" in done.ledger.rows[-1].remarks


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparing.DistilFair(), "give one of teacher"),
        (lambda: sparing.DistilFair(teacher="t", student={"hidden": 4}), "the key 'name' is needed"),
        (lambda: sparing.DistilFair(teacher="t", alpha=-1), "alpha = -1"),
        (lambda: sparing.DistilFair(teacher="t", framework_args={"lam": 1}), "'lam', which 'soft' does not have"),
        (lambda: sparing.DistilFair(teacher="t", framework="glnn", framework_args={"lam": 2}), "lam = 2; 0 … 1"),
    ],
)
def test_wrong_settings_are_refused_at_once(call, message):
    with pytest.raises(InvalidValue, match=message):
        call()


def test_what_cannot_be_distilled_fairly_is_refused():
    fair = sparing.DistilFair(teacher="teacher", student=STUDENT, epochs=2)
    with pytest.raises(sparing.RecipeError, match="'groups'"):
        sparing.run(task=TinyGraph(), steps=[TEACHER, fair], meter=QUICK)
    akd = sparing.DistilFair(teacher="exported", framework="graphakd", student="sgc_student", epochs=2)
    with pytest.raises(IncompatibleStep, match="embeddings, which the teacher's predictor of kind 'onnx'"):
        sparing.run(task=TinyPeople(), steps=[TEACHER, sparing.Export(id="exported"), akd], meter=QUICK)
    unused = [TEACHER, sparing.SmoothLabels(), fair]
    with pytest.raises(SparingError, match="training"):
        sparing.run(task=TinyPeople(), steps=unused, meter=QUICK)


@pytest.mark.parametrize("proxy", [True, False])
def test_planning_says_what_no_student_can_be_made_of(proxy: bool):
    def plan(**fields):
        sparing.DistilFair(teacher="teacher", **fields).check(TinyPeople())

    labelled = {"framework": "cpf", "student": "cpf", "proxy": proxy, "fair_nodes": "train"}
    with pytest.raises(InvalidValue, match="answers training nodes with their labels"):
        plan(**labelled)
    with pytest.raises(sparing.RecipeError, match="answers training nodes with their labels"):
        sparing.run(task=TinyPeople(), steps=[TEACHER, sparing.DistilFair(teacher="teacher", **labelled)], meter=QUICK)
    plan(**labelled | {"alpha": 0})
    plan(**labelled | {"fair_nodes": None})
    with pytest.raises(InvalidValue, match="GLNNStudent has no method 'embed'"):
        plan(framework="graphakd", student=STUDENT, proxy=proxy)
    plan(framework="graphakd", student="sgc_student", proxy=proxy)


def test_a_table_of_ones_own(tmp_path: Path):
    task = own(tmp_path, drop=["until"], labels=["left", "stayed"])
    splits = task.splits()
    assert task.labels == ("left", "stayed")
    assert task.group_names == ("0", "2")
    assert task.positive == 1
    assert (splits.train.sens == -1).sum() > 20  # of the third region, in neither group
    assert set(splits.train.sens.tolist()) == {-1, 0, 1}
    x = splits.train.x
    train = torch.cat([splits.train.nodes, splits.calibration.nodes])
    torch.testing.assert_close(x[train].mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[train].std(0, unbiased=False), torch.ones(2))
    edges = splits.train.edge_index
    assert (edges[0] == edges[1]).sum() == 120
    assert edges.shape[1] == task.example_edges
    assert own(tmp_path, positive=5).positive == 0
    assert set(task.groups) == {"0", "2", None}


def test_a_column_that_tells_the_answer_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    task = own(tmp_path)
    with pytest.raises(SparingError, match="leaks are known once"):
        _ = task.leaks
    task.splits()
    (told,) = caplog.messages
    assert re.search(r"^node_table:people: columns that alone predict .*'until' \(1\.0.*drop leaves them out$", told)
    assert list(task.leaks) == ["until"]
    honest = own(tmp_path, drop=["until"])
    honest.splits()
    assert honest.leaks == {}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": [1, 1]}, r"groups = \[1, 1\]; two different"),
        ({"groups": None}, "has 3 values .*; name the two to compare"),
        ({"groups": [0, 9]}, "groups names 9, which nobody has"),
        ({"sensitive": "race"}, "no column 'race'"),
        ({"sensitive": None}, "no array 'sens'"),
        ({"positive": 3}, r"positive = 3; one of \[5, 7\]"),
        ({"labels": ["one"]}, "1 labels; 2 are expected"),
        ({"drop": ["untill"]}, "no column 'untill'. Did you mean 'until'"),
        ({"drop": "until"}, "drop = 'until'; a list"),
        ({"drop": ["region", "merit", "until"]}, "no column is left"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, fields: dict, message: str):
    def use():
        task = own(tmp_path, **fields)
        task.splits()
        return task.positive, task.labels

    with pytest.raises(SparingError, match=message):
        use()


def test_recidivism_is_honest_by_default(data_root: Path):
    task = resolve("tasks", "recidivism")()
    splits = task.splits(data_root)
    assert [len(getattr(splits, name)) for name in ("train", "val", "calibration", "test")] == [5096, 3776, 566, 9438]
    assert task.leaks == {}
    assert task.in_features == splits.train.x.shape[1] == 16
    assert splits.train.edge_index.shape[1] == task.example_edges == 642_616
    with pytest.raises(InvalidValue, match=r"'TIMES', which is no column\. Did you mean 'TIME'"):
        resolve("tasks", "recidivism")(drop=["TIMES"])


def test_time_alone_tells_who_came_back(data_root: Path, caplog: pytest.LogCaptureFixture):
    task = resolve("tasks", "recidivism")(drop=[])
    task.splits(data_root)
    assert list(task.leaks) == ["TIME"]
    (told,) = caplog.messages
    page = (Path(__file__).parents[2] / "docs" / "systems" / "reliant.md").read_text(encoding="utf-8")
    assert told in " ".join(page.split())
