"""Layers of scale and direction: what they keep, what they leave alone, and that they bake back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize

from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect
from sparing.optimization.weight_norm import (
    bake,
    direction_norm,
    init_from_data,
    parametrized_layers,
    renormalize_,
    scale_and_direction,
    shrink_scales,
    unit_direction,
    weight_normalize,
)

BOTH = pytest.mark.parametrize("reparametrise", [weight_normalize, unit_direction])


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 2)
    )


def images(seed: int = 1, n: int = 8) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(images()), torch.arange(8) % 2).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_torchs(dim: int | None) -> None:
    ours, theirs = network(), network()
    weight_normalize(ours, dim)
    for layer in theirs:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            parametrizations.weight_norm(layer, dim=dim)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    trained(ours)
    trained(theirs)
    for (name, value), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6, msg=name)


@BOTH
def test_outputs_are_as_before_and_norms_and_biases_are_left_alone(reparametrise: Callable[..., Any]) -> None:
    model, plain = network(), network()
    assert reparametrise(model) is model
    torch.testing.assert_close(model(images()), plain(images()))
    assert list(parametrized_layers(model)) == ["0", "4", "6"]
    for layer in parametrized_layers(model).values():
        g, v = scale_and_direction(layer)
        assert g.shape == (v.shape[0], *[1] * (v.ndim - 1))
        norms = direction_norm(v)
        torch.testing.assert_close(norms, torch.ones_like(g) if reparametrise is unit_direction else g)
    assert isinstance(model[4].bias, nn.Parameter)
    assert not parametrize.is_parametrized(model[1])


@BOTH
@pytest.mark.parametrize("dim", [0, 1, None])
def test_baked_outputs_are_the_same_bits_and_the_network_is_plain(reparametrise: Any, dim: int | None) -> None:
    model = trained(reparametrise(network(), dim)).eval()
    kept = copy.deepcopy(model)
    before = model(images())
    assert bake(model) is model
    assert torch.equal(model(images()), before)
    assert list(model.state_dict()) == list(network().state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]
    assert type(model[0]) is nn.Conv2d
    assert model[0].weight.requires_grad
    assert torch.equal(kept(images()), before)  # a copy made before is still whole
    assert len(parametrized_layers(kept)) == 3
    trained(model)


def test_frozen_layers_stay_frozen_and_come_out_frozen() -> None:
    model = network()
    model[4].weight.requires_grad_(False)
    weight_normalize(model)
    assert not any(p.requires_grad for p in scale_and_direction(model[4]))
    bake(model)
    assert not model[4].weight.requires_grad
    assert model[6].weight.requires_grad


def test_weight_norm_gradients_are_orthogonal_to_the_direction() -> None:
    layer = weight_normalize(nn.Linear(6, 3, dtype=torch.float64))
    layer(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
    _, v = scale_and_direction(layer)
    assert v.grad is not None
    torch.testing.assert_close((v.grad * v).sum(1), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BOTH
def test_half_types_add_up_in_float32(reparametrise: Callable[..., Any], dtype: torch.dtype) -> None:
    layer = nn.Linear(4096, 2, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight.fill_(8.0)  # in half types the sum of squares would be 262,144: infinite in float16
    before = layer.weight.detach().clone()
    reparametrise(layer)
    g, _ = scale_and_direction(layer)
    assert g.dtype == layer.weight.dtype == dtype
    torch.testing.assert_close(g, torch.full((2, 1), 512.0, dtype=dtype))
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-2, atol=0)


@given(st.integers(0, 1000), st.sampled_from([0, 1, 2, None]))
def test_projection_gives_unit_directions(seed: int, dim: int | None) -> None:
    w = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))
    kept = w.clone()
    renormalize_(w, dim)
    norms = direction_norm(w, dim)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    torch.testing.assert_close(w * direction_norm(kept, dim), kept)


def test_scales_shrink_together() -> None:
    model = unit_direction(network())
    before = [layer.weight.detach().clone() for layer in parametrized_layers(model).values()]
    shrink_scales(model, 0.25)
    for layer, old in zip(parametrized_layers(model).values(), before, strict=True):
        torch.testing.assert_close(layer.weight, old / 4)
    with pytest.raises(InvalidValue, match="factor = 0"):
        shrink_scales(model, 0)
    with pytest.raises(NoEffect, match="Sequential has no layer"):
        shrink_scales(network(), 0.5)


# --- initialisation from data


def test_data_initialisation_gives_mean_zero_and_deviation_one_layer_by_layer() -> None:
    model, batch = network(), images(n=32)
    statistics = {name: value.clone() for name, value in model[1].state_dict().items()}
    directions = [model[i].weight.detach().clone() for i in (0, 4, 6)]
    weight_normalize(model, init="data", batch=batch)
    assert model.training
    for name, value in model[1].state_dict().items():
        assert torch.equal(value, statistics[name])
    found: dict[int, torch.Tensor] = {}
    for place in (0, 4, 6):
        model[place].register_forward_hook(lambda _, __, output, place=place: found.update({place: output}))
    model.eval()
    model(batch)
    for output in found.values():
        rows = output.movedim(1, 0).flatten(1)
        torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)), rtol=0, atol=1e-5)
        torch.testing.assert_close(rows.std(1, correction=0), torch.ones(len(rows)), rtol=1e-4, atol=0)
    for place, old in zip((0, 4, 6), directions, strict=True):
        assert torch.equal(scale_and_direction(model[place])[1], old)


def test_data_initialisation_takes_positional_and_named_inputs_and_layers_without_bias() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.layer(a + b)

    a, b = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    one, other = Sum(), Sum()
    other.load_state_dict(one.state_dict())
    weight_normalize(one, init="data", batch=(a, b))
    weight_normalize(other, init="data", batch={"a": a, "b": b})
    assert torch.equal(one.layer.weight, other.layer.weight)
    output = one(a, b)
    torch.testing.assert_close(output.std(0, correction=0), torch.ones(3))
    assert output.mean(0).abs().max() > 1e-3  # there is no bias to take it away


def test_data_initialisation_refuses_what_it_cannot_divide_by() -> None:
    for batch, says in (
        (torch.ones(4, 3, 6, 6), r"layer '0': the pre-activation of unit 0 has deviation 0\.0"),
        (torch.full((4, 3, 6, 6), torch.nan), "layer '0': the pre-activation of unit 0 has deviation nan"),
        (images(n=1), "layer '4': one value for each unit"),
    ):
        model = network()
        with pytest.raises(InvalidValue, match=says):
            weight_normalize(model, init="data", batch=batch)
        assert not parametrized_layers(model)
        assert model.training
    with pytest.raises(InvalidValue, match="needs dim = 0; it is None"):
        weight_normalize(network(), None, init="data", batch=images())
    with pytest.raises(InvalidValue, match="'data' needs a batch"):
        weight_normalize(network(), init="data")
    with pytest.raises(InvalidValue, match="looks at no batch"):
        weight_normalize(network(), batch=images())
    with pytest.raises(InvalidValue, match="init = 'date'"):
        weight_normalize(network(), init="date", batch=images())  # type: ignore[arg-type]
    with pytest.raises(NoEffect, match="none of the layers"):
        init_from_data(weight_normalize(network()), lambda: None)
    with pytest.raises(NoEffect, match="has no layer"):
        init_from_data(network(), lambda: None)
    with pytest.raises(InvalidValue, match="dim = 1; 0 is needed"):
        init_from_data(unit_direction(network(), dim=1), lambda: None)


# --- refusals


@BOTH
def test_units_without_direction_are_refused_before_anything_is_changed(reparametrise: Callable[..., Any]) -> None:
    model = network()
    with torch.no_grad():
        model[6].weight[1].zero_()
    with pytest.raises(InvalidValue, match=r"layer '6': unit 1 has norm 0\.0.*small random numbers"):
        reparametrise(model)
    assert not parametrized_layers(model)
    assert list(parametrized_layers(reparametrise(model, exclude=["6"]))) == ["0", "4"]
    broken = nn.Linear(2, 2)
    nn.init.constant_(broken.weight, torch.nan)
    with pytest.raises(InvalidValue, match="the layer: its weight has norm nan"):
        reparametrise(broken, None)


@BOTH
@pytest.mark.parametrize("dim", [-1, 2, 0.5])
def test_dimensions_a_weight_does_not_have_are_refused(reparametrise: Callable[..., Any], dim: Any) -> None:
    with pytest.raises(InvalidValue, match=rf"dim = {dim}; 0 … 1 of its weight \(2, 3\), or None"):
        reparametrise(nn.Linear(3, 2), dim)


@BOTH
def test_what_is_passed_over_is_said(reparametrise: Callable[..., Any]) -> None:
    with pytest.raises(NoEffect, match=r"BatchNorm2d has no layer to reparametrise .*none is there"):
        reparametrise(nn.BatchNorm2d(3))
    with pytest.raises(NoEffect, match="Linear: it is parametrised already"):
        reparametrise(reparametrise(nn.Linear(3, 2)))
    with pytest.raises(NoEffect, match="0: excluded"):
        reparametrise(nn.Sequential(nn.Linear(3, 2)), exclude=["0"])
    with pytest.raises(InvalidValue, match=r"'heda' matches no layer\. Did you mean 'head'"):
        reparametrise(nn.ModuleDict({"head": nn.Linear(3, 2)}), exclude=["heda"])
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(NoEffect, match="head: its weight is that of embedding"):
        reparametrise(tied)
    empty = nn.Linear(3, 2)
    empty.weight = nn.Parameter(torch.empty(0, 3))
    with pytest.raises(NoEffect, match="its weight is empty"):
        reparametrise(empty)


def test_baking_what_is_plain_or_parametrised_further_is_refused() -> None:
    with pytest.raises(NoEffect, match="Sequential has no layer"):
        bake(network())

    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    model = weight_normalize(network())
    parametrize.register_parametrization(model[4], "weight", Double())
    with pytest.raises(IncompatibleStep, match=r"layer '4' has other parametrisations \(WeightNorm, Double\)"):
        bake(model)
    assert len(parametrized_layers(model)) == 3
