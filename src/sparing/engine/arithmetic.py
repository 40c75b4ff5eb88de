"""INT8 arithmetic (fast_distilbert sheet, section 4): the one set of rules that training, packing and running share.

real = scale · (integer − zero). Weights are int8, symmetric, one scale for each output; activations are uint8,
asymmetric, one scale and zero for a tensor. All roundings go half to even. NumPy only; functions compute in the
floating type they are given (float64, or float32 for everything else).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Int8, Int32, UInt8

from sparing.core.errors import InvalidValue

RangeMethod = Literal["minmax", "percentile", "kl"]
WEIGHT_LIMIT = 127
LEVELS = 255
"""The largest uint8; a range is cut into this many steps."""
KL_BINS = 2048
KL_LEVELS = 128
"""Bins of the histogram of magnitudes, and the levels it is judged by, as in entropy calibration elsewhere."""


def floats(values: np.ndarray, what: str) -> np.ndarray:
    """``values`` as float64 if they are, else as float32; refuses what is not finite with its position."""
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise InvalidValue(f"{what} must be numbers, not {array.dtype}")
    array = array if array.dtype == np.float64 else array.astype(np.float32)
    wrong = ~np.isfinite(array)
    if wrong.any():
        where = tuple(int(index) for index in np.argwhere(wrong)[0])
        raise InvalidValue(f"{what} must be finite; {array[where]} at {list(where)}, {int(wrong.sum())} such values")
    return array


def _matrix(weight: np.ndarray) -> np.ndarray:
    array = floats(weight, "weight")
    if array.ndim != 2 or 0 in array.shape:
        raise InvalidValue(f"weight must be a matrix [out, in], not of shape {list(array.shape)}")
    return array


def weight_scale(weight: Float[np.ndarray, "out in"]) -> Float[np.ndarray, " out"]:
    """max|w|/127 of each output row; 1 for a row of zeros."""
    array = _matrix(weight)
    scale = np.abs(array).max(axis=1) / array.dtype.type(WEIGHT_LIMIT)
    return np.where(scale > 0, scale, array.dtype.type(1))


def quantize_weight(
    weight: Float[np.ndarray, "out in"], per_channel: bool = True
) -> tuple[Int8[np.ndarray, "out in"], Float[np.ndarray, " out"]]:
    """(int8 weights within ±127, scale of each output). Zeros stay zeros.

    ``per_channel=False``: all outputs share the scale of the whole matrix.
    """
    array = _matrix(weight)
    scale = weight_scale(array) if per_channel else np.repeat(weight_scale(array.reshape(1, -1)), len(array))
    integers = np.clip(np.rint(array / scale[:, None]), -WEIGHT_LIMIT, WEIGHT_LIMIT)
    return integers.astype(np.int8), scale


def activation_range(
    values: Float[np.ndarray, "..."], method: RangeMethod = "minmax", percentile: float = 0.1
) -> tuple[float, float]:
    """(lo, hi) of calibration values: what an activation's uint8 range should span.

    "minmax": the extremes. "percentile": the ``percentile`` and 100 − ``percentile`` percentiles of all values,
    linearly interpolated. "kl": the extremes cut at ±T, where T makes the magnitudes' distribution on 128 levels
    diverge least from the one that is cut (Kullback-Leibler).
    """
    array = floats(values, "calibration values").ravel()
    if array.size == 0:
        raise InvalidValue("calibration values are empty; at least one is needed")
    low, high = float(array.min()), float(array.max())
    if method == "minmax":
        return low, high
    if method == "percentile":
        if not 0 <= percentile < 50:
            raise InvalidValue(f"percentile must be at least 0 and less than 50, not {percentile}")
        lower, upper = np.percentile(array, [percentile, 100 - percentile])
        return float(lower), float(upper)
    if method == "kl":
        cut = _kl_threshold(np.abs(array.astype(np.float64)))
        return max(low, -cut), min(high, cut)
    raise InvalidValue(f"method must be 'minmax', 'percentile' or 'kl', not {method!r}")


def _kl_threshold(magnitudes: np.ndarray) -> float:
    """Where to cut magnitudes so that 128 levels below describe their histogram best."""
    top = float(magnitudes.max())
    if top == 0:
        return 0.0
    counts, edges = np.histogram(magnitudes, bins=KL_BINS, range=(0.0, top))
    best, threshold = np.inf, top
    for kept in range(KL_LEVELS, KL_BINS + 1, KL_LEVELS // 8):
        reference = counts[:kept].astype(np.float64)
        reference[-1] += counts[kept:].sum()
        bounds = np.arange(KL_LEVELS + 1) * kept // KL_LEVELS
        filled = counts[:kept] > 0
        mass = np.add.reduceat(counts[:kept].astype(np.float64), bounds[:-1])
        bins = np.maximum(np.add.reduceat(filled.astype(np.float64), bounds[:-1]), 1)
        candidate = np.where(filled, np.repeat(mass / bins, np.diff(bounds)), 0.0)
        divergence = _divergence(reference, candidate)
        if divergence < best:
            best, threshold = divergence, float(edges[kept])
    return threshold


def _divergence(reference: np.ndarray, candidate: np.ndarray) -> float:
    """Kullback-Leibler divergence in nats; bins empty in one get a little, so that it stays finite."""
    p = np.maximum(reference / reference.sum(), 1e-9)
    q = np.maximum(candidate / max(candidate.sum(), 1.0), 1e-9)
    return float((p * np.log(p / q)).sum())


def activation_scale(lo: float, hi: float) -> tuple[float, int]:
    """(scale, zero) of the uint8 grid that spans lo…hi, widened to contain 0; (1, 0) when both are 0."""
    if not (np.isfinite(lo) and np.isfinite(hi)) or lo > hi:
        raise InvalidValue(f"a range needs finite lo ≤ hi, not lo = {lo}, hi = {hi}")
    low, high = min(float(lo), 0.0), max(float(hi), 0.0)
    scale = (high - low) / LEVELS
    if not np.isfinite(scale):
        raise InvalidValue(f"the range {lo} … {hi} is too wide")
    if scale == 0:
        return 1.0, 0
    return scale, int(np.clip(np.rint(-low / scale), 0, LEVELS))


def quantize_activation(values: Float[np.ndarray, "..."], scale: float, zero: int) -> UInt8[np.ndarray, "..."]:
    """clip(round(x/scale) + zero, 0, 255)."""
    _checked(scale, zero)
    array = floats(values, "activation")
    if array.dtype.type(scale) == 0:
        raise InvalidValue(f"scale = {scale} is 0 in {array.dtype}: the range is too narrow")
    return np.clip(np.rint(array / array.dtype.type(scale)) + zero, 0, LEVELS).astype(np.uint8)


def dequantize_activation(integers: UInt8[np.ndarray, "..."], scale: float, zero: int) -> Float[np.ndarray, "..."]:
    """scale · (q − zero), in float64."""
    _checked(scale, zero)
    return (np.asarray(integers).astype(np.float64) - zero) * scale


def _checked(scale: float, zero: int) -> None:
    if not (np.isfinite(scale) and scale > 0):
        raise InvalidValue(f"scale must be positive and finite, not {scale}")
    if not 0 <= zero <= LEVELS:
        raise InvalidValue(f"zero must be in 0…255, not {zero}")


def integer_product(
    x: UInt8[np.ndarray, "*tokens in"], w: Int8[np.ndarray, "out in"]
) -> Int32[np.ndarray, "*tokens out"]:
    """Σ_k q_x·q_w, exact in int32."""
    if x.shape[-1] != w.shape[1]:
        raise InvalidValue(f"activations have {x.shape[-1]} features, the weight takes {w.shape[1]}")
    if w.shape[1] * LEVELS * 128 > np.iinfo(np.int32).max:
        raise InvalidValue(f"a sum over {w.shape[1]} inputs can leave int32; at most 65793 are possible")
    # sums stay below 2⁵³, so that float64 holds every one of them, and its product is the fast one
    return (x.astype(np.float64) @ w.astype(np.float64).T).astype(np.int32)


def compensation(w: Int8[np.ndarray, "out in"], zero: int) -> Int32[np.ndarray, " out"]:
    """z_x·Σ_k q_w: what a zero point that is not 0 adds to each output's sum."""
    return (w.astype(np.int64).sum(axis=1) * zero).astype(np.int32)


def int8_linear(
    x: UInt8[np.ndarray, "*tokens in"],
    x_scale: float,
    x_zero: int,
    w: Int8[np.ndarray, "out in"],
    w_scale: Float[np.ndarray, " out"],
    bias: Float[np.ndarray, " out"] | None = None,
) -> Float[np.ndarray, "*tokens out"]:
    """(Σ_k q_x·q_w − z_x·Σ_k q_w)·s_x·s_w + b, in the floating type of ``w_scale``."""
    _checked(x_scale, x_zero)
    sums: Int[np.ndarray, "*tokens out"] = integer_product(x, w).astype(np.int64) - compensation(w, x_zero)
    scale = np.asarray(w_scale)
    real = sums * (scale.dtype.type(x_scale) * scale)
    return real if bias is None else real + np.asarray(bias)


def gelu(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """x·Φ(x), by the error function."""
    from scipy.special import erf

    array = np.asarray(x)
    return array * (1 + erf(array / np.sqrt(array.dtype.type(2)))) / 2
