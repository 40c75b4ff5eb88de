"""Int8Linear: the torch layer that carries integers to the engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from sparing.core.errors import InvalidValue
from sparing.engine import arithmetic
from sparing.engine.linear import Int8Linear


def test_forward_is_the_integer_arithmetic() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(24, 12), torch.randn(3, 5, 24)
    layer = Int8Linear.of(linear, (-2.5, 3.0))
    scale, zero = arithmetic.activation_scale(-2.5, 3.0)
    q = arithmetic.quantize_activation(x.numpy(), np.float32(scale), zero)
    w, w_scale = arithmetic.quantize_weight(linear.weight.detach().numpy())
    y = arithmetic.int8_linear(q, scale, zero, w, w_scale, linear.bias.detach().numpy())
    assert torch.equal(layer.weight, torch.from_numpy(w))
    np.testing.assert_allclose(layer(x).numpy(), y, rtol=1e-5, atol=1e-6)


def test_an_output_range_rounds_to_its_grid() -> None:
    layer = Int8Linear.of(nn.Linear(8, 4), (-1, 1), (-0.5, 0.5))
    y = layer(torch.randn(100, 8))
    steps = y / layer.output_scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert len(y.unique()) > 10


def test_state_survives_a_round_trip() -> None:
    layer = Int8Linear.of(nn.Linear(8, 4), (-1, 1), (-1, 2))
    other = Int8Linear(8, 4, output=True)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(6, 8)
    assert torch.equal(layer(x), other(x))
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_block_sparsity() -> None:
    linear = nn.Linear(6, 8)
    linear.weight.data[:4, :3] = 0
    assert Int8Linear.of(linear, (-1, 1)).block_sparsity == pytest.approx(3 / 12)


def test_refusals() -> None:
    linear = nn.Linear(8, 4)
    with pytest.raises(InvalidValue, match="8 features, not 7"):
        Int8Linear.of(linear, (-1, 1))(torch.zeros(2, 7))
    with pytest.raises(InvalidValue, match="too narrow"):
        Int8Linear.of(linear, (-1e-60, 0))
    linear.weight.data[1, 2] = float("inf")
    with pytest.raises(InvalidValue, match=r"inf at \[1, 2\]"):
        Int8Linear.of(linear, (-1, 1))
