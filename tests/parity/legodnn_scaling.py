"""The groups of the LegoDNN fixtures that concern the optimiser: run-time estimate, selections, switching, options.

``GROUPS`` maps a prefix of array names to a check of all of a file's arrays that returns the names it compared or used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np

from sparing.adaptive.scaling import (
    InfeasibleError,
    LatencyEstimate,
    ScalingOptimizer,
    bytes_moved,
    bytes_moved_whole,
    estimate_latency,
)

Arrays = Mapping[str, np.ndarray]


def named(arrays: Arrays, group: str) -> dict[str, np.ndarray]:
    """The arrays of a group, without its prefix."""
    return {name.removeprefix(f"{group}/"): array for name, array in arrays.items() if name.startswith(f"{group}/")}


def understood(found: Mapping[str, np.ndarray], known: set[str], group: str) -> None:
    assert set(found) == known, f"{group}: {sorted(set(found) ^ known)} are missing or not understood"


def estimate_of(arrays: Arrays) -> LatencyEstimate:
    ilp, given = named(arrays, "ilp"), named(arrays, "estimate")
    return estimate_latency(
        ilp["original_block_latency_s"],
        ilp["latency_relative_drop"],
        float(ilp["original_model_latency_s"]),
        given["measured_block_latency_s"],
        given["current_selection"],
    )


def estimate(arrays: Arrays) -> int:
    """Number of arrays compared."""
    outputs = {
        "ratio": "ratio",
        "kept": "kept",
        "avg_ratio": "mean_ratio",
        "original_model_latency_now_s": "model_latency",
        "original_block_latency_now_s": "block_latency",
        "absolute_latency_drop_s": "drop",
    }
    given, found = named(arrays, "estimate"), estimate_of(arrays)
    understood(given, {"current_selection", "measured_block_latency_s", *outputs}, "estimate")
    for name, attribute in outputs.items():
        np.testing.assert_allclose(getattr(found, attribute), given[name], rtol=1e-12, atol=1e-15, err_msg=name)
    return len(outputs)


def ilp(arrays: Arrays) -> int:
    """Number of arrays compared, by both ways of solving."""
    given = named(arrays, "ilp")
    inputs = {"acc_drop", "original_block_bytes", "original_block_latency_s", "latency_relative_drop", "bytes_drop"}
    inputs |= {"original_model_bytes", "original_model_latency_s", "max_latency_max_bytes"}
    understood(given, {*inputs, "selection", "objective"}, "ilp")
    blocks = np.arange(len(given["acc_drop"]))
    profile = SimpleNamespace(
        sparsities=arrays["profile/sparsities"],
        drops=given["acc_drop"],
        bytes=given["original_block_bytes"][:, None] - given["bytes_drop"],
        latency=given["original_block_latency_s"],
        rel=given["latency_relative_drop"],
        model_latency=float(given["original_model_latency_s"]),
        frame_bytes=float(given["original_model_bytes"] - given["original_block_bytes"].sum()),
        accuracy=1.0,
    )
    optimizer = ScalingOptimizer(profile, now=estimate_of(arrays))  # type: ignore[arg-type]
    cases = zip(given["max_latency_max_bytes"], given["selection"], given["objective"], strict=True)
    for number, ((deadline, memory), selection, objective) in enumerate(cases):
        for method in ("auto", "milp"):
            where = f"instance {number} by {method}"
            try:
                found = optimizer.solve(float(deadline), float(memory), method=method)
            except InfeasibleError:
                assert math.isnan(objective), f"{where}: {objective} is possible"
                assert (selection == -1).all(), where
                continue
            assert not math.isnan(objective), f"{where}: no selection keeps the limits, but {found} was found"
            drops = given["acc_drop"][blocks, list(found.options)].sum()
            assert abs(drops - objective) <= 1e-9, f"{where}: {drops} is not {objective}"
            assert abs(given["acc_drop"][blocks, selection].sum() - objective) <= 1e-9, where
            assert found.est_latency <= deadline * (1 + 1e-9), where
            assert found.est_bytes <= memory * (1 + 1e-9), where
    return 2


def switch(arrays: Arrays) -> int:
    """Number of arrays compared."""
    given = named(arrays, "switch")
    understood(given, {"from", "to", "bytes", "full_model_bytes"}, "switch")
    size = arrays["ilp/original_block_bytes"][:, None] - arrays["ilp/bytes_drop"]
    for function, name in ((bytes_moved, "bytes"), (bytes_moved_whole, "full_model_bytes")):
        np.testing.assert_allclose(function(size, given["from"], given["to"]), given[name], rtol=1e-12, err_msg=name)
    assert bytes_moved(size, None, given["to"]) == 0
    return 2


def options(arrays: Arrays) -> int:
    """Number of arrays compared: what the network has, and the two ratios that were published."""
    given = named(arrays, "options")
    understood(given, {"number", "published_check"}, "options")
    blocks, sizes = arrays["ilp/acc_drop"].shape
    assert sizes**blocks == int(given["number"])
    assert given["published_check"].tolist() == [6**5 // 6, 6**8 // 6]
    return 2


GROUPS: dict[str, Callable[[Arrays], int]] = {
    "estimate": estimate,
    "ilp": ilp,
    "switch": switch,
    "options": options,
}
