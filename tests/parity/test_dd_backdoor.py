"""The audit of condensed data beside the reference's trigger updates, and numbers worked out from the formulas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dd_backdoor_defences import defences
from dd_backdoor_doorping import doorping
from dd_unroll import CHECKS as UNROLLED

CHECKS: dict[str, Callable[..., set[str]]] = {"patch_uint8": doorping, "strip_frr": defences, **UNROLLED}
"""An array that tells what a file holds → the check of all of that file."""


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("dd_backdoor"):
        with np.load(file, allow_pickle=False) as opened:
            arrays = dict(opened)
        kinds = [check for mark, check in CHECKS.items() if mark in arrays]
        assert len(kinds) == 1, f"{file.name}: {len(kinds)} kinds of file known that look like this"
        used = kinds[0](arrays)
        assert used == arrays.keys(), f"{file.name}: missing or not understood: {sorted(arrays.keys() ^ used)}"
        count += len(used)
    record_property("arrays", count)
    print(f"dd_backdoor: {count} arrays read, all that are outputs compared")


def test_another_patch_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = next(a for a in (dict(np.load(file)) for file in oracles("dd_backdoor")) if "patch_uint8" in a)
    with pytest.raises(AssertionError, match="neurons_top"):
        doorping(arrays | {"w/classifier.0.weight": arrays["w/classifier.0.weight"][::-1].copy()})
    with pytest.raises(AssertionError, match="losses"):
        doorping(arrays | {"alpha": arrays["alpha"] * 1.01})


def reversed_(array: np.ndarray) -> np.ndarray:
    return array[..., ::-1].copy()


def larger(array: np.ndarray) -> np.ndarray:
    return array * 1.01


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("strip_probs_clean", larger),
        ("spec_reps", larger),
        ("nad_teacher", reversed_),
        ("nc_success", reversed_),
        ("nc_0_mask_raw", larger),
        ("nc_norms_0", larger),
        ("images_uint8", reversed_),
        ("w/features.0.weight", larger),
    ],
)
def test_other_numbers_would_be_noticed(
    oracles: Callable[[str], list[Path]], name: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    arrays = next(a for a in (dict(np.load(file)) for file in oracles("dd_backdoor")) if "strip_frr" in a)
    with pytest.raises(AssertionError):
        defences(arrays | {name: change(arrays[name])})
