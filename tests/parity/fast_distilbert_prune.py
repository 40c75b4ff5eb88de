"""Masks, gradual pruning and distillation beside what the reference pruning package computed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from sparing.compression.pruning import BlockMagnitudePruner, CubicSchedule, block_mask
from sparing.distillation.logits import DistillationLoss

Arrays = Mapping[str, np.ndarray]
SCORES = {"avg": "mean", "max": "max"}


def near(found: object, expected: np.ndarray, what: str, tolerance: float) -> None:
    """Within ``tolerance`` of the array's largest value."""
    scale = max(float(np.abs(expected).max()), 1e-300)
    apart = float(np.abs(np.asarray(found, dtype=np.float64) - expected).max()) / scale
    assert apart <= tolerance, f"{what}: {apart:.3g} of the largest value apart, {tolerance:g} allowed"


def block_of(pattern: str) -> tuple[int, int]:
    """(outputs, inputs) of "4out_x_1in" or "4x4"."""
    found = re.fullmatch(r"(\d+)(?:out)?_?x_?(\d+)(?:in)?", pattern)
    assert found, f"the pattern {pattern!r} is not understood"
    return int(found[1]), int(found[2])


def masks(arrays: Arrays) -> int:
    """Every mask of the one weight."""
    weight = torch.from_numpy(arrays["mask/weight_out_in"])
    shape = tuple(arrays["mask/shape"])
    assert tuple(weight.shape) == shape, f"mask/shape is {shape}, the weight is {tuple(weight.shape)}"
    compared = 0
    for name in sorted(set(arrays) - {"mask/weight_out_in", "mask/shape"}):
        _, pattern, score, sparsity = name.split("/")
        assert score in SCORES, f"{name}: the score {score!r} is not understood"
        expected = np.unpackbits(arrays[name])[: weight.numel()].reshape(shape).astype(bool)
        found = block_mask(weight, block_of(pattern), float(sparsity), SCORES[score]).numpy()
        assert np.array_equal(found, expected), f"{name}: {int((found != expected).sum())} weights differ"
        compared += 1
    assert compared, "a weight without masks"
    return compared


def gradual(arrays: Arrays) -> int:
    """A pruned training, step by step."""
    told = json.loads(str(arrays["gmp/settings"]))
    assert told.pop("order") == "forward,backward,optimizer step,scheduler step"
    pattern, score = told.pop("block").split()
    optimizer, rate = re.fullmatch(r"(\w+) lr=([\d.e-]+)", told.pop("optimizer")).groups()
    assert optimizer == "SGD", f"the optimizer {optimizer!r} is not understood"
    target = told.pop("target_sparsity")
    schedule = CubicSchedule(
        t0=told.pop("policy_begin_step"),
        t1=told.pop("policy_end_step"),
        begin=told.pop("begin_pruning_step"),
        end=told.pop("end_pruning_step"),
        freq=told.pop("pruning_frequency"),
        initial=told.pop("initial_sparsity"),
    )
    assert not told, f"gmp/settings: {sorted(told)} are not understood"
    begun = {name.removeprefix("gmp/init/"): torch.from_numpy(a) for name, a in arrays.items() if "/init/" in name}
    first, second = begun["0.weight"], begun["2.weight"]
    model = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0], bias=False), nn.ReLU(), nn.Linear(second.shape[1], second.shape[0])
    )
    model.load_state_dict(begun)
    heads = nn.Sequential(model, nn.Linear(1, 1))  # so that both layers come before the one that gives the outputs
    pruner = BlockMagnitudePruner(heads, block_of(pattern), target, schedule, score=SCORES[score])
    stepper = torch.optim.SGD(model.parameters(), lr=float(rate))
    x, y = torch.from_numpy(arrays["gmp/x"]), torch.from_numpy(arrays["gmp/y"])
    base, sparsity, losses = [], [], []
    for t in range(len(x)):
        base.append(schedule.base(t))
        loss = nn.functional.mse_loss(model(x[t]), y[t])
        losses.append(loss.item())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        pruner.step()
        sparsity.append([layer.sparsity for layer in pruner.report().layers])
    near(base, arrays["gmp/schedule_before_step"], "gmp/schedule_before_step", 1e-10)
    near(sparsity, arrays["gmp/sparsity_after_step"], "gmp/sparsity_after_step", 1e-5)
    near(losses, arrays["gmp/loss"], "gmp/loss", 1e-5)
    pruner.apply_()
    state = model.state_dict()
    ends = {name.removeprefix("gmp/final/"): a for name, a in arrays.items() if "/final/" in name}
    assert ends.keys() == state.keys(), f"gmp/final holds {sorted(ends)}, the model {sorted(state)}"
    for name, expected in ends.items():
        near(state[name].numpy(), expected, f"gmp/final/{name}", 1e-5)
        assert np.array_equal(state[name].numpy() == 0, expected == 0), f"gmp/final/{name}: other zeros"
    known = {"settings", "x", "y", "schedule_before_step", "sparsity_after_step", "loss"}
    known |= {f"init/{name}" for name in begun} | {f"final/{name}" for name in ends}
    assert {name.removeprefix("gmp/") for name in arrays} == known, f"not understood: {sorted(arrays)}"
    return 3 + len(ends)


def distillation(arrays: Arrays) -> int:
    """Both terms, their sum and its gradient."""
    student = torch.from_numpy(arrays["kd/student"]).requires_grad_()
    teacher, label = torch.from_numpy(arrays["kd/teacher"]), torch.from_numpy(arrays["kd/label"])
    totals = [name for name in arrays if name.startswith("kd/total_")]
    assert len(totals) == 1, f"one total is expected: {totals}"
    found = re.fullmatch(r"kd/total_alpha([\d.]+)_([\d.]+)_T([\d.]+)", totals[0])
    assert found, f"{totals[0]} is not understood"
    alpha_ce, alpha_kd, temperature = map(float, found.groups())
    near(DistillationLoss(1, 0, temperature)(student, teacher, label).item(), arrays["kd/cross_entropy"], "CE", 1e-6)
    near(
        DistillationLoss(0, 1, temperature)(student, teacher, label).item(), arrays["kd/kd_term_unweighted"], "KD", 1e-6
    )
    total = DistillationLoss(alpha_ce, alpha_kd, temperature)(student, teacher, label)
    near(total.item(), arrays[totals[0]], totals[0], 1e-6)
    total.backward()
    near(student.grad.numpy(), arrays["kd/grad_student"], "kd/grad_student", 1e-6)
    known = {"student", "teacher", "label", "cross_entropy", "kd_term_unweighted", "grad_student", totals[0][3:]}
    assert {name.removeprefix("kd/") for name in arrays} == known, f"not understood: {sorted(arrays)}"
    return 4


GROUPS: dict[str, Callable[[Arrays], int]] = {"mask": masks, "gmp": gradual, "kd": distillation}
"""Group of arrays → check, which returns how many it compared."""
