"""Distances of gradients and of embeddings."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparing.condensation.matching import embedding_distance, gradient_distance
from sparing.core.errors import InvalidValue


def test_each_metric_by_hand() -> None:
    a = [torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0])]
    b = [torch.tensor([[4.0, 3.0], [0.0, 2.0]]), torch.tensor([0.0, 1.0])]
    assert gradient_distance(a, b, "mse").item() == pytest.approx(1 + 1 + 1 + 4 + 1 + 1)
    assert gradient_distance(a, b, "mse", relative=True).item() == pytest.approx(9 / 30)
    assert gradient_distance(a, b, "layer_cos").item() == pytest.approx((1 - 24 / 25) + 1, abs=1e-5)
    assert gradient_distance(a, b, "ours").item() == gradient_distance(a, b).item()
    assert gradient_distance(a, b, "cos").item() == pytest.approx(1 - 24 / math.sqrt(27 * 30), abs=1e-5)


def test_rows_of_kernels_and_of_transposed_weights() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    rows = gradient_distance([a.flatten(1)], [b.flatten(1)])
    torch.testing.assert_close(gradient_distance([a], [b]), rows)
    a, b = torch.randn(4, 3), torch.randn(4, 3)
    stored = gradient_distance([a.T.contiguous()], [b.T.contiguous()], transposed=True)
    torch.testing.assert_close(stored, gradient_distance([a], [b]))
    assert abs(stored - gradient_distance([a.T], [b.T])) > 0.01


@pytest.mark.parametrize("metric", ["mse", "layer_cos", "cos"])
def test_a_dead_row_has_finite_derivatives(metric: Any) -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
    distance = gradient_distance([a, a[0]], [torch.tensor([[0.0, 0.0], [2.0, 1.0]]), torch.zeros(2)], metric)
    (found,) = torch.autograd.grad(distance, a)
    assert found.isfinite().all()
    assert found[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "l1"}, "metric = 'l1'"),
        ({"metric": "cos", "relative": True}, "metric = 'cos'"),
        ({"real": []}, "1 synthetic gradients and 0 real ones"),
        ({"real": [torch.ones(3)]}, r"gradient 0: synthetic \(2,\), real \(3,\)"),
        ({"real": [torch.zeros(2)], "metric": "mse", "relative": True}, "squared norm of the real gradient"),
    ],
    ids=["metric", "relative", "none", "shape", "zero"],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        gradient_distance(**{"synthetic": [torch.ones(2)], "real": [torch.ones(2)], **arguments})


def test_mean_embeddings() -> None:
    synthetic, real = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [4.0, 2.0]])
    assert embedding_distance(synthetic, real).item() == pytest.approx(1 + 1)
    with pytest.raises(InvalidValue, match=r"\(0, 2\)"):
        embedding_distance(torch.zeros(0, 2), real)
    with pytest.raises(InvalidValue, match=r"\(1, 2\) and \(2, 3\)"):
        embedding_distance(synthetic, torch.zeros(2, 3))
