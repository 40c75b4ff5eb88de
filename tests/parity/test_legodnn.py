"""LegoDNN beside the reference's block detection, and numbers worked out from its formulas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from legodnn_scaling import GROUPS as SCALING
from torch import nn

from sparing.adaptive.block_profile import accuracy_drops, environments
from sparing.adaptive.blocks import COMPRESSIBLE, MIN_CONVOLUTIONS, detect_blocks
from sparing.adaptive.descendants import filter_scores, kept_filters, prune_filters

Arrays = Mapping[str, np.ndarray]
DESCRIBED = {"net", "max_ratio", "nodes", "op_types", "inputs", "kinds"}
PER_BLOCK = {
    "blocks", "n_conv", "start", "end", "start_is_placeholder", "not_compressed", "start_hook", "end_hook",
}  # fmt: skip


def named(arrays: Arrays, group: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}


def detection(cases: list[dict[str, Any]]) -> int:
    """Number of results compared."""
    count = 0
    for case in cases:
        where = f"{case['net']} at {case['max_ratio']}"
        known = DESCRIBED | PER_BLOCK | {"min_conv", "max_conv"}
        assert set(case) == known, f"{where}: {sorted(set(case) ^ known)} are missing or not understood"
        type_of = dict(zip(case["nodes"], case["op_types"], strict=True))
        blocks = detect_blocks(case["nodes"], case["op_types"], case["inputs"], case["kinds"], case["max_ratio"])
        total = sum(kind in COMPRESSIBLE for kind in case["op_types"])
        assert case["min_conv"] == MIN_CONVOLUTIONS
        assert case["max_conv"] == max(int(total * case["max_ratio"]), MIN_CONVOLUTIONS), where
        listed = [[*([block.start] if block.start_is_placeholder else []), *block.nodes] for block in blocks]
        found = {
            "blocks": listed,
            "n_conv": [sum(type_of[name] in COMPRESSIBLE for name in names) for names in listed],
            "start": [[block.start] for block in blocks],
            "end": [[block.end] for block in blocks],
            "start_is_placeholder": [[block.start_is_placeholder] for block in blocks],
            "not_compressed": [list(block.frozen) for block in blocks],
            "start_hook": [list(block.start_hook or ()) for block in blocks],
            "end_hook": [list(block.end_hook or ()) for block in blocks],
        }
        for key, value in found.items():
            assert value == case[key], f"{where}: {key}"
        count += len(found)
    return count


def prune(arrays: Arrays) -> int:
    """Number of arrays compared."""
    given = named(arrays, "prune")
    state = {name: torch.tensor(array) for name, array in named(given, "full").items()}
    first, last = state["0.weight"], state["3.weight"]
    block = nn.Sequential(
        nn.Conv2d(first.shape[1], first.shape[0], first.shape[2], padding=first.shape[2] // 2),
        nn.BatchNorm2d(first.shape[0]),
        nn.ReLU(),
        nn.Conv2d(last.shape[1], last.shape[0], last.shape[2], padding=last.shape[2] // 2, bias=False),
    ).eval()
    block.load_state_dict(state)
    x, full = torch.tensor(given["x"]), torch.tensor(given["y_full"])
    np.testing.assert_allclose(block(x).detach(), full, rtol=1e-5, atol=1e-5)
    used = {"x", "y_full", *(f"full/{name}" for name in state)}
    count = 1
    for level in sorted({name.split("/")[0] for name in given if name.endswith("/kept_filters")}):
        kept = kept_filters(filter_scores(block[0]), float(level))
        np.testing.assert_array_equal(kept, given[f"{level}/kept_filters"])
        made = prune_filters(block, ["0"], x[:1], float(level))
        y = made(x)
        error = (y - full).square().mean()
        error.backward()
        found = {
            "y": y.detach().numpy(),
            "mse_vs_full": error.item(),
            "grad_conv1": made.get_parameter("0.weight").grad,
            "n_params": sum(p.numel() for p in made.parameters()),
        }
        for name, value in found.items():
            expected = given[f"{level}/{name}"]
            np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5, atol=1e-5, err_msg=f"{level}/{name}")
        used |= {f"{level}/{name}" for name in (*found, "kept_filters")}
        count += 1 + len(found)
    assert count > 1, "no sparsity"
    assert used == given.keys(), f"prune: {sorted(given.keys() ^ used)} are missing or not understood"
    return count


def profile(arrays: Arrays) -> int:
    """Number of arrays compared."""
    given = named(arrays, "profile")
    known = {"sparsities", "environments", "composition", "composition_accuracy", "acc_drop_block_sparsity"}
    assert given.keys() == known, f"profile: {sorted(given.keys() ^ known)} are missing or not understood"
    blocks, sizes = given["acc_drop_block_sparsity"].shape
    index = {-1.0: -1} | {float(s): i for i, s in enumerate(given["sparsities"])}

    def indices(rows: np.ndarray) -> np.ndarray:
        return np.array([[index[float(value)] for value in row] for row in rows])

    surroundings = environments(blocks, sizes)
    np.testing.assert_array_equal(surroundings, indices(given["environments"]))
    figures = {
        tuple(row.tolist()): float(accuracy)
        for row, accuracy in zip(indices(given["composition"]), given["composition_accuracy"], strict=True)
    }
    asked: set[tuple[int, ...]] = set()

    def accuracy(composition: tuple[int, ...]) -> float:
        assert composition not in asked, "a composition is measured once"
        asked.add(composition)
        return figures[composition]

    drops = accuracy_drops(accuracy, blocks, sizes)
    np.testing.assert_allclose(drops, given["acc_drop_block_sparsity"], rtol=0, atol=1e-9)
    return 2


GROUPS: Mapping[str, Callable[[Arrays], int]] = {"prune": prune, "profile": profile, **SCALING}


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("legodnn"):
        with np.load(file, allow_pickle=False) as opened:
            arrays = dict(opened)
        groups = {name.split("/")[0] for name in arrays}
        unknown = groups - GROUPS.keys() - {"detection_json"}
        assert groups, f"{file.name} is empty"
        assert not unknown, f"{file.name}: not understood: {sorted(unknown)}"
        if "detection_json" in groups:
            cases = json.loads(str(arrays["detection_json"]))
            assert cases, f"{file.name}: no case of detection"
            count += detection(cases)
        for group in sorted(groups - {"detection_json"}):
            count += GROUPS[group](arrays)
    record_property("arrays", count)
    print(f"LegoDNN: {count} arrays and lists compared")


def test_other_filters_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = dict(np.load(oracles("legodnn")[0], allow_pickle=False))
    wrong = arrays | {"prune/full/0.weight": arrays["prune/full/0.weight"][::-1].copy()}
    with pytest.raises(AssertionError):
        prune(wrong)


def test_another_graph_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = dict(np.load(oracles("legodnn")[0], allow_pickle=False))
    case = json.loads(str(arrays["detection_json"]))[0]
    with pytest.raises(AssertionError, match="blocks"):
        detection([{**case, "op_types": ["ReLU" if t == "MaxPool2d" else t for t in case["op_types"][::-1]]}])
