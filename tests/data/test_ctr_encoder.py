"""From tables to ids: formats, vocabularies, missing and unknown values, leaks, and what is refused."""

from __future__ import annotations

import gzip
import math
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_svmlight_file

from sparing.core.errors import CorruptFile, DataError, InvalidRecord, InvalidValue
from sparing.data import ctr, tables
from sparing.data.binning import libffm_bins, linear_bins, log2_bins, log_square_bins, quantile_bins
from sparing.data.ctr import (
    Categorical,
    CTREncoder,
    CTRSchema,
    Numeric,
    avazu_schema,
    criteo_schema,
    fnv1a,
    in_published_training,
    leaking,
    read_libffm,
    read_libsvm,
    write_libffm,
    write_libsvm,
)
from sparing.data.tables import TableLayout, column_names, record_batches

SCHEMA = CTRSchema(
    (Categorical("shop", min_count=2), Numeric("price", missing="zero"), Categorical("day", min_count=1))
)
ROWS: dict[str, list[Any]] = {
    "label": [0, 1, 0, 1, 1, 0],
    "shop": ["b", "a", "b", "c", None, "a"],
    "price": [0.0, 3.0, None, 10.0, 10.0, 1e6],
    "day": [1, 2, 1, 1, 2, 1],
}
IDS = [[1, 0, 0], [0, 1, 1], [1, 0, 0], [-1, 2, 0], [-1, 2, 1], [0, 3, 0]]
"""Shops "a" and "b" twice each, in order; bins 0, 2, 4 and 27; day 1 more often than 2."""


def table() -> pa.Table:
    return pa.table(ROWS)


def whole(encoder: CTREncoder, source: Any, **more: Any) -> tuple[np.ndarray, np.ndarray]:
    ids, labels = zip(*encoder.transform(source, **more), strict=True)
    return np.concatenate(ids), np.concatenate(labels)


def written(folder: Path, kind: str) -> Any:
    frame = pl.DataFrame(ROWS)
    if kind == "arrow":
        return table()
    if kind == "polars":
        return frame
    if kind == "lazy":
        return frame.lazy()
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table(), path, row_group_size=2)
    else:
        text = frame.write_csv(separator="\t" if "tsv" in kind else ",")
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    return path


# --- every source says the same


@pytest.mark.parametrize("kind", ["arrow", "polars", "lazy", "parquet", "csv", "tsv", "csv.gz", "tsv.gz"])
def test_every_source_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    source = written(tmp_path, kind)
    encoder = CTREncoder(SCHEMA).fit(source)
    ids, labels = whole(encoder, source)
    assert ids.tolist() == IDS
    assert labels.tolist() == ROWS["label"]
    assert (ids.dtype, labels.dtype) == (np.int64, np.float32)
    assert encoder.cardinalities == (2, 4, 2)
    assert encoder.rows == 6
    assert set(column_names(source)) == set(ROWS)


def test_several_files_are_one_source(tmp_path: Path) -> None:
    paths = [tmp_path / "one.parquet", tmp_path / "two.csv"]
    pq.write_table(table().slice(0, 2), paths[0])
    pl.DataFrame(ROWS).slice(2).write_csv(paths[1])
    encoder = CTREncoder(SCHEMA).fit(paths)
    assert whole(encoder, paths)[0].tolist() == IDS


@pytest.mark.parametrize(("size", "shapes"), [(4, [4, 2]), (6, [6]), (1, [1] * 6), (100, [6])])
def test_batches_have_the_size_asked_for(size: int, shapes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CTREncoder(SCHEMA).fit(table())
    monkeypatch.setattr(ctr, "ROWS", 3)
    parts = list(encoder.transform(table(), batch_size=size))
    assert [len(ids) for ids, _ in parts] == shapes
    assert np.concatenate([ids for ids, _ in parts]).tolist() == IDS


def test_criteo_rows(tmp_path: Path) -> None:
    """No header, tabs, empty is missing; all 13 numbers are fields."""
    columns = [f"{i % 2}\t{i}" + "\t" * 12 + "\ta" + "\t" * 24 + "\tz" for i in range(4)]
    path = tmp_path / "train.txt"
    path.write_text("\n".join(columns) + "\n")
    schema = criteo_schema(min_count=1)
    assert [field.name for field in schema.fields][:13] == [f"I{i}" for i in range(1, 14)]
    encoder = CTREncoder(schema).fit(path, layout="criteo")
    ids, labels = whole(encoder, path, layout="criteo")
    assert labels.tolist() == [0, 1, 0, 1]
    assert ids[:, 0].tolist() == [0, 0, 1, 2]  # ⌊ln(x² + 1)⌋ of 0, 1, 2, 3 is 0, 0, 1, 2
    assert (ids[:, 1:13] == 0).all()  # missing counts as 0
    assert (ids[:, 13] == 0).all()
    assert (ids[:, 14:38] == -1).all()
    assert (ids[:, 38] == 0).all()


def test_the_published_recipe_keeps_what_was_seen_more_than_twenty_times() -> None:
    rows = pa.table(
        {
            "label": [0, 1] * 21,
            **{f"I{i}": [1] * 42 for i in range(1, 14)},
            **{f"C{i}": ["often"] * 22 + ["rare"] * 20 for i in range(1, 27)},
        }
    )
    encoder = CTREncoder(criteo_schema()).fit(rows)
    assert [values.to_pylist() for values in encoder.vocabulary[13:]] == [["often"]] * 26


def test_avazu_rows(tmp_path: Path) -> None:
    names = ["id", "click", "hour", *ctr.AVAZU_FIELDS.split()]
    path = tmp_path / "train.csv"
    lines = [",".join([f"{i}", f"{i % 2}", f"1410210{i}", *["7"] * 21]) for i in range(3)]
    path.write_text("\n".join([",".join(names), *lines]))
    encoder = CTREncoder(avazu_schema(min_count=1)).fit(path, layout="avazu")
    ids, _ = whole(encoder, path, layout="avazu")
    assert encoder.vocabulary[0].to_pylist() == ["00", "01", "02"]
    assert ids[:, 0].tolist() == [0, 1, 2]
    assert (ids[:, 1:] == 0).all()
    assert ids.shape == (3, 22)


def test_the_published_split_keeps_801_of_each_1000() -> None:
    kept = in_published_training(np.arange(3000))
    assert kept.sum() == 3 * 801
    assert kept[:1001].tolist() == [True] * 801 + [False] * 199 + [True]


# --- vocabularies


values = st.lists(st.sampled_from(["", "a", "b", "ä", "aa", "7", "c d"]) | st.text(max_size=3), min_size=1, max_size=40)


@settings(max_examples=30)
@given(values=values, least=st.integers(1, 4), chunk=st.integers(1, 9))
def test_ids_are_ranks_of_counts(values: list[str], least: int, chunk: int) -> None:
    """Against a count in plain Python, however the rows are cut into batches and the counts merged."""
    rows = pa.table({"label": [0] * len(values), "x": pa.array(values, pa.string())})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "ROWS", chunk)
        patch.setattr(ctr, "PENDING", 2)
        encoder = CTREncoder(CTRSchema((Categorical("x", min_count=least),))).fit(rows)
    counts = Counter(value for value in values if value)
    kept = sorted((v for v, n in counts.items() if n >= least), key=lambda v: (-counts[v], v.encode()))
    assert encoder.vocabulary[0].to_pylist() == kept
    assert encoder.encode(rows)[:, 0].tolist() == [kept.index(v) if v in kept else -1 for v in values]


def test_what_was_not_in_the_training_data_is_unknown() -> None:
    encoder = CTREncoder(SCHEMA).fit(table())
    later = pa.table({"label": [0, 1], "shop": ["a", "new"], "price": [50.0, 3.0], "day": [3, 2]})
    assert encoder.encode(later).tolist() == [[0, -1, -1], [-1, 1, 1]]  # no training row in bin ⌊ln 2501⌋ = 7
    assert encoder.unknown_shares(later) == {"shop": 0.5, "price": 0.5, "day": 0.5}
    assert encoder.encode(later.to_batches()[0]).tolist() == encoder.encode(later).tolist()
    assert encoder.encode(later.slice(0, 0)).shape == (0, 3)


@pytest.mark.parametrize(
    ("value", "expected"), [(b"", 0xCBF29CE484222325), (b"a", 0xAF63DC4C8601EC8C), (b"foobar", 0x85944171F73967E8)]
)
def test_hashes_are_those_of_the_standard(value: bytes, expected: int) -> None:
    assert fnv1a([value, b"something longer", b""])[0] == expected


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=8))
def test_hashes_agree_with_a_plain_loop(values: list[bytes]) -> None:
    for value, found in zip(values, fnv1a(values).tolist(), strict=True):
        expected = 0xCBF29CE484222325
        for byte in value:
            expected = ((expected ^ byte) * 0x100000001B3) % 2**64
        assert found == expected


def test_hashing_keeps_no_list_of_values() -> None:
    field = Categorical("x", min_count=2, hash_buckets=4)
    words = [f"word {i}" for i in range(40)]
    buckets = [int(h) % 4 for h in fnv1a([w.encode() for w in words]).tolist()]
    rows = pa.table({"label": [0, 1] * 20, "x": words})
    encoder = CTREncoder(CTRSchema((field,))).fit(rows)
    kept = [b for b in range(4) if buckets.count(b) >= 2]
    assert encoder.vocabulary[0].tolist() == kept
    assert encoder.encode(rows)[:, 0].tolist() == [kept.index(b) if b in kept else -1 for b in buckets]
    new = pa.table({"x": ["word 0", "never seen", None, ""]})
    assert encoder.encode(new)[0, 0] == encoder.encode(rows)[0, 0]
    assert encoder.encode(new)[2:, 0].tolist() == [-1, -1]
    rare = CTREncoder(CTRSchema((Categorical("x", min_count=41, hash_buckets=4),))).fit(rows)
    assert rare.cardinalities == (0,)
    assert (rare.encode(rows) == -1).all()


# --- numbers


def test_binnings_by_hand() -> None:
    x = np.array([-5.0, -1, 0, 1, 2, 2.5, 3, 10, 1e300])
    assert log_square_bins(x)[:8].tolist() == [math.floor(math.log(v * v + 1)) for v in x[:8]]
    assert log_square_bins(x)[8] > 1000
    assert libffm_bins(x).tolist() == [0, 2, 3, 4, 5, 6, 7, 11, math.floor(math.log(1e300) ** 2) + 6]
    assert linear_bins(np.array([0.0, 29, 30, 1439]), 30).tolist() == [0, 0, 1, 47]
    assert log2_bins(np.array([-1.0, 0, 1, 3, 1023]), 0.5).tolist() == [0, 0, 2, 4, 20]
    assert quantile_bins(np.array([0.0, 1, 2, 3]), np.array([1.0, 3.0])).tolist() == [0, 1, 1, 2]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=60), st.integers(2, 8))
def test_quantiles_are_monotone_and_within_bounds(numbers: list[float], buckets: int) -> None:
    rows = pa.table({"label": [0] * len(numbers), "x": numbers})
    encoder = CTREncoder(CTRSchema((Numeric("x", "quantile", buckets),))).fit(rows)
    assert 1 <= encoder.cardinalities[0] <= buckets
    ids = encoder.encode(rows)[:, 0]
    assert (ids >= 0).all()
    assert (np.diff(ids[np.argsort(numbers, kind="stable")]) >= 0).all()


def test_quantiles_have_equal_shares_and_outliers_belong_to_the_ends() -> None:
    rows = pa.table({"label": [0, 1] * 500, "x": np.random.RandomState(0).randn(1000) ** 3})
    encoder = CTREncoder(CTRSchema((Numeric("x", "quantile", 10),))).fit(rows)
    assert np.bincount(encoder.encode(rows)[:, 0]).tolist() == [100] * 10
    assert encoder.encode(pa.table({"x": [-1e9, 1e9]}))[:, 0].tolist() == [0, 9]


@pytest.mark.parametrize("binning", ["log_square", "quantile", "linear"])
def test_missing_numbers(binning: Any) -> None:
    rows = pa.table({"label": [0, 1, 0, 1], "x": [0.0, 5.0, None, math.nan]})
    for missing, expected in (("zero", 0), ("unknown", -1)):
        encoder = CTREncoder(CTRSchema((Numeric("x", binning, missing=missing),))).fit(rows)
        assert encoder.encode(rows)[2:, 0].tolist() == [expected, expected]
        assert encoder.encode(rows)[0, 0] == 0
    with pytest.raises(InvalidRecord, match=r"the table, row 2: no number in 'x'; say missing=\"zero\" or"):
        CTREncoder(CTRSchema((Numeric("x", binning),))).fit(rows)


def test_one_column_can_be_a_number_and_a_category() -> None:
    schema = CTRSchema((Numeric("size", column="x"), Categorical("code", 1, column="x")))
    rows = pa.table({"label": [0, 1, 1], "x": ["3", "3", "1"]})
    encoder = CTREncoder(schema).fit(rows)
    assert encoder.encode(rows).tolist() == [[1, 0], [1, 0], [0, 1]]


# --- keeping


def test_an_encoder_that_is_read_again_says_the_same(tmp_path: Path) -> None:
    fields = (
        *SCHEMA.fields,
        Numeric("q", "quantile", 4, column="price", missing="unknown"),
        Categorical("h", 1, 8, "shop"),
    )
    encoder = CTREncoder(CTRSchema(fields)).fit(table())
    encoder.save(tmp_path / "encoder")
    again = CTREncoder.load(tmp_path / "encoder")
    assert again.schema == encoder.schema
    assert (again.cardinalities, again.rows, again.leaks) == (encoder.cardinalities, encoder.rows, encoder.leaks)
    np.testing.assert_array_equal(again.encode(table()), encoder.encode(table()))
    assert {path.name for path in (tmp_path / "encoder").iterdir()} == {"encoder.json", "vocabulary.parquet"}


def test_an_encoder_of_numbers_alone_is_kept_too(tmp_path: Path) -> None:
    encoder = CTREncoder(CTRSchema((Numeric("price", missing="zero"),))).fit(table())
    encoder.save(tmp_path / "encoder")
    assert CTREncoder.load(tmp_path / "encoder").encode(table()).tolist() == encoder.encode(table()).tolist()


@pytest.mark.parametrize("damage", ["short", "json", "kind", "values", "format", "gone"])
def test_a_damaged_encoder_is_refused(damage: str, tmp_path: Path) -> None:
    CTREncoder(SCHEMA).fit(table()).save(tmp_path / "e")
    parquet, config = tmp_path / "e/vocabulary.parquet", tmp_path / "e/encoder.json"
    if damage == "short":
        parquet.write_bytes(parquet.read_bytes()[:-10])
    elif damage == "json":
        config.write_text(config.read_text()[:-3])
    elif damage == "kind":
        config.write_text(config.read_text().replace('"categorical"', '"pickle"', 1))
    elif damage == "format":
        config.write_text(config.read_text().replace('"format":1', '"format":2').replace('"format": 1', '"format": 2'))
    elif damage == "values":
        pq.write_table(pq.read_table(parquet).slice(1), parquet)
    else:
        config.unlink()
    with pytest.raises(CorruptFile, match=r"e"):
        CTREncoder.load(tmp_path / "e")


def test_ids_are_written_and_read_as_parquet(tmp_path: Path) -> None:
    encoder = CTREncoder(SCHEMA).fit(table())
    assert encoder.write(table(), tmp_path / "ids.parquet") == 6
    back = pq.read_table(tmp_path / "ids.parquet")
    assert back.schema.field("shop").type == pa.int32()
    assert np.stack([back[name].to_numpy() for name in ("shop", "price", "day")], 1).tolist() == IDS
    assert back["label"].to_pylist() == ROWS["label"]
    broken = pa.table({**ROWS, "label": [0, 1, 0, 1, 1, 3]})
    with pytest.raises(DataError, match="row 5"):
        encoder.write(broken, tmp_path / "other.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["ids.parquet"]


def test_libffm_text_there_and_back(tmp_path: Path) -> None:
    encoder = CTREncoder(SCHEMA).fit(table())
    assert write_libffm(encoder.transform(table(), 4), tmp_path / "rows.ffm") == 6
    assert (tmp_path / "rows.ffm").read_text().splitlines()[3] == "1 1:2:1 2:0:1"
    ids, labels = zip(*read_libffm(tmp_path / "rows.ffm", 3, batch_size=4), strict=True)
    assert [len(part) for part in ids] == [4, 2]
    assert np.concatenate(ids).tolist() == IDS
    assert np.concatenate(labels).tolist() == ROWS["label"]


@pytest.mark.parametrize("line", ["2 0:1:1", "1 0:1", "1 5:0:1", "1 0:1:0.5", "1 0:1:1 0:2:1", "1 a:b:c", "1 0:-1:1"])
def test_other_libffm_text_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.ffm").write_text(f"0 0:0:1\n{line}\n")
    with pytest.raises(DataError, match=r"rows\.ffm:2: "):
        list(read_libffm(tmp_path / "rows.ffm", 3))


def test_libsvm_text_there_and_back_and_as_scikit_learn_reads_it(tmp_path: Path) -> None:
    encoder = CTREncoder(SCHEMA).fit(table())
    sizes = encoder.cardinalities  # 2, 4 and 2, so that the fields begin at 1, 3 and 7
    assert write_libsvm(encoder.transform(table(), 4), sizes, tmp_path / "rows.svm") == 6
    assert (tmp_path / "rows.svm").read_text().splitlines()[2:4] == ["0 2:1 3:1 7:1", "1 5:1 7:1"]
    ids, labels = zip(*read_libsvm(tmp_path / "rows.svm", sizes, batch_size=4), strict=True)
    assert [len(part) for part in ids] == [4, 2]
    assert np.concatenate(ids).tolist() == IDS
    assert np.concatenate(labels).tolist() == ROWS["label"]
    matrix, read = load_svmlight_file(str(tmp_path / "rows.svm"), n_features=8, zero_based=False)
    first = np.cumsum([0, *sizes])
    assert [sorted(row.nonzero()[1].tolist()) for row in matrix] == [
        [int(first[f]) + n for f, n in enumerate(row) if n >= 0] for row in IDS
    ]
    assert read.tolist() == ROWS["label"]


@pytest.mark.parametrize("line", ["2 1:1", "1 0:1", "1 9:1", "1 1:0.5", "1 1:1 2:1", "1 a:1", "1 1", "1 1:2:1"])
def test_other_libsvm_text_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "rows.svm").write_text(f"0 1:1\n{line}\n")
    with pytest.raises(DataError, match=r"rows\.svm:2: "):
        list(read_libsvm(tmp_path / "rows.svm", (2, 4, 2)))


# --- leaks


def test_a_column_that_alone_predicts_the_label_is_reported() -> None:
    draw = np.random.RandomState(0)
    label = draw.randint(0, 2, 4000)
    rows = {
        "label": label,
        "noise": draw.randint(0, 9, 4000).astype(str),
        "row": np.arange(4000).astype(str),
        "told": np.where(label, "yes", "no"),
        "delay": label * 20 + draw.rand(4000) * 10,
        "nearly": np.where(draw.rand(4000) < 0.2, 1 - label, label).astype(str),
    }
    fields = [Categorical(name, 1) for name in ("noise", "row", "told", "nearly")]
    schema = CTRSchema((*fields, Numeric("delay")))
    with pytest.warns(UserWarning, match=r"alone predict 'label'.*'told' \(1\.000\), 'delay' \(1\.000\)"):
        encoder = CTREncoder(schema).fit(pa.table(rows))
    assert encoder.leaks.keys() == {"told", "delay"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CTREncoder(CTRSchema(tuple(fields[:2]))).fit(pa.table(rows)).leaks == {}
    nearly = leaking({"nearly": pa.array(rows["nearly"])}, label == 1, threshold=0.75)
    assert 0.75 < nearly["nearly"] < 0.85


def test_nothing_can_be_said_of_one_class() -> None:
    assert leaking({"x": np.arange(5.0)}, np.zeros(5)) == {}
    assert leaking({"x": np.arange(1.0)}, np.ones(1)) == {}


def test_the_sample_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = ctr._Drawn(0, 500)
    for start in range(0, 20_000, 700):
        drawn.add(pa.record_batch({"x": np.arange(start, min(start + 700, 20_000))}))
    found = drawn.cut()["x"].to_numpy()
    assert len(np.unique(found)) == 500
    counts = np.histogram(found, bins=4, range=(0, 20_000))[0]
    assert ((counts > 85) & (counts < 165)).all()  # 125 are expected, standard deviation 9.7


def test_reading_keeps_nothing_of_a_file_that_has_been_read(tmp_path: Path) -> None:
    numbers = np.random.RandomState(0).random_sample(1_000_000)
    pq.write_table(pa.table({"x": numbers}), tmp_path / "rows.parquet", row_group_size=50_000, compression="none")
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for _, rows, _ in record_batches(tmp_path / "rows.parquet", {"x": "number"}):
        most, count = max(most, pa.total_allocated_bytes() - before), count + len(rows)
    assert count == len(numbers)
    assert most < numbers.nbytes / 2


# --- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": [0, 1, 2, 1, 1, 0]}, "the table, row 2: the label 'label' is 2; 0 or 1 is expected"),
        ({"label": [0, 1, None, 1, 1, 0]}, "the table, row 2: the label 'label' is nan; 0 or 1"),
        ({"label": ["x"] * 6}, "the table: 'label' is no column of numbers"),
        ({"shop": [0.5] * 6}, "the table: 'shop' is a column of type double; categories are"),
        ({"price": ["much"] * 6}, "the table: 'price' is no column of numbers"),
    ],
)
def test_wrong_data_is_named(change: dict[str, list[Any]], message: str) -> None:
    with pytest.raises(DataError, match=message) as found:
        CTREncoder(SCHEMA).fit(pa.table({**ROWS, **change}))
    # a value that is not allowed is a ValueError too, a column of another kind is not
    assert isinstance(found.value, ValueError) == ("row 2" in message)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    cases = {
        "gone.csv": None,
        "empty.csv": b"",
        "short.parquet": b"PAR1",
        "columns.csv": b"label,shop,prise,day\n0,a,1,1\n",
        "ragged.csv": b"label,shop,price,day\n0,a,1,1\n0,a\n",
        "text.csv": b"label,shop,price,day\n0,a,1,1\n1,a,much,1\n",
        "bytes.csv": b"label,shop,price,day\n0,\xff\xfe,1,1\n",
    }
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            CTREncoder(SCHEMA).fit(tmp_path / name)
    with pytest.raises(DataError, match=r"no column 'price'\. Did you mean 'prise'\?"):
        CTREncoder(SCHEMA).fit(tmp_path / "columns.csv")
    (tmp_path / "none.csv").write_text("label,shop,price,day\n")
    with pytest.raises(DataError, match="holds no row"):
        CTREncoder(SCHEMA).fit(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "make",
    [
        lambda: CTRSchema(()),
        lambda: CTRSchema((Categorical("a"), Numeric("a"))),
        lambda: CTRSchema((Categorical("label"),)),
        lambda: CTRSchema((Categorical("a", column="label"),)),
        lambda: Categorical(""),
        lambda: Categorical("a", min_count=0),
        lambda: Categorical("a", hash_buckets=0),
        lambda: Categorical("a", characters=(3, 3)),
        lambda: Numeric("a", binning="sqrt"),  # type: ignore[arg-type]
        lambda: Numeric("a", missing="mean"),  # type: ignore[arg-type]
        lambda: Numeric("a", buckets=1),
        lambda: Numeric("a", width=0),
        lambda: CTRSchema.from_config({"label": "y", "fields": [{"kind": "categorical", "colour": 1}]}),
        lambda: CTRSchema.from_config({"fields": []}),
        lambda: CTREncoder(SCHEMA).encode(table()),
        lambda: CTREncoder(SCHEMA).cardinalities,
        lambda: next(CTREncoder(SCHEMA).fit(table()).transform(table(), batch_size=0)),
        lambda: CTREncoder(SCHEMA).fit(7),
        lambda: CTREncoder(SCHEMA).fit([]),
        lambda: list(record_batches(["x.csv"], {}, layout="crateo")),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text("label\n1\n")
    with pytest.raises(InvalidValue):
        make()


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "rows.dat").write_text("0;b;0;1\n1;a;3;2\n")
    layout = TableLayout(";", ("label", "shop", "price", "day"))
    encoder = CTREncoder(CTRSchema((Categorical("shop", 1),))).fit(tmp_path / "rows.dat", layout)
    assert encoder.vocabulary[0].to_pylist() == ["a", "b"]


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'sparing\[tables\]'"):
        CTREncoder(SCHEMA).fit("x.csv")


def test_the_module_alone_imports_neither_arrow_nor_torch() -> None:
    code = "import sys, sparing.data.ctr; print([m for m in ('pyarrow', 'polars', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
