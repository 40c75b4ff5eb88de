"""Order and random numbers are pure functions of (seed, epoch, batch)."""

from __future__ import annotations

import pickle
import random
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from points import Points
from torch.utils.data import DataLoader, Subset

from sparing.core.collation import batches_of, items_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.training import Batches, IndexBatch, SeededItems, reseed


def everything(batches: Batches) -> list[list[int]]:
    return [list(batch) for batch in batches]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**31), st.integers(0, 5), st.booleans())
def test_an_epoch_holds_each_sample_once(size: int, batch_size: int, seed: int, epoch: int, shuffle: bool) -> None:
    batches = Batches(range(size), batch_size, seed, shuffle=shuffle)
    batches.set_epoch(epoch)
    found = everything(batches)
    assert sorted(chain.from_iterable(found)) == list(range(size))
    assert len(found) == len(batches)
    assert all(len(batch) == batch_size for batch in found[:-1])
    assert found == everything(batches)


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_a_position_leaves_the_rest(size: int, batch_size: int, data: st.DataObject) -> None:
    batches = Batches(range(size), batch_size, 1)
    batches.set_epoch(2)
    whole = everything(batches)
    consumed = data.draw(st.integers(0, len(whole)))
    batches.seek(2, consumed)
    assert everything(batches) == whole[consumed:]
    assert len(batches) == len(whole)  # the length never changes
    batches.set_epoch(2)
    assert everything(batches) == whole[consumed:]
    batches.set_epoch(3)
    assert len(everything(batches)) == len(whole)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5))
def test_all_processes_together_see_the_batches_of_one(size: int, batch_size: int, world: int) -> None:
    one = everything(Batches(range(size), batch_size, 5))
    parts = [Batches(range(size), batch_size, 5, rank=rank, world=world) for rank in range(world)]
    for number, batch in enumerate(one):
        shares = [part.shares(0)[number] for part in parts]
        assert {total for total, _ in shares} == {len(batch)}
        assert sum(own for _, own in shares) == len(batch)
        drawn = [everything(part)[number] for part in parts]
        assert all(drawn)  # every process takes part in every step
        assert sorted(chain.from_iterable(d for d, (_, own) in zip(drawn, shares, strict=True) if own)) == sorted(batch)


def test_order_depends_on_seed_and_epoch() -> None:
    batches = Batches(range(50), 10, 0)
    orders = {tuple(batches.order(epoch)) for epoch in range(5)} | {tuple(Batches(range(50), 10, 1).order(0))}
    assert len(orders) == 6


def test_drop_last() -> None:
    batches = Batches(range(25), 10, 0, drop_last=True)
    assert [len(batch) for batch in batches] == [10, 10]
    with pytest.raises(DataError, match=r"7 samples, fewer than one batch of 10.*batch_size ≤ 7"):
        Batches(range(7), 10, 0, drop_last=True)


def test_bad_input() -> None:
    with pytest.raises(DataError, match="empty"):
        Batches([], 4, 0)
    with pytest.raises(InvalidValue, match=r"generator.*map-style"):
        Batches((i for i in range(3)), 4, 0)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="batch_size = 0"):
        Batches(range(3), 0, 0)
    with pytest.raises(InvalidValue, match="consumed = 3; an epoch has 2 batches"):
        Batches(range(3), 2, 0).seek(0, 3)
    with pytest.raises(InvalidValue, match=r"rank = 2; 0 … 1"):
        Batches(range(3), 2, 0, rank=2, world=2)


def test_an_index_batch_keeps_its_place_when_sent_to_a_worker() -> None:
    batch = pickle.loads(pickle.dumps(IndexBatch([3, 4], 1, 2, 3)))  # noqa: S301  # as loaders do
    assert (list(batch), batch.epoch, batch.number, batch.rank) == ([3, 4], 1, 2, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_are_the_same_for_any_worker_and_after_a_jump(workers: int) -> None:
    data = SeededItems(Points(40, 0, noisy=True), seed=9)
    batches = Batches(data, 8, 9)

    def read(workers: int) -> list[torch.Tensor]:
        loader = DataLoader(data, batch_sampler=batches, num_workers=workers)  # type: ignore[arg-type]
        return [x for x, _ in loader]

    batches.set_epoch(1)
    whole = read(0)
    assert not torch.equal(whole[0] - data.dataset.x[list(next(iter(batches)))], torch.zeros(8, 8))
    batches.seek(1, 2)
    rest = read(workers)
    assert len(rest) == 3
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], rest, strict=True))


def test_reading_leaves_the_callers_generators_alone() -> None:
    reseed("test")
    before = random.random(), np.random.rand(), torch.rand(1)
    reseed("test")
    SeededItems(Points(4, 0, noisy=True), 0).__getitems__(IndexBatch([0, 1], 0, 0))
    assert before == (random.random(), np.random.rand(), torch.rand(1))


class Broken:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        if index == 6:
            raise KeyError("no such picture")
        return index


def test_a_sample_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match="sample 6 of the training data cannot be read: KeyError: 'no such picture'"):
        SeededItems(Broken(), 0).__getitems__(IndexBatch([5, 6], 0, 0))
    with pytest.raises(DataError, match="sample 6 of the training data cannot be read: KeyError: 'no such picture'"):
        SeededItems(Subset(Broken(), [5, 6]), 0).__getitems__(IndexBatch([0, 1], 0, 0))  # read all at once
    with pytest.raises(DataError, match=r"^sample 6 cannot be read: KeyError: 'no such picture'$"):
        list(batches_of(Broken(), 4))
    with pytest.raises(InvalidValue, match="batch_sampler"):
        SeededItems(Broken(), 0).__getitems__([5])


def test_items_that_can_only_be_read_alone() -> None:
    class Alone:
        def __getitem__(self, index: int) -> int:
            return index

        def __getitems__(self, indices: list[int]) -> list[int]:
            raise OSError("too many files")

    with pytest.raises(DataError, match=r"samples 3 … 5 can be read one by one, but not together: OSError: too many"):
        items_of(Alone(), [3, 4, 5])
