"""rPGD as an optimizer: its step, its two phases, momentum on a sphere, state, and where it is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from sparing.core.errors import InvalidValue, NoEffect
from sparing.optimization.rpgd import RPGD, rpgd_groups
from sparing.optimization.weight_norm import (
    direction_norm,
    parametrized_layers,
    scale_and_direction,
    unit_direction,
    weight_normalize,
)


def network(seed: int = 0, scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.mul_(scale)
    return model


def backward(model: nn.Module, optimizer: Any = None, seed: int = 1) -> None:
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    cross_entropy(model(x), torch.arange(8) % 3).backward()
    if optimizer is not None:
        optimizer.step()


def norms(model: nn.Module) -> list[torch.Tensor]:
    return [direction_norm(scale_and_direction(layer)[1]) for layer in parametrized_layers(model).values()]


def scales(model: nn.Module) -> list[torch.Tensor]:
    return [scale_and_direction(layer)[0].detach().clone() for layer in parametrized_layers(model).values()]


def test_one_step_is_the_formula_with_old_values_and_sgd_elsewhere() -> None:
    model = unit_direction(network())
    optimizer = RPGD(model, lr=0.1, lr_g=0.02)
    backward(model)
    expected = {}
    for name, layer in parametrized_layers(model).items():
        g, w = scale_and_direction(layer)
        v = w - 0.1 / g**2 * w.grad
        expected[name] = (g - 0.02 * g.grad, v / v.norm(dim=1, keepdim=True))
    others = [model[0].bias, model[1].weight, model[1].bias, model[3].bias]
    plain = [p.detach() - 0.1 * p.grad for p in others]
    optimizer.step()
    for name, layer in parametrized_layers(model).items():
        for found, value in zip(scale_and_direction(layer), expected[name], strict=True):
            torch.testing.assert_close(found, value)
    for found, value in zip(others, plain, strict=True):
        torch.testing.assert_close(found, value)


@given(st.integers(0, 100), st.sampled_from([0, 1, None]), st.sampled_from([0.0, 0.9]), st.booleans())
def test_directions_stay_of_length_one(seed: int, dim: int | None, momentum: float, scaled: bool) -> None:
    model = unit_direction(network(seed), dim)
    optimizer = RPGD(model, 0.05, momentum=momentum, g_scaling="inverse_square" if scaled else "none")
    for turn in range(5):
        backward(model, optimizer, turn)
    for layer in parametrized_layers(model).values():
        found = direction_norm(scale_and_direction(layer)[1], dim)
        torch.testing.assert_close(found, torch.ones_like(found))


def test_the_tangential_step_is_that_of_sgd_at_every_scale() -> None:
    for scale in (0.5, 8.0):
        plain, model = network(scale=scale), unit_direction(network(scale=scale))
        backward(plain)
        before = plain[0].weight.detach()
        assert plain[0].weight.grad is not None
        unit = before / before.norm(dim=1, keepdim=True)
        tangent = plain[0].weight.grad - (plain[0].weight.grad * unit).sum(1, keepdim=True) * unit
        backward(model, RPGD(model, lr=1e-6, lr_g=1e-12))
        moved = (model[0].weight - before) / -1e-6
        torch.testing.assert_close(moved, tangent, rtol=1e-4, atol=1e-5)


def test_small_scales_are_divided_by_the_floor() -> None:
    model = unit_direction(network(scale=1e-6))
    _, w = scale_and_direction(model[0])
    before = w.detach().clone()
    backward(model, optimizer := RPGD(model, lr=1e-3))
    assert w.grad is not None
    v = before - 1e-3 / 1e-4 * w.grad
    torch.testing.assert_close(w.detach(), v / v.norm(dim=1, keepdim=True))
    assert optimizer.param_groups[0]["steps"] == 1


def test_two_phases_shrink_scales_then_keep_them_for_a_while() -> None:
    model = unit_direction(network())
    before = scales(model)
    optimizer = RPGD(model, lr=0.1, momentum=0.9, weight_decay=0.1, freeze_g_steps=3, g_shrink=0.25)
    shrunk = scales(model)
    for old, new in zip(before, shrunk, strict=True):
        torch.testing.assert_close(new, old / 4)
    directions = [w.detach().clone() for w in optimizer.param_groups[0]["params"][::2]]
    for _ in range(3):
        backward(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(scales(model), shrunk, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(directions, optimizer.param_groups[0]["params"][::2], strict=True))
    backward(model, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(scales(model), shrunk, strict=True))


def test_weight_decay_is_on_scales_only() -> None:
    with_decay, without = unit_direction(network()), unit_direction(network())
    backward(with_decay, RPGD(with_decay, lr=0.1, weight_decay=0.5))
    backward(without, RPGD(without, lr=0.1))
    for name, value in with_decay.named_parameters():
        other = dict(without.named_parameters())[name]
        assert torch.equal(value, other) != name.endswith("original0"), name
    start = unit_direction(network())
    torch.testing.assert_close(scales(with_decay)[0], scales(without)[0] - 0.1 * 0.5 * scales(start)[0])


def test_momentum_of_directions_is_tangential_or_none() -> None:
    model = unit_direction(network())
    optimizer = RPGD(model, lr=0.05, momentum=0.9)
    for turn in range(4):
        backward(model, optimizer, turn)
    for w in optimizer.param_groups[0]["params"][::2]:
        buffer = optimizer.state[w]["momentum_buffer"]
        assert buffer.abs().max() > 0
        torch.testing.assert_close((buffer * w).sum(1), torch.zeros(len(w), dtype=w.dtype), rtol=0, atol=1e-12)
    reset = unit_direction(network())
    optimizer = RPGD(reset, lr=0.05, momentum=0.9, momentum_w="reset")
    for turn in range(4):
        backward(reset, optimizer, turn)
    assert not any(optimizer.state[w] for w in optimizer.param_groups[0]["params"][::2])
    assert all(optimizer.state[g] for g in optimizer.param_groups[0]["params"][1::2])


def test_a_state_goes_on_where_it_was_taken() -> None:
    def new(model: nn.Module) -> RPGD:
        return RPGD(model, lr=0.1, lr_g=0.05, momentum=0.9, freeze_g_steps=3)

    whole = unit_direction(network())
    optimizer = new(whole)
    for turn in range(2):
        backward(whole, optimizer, turn)
    half, kept = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    for turn in range(2, 5):
        backward(whole, optimizer, turn)
    resumed = new(half)
    resumed.load_state_dict(kept)
    for turn in range(2, 5):
        backward(half, resumed, turn)
    for a, b in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedules_act_on_scales_as_on_directions() -> None:
    model = unit_direction(network())
    optimizer = RPGD(model, lr=0.1, lr_g=0.01)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    backward(model, optimizer)
    schedule.step()
    kept = copy.deepcopy(model.state_dict())
    backward(model, optimizer)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=1e-12, atol=0, msg=name)


def test_groups_of_parts_have_rates_of_their_own() -> None:
    model = unit_direction(network())
    optimizer = RPGD([*rpgd_groups(model[0], lr=0.3), *rpgd_groups(model[3])], lr=0.1)
    assert [(group["lr"], group["dims"]) for group in optimizer.param_groups] == [
        (0.3, [0]),
        (0.3, None),
        (0.1, [0]),
        (0.1, None),
    ]
    loss = optimizer.step(lambda: torch.tensor(3.0))
    assert loss == 3


def test_closures_are_evaluated_with_gradients() -> None:
    model = unit_direction(network())
    optimizer = RPGD(model, lr=0.1)
    before = scales(model)[0]

    def closure() -> float:
        backward(model)
        return 1.5

    with torch.no_grad():
        assert optimizer.step(closure) == 1.5
    assert not torch.equal(scales(model)[0], before)


def test_half_types_keep_their_length() -> None:
    model = unit_direction(nn.Linear(4096, 2, bias=False).to(torch.bfloat16))
    optimizer = RPGD(model, lr=0.01)
    model(torch.ones(1, 4096, dtype=torch.bfloat16)).square().sum().backward()
    optimizer.step()
    (found,) = norms(model)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-2, atol=0)


def test_frozen_layers_are_left_out() -> None:
    model = unit_direction(network())
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    kept = {name: value.clone() for name, value in model[0].state_dict().items()}
    backward(model, RPGD(model, lr=0.1, g_shrink=0.5))
    assert all(torch.equal(value, kept[name]) for name, value in model[0].state_dict().items())
    model[3].requires_grad_(False)
    with pytest.raises(NoEffect, match="no layer under unit_direction that is trained"):
        RPGD(model, lr=0.1)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lr": 0}, "lr = 0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"lr_g": -1.0}, r"lr_g = -1\.0"),
        ({"g_scaling": "inverse"}, "Did you mean 'inverse_square'"),
        ({"momentum": 1.0}, r"momentum = 1\.0"),
        ({"momentum_w": "keep"}, "momentum_w = 'keep'"),
        ({"weight_decay": -0.1}, r"weight_decay = -0\.1"),
        ({"freeze_g_steps": -1}, "freeze_g_steps = -1"),
        ({"freeze_g_steps": 1.5}, r"freeze_g_steps = 1\.5"),
        ({"g_shrink": 0}, "g_shrink = 0"),
    ],
)
def test_settings_out_of_bounds_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidValue, match=says):
        RPGD(unit_direction(network()), **({"lr": 0.1} | fields))


def test_parameters_without_directions_are_refused() -> None:
    for model in (network(), weight_normalize(network())):
        with pytest.raises(NoEffect, match="Sequential has no layer under unit_direction"):
            RPGD(model, lr=0.1)
        with pytest.raises(NoEffect, match="none of these parameters is a unit direction"):
            RPGD([{"params": list(model.parameters())}], lr=0.1)


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(4, 6, sparse=True), unit_direction(nn.Linear(6, 2)))
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InvalidValue, match=r"sparse gradients; a parameter of shape \(4, 6\)"):
        RPGD(model, lr=0.1).step()
