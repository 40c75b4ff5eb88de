"""Seeding: a block draws the same whatever was drawn before, and leaves the caller's generators as they were."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from sparing.core.randomness import derive_seed, isolated_rng, seed_everything


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_derived_seeds_depend_on_every_part_their_order_and_their_borders():
    parts = [(1, 2), (2, 1), (12,), ("1", "2", ""), (1, "2x"), ("a", 0), ("a", 1), ("b", 0), ("",)]
    found = [derive_seed(*part) for part in parts]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**32 for seed in found)
    assert derive_seed(1, "a") == derive_seed("1", "a")


def test_derived_seeds_are_the_same_in_another_process():
    code = "from sparing.core.randomness import derive_seed; print(derive_seed('train', 7))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == derive_seed("train", 7)


def test_derived_seeds_are_spread_evenly():
    high = sum(derive_seed("x", number) >= 2**31 for number in range(2000))
    assert 900 < high < 1100


def test_a_block_draws_from_its_parts_alone():
    found = []
    for before, parts in [(1, ("a", 0)), (2, ("a", 0)), (2, ("a", 1)), (2, ("b", 0))]:
        seed_everything(before)
        with isolated_rng(*parts):
            found.append(draws())
    assert found[0] == found[1]
    assert all(one != other for pair in combinations(found[1:], 2) for one, other in zip(*pair, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_caller_goes_on_as_if_there_had_been_no_block(fails):
    def block() -> None:
        with isolated_rng("inner", 1):
            seed_everything(99)
            draws()
            if fails:
                raise ZeroDivisionError

    seed_everything(5)
    expected = [draws(), draws()]
    seed_everything(5)
    found = [draws()]
    if fails:
        with pytest.raises(ZeroDivisionError):
            block()
    else:
        block()
    assert [*found, draws()] == expected
    assert torch.initial_seed() == 5


def test_blocks_may_be_nested():
    with isolated_rng("outer"):
        expected = [draws(), draws()]
    with isolated_rng("outer"):
        found = [draws()]
        with isolated_rng("inner"):
            inside = draws()
        found.append(draws())
    assert found == expected
    assert inside not in expected
