"""What the engine computes, in NumPy: the same operations in the same order, so that every bit agrees.

Activations are feature-major, [feature, token]. Floats go through single-precision additions, multiplications,
divisions and square roots, each rounded once; sums of integers are exact. Functions that take float64 compute in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Float32, Int8, Int32, Integer, UInt8

from sparing.engine import gelu_table
from sparing.engine.pack import GridOf, Layer, Pack
from sparing.engine.program import attention_constant

F32 = np.float32
EXP2 = tuple(F32(c) for c in (0.00132764719, 0.00967554189, 0.0555071279, 0.240221202, 0.693146974, 1.0))
"""2^f on −½ … ½, highest power first; relative error below 3e-7 with the rounding of single precision."""


WEIGHT = tuple(F32(c) for c in (14.027278, 61.763798, 176.78714, 255.0))
"""255·2^f on −½ … ½, highest power first; relative error below 1.1e-4."""


def _polynomial(x: np.ndarray, coefficients: Sequence[np.float32]) -> np.ndarray:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def exp2_negative(
    t: Float32[np.ndarray, "..."], coefficients: Sequence[np.float32] = EXP2
) -> Float32[np.ndarray, "..."]:
    """2^t for t ≤ 0."""
    t = np.maximum(t, F32(-125))
    n = np.rint(t)
    p = _polynomial(t - n, coefficients)
    return (p.view(np.int32) + (n.astype(np.int32) << 23)).view(F32)


def gelu(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """x·Φ(x), Φ from a table of parabolas; error below 8e-5."""
    t = np.minimum(np.maximum(x * gelu_table.PER_UNIT + gelu_table.MIDDLE, F32(0)), gelu_table.LAST)
    n = np.rint(t)
    c0, c1, c2 = gelu_table.TABLE[:, n.astype(np.int32)]
    f = t - n
    return x * ((c2 * f + c1) * f + c0)


def tanh(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
    """Hyperbolic tangent, by 2^x."""
    e = exp2_negative(np.abs(x) * F32(-2.88539008))
    return np.copysign((F32(1) - e) / (F32(1) + e), x)


def rounded(x: Float32[np.ndarray, "..."], grid: GridOf) -> Int32[np.ndarray, "..."]:
    """round(clamp(x/s)), to which zero is still to be added; a multiplication by 1/s stands for the division."""
    inverse = F32(1) / F32(grid.scale)
    return np.rint(np.minimum(np.maximum(x * inverse, F32(-grid.zero)), F32(255 - grid.zero))).astype(np.int32)


def quantise(x: Float32[np.ndarray, "..."], grid: GridOf) -> UInt8[np.ndarray, "..."]:
    """The uint8 of a grid."""
    return (rounded(x, grid) + grid.zero).astype(np.uint8)


def int8_product(
    q: UInt8[np.ndarray, "in tokens"],
    weight: Int8[np.ndarray, "out in"],
    compensation: Int32[np.ndarray, " out"],
    scale: Float32[np.ndarray, " out"],
    bias: Float32[np.ndarray, " out"],
) -> Float32[np.ndarray, "out tokens"]:
    """(W·q − compensation)·scale + bias."""
    sums = integer_sums(weight, q) - compensation[:, None]
    return sums.astype(F32) * scale[:, None] + bias[:, None]


def integer_sums(a: Integer[np.ndarray, "m k"], b: Integer[np.ndarray, "k n"]) -> Int32[np.ndarray, "m n"]:
    """a·b in int32; float64 holds every sum exactly."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int32)


def float_product(
    x: Float32[np.ndarray, "in tokens"], weight: Float32[np.ndarray, "out in"], bias: Float32[np.ndarray, " out"]
) -> Float32[np.ndarray, "out tokens"]:
    """W·x + bias; inputs are added up in order."""
    total = np.zeros((len(weight), x.shape[1]), dtype=F32)
    for k in range(len(x)):
        total = total + weight[:, k, None] * x[k]
    return total + bias[:, None]


def layer_norm_t(
    x: Float[np.ndarray, "feature token"],
    gamma: Float[np.ndarray, " feature"],
    beta: Float[np.ndarray, " feature"],
    eps: float = 1e-12,
) -> Float[np.ndarray, "feature token"]:
    """Layer norm of each column, in two passes: mean, then the biased variance around it.

    Features are added up in four sums, of every fourth each, which are added in pairs.
    """
    one = x.dtype.type(1)
    mean = _four_sums(x) / x.dtype.type(len(x))
    difference = x - mean
    variance = _four_sums(difference * difference) / x.dtype.type(len(x))
    inverse = one / np.sqrt(variance + x.dtype.type(eps))
    return difference * inverse * gamma[:, None] + beta[:, None]


def _four_sums(x: np.ndarray) -> np.ndarray:
    sums = np.zeros((4, x.shape[1]), dtype=x.dtype)
    for row in range(len(x)):
        sums[row % 4] = sums[row % 4] + x[row]
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def int8_attention(
    query: Int32[np.ndarray, "d t"],
    key: Int32[np.ndarray, "d t"],
    value: Int32[np.ndarray, "d t"],
    keep: np.ndarray,
    grids: Sequence[GridOf],
) -> Float32[np.ndarray, "d t"]:
    """One head. ``query``, ``key``, ``value`` are :func:`rounded`, of their three grids; ``keep`` bool (t).

    Soft-max weights are round(255·2^(score − largest)); context = s_v·(Σ p·v)/(Σ p).
    """
    constant = F32(attention_constant(float(F32(grids[0].scale) * F32(grids[1].scale)), len(query)))
    # terms that are equal for all keys fall out of the soft-max: what is left is key · query − zero_q · Σ key
    uint_query, int_key = query + grids[0].zero, key + grids[1].zero - 128
    scores = integer_sums(int_key.T, uint_query) - (grids[0].zero * key.sum(axis=0, dtype=np.int32))[:, None]
    below = scores - scores[keep].max(axis=0)
    weights = np.rint(exp2_negative(np.minimum(below, 0).astype(F32) * constant, WEIGHT)).astype(np.int32)
    weights[~keep] = 0
    total = weights.sum(axis=0, dtype=np.int32)
    int_value = value + grids[2].zero - 128
    sums = integer_sums(int_value, weights) - (grids[2].zero - 128) * total
    return sums.astype(F32) * (F32(grids[2].scale) / total.astype(F32))


def float_attention(
    query: Float32[np.ndarray, "d t"],
    key: Float32[np.ndarray, "d t"],
    value: Float32[np.ndarray, "d t"],
    keep: np.ndarray,
) -> Float32[np.ndarray, "d t"]:
    """One head in single precision; sums run in order."""
    constant = F32(attention_constant(1.0, len(query)))
    scores = np.zeros((key.shape[1], query.shape[1]), dtype=F32)
    for d in range(len(query)):
        scores = scores + key[d, :, None] * query[d]
    scores = scores[keep] * constant
    weights = exp2_negative(scores - scores.max(axis=0))
    total = np.zeros(query.shape[1], dtype=F32)
    context = np.zeros_like(value)
    for j, weight in enumerate(weights):
        total = total + weight
        context = context + value[:, keep][:, j, None] * weight
    return context / total


def _product(pack: Pack, name: str, layer: Layer, x: np.ndarray) -> np.ndarray:
    part = {key: pack.arrays[f"{name}.{key}"] for key in ("bias",)}
    if layer.input is None:
        return float_product(x, pack.arrays[f"{name}.weight"], part["bias"])
    scale, shift = pack.arrays[f"{name}.scale"], pack.arrays[f"{name}.compensation"]
    integers = x if x.dtype == np.uint8 else quantise(x, layer.input)
    return int8_product(integers, pack.weight(name), shift, scale, part["bias"])


def _on_grid(x: np.ndarray, grids: Sequence[GridOf]) -> np.ndarray:
    """Floats rounded to the grid, if there is one, and floats again."""
    return rounded(x, grids[0]).astype(F32) * F32(grids[0].scale) if grids else x


def _attention(pack: Pack, number: int, layers: Mapping[str, Layer], x: np.ndarray, keep: np.ndarray) -> np.ndarray:
    about = pack.manifest.encoder
    names = [name for name in ("qkv", "query", "key", "value") if name in layers]
    rows = [_product(pack, f"{number}.{name}", layers[name], x) for name in names]
    grids = [grid for name in names for grid in layers[name].outputs] if all(layers[n].outputs for n in names) else []
    if not grids:
        rows = [_on_grid(part, layers[name].outputs) for name, part in zip(names, rows, strict=True)]
    parts = np.split(np.concatenate(rows), 3)
    if grids:
        parts = [rounded(part, grid) for part, grid in zip(parts, grids, strict=True)]
    heads = []
    for head in np.split(np.arange(about.dim), about.heads):
        q, k, v = (part[head] for part in parts)
        heads.append(int8_attention(q, k, v, keep, grids) if grids else float_attention(q, k, v, keep))
    return np.concatenate(heads)


def encode(
    pack: Pack, ids: Sequence[int], keep: Sequence[bool], positions: Sequence[int], segments: Sequence[int]
) -> Float32[np.ndarray, "..."]:
    """The output for one sequence: (outputs,), or (tokens, outputs) for the heads "span" and "tokens"."""
    about, arrays = pack.manifest.encoder, pack.arrays
    kept = np.asarray(keep, dtype=bool)
    summed = arrays["embeddings.words"][list(ids)] + arrays["embeddings.positions"][list(positions)]
    if about.segments:
        summed = summed + arrays["embeddings.segments"][list(segments)]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        return layer_norm_t(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"], about.eps)

    x = norm("embeddings.norm", np.ascontiguousarray(summed.T))
    for number, layers in enumerate(about.blocks):
        context = _attention(pack, number, layers, x, kept)
        x = norm(
            f"{number}.attention_norm", _product(pack, f"{number}.attention_out", layers["attention_out"], context) + x
        )
        hidden = gelu(_product(pack, f"{number}.up", layers["up"], x))
        x = norm(f"{number}.output_norm", _product(pack, f"{number}.down", layers["down"], hidden) + x)
    return _head(pack, x, kept)


def _head(pack: Pack, x: np.ndarray, kept: np.ndarray) -> np.ndarray:
    about, arrays = pack.manifest.encoder, pack.arrays
    if about.head == "tokens":
        return x.T
    if about.head == "embedding" and about.pooling == "mean":
        total = np.zeros(len(x), dtype=F32)
        for token in np.flatnonzero(kept):
            total = total + x[:, token]
        return total / F32(kept.sum())
    if about.head == "embedding":
        return x[:, 0]
    if about.head == "classifier":
        x = x[:, :1]
        if about.pooler != "none":
            x = float_product(x, arrays["head.pooler.weight"].T, arrays["head.pooler.bias"])[: about.dim]
            x = tanh(x) if about.pooler == "tanh" else np.maximum(x, F32(0))
    weight = arrays["head.classifier.weight"]
    weight = weight.T if about.head == "classifier" else weight
    logits = float_product(x, weight, arrays["head.classifier.bias"])[: about.outputs]
    return logits[:, 0] if about.head == "classifier" else logits.T
