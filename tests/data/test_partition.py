"""Partitions among clients: nothing given twice, nothing lost, the same every time, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.core.errors import InvalidValue
from sparing.data.partition import dirichlet_partition, iid_partition, label_shard_partition, limit_samples

LABELS = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 60))


def is_a_partition(parts: list[np.ndarray], total: int) -> bool:
    """Whether every sample is in exactly one part."""
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(total))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_shards_give_every_client_its_number_of_classes(clients, each, seed):
    if clients * each < 10:
        with pytest.raises(InvalidValue, match=f"{clients} clients with {each} classes"):
            label_shard_partition(LABELS, clients, each, seed)
        return
    parts = label_shard_partition(LABELS, clients, each, seed)
    assert len(parts) == clients
    assert is_a_partition(parts, len(LABELS))
    owners = np.zeros(10, int)
    for part in parts:
        present, counts = np.unique(LABELS[part], return_counts=True)
        assert len(present) == each
        owners[present] += 1
        shards = [60 / (clients * each // 10), 60 / -(-clients * each // 10)]
        assert counts.min() >= np.floor(min(shards))
        assert counts.max() <= np.ceil(max(shards))
    assert owners.max() - owners.min() <= 1
    again = label_shard_partition(LABELS, clients, each, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.sampled_from([0.05, 0.5, 100.0]), st.integers(0, 2**32 - 1))
def test_dirichlet_loses_nothing(clients, alpha, seed):
    try:
        parts = dirichlet_partition(LABELS, clients, alpha, seed)
    except InvalidValue:
        parts = []
    if not parts:  # with 100.0 each client is given something
        assert alpha < 1
        return
    assert is_a_partition(parts, len(LABELS))
    assert all(len(part) for part in parts)
    again = dirichlet_partition(LABELS, clients, alpha, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_small_alpha_is_uneven_and_a_large_one_is_not():
    def largest_share(alpha: float) -> float:
        parts = dirichlet_partition(LABELS, 5, alpha, seed=1)
        return float(np.mean([max(np.sum(LABELS[part] == k) for part in parts) / 60 for k in range(10)]))

    assert largest_share(0.1) > 0.6
    assert largest_share(1000.0) < 0.25


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 600), st.integers(0, 2**32 - 1))
def test_iid_parts_are_equally_large(clients, seed):
    parts = iid_partition(LABELS, clients, seed)
    assert is_a_partition(parts, len(LABELS))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_seeds_differ():
    for cut in (
        lambda seed: label_shard_partition(LABELS, 5, 5, seed),
        lambda seed: dirichlet_partition(LABELS, 5, 1.0, seed),
        lambda seed: iid_partition(LABELS, 5, seed),
    ):
        assert not np.array_equal(cut(0)[0], cut(1)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 130), st.integers(0, 2**32 - 1))
def test_limits_draw_from_the_parts_and_by_class_evenly(count, seed):
    parts = label_shard_partition(LABELS, 5, 5, 0)  # 20 or 30 samples of each of five classes
    for by_class in (False, True):
        kept = limit_samples(LABELS, parts, count, seed, by_class=by_class)
        for part, fewer in zip(parts, kept, strict=True):
            assert len(fewer) == min(count, len(part)) == len(np.unique(fewer))
            assert np.isin(fewer, part).all()
            assert np.array_equal(fewer, np.sort(fewer))
            if by_class and count <= 100:
                counts = np.bincount(LABELS[fewer], minlength=10)[np.unique(LABELS[part])]
                assert counts.max() - counts.min() <= 1


def test_what_cannot_be_met_is_refused_with_its_numbers():
    with pytest.raises(InvalidValue, match="n_clients = 601 for 600 samples"):
        iid_partition(LABELS, 601, 0)
    with pytest.raises(InvalidValue, match="classes_per_client = 11; 1 … 10"):
        label_shard_partition(LABELS, 5, 11, 0)
    with pytest.raises(InvalidValue, match="class 0 has 60 samples for 61 clients"):
        label_shard_partition(LABELS, 61, 10, 0)
    with pytest.raises(InvalidValue, match=r"alpha = 0\.001 left one of 40 clients without a sample"):
        dirichlet_partition(LABELS, 40, 0.001, 0)
    with pytest.raises(InvalidValue, match="alpha = 0;"):
        dirichlet_partition(LABELS, 4, 0, 0)
    with pytest.raises(InvalidValue, match="samples_per_client = 4 for the 5 classes of client 0"):
        limit_samples(LABELS, label_shard_partition(LABELS, 5, 5, 0), 4, 0, by_class=True)
    with pytest.raises(InvalidValue, match="samples_per_client = 0"):
        limit_samples(LABELS, [np.arange(5)], 0, 0)
    assert issubclass(InvalidValue, ValueError)
