"""A linear layer in INT8, as a torch module: what quantisation hands to the engine."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.engine import arithmetic

Range = tuple[float, float]
"""(lo, hi) of an activation, from :func:`~sparing.engine.arithmetic.activation_range`."""


class Int8Linear(nn.Module):
    """y = (Σ_k q_x·q_w − z_x·Σ_k q_w)·s_x·s_w + b on float inputs (…, in), to float outputs (…, out).

    The integers are exact: they are held in float64 where torch has no integer product. With an output range the
    outputs are rounded to their uint8 grid as well, as the engine does before integer attention. No gradients flow.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero: Tensor
    output_scale: Tensor | None
    output_zero: Tensor | None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, output: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero", torch.zeros((), dtype=torch.int32))
        self.register_buffer("output_scale", torch.ones(()) if output else None)
        self.register_buffer("output_zero", torch.zeros((), dtype=torch.int32) if output else None)

    @classmethod
    def of(
        cls, linear: nn.Linear, input_range: Range, output_range: Range | None = None, per_channel: bool = True
    ) -> Int8Linear:
        """The layer quantised: weights by their own maxima, activations by the ranges that calibration found."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, output_range is not None)
        weight, scale = arithmetic.quantize_weight(linear.weight.detach().float().cpu().numpy(), per_channel)
        made.weight.copy_(torch.from_numpy(weight))
        made.weight_scale.copy_(torch.from_numpy(scale))
        if made.bias is not None:
            bias = arithmetic.floats(linear.bias.detach().float().cpu().numpy(), "bias")
            made.bias.copy_(torch.from_numpy(bias))
        _grid(made.input_scale, made.input_zero, input_range)
        if made.output_scale is not None and made.output_zero is not None and output_range is not None:
            _grid(made.output_scale, made.output_zero, output_range)
        return made

    @property
    def block_sparsity(self) -> float:
        """Share of 4 outputs × 1 input blocks that are zero; 0 when outputs do not come in fours."""
        if self.out_features % 4:
            return 0.0
        blocks = self.weight.reshape(self.out_features // 4, 4, self.in_features)
        return 1.0 - float((blocks != 0).any(dim=1).float().mean())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Quantise, multiply integers, scale, add the bias."""
        if x.shape[-1] != self.in_features:
            raise InvalidValue(f"the layer takes {self.in_features} features, not {x.shape[-1]}")
        quantised = _rounded(x, self.input_scale, self.input_zero) - self.input_zero
        sums = quantised.double() @ self.weight.double().T
        y = (sums * (self.input_scale * self.weight_scale)).float()
        if self.bias is not None:
            y = y + self.bias
        if self.output_scale is not None and self.output_zero is not None:
            y = (_rounded(y, self.output_scale, self.output_zero) - self.output_zero) * self.output_scale
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """Sizes and grids, for ``print(model)``."""
        output = "" if self.output_scale is None else f", output scale {float(self.output_scale):.3g}"
        return (
            f"{self.in_features} → {self.out_features}, int8, input scale {float(self.input_scale):.3g} "
            f"zero {int(self.input_zero)}{output}"
        )


def _grid(scale: Tensor, zero: Tensor, limits: Range) -> None:
    found, offset = arithmetic.activation_scale(*limits)
    if np.float32(found) == 0 or not np.isfinite(np.float32(1 / found)):
        raise InvalidValue(f"the range {limits[0]} … {limits[1]} is too narrow for float32")
    scale.fill_(found)
    zero.fill_(offset)


def _rounded(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return torch.clamp(torch.round(x.float() / scale) + zero, 0, arithmetic.LEVELS)
