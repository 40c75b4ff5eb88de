"""One sparse INT8 layer for a loop of one's own."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Float32, Int8

from sparing.core.errors import InvalidValue
from sparing.engine import arithmetic, native, program
from sparing.engine.compiler import aligned
from sparing.engine.native import choose_path
from sparing.engine.pack import GridOf
from sparing.engine.packing import pack_4x1
from sparing.engine.reference import quantise


class SparseInt8Linear:
    """y = x·Wᵀ + b with int8 weights in the 4×1 form and uint8 activations, by the engine's kernel.

    Called with float activations (…, in); answers float32 (…, out).

    Args:
        weight: int8 (out, in); out is divisible by 4.
        weight_scale: (out).
        bias: (out), or None.
        input_range: (lo, hi) of the activations.
        isa: instruction path; "amx" has no kernel of this form, and stands for "vnni".

    Raises:
        UnsupportedISA: when native code is not here, or not for this CPU.
    """

    def __init__(
        self,
        weight: Int8[np.ndarray, "out in"],
        weight_scale: Float[np.ndarray, " out"],
        bias: Float[np.ndarray, " out"] | None,
        input_range: tuple[float, float],
        isa: str | None = None,
    ) -> None:
        path = choose_path(isa)
        self.isa = "vnni" if path == "amx" else path
        self.packed = pack_4x1(weight)
        self.out_features, self.in_features = weight.shape
        if self.in_features > 65536 or self.in_features % 4:
            raise InvalidValue(f"in features must be a multiple of 4, at most 65536; not {self.in_features}")
        scale, zero = arithmetic.activation_scale(*input_range)
        self.grid = GridOf(scale=scale, zero=zero)
        full = np.zeros(self.out_features, dtype=np.float32) if bias is None else arithmetic.floats(bias, "bias")
        arrays = {
            "weight": self.packed.values,
            "index": self.packed.col_index.astype(np.uint16),
            "pointer": self.packed.row_ptr,
            "compensation": arithmetic.compensation(weight, zero),
            "scale": np.float32(scale) * arithmetic.floats(weight_scale, "weight_scale").astype(np.float32),
            "bias": full.astype(np.float32),
        }
        self._arrays = {name: aligned(array) for name, array in arrays.items()}
        if any(self._arrays[name].shape != (self.out_features,) for name in ("scale", "bias")):
            raise InvalidValue(f"weight_scale and bias must have {self.out_features} values each")

    def __call__(self, x: Float[np.ndarray, "*batch in"]) -> Float32[np.ndarray, "*batch out"]:
        """(…, in) → (…, out)."""
        values = arithmetic.floats(x, "activation").astype(np.float32)
        if values.shape[-1] != self.in_features:
            raise InvalidValue(f"the layer takes {self.in_features} features, not {values.shape[-1]}")
        rows = values.reshape(-1, self.in_features)
        slab = native.SLAB[self.isa]
        slabs = -(-len(rows) // slab)
        integers = np.zeros((slabs * slab, self.in_features), dtype=np.uint8)
        integers[: len(rows)] = quantise(rows, self.grid)
        source = np.ascontiguousarray(integers.reshape(slabs, slab, self.in_features).transpose(0, 2, 1))
        output = np.empty((slabs, self.out_features, slab), dtype=np.float32)
        op = native.Op(kind=program.GEMM, format=program.SPARSE_4X1, epilogue=program.PLAIN, chunk=1)
        op.rows, op.columns, op.out_rows = self.out_features, self.in_features, self.out_features
        for name, array in self._arrays.items():
            setattr(op, name, array.ctypes.data)
        op.input, op.output = source.ctypes.data, output.ctypes.data
        native.run(
            self.isa, (native.Op * 1)(op), native.Run(batch=1, tokens=-(-len(rows) // 16) * 16, length=len(rows))
        )
        made = output.transpose(0, 2, 1).reshape(-1, self.out_features)[: len(rows)]
        return np.ascontiguousarray(made).reshape(*values.shape[:-1], self.out_features)
