"""The rules of INT8: rounding, degenerate ranges, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from sparing.core.errors import InvalidValue
from sparing.engine import arithmetic as A  # noqa: N812
from sparing.engine import gelu_table, reference


def test_weights_round_half_to_even_and_zeros_stay() -> None:
    weight = np.array([[127.0, 0.5, 1.5, -2.5, 0.0], [0, 0, 0, 0, 0]])
    integers, scale = A.quantize_weight(weight)
    assert integers.tolist() == [[127, 0, 2, -2, 0], [0, 0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 1.0]
    assert integers.dtype == np.int8
    assert scale.dtype == np.float64


def test_one_scale_for_a_tensor_is_the_largest_rows() -> None:
    weight = np.array([[1.0, -2.0], [0.5, 0.25]], dtype=np.float32)
    _, per_tensor = A.quantize_weight(weight, per_channel=False)
    assert per_tensor.tolist() == [np.float32(2) / np.float32(127)] * 2
    assert A.weight_scale(weight).tolist() == [np.float32(2) / np.float32(127), np.float32(0.5) / np.float32(127)]


@pytest.mark.parametrize(
    ("lo", "hi", "expected"),
    [
        (0.0, 0.0, (1.0, 0)),
        (1.0, 2.0, (2 / 255, 0)),  # widened down to 0
        (-2.0, -1.0, (2 / 255, 255)),  # widened up to 0
        (-1.0, 1.0, (2 / 255, 128)),  # 127.5 goes to the even 128
        (-5e-324, 0.0, (1.0, 0)),  # too narrow for any scale
    ],
)
def test_scales_and_zeros(lo: float, hi: float, expected: tuple[float, int]) -> None:
    assert A.activation_scale(lo, hi) == expected


def test_activations_round_half_to_even_and_saturate() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -3.0, 300.0])
    assert A.quantize_activation(x, 1.0, 2).tolist() == [2, 4, 4, 2, 0, 255]


def test_ranges() -> None:
    values = np.linspace(-1, 3, 1001)
    assert A.activation_range(values) == (-1.0, 3.0)
    assert A.activation_range(values, "percentile", 25) == (0.0, 2.0)
    outlier = np.concatenate([np.random.default_rng(0).normal(size=20000), [100.0]])
    low, high = A.activation_range(outlier, "kl")
    assert low == outlier.min()
    assert 3 < high < 50, "one value far out does not stretch the range"
    assert A.activation_range(np.zeros(5), "kl") == (0.0, 0.0)


@given(
    st_numpy.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 9)),
        elements=st.floats(-4, 4, width=32, allow_subnormal=False),
    )
)
def test_rounding_is_off_by_half_a_step_at_most(x: np.ndarray) -> None:
    scale, zero = A.activation_scale(*A.activation_range(x))
    back = A.dequantize_activation(A.quantize_activation(x, scale, zero), scale, zero)
    # half a step, and another half where the zero point was rounded
    assert np.abs(back - x).max() <= scale * 1.0001


def test_the_linear_layer_is_the_products_of_the_rounded_numbers() -> None:
    rng = np.random.default_rng(1)
    x, weight, bias = rng.normal(size=(5, 12)), rng.normal(size=(8, 12)), rng.normal(size=8)
    scale, zero = A.activation_scale(-2, 3)
    q, (w, w_scale) = A.quantize_activation(x, scale, zero), A.quantize_weight(weight)
    expected = A.dequantize_activation(q, scale, zero) @ (w * w_scale[:, None]).T + bias
    np.testing.assert_allclose(A.int8_linear(q, scale, zero, w, w_scale, bias), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: A.quantize_weight(np.array([[1.0, np.nan]])), r"nan at \[0, 1\]"),
        (lambda: A.quantize_weight(np.ones((0, 3))), r"\[0, 3\]"),
        (lambda: A.activation_range(np.array([])), "empty"),
        (lambda: A.activation_range(np.ones(3), "percentile", 50), "50"),
        (lambda: A.activation_range(np.ones(3), "median"), "median"),  # type: ignore[arg-type]
        (lambda: A.activation_scale(1, -1), "lo = 1, hi = -1"),
        (lambda: A.activation_scale(0, np.inf), "hi = inf"),
        (lambda: A.quantize_activation(np.array([np.inf]), 1.0, 0), "inf"),
        (lambda: A.quantize_activation(np.ones(2), 0.0, 0), "scale must be positive"),
        (lambda: A.quantize_activation(np.ones(2, np.float32), 1e-47, 0), "too narrow"),
        (lambda: A.quantize_activation(np.ones(2), 1.0, 256), "0…255, not 256"),
        (lambda: A.integer_product(np.zeros((1, 3), np.uint8), np.zeros((4, 5), np.int8)), "3 features.*takes 5"),
    ],
)
def test_refusals_name_the_value(call: object, named: str) -> None:
    with pytest.raises(InvalidValue, match=named):
        call()  # type: ignore[operator]


# ------------------------------------------------------------------------------- the engine's polynomials


def test_gelu_is_close_to_the_error_function_and_exact_far_out() -> None:
    x = np.linspace(-12, 12, 200_001).astype(np.float32)
    assert np.abs(reference.gelu(x) - A.gelu(x.astype(np.float64))).max() < 8e-5
    far = np.float32([4.5, 100, 1e30])
    assert np.array_equal(reference.gelu(far), far)
    assert not reference.gelu(-far).any()


def test_the_table_of_the_native_code_is_the_references() -> None:
    header = Path(gelu_table.__file__).parent / "native" / "gelu_table.h"
    numbers = [np.float32(text) for text in re.findall(r"(-?\d[\d.e+-]*)f", header.read_text())]
    assert numbers[:3] == [gelu_table.PER_UNIT, gelu_table.MIDDLE, gelu_table.LAST]
    assert np.array_equal(np.array(numbers[3:]).reshape(3, 32), gelu_table.TABLE)


def test_powers_of_two_and_tanh_are_close() -> None:
    t = np.linspace(-120, 0, 100_001).astype(np.float32)
    np.testing.assert_allclose(reference.exp2_negative(t), np.exp2(t.astype(np.float64)), rtol=3e-7)
    assert reference.exp2_negative(np.float32([0.0]))[0] == 1, "the largest soft-max weight is exactly 255"
    x = np.linspace(-20, 20, 100_001).astype(np.float32)
    np.testing.assert_allclose(reference.tanh(x), np.tanh(x.astype(np.float64)), atol=3e-7)


def test_layer_norm_has_the_textbooks_value() -> None:
    rng = np.random.default_rng(3)
    x, gamma, beta = rng.normal(5, 2, (48, 7)), rng.normal(size=48), rng.normal(size=48)
    expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-12) * gamma[:, None] + beta[:, None]
    np.testing.assert_allclose(reference.layer_norm_t(x, gamma, beta), expected, rtol=1e-10, atol=1e-12)
