"""Predictive Exit beside the reference's numbers: pooling, thresholds, forecasts, the loop, clock levels, placement.

Arrays are named ``group/…``. Some checks read arrays of another group (thresholds, numbers of exits and rounds), as the
fixtures' README says; every array must be known to its group.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import predictive_exit_bof
import pytest
from predictive_exit_bof import near

from sparing.adaptive.confidence import ConfidenceRule, activation_thresholds
from sparing.adaptive.dvfs import DVFSGovernor
from sparing.adaptive.exit_cost import kept_exits, placement_scores
from sparing.adaptive.forecast import ExitPredictor, convolved
from sparing.adaptive.policies import PredictiveExitPolicy
from sparing.adaptive.reference_tables import COSTS, LEVELS_HZ

Arrays = Mapping[str, np.ndarray]
Groups = Mapping[str, Arrays]
UNITS_HZ = {"tx2": 1, "agx": 1, "i7-10700": 1000}
"""What the fixtures' frequencies of a platform are in."""


def same(found: object, expected: np.ndarray, what: str) -> int:
    """Equal to the last element; counts as one array."""
    values = np.asarray(found)
    assert values.shape == expected.shape, f"{what}: shape {values.shape}, expected {expected.shape}"
    assert np.array_equal(values, expected), f"{what}: {int((values != expected).sum())} elements differ"
    return 1


def only(arrays: Arrays, group: str, *names: str) -> None:
    """All of these are there, and nothing else."""
    assert set(arrays) == set(names), f"{group}: {sorted(set(arrays) ^ set(names))} are unknown or missing"


def by_layer(predictor: ExitPredictor, logits: np.ndarray, layers: np.ndarray, exits: int, single: bool) -> np.ndarray:
    """Jumps of samples that are each at a layer (from 1) of their own."""
    jumps = np.zeros(len(logits), dtype=np.int64)
    for layer in np.unique(layers):
        here = layers == layer
        jumps[here] = predictor.predict(logits[here], int(layer), exits, single)
    return jumps


def thresholds(files: Groups) -> int:
    arrays = files["thr"]
    only(arrays, "thr", "train_logits", "threshold")
    return near(activation_thresholds(arrays["train_logits"]), arrays["threshold"], "thr/threshold")


def activation_forecasts(files: Groups) -> int:
    arrays, t = files["pred_v1"], files["thr"]["threshold"]
    only(arrays, "pred_v1", "logits", "current_layer_1based", "beta", "jump", "ratio_at_current", "max_round")
    logits, layers = arrays["logits"], arrays["current_layer_1based"]
    jumps, ratios = [], []
    for beta in arrays["beta"]:
        rule = ConfidenceRule.activation(t, float(beta))
        predictor = ExitPredictor(rule, max_round=int(arrays["max_round"]))
        jumps.append(by_layer(predictor, logits, layers, len(t), single=False))
        ratios.append([rule.ratio(z[None], int(layer) - 1)[0] for z, layer in zip(logits, layers, strict=True)])
    return same(jumps, arrays["jump"], "pred_v1/jump") + near(ratios, arrays["ratio_at_current"], "pred_v1/ratio")


def softmax_forecasts(files: Groups) -> int:
    arrays, exits = files["pred_v2"], int(files["dvfs"]["num_exits"])
    only(arrays, "pred_v2", "logits", "layer_0based", "beta", "kernels", "jump_kernel_single_beta_sample", "max_round")
    jumps = [
        [
            [
                by_layer(
                    ExitPredictor(
                        ConfidenceRule.softmax(float(beta)), tuple(map(float, kernel)), int(arrays["max_round"])
                    ),
                    arrays["logits"],
                    arrays["layer_0based"] + 1,
                    exits,
                    single,
                )
                for beta in arrays["beta"]
            ]
            for single in (False, True)
        ]
        for kernel in arrays["kernels"]
    ]
    return same(jumps, arrays["jump_kernel_single_beta_sample"], "pred_v2/jump")


def convolutions(files: Groups) -> int:
    arrays = files["conv"]
    only(arrays, "conv", "sequence")
    found = [arrays["sequence"][0]]
    for _ in arrays["sequence"][1:]:
        found.append(convolved(found[-1], (1.0, 1.0, 1.0)))
    assert len(found) > 1, "conv/sequence: logits alone"
    return near(found, arrays["sequence"], "conv/sequence")


def clock_levels(files: Groups) -> int:
    arrays, compared = files["dvfs"], 0
    exits = int(arrays["num_exits"])
    platforms = {name.partition("/")[0] for name in arrays} - {"num_exits"}
    only(arrays, "dvfs", "num_exits", *(f"{p}/{of}" for p in platforms for of in ("frequencies", "level_cur_jump")))
    for platform in sorted(platforms):
        frequencies, expected = arrays[f"{platform}/frequencies"], arrays[f"{platform}/level_cur_jump"]
        assert platform in UNITS_HZ, f"dvfs: no levels of {platform!r}"
        compared += same(np.asarray(LEVELS_HZ[platform]), frequencies * UNITS_HZ[platform], f"levels of {platform}")
        governor = DVFSGovernor(tuple(map(float, frequencies)), rounding="nearest", floor=None)
        found = np.full_like(expected, -1)
        for current in range(exits):
            for jump in range(1, exits - current + 1):
                found[current, jump] = governor.level(jump, exits - current)
        compared += same(found, expected, f"dvfs/{platform}/level_cur_jump")
    return compared


def loops(files: Groups) -> int:
    arrays, compared = files["loop"], 0
    table, t = arrays["logits_sample_exit_class_last_is_final"], files["thr"]["threshold"]
    assert len(arrays["labels"]) == len(table), "loop/labels: another number of samples than the logits"
    cases = {name.rpartition("/")[0] for name in arrays if "/" in name}
    results = ("exit_index", "num_exit_evaluations", "num_predictions")
    known = [f"{case}/{result}" for case in cases for result in results]
    only(arrays, "loop", "logits_sample_exit_class_last_is_final", "labels", *known)
    for case in sorted(cases):
        found = re.fullmatch(r"start(\d+)_beta([\d.]+)", case)
        assert found, f"loop/{case}: not understood"
        rule = ConfidenceRule.activation(t, float(found[2]))
        predictor = ExitPredictor(rule, max_round=int(files["pred_v1"]["max_round"]))
        policy = PredictiveExitPolicy(int(found[1]), predictor)
        trace = policy.run(table)
        for name, values in zip(results, (trace.exit_index, trace.n_exit_evals, trace.n_predictions), strict=True):
            compared += same(values, arrays[f"{case}/{name}"], f"loop/{case}/{name}")
        alone = [policy.run(row[None]).exit_index[0] for row in table]
        assert alone == trace.exit_index.tolist(), f"loop/{case}: one by one the samples leave elsewhere"
    return compared


def placement(files: Groups) -> int:
    arrays = files["placement"]
    only(arrays, "placement", "layer_cost", "exit_cost", "continue_rate", "score", "keep")
    scores = placement_scores(arrays["layer_cost"], arrays["exit_cost"], arrays["continue_rate"])
    return near(scores, arrays["score"], "placement/score") + same(kept_exits(scores), arrays["keep"], "placement/keep")


def cost_tables(files: Groups) -> int:
    arrays, compared = files["cost_tables"], 0
    for name, expected in arrays.items():
        found = re.fullmatch(r"(.+)_layer_exit", name)
        assert found, f"cost_tables/{name}: not understood"
        assert found[1] in COSTS, f"cost_tables: no table of {found[1]!r}"
        compared += same(COSTS[found[1]], expected, f"cost_tables/{name}")
    return compared


GROUPS: dict[str, Callable[[Groups], int]] = {
    **{
        group: (lambda files, group=group, check=check: check(files[group]))  # type: ignore[misc]
        for group, check in predictive_exit_bof.GROUPS.items()
    },
    "thr": thresholds,
    "pred_v1": activation_forecasts,
    "pred_v2": softmax_forecasts,
    "conv": convolutions,
    "dvfs": clock_levels,
    "loop": loops,
    "placement": placement,
    "cost_tables": cost_tables,
}


def test_every_array_of_every_file(oracles: Callable[[str], list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    compared: dict[str, int] = defaultdict(int)
    for path in oracles("predictive_exit"):
        with np.load(path, allow_pickle=False) as archive:
            files: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
            for name in archive.files:
                group, slash, rest = name.partition("/")
                assert slash, f"{path}: {name!r} is in no group"
                assert group in GROUPS, f"{path}: no check for {name!r}; groups: {', '.join(GROUPS)}"
                files[group][rest] = archive[name]
        assert files, f"{path} holds nothing"
        for group in list(files):
            count = GROUPS[group](files)
            assert count, f"{path}: nothing of {group} was compared"
            compared[group] += count
    with capsys.disabled():
        listed = ", ".join(f"{count} of {group}" for group, count in compared.items())
        print(f"\npredictive_exit: {sum(compared.values())} arrays compared: {listed}")
