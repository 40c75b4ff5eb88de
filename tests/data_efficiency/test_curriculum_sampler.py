"""The cluster sampler: which samples it releases, how it draws, how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sparing.core.errors import DataError, InvalidValue
from sparing.data_efficiency.analysis import DataAnalyzer
from sparing.data_efficiency.index import DifficultyIndex
from sparing.data_efficiency.metrics import FunctionMetric
from sparing.data_efficiency.pacing import CustomPacing, discrete, linear
from sparing.data_efficiency.postprocessing import truncate_batch
from sparing.data_efficiency.sampler import (
    CurriculumBatch,
    CurriculumCollate,
    CurriculumItems,
    CurriculumMetric,
    CurriculumSampler,
)

N = 97
ORDERS = ("keyed", "reference")


def column(number: int) -> Any:
    return FunctionMetric(f"m{number}", lambda batch: np.asarray(batch)[:, number], f"column {number}")


VALUES = np.random.default_rng(0).integers(0, 20, (N, 2))


@pytest.fixture(scope="module")
def indexes(tmp_path_factory: pytest.TempPathFactory) -> list[DifficultyIndex]:
    folder = tmp_path_factory.mktemp("indexes")
    made = DataAnalyzer(VALUES, [column(0), column(1)], folder).run()
    return [made["m0"], made["m1"]]


def two(indexes: list[DifficultyIndex]) -> dict[str, CurriculumMetric]:
    return {
        "a": CurriculumMetric(linear(5, 20, 12), indexes[0], "value"),
        "b": CurriculumMetric(linear(30, 100, 9, 10), indexes[1], "percentile"),
        "length": CurriculumMetric(linear(8, 64, 10, 8)),
    }


def one(indexes: list[DifficultyIndex]) -> dict[str, CurriculumMetric]:
    return {"a": CurriculumMetric(linear(10, 100, 12), indexes[0])}


CASES = {"one": one, "two": two}


def flat(batches: Any) -> list[list[int]]:
    return [list(batch) for batch in batches]


# --- what is released


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_clusters_are_disjoint_and_batches_hold_what_is_released(indexes, case, order):
    sampler = CurriculumSampler(CASES[case](indexes), 8, 40, 3, rng_order=order)
    for batch, now in sampler.global_batches():
        released = np.concatenate(sampler.clusters)
        assert len(set(released.tolist())) == len(released)
        allowed = np.ones(N, bool)
        if case == "two":
            allowed &= VALUES[:, 0] <= now["a"]
            allowed[indexes[1].ids[int(N * now["b"] // 100) :]] = False
        else:
            allowed[indexes[0].ids[int(N * now["a"] // 100) :]] = False
        assert set(released.tolist()) == set(np.flatnonzero(allowed).tolist())
        assert set(batch) <= set(released.tolist())
        assert len(batch) == 8
    assert len(released) == N


@pytest.mark.parametrize("order", ORDERS)
def test_no_sample_comes_twice_in_one_pass_and_all_come_equally_often(indexes, order):
    metric = CurriculumMetric(discrete([50, 100], [10]), indexes[0])
    sampler = CurriculumSampler(metric, 10, 4000, 5, rng_order=order)
    seen = np.zeros(N, int)
    passes: list[list[int]] = [[], []]
    for step, (batch, _) in enumerate(sampler.global_batches()):
        sets = [set(cluster.tolist()) for cluster in sampler.clusters]
        for number, members in enumerate(sets):
            passes[number] += [i for i in batch if i in members]
        if step >= 10:
            np.add.at(seen, batch, 1)
    for number, drawn in enumerate(passes):
        size = len(sampler.clusters[number])
        counts = np.bincount(drawn, minlength=N)[sorted(sets[number])]
        assert counts.max() - counts.min() <= 1  # passes, the last of them begun
        assert len(drawn) > 100 * size
    expected = seen.sum() / N
    assert np.abs(seen - expected).max() < 6 * np.sqrt(expected)


def test_percentiles_are_rounded_evenly_or_as_the_reference_does(indexes):
    pacing = linear(1, 100, 1e9)  # stays at 1 for long
    even = CurriculumSampler(CurriculumMetric(linear(50, 100, 1e9), indexes[0]), 1, 1)
    list(even)
    assert len(even.clusters[0]) == N * 50 // 100
    with pytest.raises(DataError, match="the first step releases no sample"):
        CurriculumSampler(CurriculumMetric(pacing, indexes[0]), 1, 1)
    with pytest.raises(DataError, match="the first step releases no sample"):  # 97 // 100 = 0 until the end
        CurriculumSampler(CurriculumMetric(linear(50, 100, 1e9), indexes[0]), 1, 1, percentile_rounding="reference")
    with pytest.raises(DataError, match=r"the least value of 'v' is 0\. Raise min_difficulty"):
        CurriculumSampler({"v": CurriculumMetric(linear(-5, 9, 1e9), indexes[0], "value")}, 1, 1)


def test_without_a_clustered_metric_all_samples_are_one_cluster():
    sampler = CurriculumSampler({"length": CurriculumMetric(linear(8, 64, 10, 8))}, 4, 20, samples=N)
    assert {batch.difficulties["length"] for batch in sampler} == {8, 16, 24, 32, 40, 48, 56, 64}
    assert [len(cluster) for cluster in sampler.clusters] == [N]


def test_a_difficulty_that_falls_back_releases_nothing_twice(indexes):
    falling = CustomPacing(0, 100, lambda t: [20, 60, 30, 70, 10][t % 5])
    sampler = CurriculumSampler(CurriculumMetric(falling, indexes[0]), 3, 20)
    list(sampler)
    assert sorted(np.concatenate(sampler.clusters).tolist()) == sorted(indexes[0].ids[: N * 70 // 100].tolist())
    again = CurriculumSampler(CurriculumMetric(falling, indexes[0]), 3, 20)
    again.load_state_dict(sampler.state_dict(30 // 3))
    assert flat(again) == flat(CurriculumSampler(CurriculumMetric(falling, indexes[0]), 3, 20))[10:]


def test_a_cluster_smaller_than_its_draw_still_fills_the_batch(indexes):
    metric = CurriculumMetric(linear(3, 100, 1e9), indexes[0])
    (batch,) = CurriculumSampler(metric, 50, 1)
    assert len(batch) == 50
    assert np.bincount(batch)[np.unique(batch)].tolist() == [25, 25]


# --- going on


@settings(max_examples=25)
@given(
    case=st.sampled_from(sorted(CASES)), order=st.sampled_from(ORDERS), consumed=st.integers(0, 45),
    ahead=st.integers(0, 30), seed=st.integers(0, 3),
)  # fmt: skip
def test_a_resumed_sampler_yields_what_was_not_consumed(indexes, case, order, consumed, ahead, seed):
    def made() -> CurriculumSampler:
        return CurriculumSampler(
            CASES[case](indexes), 4, 15, seed, rank=1, world_size=2, accumulation=3, rng_order=order
        )

    whole = flat(made())
    assert len(whole) == len(made()) == 45
    first = made()
    fetching = iter(first)
    for _ in range(min(consumed + ahead, 45)):
        next(fetching)
    state = json.loads(json.dumps(first.state_dict(consumed)))
    other = made()
    other.load_state_dict(state)
    assert flat(other) == whole[consumed:]
    assert flat(fetching) == whole[consumed + ahead :]


def test_a_state_older_than_what_is_remembered_is_found_by_drawing_again(indexes):
    sampler = CurriculumSampler(one(indexes), 4, 200)
    whole = flat(sampler)
    other = CurriculumSampler(one(indexes), 4, 200)
    other.load_state_dict(sampler.state_dict(20))
    assert flat(other) == whole[20:]


def test_a_state_does_not_grow_with_the_data(tmp_path):
    sizes = []
    for count in (200, 20_000):
        data = np.random.default_rng(0).integers(0, 20, (count, 1))
        index = DataAnalyzer(data, [column(0)], tmp_path / str(count)).run()["m0"]
        sampler = CurriculumSampler(CurriculumMetric(linear(10, 100, 12), index), 4, 30)
        list(sampler)
        sizes.append(len(json.dumps(sampler.state_dict())))
    assert sizes[1] < sizes[0] + 50


@pytest.mark.parametrize("order", ORDERS)
def test_another_number_of_processes_sees_the_same_samples(indexes, order):
    def parts(world: int, micro: int, accumulation: int, state: Any = None) -> list[int]:
        made = []
        for rank in range(world):
            sampler = CurriculumSampler(
                two(indexes), micro, 10, rank=rank, world_size=world, accumulation=accumulation, rng_order=order
            )
            if state is not None:
                sampler.load_state_dict(state)
            made.append(flat(sampler))
        return [i for batch in zip(*made, strict=True) for part in batch for i in part]

    whole = parts(1, 12, 1)
    assert parts(3, 2, 2) == whole
    sampler = CurriculumSampler(two(indexes), 3, 10, rank=0, world_size=2, accumulation=2, rng_order=order)
    drawn = iter(sampler)
    for _ in range(7):
        next(drawn)
    state = sampler.state_dict()
    assert state["offset"] == 6
    assert parts(2, 3, 2, state) == parts(3, 2, 2, state) == whole[42:]
    with pytest.raises(InvalidValue, match=r"6 samples into step 4, which is not between two micro batches of 12"):
        parts(1, 12, 1, state)


def test_foreign_states_are_refused(indexes, tmp_path):
    state = CurriculumSampler(one(indexes), 4, 9, 1).state_dict()
    for other, named in (
        (CurriculumSampler(one(indexes), 4, 9, 2), "seed was 1, is 2"),
        (CurriculumSampler(one(indexes), 8, 9, 1), "global_batch was 4, is 8"),
        (CurriculumSampler(one(indexes), 4, 9, 1, rng_order="reference"), "rng_order was 'keyed', is 'reference'"),
        (CurriculumSampler(one(indexes[::-1]), 4, 9, 1), r"metrics\.a\.index was"),
        (
            CurriculumSampler({"a": CurriculumMetric(linear(20, 100, 12), indexes[0])}, 4, 9, 1),
            r"metrics\.a\.pacing\.min_difficulty was 10, is 20",
        ),
    ):
        with pytest.raises(InvalidValue, match=named):
            other.load_state_dict(state)
    with pytest.raises(InvalidValue, match="a state of version 7"):
        CurriculumSampler(one(indexes), 4, 9, 1).load_state_dict(state | {"version": 7})
    with pytest.raises(InvalidValue, match="consumed = 1; 0 batches"):
        CurriculumSampler(one(indexes), 4, 9, 1).state_dict(1)


def test_seeds_and_keys_give_other_batches(indexes):
    runs = [flat(CurriculumSampler(one(indexes), 8, 5, seed, rng_order=order)) for seed in (0, 1) for order in ORDERS]
    assert len({json.dumps(run) for run in runs}) == 4
    before = np.random.get_state()[1].tolist()
    list(CurriculumSampler(one(indexes), 8, 5))
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"metrics": {}}, "at least one CurriculumMetric"),
        ({"metrics": {"a": 3}}, "at least one CurriculumMetric"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"steps": 1.5}, "steps = 1.5"),
        ({"seed": -1}, "seed = -1"),
        ({"rank": 2, "world_size": 2}, "rank = 2; 0 … 1"),
        ({"rng_order": "random"}, "rng_order = 'random'; one of keyed, reference"),
        ({"percentile_rounding": "up"}, "percentile_rounding = 'up'"),
        ({"samples": 96}, "indexes of different datasets"),
        ({"metrics": {"l": CurriculumMetric(linear(1, 5, 5))}}, "samples = N is needed"),
    ],
)
def test_bad_arguments_are_named(indexes, options, named):
    arguments = {"metrics": one(indexes), "batch_size": 4, "steps": 5} | options
    with pytest.raises(InvalidValue, match=named):
        CurriculumSampler(**arguments)


def test_bad_metrics_are_named(indexes):
    for arguments, named in (
        ((3,), "pacing = 3"),
        ((linear(1, 5, 5), "folder"), "index = 'folder'"),
        ((linear(1, 5, 5), indexes[0], "values"), "difficulty_type = 'values'"),
        ((linear(-1, 5, 5), indexes[0]), "percentiles from -1 to 5"),
    ):
        with pytest.raises(InvalidValue, match=named):
            CurriculumMetric(*arguments)


# --- with a loader


@pytest.mark.parametrize("workers", [0, 2])
def test_difficulty_and_batch_belong_together_in_every_process(indexes, workers):
    data = torch.arange(N)[:, None] * 100 + torch.arange(64)

    def loader(sampler: CurriculumSampler) -> DataLoader:
        cut = CurriculumCollate(lambda batch, now: (truncate_batch(batch, now["length"], shifted=False), now["length"]))
        return DataLoader(CurriculumItems(data), batch_sampler=sampler, collate_fn=cut, num_workers=workers)

    sampler = CurriculumSampler(two(indexes), 4, 12)
    expected = list(CurriculumSampler(two(indexes), 4, 12))
    found = list(loader(sampler))
    assert len(found) == len(loader(sampler)) == 12
    for (batch, length), indices in zip(found, expected, strict=True):
        assert length == indices.difficulties["length"]
        assert torch.equal(batch, data[list(indices), : int(length)])
    resumed = CurriculumSampler(two(indexes), 4, 12)
    resumed.load_state_dict(sampler.state_dict(5))
    for (batch, _), (same, _) in zip(loader(resumed), found[5:], strict=True):
        assert torch.equal(batch, same)


def test_other_batches_and_items_are_refused():
    with pytest.raises(InvalidValue, match="batch_sampler"):
        CurriculumItems(list(range(5))).__getitems__([1, 2])
    with pytest.raises(InvalidValue, match="items of CurriculumItems"):
        CurriculumCollate(lambda batch, now: batch)([1, 2])
    items = CurriculumItems([0, 1])
    assert len(items) == 2
    with pytest.raises(DataError, match="sample 5"):
        items.__getitems__(CurriculumBatch([0, 5], 1, 0, {}))


def test_two_metrics_that_share_no_sample_are_refused(tmp_path: Path):
    data = np.array([[0, 9], [9, 0]] * 5)
    made = DataAnalyzer(data, [column(0), column(1)], tmp_path).run()
    metrics = {name: CurriculumMetric(linear(1, 9, 100), index, "value") for name, index in made.items()}
    with pytest.raises(DataError, match="releases no sample"):
        CurriculumSampler(metrics, 2, 10)
