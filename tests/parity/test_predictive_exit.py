"""Predictive Exit beside the reference's numbers: pooling, thresholds, jumps, clock levels, the loop, placement, costs.

The arrays of a file are named ``group/…``; each group has its check, which fails on a name it does not know. Some
groups need others of the same file: thresholds, and the number of exits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparing.adaptive.confidence import ConfidenceRule, activation_thresholds
from sparing.adaptive.dvfs import DVFSGovernor
from sparing.adaptive.exit_cost import kept_exits, placement_scores
from sparing.adaptive.exits import BoFPooling
from sparing.adaptive.forecast import ExitPredictor, convolved
from sparing.adaptive.policies import PredictiveExitPolicy
from sparing.adaptive.reference_tables import COSTS, LEVELS_HZ

Arrays = Mapping[str, np.ndarray]


def close(found: Any, expected: np.ndarray, what: str) -> None:
    found = np.asarray(found)
    assert found.shape == expected.shape, (what, found.shape, expected.shape)
    scale = max(float(np.abs(expected).max(initial=0.0)), 1e-300)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * scale, err_msg=what)


def all_used(arrays: Arrays, prefix: str, compared: set[str], given: set[str]) -> int:
    """How many were compared, once it is clear that there are no others than these and what was given to us."""
    names, used = {name for name in arrays if name.startswith(prefix)}, compared | given
    assert names == used, f"{prefix}: not understood: {sorted(names - used)}, missing: {sorted(used - names)}"
    return len(compared)


def pooling(arrays: Arrays, group: str) -> int:
    own = {name.removeprefix(f"{group}/"): value for name, value in arrays.items() if name.startswith(f"{group}/")}
    weight, horizon = own["codebook.weight"], int(own["horizon"])
    codewords, channels = weight.shape[:2]
    module = (
        BoFPooling(channels, codewords, variant=1, horizon=horizon)
        if group == "bof_v1"
        else BoFPooling(channels, codewords, pool=horizon)
    ).double()
    parameters = dict(module.named_parameters())
    module.load_state_dict({name: torch.from_numpy(own[name]) for name in parameters})
    x = torch.from_numpy(own["x"]).requires_grad_()
    y = module(x)
    close(y.detach().numpy(), own["y"], f"{group} y")
    (y * torch.from_numpy(own["grad_y"])).sum().backward()
    close(x.grad.numpy(), own["grad_x"], f"{group} grad_x")  # type: ignore[union-attr]
    for name, parameter in parameters.items():
        close(parameter.grad.numpy(), own[f"grad_{name}"], f"{group} grad_{name}")  # type: ignore[union-attr]
    compared = {f"{group}/{name}" for name in ("y", "grad_x", *(f"grad_{name}" for name in parameters))}
    return all_used(
        arrays, f"{group}/", compared, {f"{group}/{name}" for name in ("horizon", "x", "grad_y", *parameters)}
    )


def thresholds(arrays: Arrays) -> int:
    close(activation_thresholds(arrays["thr/train_logits"]), arrays["thr/threshold"], "thresholds")
    return all_used(arrays, "thr/", {"thr/threshold"}, {"thr/train_logits"})


def jumps_v1(arrays: Arrays) -> int:
    logits, layers, t = arrays["pred_v1/logits"], arrays["pred_v1/current_layer_1based"], arrays["thr/threshold"]
    jump, ratio = np.empty_like(arrays["pred_v1/jump"]), np.empty_like(arrays["pred_v1/ratio_at_current"])
    for b, beta in enumerate(arrays["pred_v1/beta"]):
        rule = ConfidenceRule.activation(t, float(beta))
        predictor = ExitPredictor(rule, max_round=int(arrays["pred_v1/max_round"]))
        for s, layer in enumerate(layers.tolist()):
            jump[b, s] = predictor.predict(logits[s : s + 1], layer, len(t))[0]
            ratio[b, s] = rule.ratio(logits[s : s + 1], layer - 1)[0]
    np.testing.assert_array_equal(jump, arrays["pred_v1/jump"])
    close(ratio, arrays["pred_v1/ratio_at_current"], "ratio")
    given = {f"pred_v1/{name}" for name in ("logits", "current_layer_1based", "beta", "max_round")}
    return all_used(arrays, "pred_v1/", {"pred_v1/jump", "pred_v1/ratio_at_current"}, given)


def jumps_v2(arrays: Arrays) -> int:
    name = "pred_v2/jump_kernel_single_beta_sample"
    logits, layers, exits = arrays["pred_v2/logits"], arrays["pred_v2/layer_0based"], int(arrays["dvfs/num_exits"])
    found = np.empty_like(arrays[name])
    for k, kernel in enumerate(arrays["pred_v2/kernels"]):
        for b, beta in enumerate(arrays["pred_v2/beta"]):
            rule = ConfidenceRule.softmax(float(beta))
            predictor = ExitPredictor(rule, tuple(kernel.tolist()), int(arrays["pred_v2/max_round"]))
            for single in range(found.shape[1]):
                for s, layer in enumerate(layers.tolist()):
                    found[k, single, b, s] = predictor.predict(logits[s : s + 1], layer + 1, exits, bool(single))[0]
    np.testing.assert_array_equal(found, arrays[name])
    given = {f"pred_v2/{one}" for one in ("logits", "layer_0based", "beta", "kernels", "max_round")}
    return all_used(arrays, "pred_v2/", {name}, given)


def sequence(arrays: Arrays) -> int:
    expected = arrays["conv/sequence"]
    found = [expected[0]]
    for _ in range(len(expected) - 1):
        found.append(convolved(found[-1], (1.0, 1.0, 1.0)))
    close(np.stack(found), expected, "sequence")
    return all_used(arrays, "conv/", {"conv/sequence"}, set())


def levels(arrays: Arrays) -> int:
    exits = int(arrays["dvfs/num_exits"])
    platforms = {name.split("/")[1] for name in arrays if name.startswith("dvfs/") and name.count("/") == 2}
    used = set()
    for platform in platforms:
        names = [f"dvfs/{platform}/{name}" for name in ("frequencies", "level_cur_jump")]
        frequencies, expected = (arrays[name] for name in names)
        assert platform in LEVELS_HZ, f"dvfs: no levels of {platform!r}"
        unit = 1000 if platform.startswith("i7") else 1
        np.testing.assert_array_equal(frequencies * unit, LEVELS_HZ[platform])
        governor = DVFSGovernor(tuple(frequencies.tolist()), rounding="nearest", floor=None)
        found = np.full_like(expected, -1)
        for current in range(expected.shape[0]):
            for jump in range(1, min(exits - current, expected.shape[1] - 1) + 1):
                found[current, jump] = governor.level(jump, exits - current)
        np.testing.assert_array_equal(found, expected, err_msg=platform)
        used |= set(names)
    return all_used(arrays, "dvfs/", used, {"dvfs/num_exits"})


def loop(arrays: Arrays) -> int:
    table = arrays["loop/logits_sample_exit_class_last_is_final"]
    given, used = {"loop/logits_sample_exit_class_last_is_final", "loop/labels"}, set()
    runs = {name.split("/")[1] for name in arrays if name.startswith("loop/") and name.count("/") == 2}
    for run in runs:
        match = re.fullmatch(r"start(\d+)_beta([\d.e+-]+)", run)
        assert match, run
        rule = ConfidenceRule.activation(arrays["thr/threshold"], float(match[2]))
        predictor = ExitPredictor(rule, max_round=int(arrays["pred_v1/max_round"]))
        policy = PredictiveExitPolicy(int(match[1]), predictor)
        trace = policy.run(table)
        found = {
            "exit_index": trace.exit_index,
            "num_exit_evaluations": trace.n_exit_evals,
            "num_predictions": trace.n_predictions,
        }
        for name, values in found.items():
            np.testing.assert_array_equal(values, arrays[f"loop/{run}/{name}"], err_msg=f"{run} {name}")
            used.add(f"loop/{run}/{name}")
    assert runs, "no run of the loop"
    return all_used(arrays, "loop/", used, given)


def placement(arrays: Arrays) -> int:
    own = {name.removeprefix("placement/"): value for name, value in arrays.items() if name.startswith("placement/")}
    score = placement_scores(own["layer_cost"].tolist(), own["exit_cost"].tolist(), own["continue_rate"].tolist())
    close(score, own["score"], "placement")
    np.testing.assert_array_equal(kept_exits(score), own["keep"])
    given = {f"placement/{name}" for name in ("layer_cost", "exit_cost", "continue_rate")}
    return all_used(arrays, "placement/", {"placement/score", "placement/keep"}, given)


def cost_tables(arrays: Arrays) -> int:
    used = set()
    for network, rows in COSTS.items():
        np.testing.assert_array_equal(np.asarray(rows), arrays[f"cost_tables/{network}_layer_exit"])
        used.add(f"cost_tables/{network}_layer_exit")
    return all_used(arrays, "cost_tables/", used, set())


GROUPS: Mapping[str, Callable[[Arrays], int]] = {
    "bof_v1": lambda arrays: pooling(arrays, "bof_v1"),
    "bof_v2": lambda arrays: pooling(arrays, "bof_v2"),
    "thr": thresholds,
    "pred_v1": jumps_v1,
    "conv": sequence,
    "pred_v2": jumps_v2,
    "dvfs": levels,
    "loop": loop,
    "placement": placement,
    "cost_tables": cost_tables,
}


def test_every_array_of_every_file_of_exits(
    oracles: Callable[[str], list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    compared: dict[str, int] = defaultdict(int)
    for path in oracles("predictive_exit"):
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        groups = {name.split("/")[0] for name in arrays}
        assert groups, f"{path} holds nothing"
        for group in sorted(groups):
            assert group in GROUPS, f"{path}: no check for {group!r}; groups: {', '.join(GROUPS)}"
            count = GROUPS[group](arrays)
            assert count, f"{path}: nothing of {group} was compared"
            compared[group] += count
    with capsys.disabled():
        listed = ", ".join(f"{count} of {group}" for group, count in compared.items())
        print(f"\npredictive_exit: {sum(compared.values())} arrays compared: {listed}")
