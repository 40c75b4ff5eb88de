"""The steps group_ftrl and drop_zero_rows in a pipeline: what they leave, what follows them, what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

import sparing
from sparing.core.errors import IncompatibleStep, NoEffect, RecipeError
from sparing.core.pipeline import begin
from sparing.core.store import Store
from sparing.core.training import fit
from sparing.models.ctr import CTRModel, RemappedIds, without_zero_rows
from sparing.optimization.ftrl import combined_optimizer
from sparing.tasks.ctr.own import ClickTable
from sparing.testing import QUICK, tiny_task

STEPS = (
    sparing.GroupFtrl(lambda1=1.0),
    sparing.Train(epochs=3, batch_size=64),
    sparing.DropZeroRows(),
)
MODEL = {"name": "xdeepint", "dim": 4, "num_layers": 2, "num_subspaces": 2}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clicks on 300 shops, of which the even ones below 60 are clicked on; most say nothing, each comes ten times."""
    path = tmp_path_factory.mktemp("table") / "clicks.csv"
    draw = np.random.RandomState(0)
    shop, day = draw.permutation(np.repeat(np.arange(300), 10)), draw.randint(0, 3, 3000)
    clicked = (shop % 2 == 0) & (shop < 60) | (draw.rand(3000) < 0.1)
    pl.DataFrame({"shop": shop, "day": day, "label": clicked.astype(int)}).write_csv(path)
    return path


@pytest.fixture
def task(table: Path) -> ClickTable:
    return ClickTable(str(table), min_count=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One for all tests, so that the same training is made once."""
    return Store(tmp_path_factory.mktemp("group_ftrl") / "store")


def run(task: sparing.Task, *steps: sparing.Step, **more: Any) -> Any:
    return sparing.run(task=task, steps=list(steps), model=more.pop("model", MODEL), meter=QUICK, **more)


def test_rows_leave_and_every_answer_stays(task: ClickTable, store: Store, tmp_path: Path) -> None:
    done = run(task, *STEPS, store=store, out=tmp_path / "out")
    asked, trained, dropped = done.ledger.rows
    assert "G-FTRL for tables of 303 rows" in asked.remarks[0]
    before, after = dropped.figures["embedding rows before"].value, dropped.figures["embedding rows after"].value
    assert before == 303
    assert 3 <= after < 200
    assert dropped.figures["share of zero rows"].value == pytest.approx(1 - after / before)
    assert dropped.figures["share of zero weights"].value >= 1 - after / before
    assert 0 <= dropped.figures["share of zero interactions"].value < 1
    assert dropped.figures["model bytes"].value < trained.figures["model bytes"].value
    assert dropped.figures["log_loss"].value == trained.figures["log_loss"].value
    one, other = (done.job.earlier[name] for name in ("train", "drop_zero_rows"))
    ids = np.array([[shop, day] for shop in range(-1, 300) for day in range(-1, 3)])
    np.testing.assert_array_equal(one(ids), other(ids))
    np.testing.assert_allclose(sparing.load(tmp_path / "out" / "model")(ids), one(ids), rtol=1e-5)  # an ONNX graph
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    np.testing.assert_array_equal(sparing.load(tmp_path / "other")(ids), one(ids))
    bytes_of = [sum(f.stat().st_size for f in (tmp_path / name).rglob("*")) for name in ("one", "other")]
    assert bytes_of[1] < bytes_of[0]


@pytest.mark.parametrize(
    "last", [sparing.Export(), sparing.Quantize(goal="bytes", max_loss=9, samples=32)], ids=["export", "quantize"]
)
@pytest.mark.parametrize("kind", ["xdeepint", "lr", "fm", "fnn", "deepfm", "dcnv2"])
def test_what_is_left_becomes_an_onnx_graph_for_which_unknown_is_zero(
    kind: str, last: sparing.Step, task: ClickTable, store: Store, tmp_path: Path
) -> None:
    model = MODEL if kind == "xdeepint" else {"name": kind, **({} if kind == "lr" else {"dim": 4})}
    torch.manual_seed(0)
    net = sparing.build_model(model["name"], task, **{k: v for k, v in model.items() if k != "name"})
    with torch.no_grad():
        for embedding in net.tables:
            torch.nn.init.normal_(embedding.weight, std=0.3)[20:250] = 0

    def start() -> Any:
        return run(task, sparing.DropZeroRows(), last, model=net, trained=True, store=store)

    if kind in ("lr", "fm") and isinstance(last, sparing.Quantize):  # a sum of embeddings multiplies no matrices
        with pytest.raises(NoEffect, match="nothing to quantise"):
            start()
        return
    done = start()
    predictor, torch_one = done.job.predictor, done.job.earlier["drop_zero_rows"]
    assert predictor.kind == "onnx"
    dropped = next(shop for shop in range(300) if done.job.model.get_buffer("new_ids")[shop] < 0)
    ids = np.array([[5, 0], [dropped, 0], [-1, 0], [-1, -1]])
    found = np.asarray(predictor(ids))
    assert found[1] == found[2]
    if isinstance(last, sparing.Export):  # what INT8 may lose is set by max_loss, for all rows together
        np.testing.assert_allclose(found, torch_one(ids), atol=1e-4)
    predictor.save(tmp_path / "model")
    np.testing.assert_array_equal(sparing.load(tmp_path / "model")(ids), found)
    raw = [{"shop": 5, "day": 1}, {"shop": 99_999, "day": None}]
    assert np.isfinite(sparing.load(tmp_path / "model").predict(raw)).all()


def test_sparse_and_dense_gradients_and_accumulated_batches_end_alike(task: ClickTable, store: Store) -> None:
    """A sum over two batches of 32 is the sum over one of 64, whichever form gradients have."""
    found = []
    for sparse, batch in ((True, 64), (False, 64), (True, 32)):
        train = sparing.Train(max_steps=6, batch_size=batch, accumulate=64 // batch)
        job = run(task, sparing.GroupFtrl(lambda1=1.0, sparse=sparse), train, sparing.DropZeroRows(), store=store).job
        found.append(np.asarray(job.predictor(task.splits().val.ids[:100])))
        assert not any(table.sparse for table in job.model.model.tables)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    np.testing.assert_allclose(found[0], found[2], atol=1e-4)


def test_the_step_does_what_the_loop_of_ones_own_does(task: ClickTable, store: Store) -> None:
    job = begin(task, MODEL, store=store)
    plain = job.fresh_model()
    plan = dataclasses.replace(job.training, optimizer=lambda net: combined_optimizer(net, lambda1=1.0))
    fit(plain, task, job.train, settings=STEPS[1], plan=plan)
    done = run(task, *STEPS[:2], sparing.DropZeroRows(), store=store)
    whole = done.job.earlier["train"].model
    for name, value in plain.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_further_training_keeps_zeros_only_by_a_further_step(task: ClickTable, store: Store) -> None:
    last = sparing.DropZeroRows(id="again")
    with pytest.raises(RecipeError, match=r"would undo the rows of zeros of 'group_ftrl'.*: group_ftrl"):
        run(task, *STEPS[:2], sparing.Train(id="more", epochs=1), last, store=store)
    more = (sparing.GroupFtrl(id="more_zeros", lambda1=3.0), sparing.Train(id="more", epochs=1, batch_size=64))
    done = run(task, *STEPS, *more, last, store=store)
    first, second = done.ledger.rows[2], done.ledger.rows[-1]
    assert second.figures["embedding rows before"].value == first.figures["embedding rows after"].value
    assert second.figures["embedding rows after"].value < first.figures["embedding rows after"].value
    model, before = done.job.model, done.job.earlier["more"]
    assert isinstance(model, RemappedIds)
    assert isinstance(model.model, CTRModel)
    ids = np.array([[shop, day] for shop in range(-1, 300) for day in range(-1, 3)])
    np.testing.assert_array_equal(before(ids), done.job.predictor(ids))


def test_lists_of_ids_are_joined() -> None:
    torch.manual_seed(0)
    model = sparing.build_model("fm", cardinalities=[6, 3], dim=2)
    ids = torch.cartesian_prod(torch.arange(-1, 6), torch.arange(-1, 3))
    for rows in ([0, 4, 7], [1], [0, 1, 2, 3, 4]):  # the last: all that is left
        inner = model.model if isinstance(model, RemappedIds) else model
        with torch.no_grad():
            for table in inner.tables:
                table.weight[rows] = 0
        expected = model(ids)
        model = without_zero_rows(model)
        assert torch.equal(model(ids), expected)
    assert sum(model.model.cardinalities) == 0


def test_what_a_recipe_must_hold(task: ClickTable) -> None:
    train, drop = sparing.Train(epochs=1), sparing.DropZeroRows()
    for steps, message in (
        ([sparing.GroupFtrl(), train], "'group_ftrl' promises rows of zeros.*add one of: drop_zero_rows"),
        ([sparing.GroupFtrl(), drop, train], "'drop_zero_rows' comes before the training"),
        ([sparing.GroupFtrl(), sparing.Train(lr=0.1), drop], "sets the training plan's optimizer"),
        ([sparing.GroupFtrl(), sparing.Train(scheduler="cosine"), drop], "sets the training plan's scheduler"),
        ([sparing.GroupFtrl(), sparing.Train(warmup_steps=9), drop], "sets the training plan's scheduler"),
        ([sparing.GroupFtrl(), sparing.Rpgd(), train, drop], "sets the training plan's optimizer"),
        ([sparing.GroupFtrl(), sparing.Ema(), train, drop], "sets the training plan's average of weights"),
        ([sparing.Leap(), sparing.GroupFtrl(), train, drop], "sets the training plan's learning-rate perturbation"),
    ):
        with pytest.raises(RecipeError, match=message):
            run(task, *steps)
    assert sparing.GroupFtrl(lambda1=0).promises == {"training"}  # it zeroes no row


def test_what_has_no_table_is_refused(task: ClickTable, store: Store) -> None:
    with pytest.raises(NoEffect, match=r"'group_ftrl': ConvNet has no embedding table .*; it has .*Conv2d, Linear"):
        sparing.GroupFtrl().apply(begin(tiny_task(), store=store))
    words = torch.nn.Sequential(torch.nn.Embedding(9, 2), torch.nn.Flatten(), torch.nn.Linear(4, 1))
    with pytest.raises(IncompatibleStep, match=r"'group_ftrl': Sequential .* could not be dropped; with lambda1 = 0"):
        sparing.GroupFtrl().apply(begin(task, words, store=store))
    assert sparing.GroupFtrl(lambda1=0).apply(begin(task, words, store=store)).training.optimizer is not None
    with pytest.raises(IncompatibleStep, match="ConvNet does not take ids of fields"):
        sparing.DropZeroRows().apply(begin(tiny_task(), store=store))
    with pytest.raises(NoEffect, match="none of the 303 rows of FactorizationMachine is zero in all its tables"):
        sparing.DropZeroRows().apply(begin(task, {"name": "fm"}, store=store))


class MeanClicks(ClickTable):
    """The same, with a loss that is a mean."""

    loss_reduction = "mean"

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs, batch) / len(outputs)


def test_a_mean_loss_is_warned_of(table: Path, store: Store) -> None:
    job = begin(MeanClicks(str(table)), MODEL, store=store)
    after = sparing.GroupFtrl(lambda1=2).apply(job)
    assert "is a mean over the batch, for which lambda1 = 2 is much" in job.notes.remarks[-1]
    assert after.training.optimizer is not None
    with pytest.warns(UserWarning, match="lambda1 = 2.0 with a loss that is a mean"):
        after.training.optimizer(job.fresh_model())
