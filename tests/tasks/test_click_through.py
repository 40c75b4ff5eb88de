"""Tasks on tables: what they read, how they cut it, how they score, what they refuse, and a run of one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

import sparing
from sparing.core.errors import DataError, InvalidRecord, InvalidValue
from sparing.core.job import TrainingPlan
from sparing.core.predictor.preprocessing import Preprocessing
from sparing.core.training import Train, fit
from sparing.data.ctr import Clicks, EncodeFields, join_clicks
from sparing.data.tables import Part, column_kinds, evenly, record_batches
from sparing.models.ctr import CTRModel, without_zero_rows
from sparing.optimization.ftrl import combined_optimizer
from sparing.tasks.ctr import ClickThrough
from sparing.tasks.ctr.base import click_metrics
from sparing.tasks.ctr.hflights import HFlights
from sparing.tasks.ctr.own import ClickTable


def rows(count: int = 600, seed: int = 0) -> pl.DataFrame:
    draw = np.random.RandomState(seed)
    shop, price = draw.randint(0, 6, count), draw.rand(count)
    clicked = (draw.rand(count) < 0.1 + 0.8 * ((shop % 2 == 0) ^ (price > 0.5))).astype(int)
    return pl.DataFrame({"row": np.arange(count), "shop": shop, "price": price, "label": clicked})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows().write_csv(tmp_path / "clicks.csv")
    return tmp_path / "clicks.csv"


# --- parts of a table


def test_parts_have_no_row_in_common_and_all_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    source = pa.table({"x": np.arange(5000)})
    bounds = [0.0, 0.1, 0.5, 1.0]
    found = []
    for low, high in itertools.pairwise(bounds):
        batches = list(record_batches(Part(source, low, high), {"x": "text"}, rows=700))
        found.append([int(value) for _, _, batch in batches for value in batch["x"].to_pylist()])
        assert found[-1] == [int(row) for _, numbers, _ in batches for row in numbers]
    assert sorted(itertools.chain(*found)) == list(range(5000))
    assert [abs(len(part) / 5000 - share) < 0.03 for part, share in zip(found, (0.1, 0.4, 0.5), strict=True)] == [
        True
    ] * 3
    assert not np.array_equal(evenly(np.arange(50), 0), evenly(np.arange(50), 1))


def test_a_wrong_label_is_named_by_its_row_in_the_file(tmp_path: Path) -> None:
    frame = rows().with_columns(label=pl.when(pl.col("row") == 437).then(7).otherwise(pl.col("label")))
    frame.write_csv(tmp_path / "clicks.csv")
    with pytest.raises(DataError, match=r"clicks\.csv, row 437: the label 'label' is 7"):
        ClickTable(str(tmp_path / "clicks.csv")).splits()


def test_kinds_of_columns(table: Path) -> None:
    expected = {"row": "text", "shop": "text", "price": "number", "label": "text"}
    assert column_kinds(table) == expected
    assert column_kinds(rows()) == column_kinds(rows().lazy()) == expected


# --- the user's own table


def test_an_own_table(table: Path) -> None:
    task = ClickTable(str(table), exclude=["row"])
    splits = task.splits()
    sizes = [len(getattr(splits, name)) for name in ("train", "val", "calibration", "test")]
    assert sum(sizes) == 600
    assert [abs(size - share * 600) < 30 for size, share in zip(sizes, (0.75, 0.1, 0.05, 0.1), strict=True)] == [
        True
    ] * 4
    assert [field.name for field in task.encoder.schema.fields] == ["shop", "price"]
    assert task.encoder.rows == len(splits.train)
    assert task.encoder.cardinalities == (6, 64)
    assert task.model_fields() == {"cardinalities": [6, 64]}
    raw = task.raw_example()
    assert raw is not None
    assert task.preprocessing is not None
    assert raw[0].keys() == {"shop", "price"}
    assert task.preprocessing(raw).tolist() == [splits.train[0][0].tolist()]


def test_a_folder_with_a_test_file(tmp_path: Path) -> None:
    rows(300).write_parquet(tmp_path / "train.parquet")
    rows(90, seed=1).write_csv(tmp_path / "test.csv")
    splits = ClickTable(str(tmp_path), exclude=["row"], label="label").splits()
    assert len(splits.test) == 90
    assert len(splits.train) + len(splits.val) + len(splits.calibration) == 300
    (tmp_path / "test.tsv").write_text("x")
    with pytest.raises(DataError, match="both are the split 'test'"):
        ClickTable(str(tmp_path)).splits()


def test_given_fields_and_a_leak(table: Path, tmp_path: Path) -> None:
    fields = [
        {"kind": "categorical", "name": "shop", "min_count": 1},
        {"kind": "numeric", "name": "price", "binning": "linear", "width": 0.5},
    ]
    assert ClickTable(str(table), fields=fields).splits() is not None
    rows(2000).with_columns(told=pl.col("label") * 3).write_csv(tmp_path / "leak.csv")
    task = ClickTable(str(tmp_path / "leak.csv"))
    with pytest.warns(UserWarning, match="'told'"):
        task.splits()
    assert task.leaks.keys() == {"told"}


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"label": "clicked"}, DataError, "no column 'clicked'"),
        ({"exclude": ["shopp"]}, DataError, "no column 'shopp'. Did you mean 'shop'"),
        ({"exclude": ["row", "shop", "price"]}, DataError, "no column besides the label"),
        ({"exclude": "row"}, InvalidValue, "a list of names"),
        ({"exclude": ["row"], "fields": [{"kind": "numeric", "name": "price"}]}, InvalidValue, "give one of them"),
        ({"fields": [{"kind": "numeric", "name": "price", "bins": 3}]}, InvalidValue, "no schema"),
        ({"layout": "cvs"}, InvalidValue, "Did you mean 'csv'"),
        ({"test_share": 0}, InvalidValue, "test_share = 0"),
        ({"test_share": 0.9, "val_share": 0.2}, InvalidValue, r"test_share \+ val_share \+ calibration_share = 1.15"),
        ({"min_count": 0}, InvalidValue, "min_count = 0"),
        ({"path": "nowhere.csv"}, DataError, "nowhere.csv"),
    ],
)
def test_what_an_own_table_refuses(fields: dict[str, Any], kind: type[Exception], message: str, table: Path) -> None:
    with pytest.raises(kind, match=message):
        ClickTable(**{"path": str(table), **fields}).splits()


# --- items, batches, raw rows


def test_items_and_batches_are_the_same() -> None:
    data = Clicks(np.array([[0, -1], [3, 2], [1, 1]], np.int32), np.array([0.0, 1, 1], np.float32))
    one, all_at_once = join_clicks([data[2], data[0]]), join_clicks(data.__getitems__([2, 0]))
    assert [part.tolist() for part in one] == [[[1, 1], [0, -1]], [1.0, 0.0]]
    for a, b in zip(one, all_at_once, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert data.fingerprint() != data.subset([0, 1]).fingerprint()
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(InvalidRecord, match="row 1: the label is 2"):
        Clicks(np.zeros((2, 1), np.int64), np.array([0.0, 2.0]))


def test_raw_rows_become_ids(table: Path) -> None:
    task = ClickTable(str(table), exclude=["row"])
    assert task.preprocessing is not None
    again = Preprocessing.from_config(task.preprocessing.to_config())
    assert again == task.preprocessing
    made = again([{"shop": 3, "price": 0.5}, {"shop": 3, "price": None, "else": 1}, {"shop": 99}])
    assert made[0, 0] == made[1, 0] == again([{"shop": "3", "price": 1.0}])[0, 0] >= 0
    assert made[1:, 1].tolist() == [-1, -1]
    assert made[2, 0] == -1
    with pytest.raises(InvalidValue, match=r"no input has the column 'price'"):
        again([{"shop": 1}])
    with pytest.raises(InvalidValue, match="input 1 is 7"):
        again([{"shop": 1, "price": 1.0}, 7])
    with pytest.raises(InvalidValue, match="the column 'shop'"):
        again([{"shop": 1, "price": 1.0}, {"shop": "b"}, {"shop": [2]}])
    assert isinstance(again.operations[0], EncodeFields)


# --- figures


def test_figures_are_those_of_scikit_learn() -> None:
    draw = np.random.RandomState(0)
    logits, clicked = draw.randn(500), (draw.rand(500) < 0.3).astype(np.float32)
    found, losses = click_metrics(logits, clicked)
    p = 1 / (1 + np.exp(-logits))
    assert found["log_loss"] == pytest.approx(log_loss(clicked, p)) == pytest.approx(losses.mean())
    assert found["roc_auc"] == pytest.approx(roc_auc_score(clicked, logits))
    rate = clicked.mean()
    assert found["normalised_entropy"] == pytest.approx(log_loss(clicked, p) / log_loss(clicked, np.full(500, rate)))
    assert 0 < found["ece"] < 1


def test_one_class_has_no_area() -> None:
    with pytest.warns(UserWarning, match="all 3 labels are 1"):
        found, _ = click_metrics(np.zeros(3), np.ones(3))
    assert math.isnan(found["roc_auc"])
    assert math.isnan(found["normalised_entropy"])
    assert found["log_loss"] == pytest.approx(math.log(2))


def test_logits_that_cannot_be_scored_are_refused() -> None:
    with pytest.raises(InvalidValue, match="the logit of row 1 is nan"):
        click_metrics(np.array([0.0, np.nan]), np.ones(2))
    with pytest.raises(InvalidValue, match=r"shape \(2, 1\)"):
        click_metrics(np.zeros((2, 1)), np.ones(2))


# --- the published table


def test_flights(data_root: Path) -> None:
    task = HFlights()
    splits = task.splits(data_root)
    assert sum(task.encoder.cardinalities) == 6249
    assert task.encoder.rows == len(splits.train) + len(splits.calibration)
    assert sum(len(getattr(splits, name)) for name in ("train", "val", "calibration", "test")) == 223_874
    assert 0.19 < splits.test.labels.mean() < 0.21
    assert task.leaks == {}
    late = HFlights(split="time")
    later = late.splits(data_root).test
    day = [field.name for field in late.encoder.schema.fields].index("day_of_year")
    assert (later.ids[:, day] == -1).all()
    few = HFlights(train_limit=1000, test_limit=60).splits(data_root)
    assert (len(few.train) + len(few.calibration), len(few.val), len(few.test)) == (1000, 60, 60)
    with pytest.raises(InvalidValue, match="train_limit = 0"):
        HFlights(train_limit=0)
    with pytest.raises(InvalidValue, match="split = 'day'"):
        HFlights(split="day")  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="min_count"):
        HFlights(min_count=0)


# --- together


def test_trained_pruned_saved_and_asked_with_raw_rows(table: Path, tmp_path: Path) -> None:
    halves = {"kind": "numeric", "name": "price", "binning": "linear", "width": 0.5, "missing": "unknown"}
    task: ClickThrough = ClickTable(str(table), fields=[{"kind": "categorical", "name": "shop"}, halves])
    splits = task.splits()
    torch.manual_seed(0)
    model = sparing.build_model("xdeepint", task, dim=8, num_layers=2)
    plan = TrainingPlan(optimizer=lambda net: combined_optimizer(net, lambda1=0.5))
    known = splits.train.subset(
        np.flatnonzero(splits.train.ids[:, 0] != 5)
    )  # so that the row of a shop stays untouched
    trained = fit(model, task, known, settings=Train(epochs=6, batch_size=64), plan=plan).model.eval()
    assert isinstance(trained, CTRModel)
    scored = task.evaluate(sparing.core.predictor.ModulePredictor(trained, task), splits.test)
    assert scored.metrics["roc_auc"] > 0.7
    assert scored.per_unit is not None
    assert scored.per_unit.mean() == pytest.approx(scored.metrics["log_loss"])
    assert trained.zero_rows().nonzero()[:, 0].tolist() == [5]
    smaller = without_zero_rows(trained)
    answers = []
    for number, net in enumerate((trained, smaller)):
        predictor = sparing.core.predictor.ModulePredictor(net, task)
        predictor.save(tmp_path / str(number))
        loaded = sparing.load(tmp_path / str(number))
        answers.append(loaded.predict([{"shop": 2, "price": 0.1}, {"shop": 77, "price": None}]))
    np.testing.assert_array_equal(*answers)
