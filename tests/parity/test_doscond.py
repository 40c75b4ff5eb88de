"""DosCond, GCond, DC, DSA, DM and the core sets beside the outputs of the reference implementations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doscond_graphs import GROUPS as GRAPHS
from doscond_graphs import Arrays, allocations, graph_sets, node_graphs
from doscond_images import GROUPS as IMAGES

GROUPS: dict[str, Callable[[Arrays], set[str]]] = {**GRAPHS, **IMAGES}


def opened(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def one_with(files: list[Path], marker: str) -> dict[str, np.ndarray]:
    return next(arrays for arrays in map(opened, files) if marker in arrays)


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("doscond"):
        arrays = opened(file)
        checks = [check for marker, check in GROUPS.items() if marker in arrays]
        assert checks, f"{file.name}: not understood: {sorted(arrays)[:10]}"
        compared = set().union(*(check(arrays) for check in checks))
        assert compared == arrays.keys(), f"{file.name}: missing or not understood: {sorted(arrays.keys() ^ compared)}"
        count += len(compared)
    record_property("arrays", count)
    left_out = "" if os.environ.get("SPARING_DATA") else "; no SPARING_DATA: of real graphs only the stored gradients"
    print(f"doscond: {count} arrays read, all that are outputs compared{left_out}")


def test_another_noise_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("doscond"), "adj_logits")
    with pytest.raises(AssertionError, match="adj_relaxed"):
        graph_sets(arrays | {"noise_logit": arrays["noise_logit"][::-1].copy()})


def test_other_weights_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("doscond"), "adj_syn")
    with pytest.raises(AssertionError, match="gcn_logp_real"):
        node_graphs(arrays | {"gcn/layers.0.bias": arrays["gcn/layers.0.bias"][::-1].copy()})


def test_another_rate_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("doscond"), "alloc_0_rate")
    with pytest.raises(AssertionError, match="alloc_0"):
        allocations(arrays | {"alloc_0_rate": arrays["alloc_0_rate"] * 2})
