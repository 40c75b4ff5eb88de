"""Analysing a corpus: the order it gives, resuming, refusals, damaged files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparing.core import files
from sparing.core.errors import CorruptFile, DataError, InvalidValue, StoreError
from sparing.data_efficiency import analysis
from sparing.data_efficiency.analysis import BINS, DataAnalyzer, read_statistic
from sparing.data_efficiency.index import DifficultyIndex
from sparing.data_efficiency.metrics import (
    Composed,
    FunctionMetric,
    SequenceLength,
    SummedFunction,
    TokenFields,
    VocabularyFrequency,
    VocabularyRarity,
)

PADDED = TokenFields(pad_id=0)


def tokens(count: int = 60, width: int = 9, vocab: int = 20, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    found = draw.integers(1, vocab, (count, width))
    found[np.arange(width) >= draw.integers(1, width + 1, count)[:, None]] = 0
    return found


def first_column(batch: Any) -> np.ndarray:
    return np.asarray(batch)[:, 0]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".npy", ".json")
    }


def lengths(folder: Path, data: Any, **options: Any) -> DifficultyIndex:
    return DataAnalyzer(data, [SequenceLength(PADDED)], folder, **options).run()["seqlen"]


# --- the order


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    values=st.lists(st.integers(-300, 300), min_size=1, max_size=40), shard=st.integers(1, 50), batch=st.integers(1, 9)
)
def test_an_index_is_the_stable_order_of_its_values(tmp_path_factory, values, shard, batch):
    folder = tmp_path_factory.mktemp("order")
    column = np.array(values)[:, None]
    index = DataAnalyzer(column, [FunctionMetric("m", first_column)], folder, shard_size=shard, batch_size=batch).run()[
        "m"
    ]
    index.check()
    assert index.sample_to_metric.tolist() == values
    assert index.ids.tolist() == np.argsort(values, kind="stable").tolist()
    assert index.values.tolist() == sorted(set(values))
    low, high = sorted((values[0], values[-1]))
    assert index.ids_between(low, high).tolist() == [int(i) for i in index.ids if low < values[int(i)] <= high]
    assert len(index.ids_up_to_percentile(50)) == len(values) // 2
    assert index.percentile_offsets().tolist() == index.offsets.tolist()  # fewer than 200 rows: runs of one


def test_rows_are_merged_in_runs_of_a_hundredth(tmp_path):
    column = np.arange(512)[:, None]
    index = DataAnalyzer(column, [FunctionMetric("m", first_column)], tmp_path).run()["m"]
    assert index.percentile_offsets().tolist() == [*range(0, 512, 5), 512]


def test_shards_workers_and_kinds_of_data_do_not_matter(tmp_path):
    found = tokens()
    np.save(tmp_path / "tokens.npy", found)
    forms = {
        "array": found,
        "mapped": np.load(tmp_path / "tokens.npy", mmap_mode="r"),
        "tensor": torch.tensor(found),
        "items": list(torch.tensor(found)),
    }
    made = {}
    for name, data in forms.items():
        options = {"num_workers": 2} if name == "mapped" else {"shard_size": 7, "batch_size": 3}
        metrics = [SequenceLength(PADDED), VocabularyRarity(20, PADDED)]
        metrics.append(Composed(metrics, width=9))
        if name == "mapped":
            options["shard_size"] = 16
        DataAnalyzer(data, metrics, tmp_path / name, version="v1", **options).run()
        made[name] = contents(tmp_path / name)
    assert len(made["array"]) == 3 * 5 + 2
    assert all(one == made["array"] for one in made.values())


def test_the_rarity_and_its_composition_are_the_formulas(tmp_path):
    found = tokens()
    metrics = [SequenceLength(PADDED), VocabularyRarity(20, PADDED)]
    both = Composed(metrics, width=9)
    indexes = DataAnalyzer(found, [*metrics, both], tmp_path).run()
    counts = np.bincount(found[found > 0], minlength=21)
    assert read_statistic(tmp_path / "total_vocab_freq").tolist() == counts.tolist()
    a = -np.log(np.maximum(counts, 1) / np.maximum(counts, 1).sum())
    rarity = [int(a[row[row > 0]].sum()) for row in found]
    assert indexes["vocab_rarity"].sample_to_metric.tolist() == rarity
    power = 10 ** (int(np.ceil(np.log10(9 * a.max()))) + 1)
    expected = (found > 0).sum(1) * power + rarity
    assert indexes["seqlen_vocab_rarity"].sample_to_metric.tolist() == expected.tolist()


@pytest.mark.parametrize("pad", [0, 7, -1, 99], ids=str)
def test_padding_may_be_any_number(pad):
    """Within the vocabulary or outside it, and a mask says the same."""
    found = np.where(tokens() == 0, pad, tokens() + (pad == 7) * 8)
    real = found != pad
    counts = np.arange(1, 32)
    by_number = VocabularyRarity(30, TokenFields(pad_id=pad), counts).values(found)
    masked = {"input_ids": found, "attention_mask": real.astype(np.int64)}
    assert by_number.tolist() == VocabularyRarity(30, TokenFields(), counts).values(masked).tolist()
    a = -np.log(counts / counts.sum())
    assert by_number.tolist() == [int(a[row[keep]].sum()) for row, keep in zip(found, real, strict=True)]
    with pytest.raises(DataError, match="token number 31"):
        VocabularyRarity(30, TokenFields(pad_id=pad), counts).values(np.array([[31, 1]]))


def test_a_shard_that_turns_real_is_real(tmp_path):
    """Whole numbers in its first batch, others in the second."""
    values = np.array([[3.0], [1.0], [0.5], [2.25]])
    metric = FunctionMetric("mixed", lambda batch: batch[:, 0] if (batch % 1).any() else batch[:, 0].astype(int))
    index = DataAnalyzer(values, [metric], tmp_path, batch_size=2).run()["mixed"]
    assert index.sample_to_metric.tolist() == values[:, 0].tolist()
    assert index.ids.tolist() == [2, 1, 3, 0]


def test_a_mapping_is_renewed_before_too_much_was_read_through_it(tmp_path, monkeypatch):
    np.save(tmp_path / "tokens.npy", tokens())
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    renewed = []
    reopened = analysis._reopened
    monkeypatch.setattr(analysis, "_reopened", lambda data: renewed.append(1) or reopened(data))
    monkeypatch.setattr(analysis, "MAPPED", 10 * mapped.nbytes // 60)
    lengths(tmp_path / "out", mapped, batch_size=5, version="v1")
    assert len(renewed) == 6


def test_sample_numbers_in_a_batch_decide_the_place(tmp_path):
    order = np.random.default_rng(1).permutation(60)
    found = tokens()
    plain = lengths(tmp_path / "plain", found)
    metric = SequenceLength(TokenFields(mask=None, pad_id=0))
    mixed = DataAnalyzer(
        {"input_ids": found[order], "index": order}, [metric], tmp_path / "mixed", shard_size=7, batch_size=4
    ).run()["seqlen"]
    assert mixed.ids.tolist() == plain.ids.tolist()
    order[3] = order[50]
    with pytest.raises(DataError, match=f"gives sample {order[3]} twice"):
        DataAnalyzer({"input_ids": found, "index": order}, [metric], tmp_path / "twice", shard_size=7).run()
    with pytest.raises(DataError, match=r"0 … 59 is possible"):
        DataAnalyzer({"input_ids": found, "index": order + 5}, [metric], tmp_path / "far").run()


def test_real_numbers_keep_their_order_on_a_grid(tmp_path):
    values = np.random.default_rng(0).normal(size=(3 * BINS, 1))
    few = DataAnalyzer(values[:500], [FunctionMetric("m", first_column)], tmp_path / "few").run()["m"]
    assert few.meta["bins"] is None
    assert few.sample_to_metric.tolist() == values[:500, 0].tolist()
    many = DataAnalyzer(values, [FunctionMetric("m", first_column)], tmp_path / "many", shard_size=4096).run()["m"]
    assert len(many.values) <= BINS
    width = many.meta["bins"]["width"]
    assert (np.abs(many.sample_to_metric - values[:, 0]) <= width * 1.001).all()
    assert np.all(np.diff(values[many.ids, 0]) > -width * 1.001)


def test_an_index_is_written_as_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    index = lengths(tmp_path / "index", tokens())
    index.to_parquet(tmp_path / "index.parquet")
    table = pq.read_table(tmp_path / "index.parquet")
    assert table.column("id").to_pylist() == list(range(60))
    assert table.column("value").to_pylist() == index.sample_to_metric.tolist()


# --- resuming


def test_only_lost_shards_are_computed_again(tmp_path):
    calls: list[int] = []

    def watched(batch: Any) -> np.ndarray:
        calls.append(int(batch[0, 0]))
        return batch[:, 0]

    column = np.arange(40)[:, None]
    made = DataAnalyzer(column, [FunctionMetric("m", watched, "1")], tmp_path / "a", shard_size=10)
    made.map()
    assert calls == [0, 10, 20, 30]
    parts = next((tmp_path / "a" / "parts").iterdir())
    (parts / "part-00001.values.npy").unlink()
    damaged = parts / "part-00002.values.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    (parts / "part-00003.json").write_text("{")
    with pytest.raises(DataError, match="3 of 4 shards of 'm' are missing"):
        made.reduce()
    calls.clear()
    index = made.run()["m"]
    assert calls == [10, 20, 30]
    assert index.ids.tolist() == list(range(40))
    calls.clear()
    made.run()
    assert not calls
    assert not list((tmp_path / "a" / "parts").iterdir())


@pytest.mark.parametrize("moment", [2, 12, 45, 70])
def test_a_killed_analysis_ends_as_an_undisturbed_one(tmp_path, moment):
    found = tokens()
    np.save(tmp_path / "tokens.npy", found)
    if (pid := os.fork()) == 0:
        _killed(tmp_path, moment)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "it ended before it was killed"
    for folder in ("killed", "whole"):
        metrics = [SequenceLength(PADDED), VocabularyRarity(20, PADDED)]
        DataAnalyzer(found, metrics, tmp_path / folder, shard_size=25).run()
    killed = {name: content for name, content in contents(tmp_path / "killed").items() if "/." not in f"/{name}"}
    assert killed == contents(tmp_path / "whole")


def _killed(folder: Path, moment: int) -> None:
    """In a child process: the same analysis, killed when it writes for the ``moment``-th time."""
    seen = 0

    def die(stage: str, target: Path) -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        files.fault_hook = die
        metrics = [SequenceLength(PADDED), VocabularyRarity(20, PADDED)]
        DataAnalyzer(np.load(folder / "tokens.npy"), metrics, folder / "killed", shard_size=25).run()
    finally:
        os._exit(0)


def test_workers_share_a_folder_and_first_passes_come_first(tmp_path):
    found = tokens()

    def worker(number: int | None) -> DataAnalyzer:
        return DataAnalyzer(found, [VocabularyRarity(20, PADDED)], tmp_path / "shared", 3, number, shard_size=8)

    for number in range(3):
        worker(number).map()
    assert worker(None).reduce() == {}  # the counts; now the metric can be mapped
    for number in range(2):
        worker(number).map()
    with pytest.raises(DataError, match=r"shards of 'vocab_rarity' are missing"):
        worker(None).reduce()
    worker(2).map()
    shared = worker(None).reduce()["vocab_rarity"]
    alone = DataAnalyzer(found, [VocabularyRarity(20, PADDED)], tmp_path / "alone").run()["vocab_rarity"]
    assert shared.fingerprint == alone.fingerprint


def test_other_settings_or_data_are_told_and_computed_anew(tmp_path):
    DataAnalyzer(tokens(), [VocabularyRarity(20, PADDED)], tmp_path).run()
    with pytest.warns(UserWarning, match=r"metric\.vocab_size was 20, is 30"):
        DataAnalyzer(tokens(), [VocabularyRarity(30, PADDED)], tmp_path).run()
    with pytest.warns(UserWarning, match=r"dataset was"):
        index = DataAnalyzer(tokens(seed=1), [VocabularyRarity(30, PADDED)], tmp_path).run()["vocab_rarity"]
    fresh = DataAnalyzer(tokens(seed=1), [VocabularyRarity(30, PADDED)], tmp_path / "fresh").run()["vocab_rarity"]
    assert index.fingerprint == fresh.fingerprint


def test_a_second_run_on_one_folder_is_refused(tmp_path):
    def inside(batch: Any) -> np.ndarray:
        with pytest.raises(StoreError, match="another analysis is at work"):
            DataAnalyzer(tokens(), [SequenceLength(PADDED)], tmp_path).run()
        return batch[:, 0]

    DataAnalyzer(tokens(), [FunctionMetric("m", inside, "1")], tmp_path).run()


# --- refusals


def short(batch: Any) -> np.ndarray:
    return np.zeros(len(batch) - 1)


def nan_at_seven(batch: Any) -> np.ndarray:
    values = np.asarray(batch)[:, 0].astype(float)
    values[values == 7] = np.nan
    return values


def broken(batch: Any) -> np.ndarray:
    raise RuntimeError("a bug of the user's")


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (short, r"'m', samples 5 … 9: values of shape \(4,\)|samples 0 … 4: values of shape \(4,\) for 5"),
        (nan_at_seven, "samples 5 … 9: the value of sample 7 is nan"),
        (lambda batch: np.array(["a"] * len(batch)), "values of type <U1"),
        (lambda batch: np.full(len(batch), 2**64 - 1, np.uint64), "does not fit into 64 bits"),
    ],
)
def test_bad_values_are_named(tmp_path, function, named):
    with pytest.raises(DataError, match=named):
        DataAnalyzer(np.arange(20)[:, None], [FunctionMetric("m", function, "1")], tmp_path, batch_size=5).run()


def test_items_that_make_no_batch_are_named(tmp_path):
    data = [torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2, 3])]
    with pytest.raises(DataError, match=r"samples 0 … 2 cannot be made a batch: RuntimeError: stack expects"):
        DataAnalyzer(data, [SequenceLength(PADDED)], tmp_path).run()


def test_an_error_in_a_process_ends_the_analysis(tmp_path):
    with pytest.raises(RuntimeError, match="a bug of the user's"):
        DataAnalyzer(
            np.arange(9)[:, None], [FunctionMetric("m", broken, "1")], tmp_path, num_workers=2, shard_size=3
        ).run()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: DataAnalyzer(np.zeros((0, 3)), [SequenceLength()], p), "the dataset is empty"),
        (lambda p: DataAnalyzer(tokens(), [], p), "no metrics"),
        (lambda p: DataAnalyzer(tokens(), [SequenceLength(), SequenceLength(PADDED)], p), "are called 'seqlen'"),
        (lambda p: DataAnalyzer(tokens(), [SequenceLength(name="a/b")], p), "name = 'a/b'"),
        (lambda p: DataAnalyzer(tokens(), [len], p), "is no DifficultyMetric"),
        (lambda p: DataAnalyzer(tokens(), [SequenceLength()], p, 2, 2), "worker_id = 2; 0 … 1"),
        (lambda p: DataAnalyzer({"a": [1], "b": []}, [SequenceLength()], p), "columns of lengths"),
        (lambda p: DataAnalyzer(iter([1]), [SequenceLength()], p), "no __len__"),
        (lambda p: DataAnalyzer(tokens(), [SequenceLength()], p).run(), "nothing tells tokens from padding"),
        (lambda p: DataAnalyzer(tokens(vocab=50), [VocabularyFrequency(20, PADDED)], p).run(), "token number 49"),
        (
            lambda p: DataAnalyzer({"input_ids": tokens(), "attention_mask": tokens()}, [SequenceLength()], p).run(),
            "0 and 1",
        ),
        (lambda p: DataAnalyzer({"text": tokens()}, [SequenceLength()], p).run(), "no field 'attention_mask'; it has"),
        (lambda p: Composed([SequenceLength()], 5), "1 metrics"),
        (lambda p: Composed([SequenceLength(), FunctionMetric("f", len, "1")], 5).bound(5), "knows no greatest value"),
        (lambda p: VocabularyRarity(20).values(tokens()), "has no counts yet"),
        (lambda p: VocabularyRarity(20, counts=np.ones(20, int)), r"\(21,\)"),
        (
            lambda p: Composed([SequenceLength(PADDED)] * 2, width=3).values(np.ones((2, 2000), int)),
            "Are samples wider than that",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_and_batches_are_named(tmp_path, make, named):
    with pytest.raises((DataError, InvalidValue), match=named):
        make(tmp_path)


def test_sums_over_ragged_last_batches_are_right(tmp_path):
    data = np.arange(23)[:, None]
    DataAnalyzer(data, [SummedFunction("sum", lambda b: b.sum(0), "1")], tmp_path, batch_size=5, shard_size=10).run()
    assert read_statistic(tmp_path / "sum").tolist() == [253]
    with pytest.raises(DataError, match="the same for every batch"):
        DataAnalyzer(data, [SummedFunction("s", lambda b: b[:, 0], "1")], tmp_path / "b", batch_size=5).run()


# --- damaged files


def test_damage_and_foreign_indexes_are_refused(tmp_path):
    index = lengths(tmp_path, tokens())
    folder = index.path
    with pytest.raises(DataError, match="an index of 60 samples; the dataset has 61"):
        DifficultyIndex.open(folder, samples=61)
    with pytest.raises(DataError, match="was made from the dataset"):
        DifficultyIndex.open(folder, dataset="another")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    flipped = bytearray(kept["ids.npy"])
    flipped[-1] ^= 1
    for name, content, named in (
        ("ids.npy", bytes(flipped), "its digest differs"),
        ("offsets.npy", kept["offsets.npy"][:-1], "its digest differs"),
        ("values.npy", b"", "its digest differs"),
        ("meta.json", b"{}", "is not an index's"),
        ("meta.json", json.dumps(json.loads(kept["meta.json"]) | {"version": 99}).encode(), "version 99"),
    ):
        (folder / name).write_bytes(content)
        with pytest.raises(CorruptFile, match=named):
            DifficultyIndex.open(folder)
        (folder / name).write_bytes(kept[name])
    (folder / "ids.npy").unlink()
    with pytest.raises(CorruptFile, match="missing"):
        DifficultyIndex.open(folder)
    (folder / "ids.npy").write_bytes(kept["values.npy"])
    with pytest.raises(CorruptFile, match=r"do not fit|is expected"):
        DifficultyIndex.open(folder, verify=False)
    (folder / "ids.npy").write_bytes(b"no array")
    with pytest.raises(CorruptFile, match="not a valid npy file"):
        DifficultyIndex.open(folder, verify=False)


def test_invariants_are_checked_not_only_digests(tmp_path):
    index = lengths(tmp_path, tokens())
    ids = np.array(index.ids)
    for change, named in (
        (ids[::-1].copy(), "under a value that is not its own"),
        (np.where(ids == ids[1], ids[0], ids), "is missing|not its own"),
    ):
        np.save(index.path / "ids.npy", change)
        with pytest.raises(CorruptFile, match=named):
            DifficultyIndex.open(index.path, verify=False).check()


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(analysis.os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="No space left on device"):
        lengths(tmp_path, tokens())
    assert not (tmp_path / "seqlen").exists()
