"""LEAP as an optimizer: what it may change, what it must leave alone, how it resumes, where it is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import sparing
from faults import DeadlyKeeper, Killed
from sparing.core.errors import InvalidValue, RecipeError
from sparing.core.job import TrainingPlan
from sparing.core.training import Train, fit
from sparing.optimization import leap as module
from sparing.optimization.leap import LEAP, Leap, apply_leap, is_vector, leap_factor
from sparing.optimization.leap_lightning import LEAPCallback
from sparing.testing import tiny_task

SGD = torch.optim.SGD


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.BatchNorm1d(7), nn.Linear(7, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 5, generator=draw), torch.randint(0, 3, (8,), generator=draw)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, scheduler: Any = None) -> None:
    for step in range(first, last):
        x, y = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the formula


@given(rho=st.floats(0, 5), clip=st.none() | st.floats(0.01, 2), seed=st.integers(0, 99))
def test_the_factor_has_mean_one_and_keeps_its_bound(rho: float, clip: float | None, seed: int) -> None:
    xi = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    factor = leap_factor(xi, rho, clip)
    torch.testing.assert_close(factor - 1, (rho * xi) if clip is None else (rho * xi).clamp(-clip, clip))
    torch.testing.assert_close(leap_factor(xi, rho) + leap_factor(-xi, rho), torch.full_like(xi, 2.0))


@given(factor=st.floats(-3, 3), seed=st.integers(0, 99))
def test_the_displacement_is_multiplied(factor: float, seed: int) -> None:
    before, step = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moved = apply_leap(before, before + step, torch.full((4, 3), factor, dtype=torch.float64))
    torch.testing.assert_close(moved - before, factor * step, rtol=1e-9, atol=1e-12)


def test_a_factor_of_one_rounds_nothing_and_half_types_are_computed_in_full_precision() -> None:
    before, after = torch.randn(2, 1000) * torch.tensor([[1.0], [1e6]])
    assert torch.equal(apply_leap(before, after, torch.ones(1000)), after)
    old, new = torch.tensor([256.0], dtype=torch.bfloat16), torch.tensor([258.0], dtype=torch.bfloat16)
    moved = apply_leap(old, new, torch.tensor([3.0]))
    assert moved.dtype == torch.bfloat16
    assert float(moved) == 262.0


# --- nothing changes without noise

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    f"{cls.__name__} {' '.join(f'{k}={v}' for k, v in more.items())}": lambda p, cls=cls, more=more: cls(  # type: ignore[misc]
        p, **{"lr": 0.01, **more}
    )
    for cls, mores in {
        SGD: (
            {},
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            {"momentum": 0.9, "foreach": True},
            {"momentum": 0.9, "foreach": False},
            {"fused": True},
        ),
        torch.optim.Adam: ({"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}),
        torch.optim.AdamW: ({"weight_decay": 0.1, "foreach": False}, {"foreach": True}, {"fused": True}),
        torch.optim.Adagrad: ({}, {"fused": True}),
        torch.optim.Adadelta: ({}, {"foreach": True}),
        torch.optim.Adamax: ({},),
        torch.optim.NAdam: ({"foreach": True}, {"foreach": False}),
        torch.optim.RAdam: ({},),
        torch.optim.RMSprop: ({"momentum": 0.9, "centered": True}, {"foreach": True}),
        torch.optim.Rprop: ({},),
        torch.optim.ASGD: ({"foreach": True}, {"foreach": False}),
        torch.optim.Adafactor: ({},),
    }.items()
    for more in mores
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_noise_each_bit_is_the_base_optimizers(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    plain, wrapped, outside, noisy = (network() for _ in range(4))
    base = make(plain.parameters())
    leap = LEAP(make(wrapped.parameters()), rho=0)
    later = LEAP(make(outside.parameters()), rho=1, start_step=100)
    moved = LEAP(make(noisy.parameters()), rho=0.3)
    for model, optimizer in ((plain, base), (wrapped, leap), (outside, later), (noisy, moved)):
        train(model, optimizer, 0, 6)
    assert same(weights(plain), weights(wrapped))
    assert same(weights(plain), weights(outside))
    assert not same(weights(plain), weights(noisy))
    assert leap.state_dict()["rng"] == later.state_dict()["rng"] == []  # not even a generator was made
    assert leap.steps == 6
    one, other = (nn.utils.parameters_to_vector(m.parameters()) for m in (plain, wrapped))
    assert torch.equal(one, other)
    for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True):
        for name, value in base.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(leap.state[q][name])), name


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_stepping_by_parts_equals_stepping_at_once(
    make: Callable[[Any], torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same noise, same weights, however much is kept at a time; hooks force all at once."""
    results, calls = [], []
    for chunk, hooked in ((1, False), (40, False), (2**22, False), (1, True)):
        monkeypatch.setattr(module, "CHUNK", chunk)
        model = network()
        base = make([{"params": model[0].parameters()}, {"params": model[2:].parameters(), "lr": 0.02}])
        if hooked:
            base.register_step_post_hook(lambda *_: calls.append(1))
        train(model, LEAP(base, rho=0.5), 0, 4)
        results.append(weights(model))
    assert all(same(results[0], other) for other in results[1:])
    assert len(calls) == 4


def test_the_state_sees_clean_gradients() -> None:
    """With the same gradients, moments and step counts are those of the unperturbed optimizer."""
    one, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    plain, leap = torch.optim.Adam([one], lr=0.1), LEAP(torch.optim.Adam([other], lr=0.1), rho=1)
    for t in range(5):
        for p, optimizer in ((one, plain), (other, leap)):
            p.grad = torch.full((4,), float(t + 1))
            optimizer.step()
    assert not torch.equal(one, other)
    for name, value in plain.state[one].items():
        assert torch.equal(value, leap.state[other][name])


def test_noise_is_fresh_unbiased_and_of_the_size_asked_for() -> None:
    n = 20_000
    for mode, spread in (("relative", 0.4), ("absolute", 0.05 / 0.1)):
        p = nn.Parameter(torch.zeros(n, dtype=torch.float64))
        leap = LEAP(SGD([p], lr=0.1), rho=0.4, mode=mode, sigma=0.05 if mode == "absolute" else None, generator=3)
        moves = []
        for _ in range(2):
            old = p.detach().clone()
            p.grad = torch.full_like(p, 2.0)
            leap.step()
            moves.append(((p.detach() - old) / -0.2 - 1).numpy())
        for move in moves:
            assert abs(move.mean()) < 4 * spread / math.sqrt(n)
            assert move.std() == pytest.approx(spread, rel=4 / math.sqrt(2 * n))
        assert abs(np.corrcoef(moves)[0, 1]) < 4 / math.sqrt(n)


# --- options


def factors(n: int = 3, shape: tuple[int, ...] = (4, 2), **options: Any) -> list[list[Tensor]]:
    """The factors that two groups of ``n`` tensors met in each of three steps."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2 * n)]
    groups = [{"params": parameters[:n], "lr": 0.1}, {"params": parameters[n:], "lr": 0.2}]
    leap = LEAP(SGD(groups, lr=0.1), **options)
    found = []
    for _ in range(3):
        old = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.ones_like(p)
        leap.step()
        rates = [group["lr"] for group in groups for _ in range(n)]
        found.append([(o - p.detach()) / rate for o, p, rate in zip(old, parameters, rates, strict=True)])
    return found


def test_granularity() -> None:
    for step in factors(granularity="per_parameter", rho=0.5):
        assert len({round(float(x), 12) for f in step for x in f.flatten()}) == 6 * 8
    for step in factors(granularity="per_tensor", rho=0.5):
        assert all(torch.allclose(f, f[0, 0]) for f in step)
        assert len({round(float(f[0, 0]), 12) for f in step}) == 6
    values = [
        {round(float(x), 12) for f in step for x in f.flatten()} for step in factors(granularity="scalar", rho=0.5)
    ]
    assert [len(v) for v in values] == [1, 1, 1]
    assert len(set.union(*values)) == 3


def test_clip_bounds_the_noise_and_the_window_limits_the_steps() -> None:
    flat = torch.cat([f.flatten() for step in factors(rho=2.0, clip=0.5) for f in step])
    assert float(flat.min()) >= 0.5 - 1e-12
    assert float(flat.max()) <= 1.5 + 1e-12
    assert float(torch.isclose(flat, torch.tensor(0.5, dtype=torch.float64)).double().mean()) > 0.2
    window = factors(rho=0.5, start_step=1, end_step=2)
    touched = [any(not torch.allclose(f, torch.ones_like(f)) for f in step) for step in window]
    assert touched == [False, True, False]
    # nothing was drawn before the window: its noise is that of a first step
    assert torch.allclose(window[1][0], factors(rho=0.5)[0][0])


def test_rho_may_be_a_schedule_and_is_checked_when_it_is_asked() -> None:
    found = factors(rho=lambda step: [0.0, 0.3, 0.0][step])
    assert [any(not torch.allclose(f, torch.ones_like(f)) for f in step) for step in found] == [False, True, False]
    with pytest.raises(InvalidValue, match=r"rho\(1\) = nan"):
        factors(rho=lambda step: [0.1, math.nan, 0.1][step])
    with pytest.raises(InvalidValue, match=r"rho\(0\) = -1"):
        factors(rho=lambda step: -1.0)


def test_absolute_noise_goes_by_each_groups_rate_of_this_step_and_a_rate_of_zero_moves_nothing() -> None:
    parameters = [nn.Parameter(torch.zeros(5000, dtype=torch.float64)) for _ in range(2)]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, (0.1, 0.4), strict=True)]
    leap = LEAP(SGD(groups, lr=1.0), mode="absolute", sigma=0.05)
    schedule = lr_scheduler.LambdaLR(leap, lambda t: [1.0, 0.5, 0.0][t])
    for rates in ((0.1, 0.4), (0.05, 0.2), (0.0, 0.0)):
        old = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.ones_like(p)
        leap.step()
        schedule.step() if rates[0] else None
        for p, o, rate in zip(parameters, old, rates, strict=True):
            moved = (o - p.detach()).numpy()
            assert moved.mean() == pytest.approx(rate, abs=4 * 0.05 / math.sqrt(5000))
            assert moved.std() == pytest.approx(0.05 if rate else 0.0, rel=0.05)


def test_what_is_excluded_or_has_no_gradient_keeps_the_base_step_and_draws_nothing() -> None:
    listed, by_rule, alone = network(), network(), network()
    plain = network()
    vectors = [p for p in listed.parameters() if p.ndim < 2]
    optimizers = [
        LEAP(SGD(listed.parameters(), lr=0.1), rho=0.5, exclude=vectors),
        LEAP(SGD(by_rule.parameters(), lr=0.1), rho=0.5, exclude=is_vector),
        LEAP(SGD([p for p in alone.parameters() if p.ndim == 2], lr=0.1), rho=0.5),
        SGD(plain.parameters(), lr=0.1),
    ]
    for model, optimizer in zip((listed, by_rule, alone, plain), optimizers, strict=True):
        train(model, optimizer, 0, 1)
    assert same(weights(listed), weights(by_rule))
    for name, value in plain.named_parameters():
        assert torch.equal(listed.get_parameter(name), value) == (value.ndim < 2)
        if value.ndim == 2:  # the draws are those of an optimizer that never heard of the others
            assert torch.equal(listed.get_parameter(name), alone.get_parameter(name))
    frozen, moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    only = nn.Parameter(torch.ones(3))
    for leap, p in ((LEAP(SGD([frozen, moving], lr=0.1)), moving), (LEAP(SGD([only], lr=0.1)), only)):
        p.grad = torch.ones(3)
        leap.step()
    assert frozen.tolist() == [1, 1, 1]
    assert torch.equal(moving, only)


def test_a_shared_weight_is_perturbed_once() -> None:
    encoder = nn.Linear(4, 4, bias=False)
    tied = nn.Sequential(encoder, nn.Tanh(), encoder)
    alone = nn.Linear(4, 4, bias=False)
    alone.load_state_dict(encoder.state_dict())
    for parameters, p in ((list(tied.parameters()), encoder.weight), (list(alone.parameters()), alone.weight)):
        p.grad = torch.ones_like(p)
        LEAP(SGD(parameters, lr=0.1), rho=0.5).step()
    assert torch.equal(encoder.weight, alone.weight)


# --- in an optimizer's place


def test_it_is_an_optimizer_that_shares_what_is_inside() -> None:
    model = network()
    base = SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    leap = LEAP(base, rho=0.1)
    assert isinstance(leap, torch.optim.Optimizer)
    assert leap.param_groups is base.param_groups
    assert leap.state is base.state
    assert leap.defaults is base.defaults
    leap.add_param_group({"params": list(model[3].parameters()), "lr": 0.5})
    assert [group["lr"] for group in base.param_groups] == [0.1, 0.5]
    train(model, leap, 0, 1)
    leap.zero_grad()
    assert all(p.grad is None for group in base.param_groups for p in group["params"])
    assert "rho=0.1" in repr(leap)
    assert "momentum: 0.9" in repr(leap)
    called: list[str] = []
    leap.register_step_pre_hook(lambda *_: called.append("before"))
    leap.register_step_post_hook(lambda *_: called.append("after"))
    leap.register_state_dict_post_hook(lambda _, state: state | {"mine": 1})
    leap.register_load_state_dict_pre_hook(lambda _, state: called.append(f"load {state['mine']}"))
    train(model, leap, 1, 2)
    leap.load_state_dict(leap.state_dict())
    assert called == ["before", "after", "load 1"]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "step": lambda o: lr_scheduler.StepLR(o, 2),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=9),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedules_say_and_do_what_they_did(make: Callable[[Any], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "scheduler.step() before optimizer.step()" among others
        plain, leap = SGD(network().parameters(), lr=0.1, momentum=0.9), None
        noisy = network()
        leap = LEAP(SGD(noisy.parameters(), lr=0.1, momentum=0.9), rho=0.3)
        schedules = [make(plain), make(leap)]
        for t in range(8):
            assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
            for optimizer, schedule in zip((plain, leap), schedules, strict=True):
                train(noisy, optimizer, t, t + 1, schedule)


def test_a_schedule_attached_to_the_inner_optimizer_works_as_well() -> None:
    results = []
    for inner in (False, True):
        model = network()
        base = SGD(model.parameters(), lr=0.1)
        schedule = lr_scheduler.ExponentialLR(base, 0.5) if inner else None
        leap = LEAP(base, rho=0.3)
        train(model, leap, 0, 4, schedule or lr_scheduler.ExponentialLR(leap, 0.5))
        results.append(weights(model))
    assert same(*results)


def test_a_closure_is_called_once_with_gradients_and_its_value_returned() -> None:
    class Foreign(SGD):
        """Not torch's own: everything is kept and the closure handed on."""

    results = []
    for make in (SGD, Foreign):
        for closure in (False, True):
            model, calls = network(), []
            leap = LEAP(make(model.parameters(), lr=0.1, momentum=0.9), rho=0.3)
            for t in range(3):
                x, y = batch(t)

                def loss(model: nn.Module = model, x: Tensor = x, y: Tensor = y, calls: list[int] = calls) -> Tensor:
                    calls.append(1)
                    model.zero_grad()
                    value = cross_entropy(model(x), y)
                    value.backward()
                    return value

                if closure:
                    with torch.no_grad():
                        assert float(leap.step(loss)) > 0
                else:
                    loss()
                    assert leap.step() is None
            assert len(calls) == 3
            results.append(weights(model))
    assert all(same(results[0], other) for other in results[1:])


def test_accumulated_gradients_make_one_step_and_one_draw() -> None:
    models = []
    for parts in (1, 4):
        model = nn.Sequential(nn.Linear(5, 3)).double()
        model.load_state_dict({"0.weight": torch.ones(3, 5), "0.bias": torch.zeros(3)})
        leap = LEAP(SGD(model.parameters(), lr=0.1), rho=0.3)
        for t in range(3):
            x, y = batch(t)
            leap.zero_grad()
            for some, labels in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (cross_entropy(model(some), labels) / parts).backward()
            leap.step()
        models.append(model)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_draws_nothing(fused: bool) -> None:
    """An overflow in the middle leaves weights, state and noise as if it had not been tried."""
    results = []
    for overflow in (False, True):
        model = network()
        leap = LEAP(torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), rho=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000, backoff_factor=0.5)
        for t in (0, None, 1, 2) if overflow else (0, 1, 2):
            x, y = batch(t or 0)
            model.eval() if t is None else model.train()  # running statistics are not what is looked at
            leap.zero_grad()
            scaler.scale(cross_entropy(model(x), y)).backward()
            if t is None:
                model[0].weight.grad.fill_(math.inf)
            scaler.step(leap)
            scaler.update()
        assert leap.steps == 3
        assert scaler.get_scale() == (128.0 if overflow else 256.0)
        results.append(weights(model))
    assert same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_other_number_formats(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.zeros(4000, dtype=dtype))
    p.grad = torch.ones_like(p)
    LEAP(SGD([p], lr=1.0), rho=0.5).step()
    assert p.dtype == dtype
    moved = torch.view_as_real(p.detach())[:, 0] if dtype.is_complex else p.detach()
    assert float(moved.double().mean()) == pytest.approx(-1, abs=0.05)
    assert float(moved.double().std()) == pytest.approx(0.5, rel=0.1)


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(made, Tensor) and (place := made.untyped_storage().data_ptr()) not in known:
            self.alive[place] = made.untyped_storage().nbytes()
            weakref.finalize(made, self.alive.pop, place, None)
            self.peak = max(self.peak, sum(self.alive.values()))
        return made


@pytest.mark.parametrize(("chunk", "tensors"), [(1000, 1), (3000, 3), (2**22, 50)])
def test_it_keeps_a_part_and_not_a_copy_of_the_model(chunk: int, tensors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    parameters = [nn.Parameter(torch.zeros(1000)) for _ in range(50)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    leap = LEAP(SGD(parameters, lr=0.1, foreach=False), rho=0.1)
    with Peak() as memory:
        leap.step()
    assert tensors * 4000 <= memory.peak <= (tensors + 2) * 4000  # and a few of a single tensor's size


# --- resuming


@pytest.mark.parametrize("granularity", ["per_parameter", "per_tensor", "scalar"])
@pytest.mark.parametrize("through", ["file", "copy"])
def test_a_resumed_training_ends_with_the_same_bits(granularity: str, through: str, tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, LEAP, Any]:
        model = network()
        leap = LEAP(torch.optim.AdamW(model.parameters(), lr=0.05), rho=0.5, granularity=granularity, generator=7)
        return model, leap, lr_scheduler.CosineAnnealingLR(leap, 10)

    model, leap, schedule = begin()
    train(model, leap, 0, 8, schedule)
    whole = weights(model)
    model, leap, schedule = begin()
    train(model, leap, 0, 3, schedule)
    if through == "file":
        torch.save([model.state_dict(), leap.state_dict(), schedule.state_dict()], tmp_path / "state")
        states = torch.load(tmp_path / "state", weights_only=True)
        torch.rand(3)
        model, leap, schedule = begin()
        for part, state in zip((model, leap, schedule), states, strict=True):
            part.load_state_dict(state)
    else:
        model, leap, schedule = copy.deepcopy((model, leap, schedule))
    assert leap.steps == 3
    train(model, leap, 3, 8, schedule)
    assert same(weights(model), whole)


def test_a_given_generator_is_used_and_resumed() -> None:
    p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    mine = torch.Generator().manual_seed(5)
    leap, seeded = LEAP(SGD([p], lr=0.1), generator=mine), LEAP(SGD([q], lr=0.1), generator=5)
    for parameter, optimizer in ((p, leap), (q, seeded)):
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(p, q)
    assert torch.equal(mine.get_state(), seeded.state_dict()["rng"][0])
    state = leap.state_dict()
    mine.manual_seed(0)
    leap.load_state_dict(state)
    assert torch.equal(mine.get_state(), state["rng"][0])


def test_the_global_generators_are_left_alone() -> None:
    model = network()
    leap = LEAP(SGD(model.parameters(), lr=0.1))
    x, y = batch(0)
    cross_entropy(model(x), y).backward()
    before = torch.get_rng_state()
    leap.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_states_of_other_settings_and_bare_states_are_refused() -> None:
    model = network()
    leap = LEAP(SGD(model.parameters(), lr=0.1), rho=0.5)
    train(model, leap, 0, 2)
    state = leap.state_dict()
    for change, says in {
        "rho": ({"rho": 0.4}, "rho was 0.5, is 0.4"),
        "mode": ({"mode": "absolute", "sigma": 0.1}, "mode was 'relative', is 'absolute'; sigma was None, is 0.1"),
        "granularity": ({"rho": 0.5, "granularity": "scalar"}, "granularity was 'per_parameter', is 'scalar'"),
        "clip": ({"rho": 0.5, "clip": 1.0}, "clip was None, is 1.0"),
        "window": ({"rho": 0.5, "end_step": 9}, "end_step was None, is 9"),
        "exclude": ({"rho": 0.5, "exclude": is_vector}, r"exclude was \[\], is \[1, 2, 3, 5\]"),
        "schedule": ({"rho": lambda step: 0.5}, "rho was 0.5, is 'a schedule'"),
    }.values():
        with pytest.raises(InvalidValue, match=says):
            LEAP(SGD(model.parameters(), lr=0.1), **change).load_state_dict(state)
    with pytest.raises(InvalidValue, match=r"lacks base, rng, step, config \(it has state, param_groups\)"):
        leap.load_state_dict(leap.base.state_dict())
    with pytest.raises(InvalidValue, match="another kind of device than cpu"):
        leap.load_state_dict(state | {"rng": [torch.zeros(16, dtype=torch.uint8)]})


# --- refusals


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rho": -0.1}, "rho = -0.1"),
        ({"rho": math.nan}, "rho = nan"),
        ({"rho": math.inf}, "rho = inf"),
        ({"rho": "big"}, "rho = 'big'"),
        ({"mode": "absolute"}, "needs sigma"),
        ({"mode": "absolute", "sigma": -1}, "sigma = -1"),
        ({"mode": "absolute", "sigma": math.nan}, "sigma = nan"),
        ({"sigma": 0.1}, "sigma = 0.1 is for mode = 'absolute'"),
        ({"mode": "relativ"}, "mode = 'relativ'.*Did you mean 'relative'"),
        ({"granularity": "per_layer"}, "granularity = 'per_layer'; one of per_parameter, per_tensor, scalar"),
        ({"clip": 0}, "clip = 0"),
        ({"clip": math.nan}, "clip = nan"),
        ({"start_step": -1}, "start_step = -1"),
        ({"end_step": 2.5}, "end_step = 2.5"),
        ({"start_step": 5, "end_step": 5}, "start_step = 5, end_step = 5"),
        ({"generator": "seed"}, "generator = 'seed'"),
        ({"rho": True}, "rho = True"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        LEAP(SGD(network().parameters(), lr=0.1), **options)


def test_optimizers_that_cannot_be_perturbed_are_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(InvalidValue, match="LBFGS"):
        LEAP(torch.optim.LBFGS([p]))
    with pytest.raises(InvalidValue, match="SparseAdam"):
        LEAP(torch.optim.SparseAdam([p]))
    with pytest.raises(InvalidValue, match="around it already"):
        LEAP(LEAP(SGD([p], lr=0.1)))
    with pytest.raises(InvalidValue, match=r"a torch\.optim\.Optimizer is needed"):
        LEAP([p])
    with pytest.raises(InvalidValue, match="differentiable"):
        LEAP(SGD([p], lr=0.1, differentiable=True))


def test_sharded_parameters_are_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    p.device_mesh = object()  # type: ignore[attr-defined]  # what marks a DTensor
    with pytest.raises(InvalidValue, match="sharded over devices"):
        LEAP(SGD([p], lr=0.1))


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("closure", [False, True])
def test_sparse_gradients_are_refused_before_anything_moves(rho: float, closure: bool) -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    leap = LEAP(SGD(embedding.parameters(), lr=0.1), rho=rho)
    before = weights(embedding)

    def loss() -> Tensor:
        value = embedding(torch.tensor([1, 2])).sum()
        value.backward()
        return value

    if not closure:
        loss()
    with pytest.raises(InvalidValue, match=r"sparse gradients; parameter 0 of group 0, of shape \(10, 3\)"):
        leap.step(loss if closure else None)
    assert same(weights(embedding), before)


def test_a_generator_on_another_device_is_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    with pytest.raises(InvalidValue, match="generator is on cpu, a parameter on meta"):
        LEAP(SGD([parameter], lr=0.1), generator=torch.Generator())
    leap = LEAP(SGD([nn.Parameter(torch.zeros(2))], lr=0.1), generator=torch.Generator())
    with pytest.raises(InvalidValue, match="generator is on cpu, a parameter on meta"):
        leap.add_param_group({"params": [parameter]})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_scaled_steps_and_resumption_work() -> None:
    results = []
    for resume in (False, True):
        model = network().cuda()
        leap = LEAP(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), rho=0.3)
        scaler = torch.amp.GradScaler("cuda")
        for t in range(6):
            x, y = (tensor.cuda() for tensor in batch(t))
            leap.zero_grad()
            with torch.autocast("cuda", dtype=torch.float16):
                loss = cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(leap)
            scaler.update()
            if resume and t == 2:
                state = copy.deepcopy(leap.state_dict())
                leap = LEAP(torch.optim.AdamW(model.parameters(), lr=0.01, fused=True), rho=0.3)
                leap.load_state_dict(state)
        results.append(weights(model))
    assert same(*results)


# --- in Lightning and in Sparing


class Module(pl.LightningModule):
    """Anybody's own: a schedule, dropout, automatic optimization."""

    def __init__(self, rho: float | None = None, optimizers: int = 1) -> None:
        super().__init__()
        self.net = network(3)
        self.rho, self.count = rho, optimizers
        self.automatic_optimization = optimizers == 1

    def training_step(self, step_batch: Any, number: int) -> Any:
        loss = cross_entropy(self.net(step_batch[0]), step_batch[1])
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return None
        return loss

    def configure_optimizers(self) -> Any:
        if self.count > 1:
            return [SGD(self.net[0].parameters(), lr=0.1), SGD(self.net[3].parameters(), lr=0.1)]
        optimizer: torch.optim.Optimizer = SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        if self.rho is not None:
            optimizer = LEAP(optimizer, rho=self.rho)
        return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5)}


def lightning(module: Module, folder: Path, epochs: int, callbacks: Any = (), resume: Path | None = None) -> Any:
    data = TensorDataset(*(torch.cat(part) for part in zip(*(batch(t) for t in range(6)), strict=True)))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=resume, weights_only=True)
    return trainer


def test_in_a_lightning_module_by_hand_or_by_callback(tmp_path: Path) -> None:
    by_hand, by_callback, control, plain = Module(0.5), Module(), Module(), Module()
    for net, callbacks in (
        (by_hand, []),
        (by_callback, [LEAPCallback(0.5)]),
        (control, [LEAPCallback(0)]),
        (plain, []),
    ):
        lightning(net, tmp_path, 2, callbacks)
    assert same(weights(by_hand), weights(by_callback))
    assert same(weights(control), weights(plain))
    assert not same(weights(by_hand), weights(plain))


def test_lightnings_checkpoint_holds_the_noise(tmp_path: Path) -> None:
    whole = Module()
    lightning(whole, tmp_path, 4, [LEAPCallback(0.5, seed=4)])
    half = lightning(Module(), tmp_path, 2, [LEAPCallback(0.5, seed=4)])
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = Module()
    trainer = lightning(rest, tmp_path, 4, [LEAPCallback(0.5, seed=4)], tmp_path / "half.ckpt")
    assert isinstance(trainer.optimizers[0], LEAP)
    assert trainer.optimizers[0].steps == 24
    assert same(weights(rest), weights(whole))
    with pytest.raises(InvalidValue, match=r"rho was 0\.5, is 0\.4"):
        lightning(Module(), tmp_path, 4, [LEAPCallback(0.4, seed=4)], tmp_path / "half.ckpt")


def test_the_callback_wraps_several_optimizers_and_refuses_as_leap_does(tmp_path: Path) -> None:
    trainer = lightning(Module(optimizers=2), tmp_path, 1, [LEAPCallback(0.5)])
    assert [type(o) for o in trainer.optimizers] == [LEAP, LEAP]
    states = [o.state_dict() for o in trainer.optimizers]
    assert [state["step"] for state in states] == [6, 6]
    assert not torch.equal(states[0]["rng"][0], states[1]["rng"][0])
    with pytest.raises(InvalidValue, match="rho = -1"):
        LEAPCallback(-1)
    with pytest.raises(InvalidValue, match="around it already"):
        lightning(Module(0.1), tmp_path, 1, [LEAPCallback(0.5)])


def test_the_step_wraps_the_next_training_only() -> None:
    task = tiny_task()
    quick = Train(epochs=1, batch_size=16, lr=0.02)
    meter = {"min_seconds": 0, "max_seconds": 0.01, "memory": False}
    runs = {
        name: sparing.run(task=task, steps=steps, meter=meter)
        for name, steps in {
            "plain": [quick],
            "zero": [Leap(rho=0), quick],
            "noisy": [Leap(rho=0.5), quick],
            "other": [Leap(rho=0.5, exclude="vectors"), quick],
        }.items()
    }
    models = {name: weights(run.job.model) for name, run in runs.items()}
    assert same(models["plain"], models["zero"])
    assert not same(models["plain"], models["noisy"])
    assert not same(models["noisy"], models["other"])
    assert runs["noisy"].job.training == TrainingPlan()
    assert [row.id for row in runs["noisy"].ledger.rows] == ["leap", "train"]
    assert "ρ = 0.5, per_parameter" in runs["noisy"].ledger.rows[0].remarks[0]
    again = sparing.run(task=task, steps=[Leap(rho=0.5), quick], meter=meter, seeds=[0, 1])
    assert same(weights(sparing.run(task=task, steps=[Leap(rho=0.5), quick], meter=meter).job.model), models["noisy"])
    assert len(again.ledger.rows) == 4


def test_through_fit_the_noise_is_the_seeds_and_goes_on_after_a_kill() -> None:
    task = tiny_task()
    plan = TrainingPlan(wrap_optimizer=(lambda optimizer: LEAP(optimizer, rho=0.5, generator=11),))
    settings = Train(epochs=3, batch_size=16, lr=0.02, scheduler="cosine", checkpoint_every_batches=2)
    splits = task.splits(None)

    torch.manual_seed(0)
    first = task.default_model()
    whole = fit(copy.deepcopy(first), task, splits.train, splits.val, settings, plan, seed=2)
    keeper = DeadlyKeeper(2)
    with pytest.raises(Killed):
        fit(copy.deepcopy(first), task, splits.train, splits.val, settings, plan, seed=2, progress=keeper)
    assert keeper.state["optimizer_states"][0]["step"] > 0
    resumed = fit(copy.deepcopy(first), task, splits.train, splits.val, settings, plan, seed=2, progress=keeper)
    assert same(weights(resumed.model), weights(whole.model))


@pytest.mark.slow
def test_two_processes_draw_the_same_noise() -> None:
    """Otherwise their weights would drift apart, and from those of one process."""
    task = tiny_task()
    plan = TrainingPlan(wrap_optimizer=(lambda optimizer: LEAP(optimizer, rho=0.3, generator=11),))
    one = Train(epochs=2, batch_size=16, optimizer="SGD", lr=0.1, accelerator="cpu")
    results = []
    for settings in (one, dataclasses.replace(one, devices=2)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
        splits = task.splits(None)
        results.append(weights(fit(model, task, splits.train, None, settings, plan, seed=1).model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-5, atol=1e-6)


def test_with_distillation_and_quantisation_in_one_recipe() -> None:
    small = {"name": "convnet", "num_classes": 3, "image_size": 8, "widths": [4]}
    quick: dict[str, Any] = {"epochs": 1, "batch_size": 16, "lr": 0.02}
    run = sparing.run(
        task=tiny_task(),
        steps=[
            Train(id="teacher", **quick),
            Leap(rho=0.2),
            sparing.Distil(teacher="teacher", model=small, **quick),
            sparing.Quantize(goal="bytes", max_loss=1.0, samples=8),
        ],
        meter={"min_seconds": 0, "max_seconds": 0.01, "memory": False},
    )
    assert [row.id for row in run.ledger.rows] == ["teacher", "leap", "distil", "quantize"]
    assert run.ledger.rows[-1].figures["accuracy"].value is not None


def test_two_before_one_training_or_none_after_it_are_refused_in_planning() -> None:
    with pytest.raises(RecipeError, match="learning-rate perturbation"):
        sparing.run(task=tiny_task(), steps=[Leap(), Leap(id="more"), Train(epochs=1)])
    with pytest.raises(RecipeError, match="training"):
        sparing.run(task=tiny_task(), steps=[Leap()])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mode": "absolute"}, "sigma"),
        ({"sigma": 0.1}, "sigma = 0.1"),
        ({"start_step": 4, "end_step": 3}, "end_step = 3"),
        ({"rho": -1}, "rho"),
        ({"exclude": "norms"}, "exclude"),
    ],
)
def test_fields_of_the_step_are_checked(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        Leap(**fields)
