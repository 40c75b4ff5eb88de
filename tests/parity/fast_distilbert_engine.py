"""INT8 layers, packing, feature-major layer norm and the production choice beside independent computations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from sparing.core.errors import NoEffect
from sparing.engine import arithmetic
from sparing.engine.packing import pack_4x1, unpack_4x1
from sparing.engine.reference import layer_norm_t
from sparing.engine.tuner import Row, choose_production

Arrays = Mapping[str, np.ndarray]
TOLERANCE = 1e-10
PERCENTILE = 0.1


class Group:
    """A group's arrays: compares, counts, and knows what it has looked at."""

    def __init__(self, arrays: Arrays, prefix: str) -> None:
        self.arrays, self.prefix, self.left, self.compared = arrays, prefix, set(arrays), 0

    def __getitem__(self, name: str) -> np.ndarray:
        self.left.discard(f"{self.prefix}/{name}")
        return self.arrays[f"{self.prefix}/{name}"]

    def equal(self, name: str, found: object) -> None:
        expected = self[name]
        array = np.asarray(found)
        assert array.shape == expected.shape, f"{self.prefix}/{name}: {array.shape}, not {expected.shape}"
        assert np.array_equal(array, expected), f"{self.prefix}/{name}: {int((array != expected).sum())} values differ"
        self.compared += 1

    def close(self, name: str, found: object) -> None:
        expected = self[name]
        array = np.asarray(found, dtype=np.float64)
        assert array.shape == expected.shape, f"{self.prefix}/{name}: {array.shape}, not {expected.shape}"
        apart = float(np.abs(array - expected).max()) / max(float(np.abs(expected).max()), 1e-300)
        assert apart <= TOLERANCE, f"{self.prefix}/{name}: {apart:.3g} of the largest value apart"
        self.compared += 1

    def done(self) -> int:
        assert not self.left, f"not understood: {sorted(self.left)}"
        assert self.compared, f"{self.prefix}: nothing was compared"
        return self.compared


def int8(arrays: Arrays) -> int:
    """A pruned layer: integers of weights and activations, sums, outputs, packed arrays."""
    given = Group(arrays, "int8")
    weight, x = given["weight"], given["x"]
    w, w_scale = arithmetic.quantize_weight(weight)
    given.equal("w_int8", w)
    given.close("w_scale", w_scale)
    low, high = arithmetic.activation_range(x, "percentile", PERCENTILE)
    given.close("calib_min_max", [low, high])
    scale, zero = arithmetic.activation_scale(low, high)
    given.close("x_scale", scale)
    given.equal("x_zero_point", zero)
    q = arithmetic.quantize_activation(x, scale, zero)
    given.equal("x_uint8", q)
    given.equal("acc_int32", arithmetic.integer_product(q, w))
    given.equal("zero_point_compensation", arithmetic.compensation(w, zero))
    y = arithmetic.int8_linear(q, scale, zero, w, w_scale, given["bias"])
    given.close("y_float", y)
    given.close("y_float_reference", x @ weight.T + given["bias"])
    y_scale, y_zero = arithmetic.activation_scale(*arithmetic.activation_range(y))
    given.close("y_scale", y_scale)
    given.equal("y_zero_point", y_zero)
    given.equal("y_uint8", arithmetic.quantize_activation(y, y_scale, y_zero))
    given.close("y_gelu_erf", arithmetic.gelu(y))
    packed = pack_4x1(w)
    given.equal("packed_row_ptr", packed.row_ptr)
    given.equal("packed_col_index", packed.col_index)
    given.equal("packed_values", packed.values)
    given.equal("packed_bytes", packed.nbytes)
    assert np.array_equal(unpack_4x1(packed, w.shape[1]), w), "unpacking does not give back what was packed"
    return given.done()


def layernorm_t(arrays: Arrays) -> int:
    """Layer norm over the features of feature-major activations."""
    given = Group(arrays, "layernorm_t")
    given.close("y", layer_norm_t(given["x_feature_major"], given["gamma"], given["beta"]))
    return given.done()


def production(arrays: Arrays) -> int:
    """The row with the most throughput under each limit."""
    given = Group(arrays, "production")
    columns = given["batch_instances_p50ms_p99ms"]
    table = [Row(int(batch), int(instances), p50, p99) for batch, instances, p50, p99 in columns.tolist()]
    given.close("throughput", [row.throughput for row in table])
    for key in sorted(arrays):
        if limit := re.fullmatch(r"production/best_index_p99_le_([\d.]+)", key):
            given.equal(key.removeprefix("production/"), choose_production(table, float(limit[1])))
    smallest = min(row.p99_ms for row in table)
    with pytest.raises(NoEffect, match=re.escape(f"the smallest p99 is {smallest:.4g} ms")):
        choose_production(table, smallest / 2)
    return given.done()


GROUPS: dict[str, Callable[[Arrays], int]] = {"int8": int8, "layernorm_t": layernorm_t, "production": production}
