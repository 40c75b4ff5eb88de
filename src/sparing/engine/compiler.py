"""From a model to an engine: weights extracted, kernels chosen by measurement, everything written into one pack."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from sparing.core.errors import InvalidValue, NoEffect
from sparing.engine import native, packing
from sparing.engine import pack as packs
from sparing.engine.native import choose_path, cpu_capability
from sparing.engine.pack import ATTENTION, Encoder, Format, GridOf, Layer, Manifest
from sparing.engine.runtime import Engine, NativeEngine, OnnxEngine, TorchEngine, path_for

if TYPE_CHECKING:
    from sparing.models.bert import Bert

Choice = Literal["auto", "sparse", "dense", "onnxruntime", "torch"]
SPARSE_FROM = 0.70
"""Block sparsity below which a sparse kernel is not even tried."""
MARGIN = 0.05
"""A sparse kernel must be faster by this share; less is a tie, and goes to the dense one."""
COLD_BYTES = 6 << 20
"""Kernels are timed on copies of a layer's weights that are this large together: more than a level-2 cache."""


@dataclass
class Linear:
    """A layer as the model has it: int8 weights with their scales, or float32 ones."""

    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray | None = None
    input: GridOf | None = None
    outputs: tuple[GridOf, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of 4×1 blocks that are zero; 0 for a float layer."""
        return 0.0 if self.input is None else packing.block_sparsity(self.weight)


@dataclass
class Extracted:
    """A model's arrays, before kernels are chosen."""

    about: dict[str, Any]
    floats: dict[str, np.ndarray] = field(default_factory=dict)
    blocks: list[dict[str, Linear]] = field(default_factory=list)

    def encoder(self, formats: Mapping[str, Format]) -> Encoder:
        """The manifest's entry, with a format for each layer ("0.qkv" …)."""
        blocks = tuple(
            {
                name: Layer(
                    rows=len(linear.weight),
                    columns=linear.weight.shape[1],
                    format=formats[f"{number}.{name}"],
                    input=linear.input,
                    outputs=linear.outputs,
                )
                for name, linear in block.items()
            }
            for number, block in enumerate(self.blocks)
        )
        return Encoder(**self.about, blocks=blocks)

    def layers(self) -> dict[str, Linear]:
        """All linear layers of the blocks, by "block.name"."""
        return {
            f"{number}.{name}": linear for number, block in enumerate(self.blocks) for name, linear in block.items()
        }


def compile_encoder(
    model: Any,
    max_batch: int,
    max_length: int,
    engine: Choice = "auto",
    *,
    tokens: Sequence[int] | None = None,
    isa: str | None = None,
) -> Engine:
    """Compile an encoder into an :class:`~sparing.engine.runtime.Engine`.

    Args:
        model: a :class:`~sparing.models.bert.Bert` whose blocks hold ``Int8Linear`` layers (what is a plain ``Linear``
            stays in float), or a BERT, DistilBERT or RoBERTa type model of ``transformers``, or its folder.
        max_batch: sequences that are run at a time; longer batches are split.
        max_length: longest input in tokens; longer ones are refused.
        engine: "auto": native code, in each layer with the kernel that is fastest here, or ONNX Runtime where native
            code was not compiled or no layer is INT8. "sparse", "dense": native, with that kernel wherever it can be.
            "onnxruntime", "torch": those.
        tokens: numbers of tokens at which "auto" times the kernels; default: one sequence and a full batch.
        isa: instruction path of native code; None: what SPARING_ENGINE_ISA names, else the fastest.

    Raises:
        InvalidValue: for sizes and structures that the engine does not have, and NaN or infinite weights.
        UnsupportedISA: when native code is asked for and is not here, or not for this CPU.
        NoEffect: for "sparse" when no layer has a share of SPARSE_FROM zero blocks, "dense" when none is INT8.
    """
    _check_sizes(max_batch, max_length, engine, tokens)
    bert = _bert(model)
    found = extract(bert)
    if max_length > bert.max_length:
        raise InvalidValue(f"max_length = {max_length}; the model has positions for {bert.max_length} tokens")
    integers = [name for name, linear in found.layers().items() if linear.input is not None]
    if engine == "torch":
        from sparing.engine.served import Served

        return TorchEngine(Served(bert).eval(), _manifest(found, "native", max_batch, max_length), "asked for")
    able = cpu_capability()
    if engine in ("sparse", "dense"):
        if not integers:
            raise NoEffect(
                f"engine={engine!r}: none of the {len(found.layers())} layers is INT8; quantise the model first"
            )
        best = max(linear.sparsity for linear in found.layers().values())
        if engine == "sparse" and best < SPARSE_FROM:
            raise NoEffect(f"engine='sparse': no layer has {SPARSE_FROM:.0%} zero 4×1 blocks; the most is {best:.1%}")
        return _native(found, max_batch, max_length, engine, tokens, isa, f"engine={engine!r} was asked for")
    reason = ""
    if engine == "onnxruntime":
        reason = "asked for"
    elif not integers:
        reason = "no layer of the blocks is INT8, and in float ONNX Runtime is the faster"
    elif not able.compiled:
        reason = f"native code is not here: {able.reason}"
    if not reason:
        return _native(found, max_batch, max_length, "auto", tokens, isa, "native code is compiled and layers are INT8")
    from sparing.engine.onnx_graph import graph

    manifest = _manifest(found, "onnx", max_batch, max_length)
    content = packs.to_bytes(manifest, {"onnx": np.frombuffer(graph(found), dtype=np.uint8)})
    return OnnxEngine(packs.read(content), reason)


def _check_sizes(max_batch: int, max_length: int, engine: str, tokens: Sequence[int] | None) -> None:
    for name, value, most in (("max_batch", max_batch, 1 << 16), ("max_length", max_length, packs.MAX_LENGTH)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise InvalidValue(f"{name} must be a whole number in 1…{most}, not {value!r}")
    if max_batch * max_length > packs.MAX_TOKENS:
        raise InvalidValue(f"{max_batch} sequences of {max_length} tokens; a batch may hold {packs.MAX_TOKENS} tokens")
    if engine not in ("auto", "sparse", "dense", "onnxruntime", "torch"):
        raise InvalidValue(f"engine must be auto, sparse, dense, onnxruntime or torch, not {engine!r}")
    if tokens is not None and (not tokens or min(tokens) < 1):
        raise InvalidValue(f"tokens must be numbers of at least 1, not {list(tokens)}")


def _bert(model: Any) -> Bert:
    from torch import nn

    from sparing.engine.linear import Int8Linear
    from sparing.models.bert import Bert, from_transformers

    if isinstance(model, Bert):
        return model
    if isinstance(model, nn.Module) and any(isinstance(module, Int8Linear) for module in model.modules()):
        raise InvalidValue(
            f"a {type(model).__name__} with Int8Linear layers: take the model over with from_transformers first, then "
            "quantize_ptq"
        )
    return from_transformers(model)


# --------------------------------------------------------------------------------------------------------- extraction


def extract(model: Bert) -> Extracted:
    """A model's arrays; refuses what the engine cannot run, and what is not finite."""
    from torch import nn

    head, blocks = model.task_head, list[Any](model.blocks)
    if head == "masked_lm":
        raise InvalidValue("the engine has the heads classifier, span, tokens and embedding; this model has masked_lm")
    heads = blocks[0].heads
    embeddings = model.embeddings
    dim = embeddings.words.embedding_dim
    for number, block in enumerate(blocks):
        for name in ATTENTION:
            found = getattr(getattr(block, name), "out_features", dim)
            if found != dim:
                where = f"blocks.{number}.{name}"
                raise InvalidValue(
                    f"{where} has {found} outputs, dim is {dim}; the engine needs heads × head size = dim"
                )
    if dim // heads % 4 or dim // heads > packs.MAX_HEAD:
        raise InvalidValue(
            f"a head of {dim // heads} features; the engine needs a multiple of 4, at most {packs.MAX_HEAD}"
        )
    if {block.heads for block in blocks} != {heads}:
        raise InvalidValue("all blocks must have the same number of heads")
    epsilons = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(epsilons) != 1:
        raise InvalidValue(f"all layer norms must have one eps, not {sorted(epsilons)}")
    made = Extracted({})
    made.floats["embeddings.words"] = _array(embeddings.words.weight, "embeddings.words")
    made.floats["embeddings.positions"] = _array(embeddings.positions.weight, "embeddings.positions")
    segments = getattr(embeddings, "segments", None)
    if segments is not None:
        made.floats["embeddings.segments"] = _array(segments.weight, "embeddings.segments")
    _norm(made, "embeddings.norm", embeddings.norm)
    for number, block in enumerate(blocks):
        for name in ("attention_norm", "output_norm"):
            _norm(made, f"{number}.{name}", getattr(block, name))
        layers = {
            name: _linear(f"blocks.{number}.{name}", getattr(block, name))
            for name in (*ATTENTION, "attention_out", "up", "down")
        }
        made.blocks.append(_merged(layers))
    outputs, pooler = dim, "none"
    if head in ("classifier", "span"):
        module = cast(Any, model.head)
        outputs = module.classifier.out_features
        if hasattr(module, "pooler"):
            import torch

            pooler = "tanh" if module.activation is torch.tanh else "relu"
            _head(made, "head.pooler", module.pooler, True)
        _head(made, "head.classifier", module.classifier, head == "classifier")
    made.about = {
        "dim": dim,
        "heads": heads,
        "vocabulary": embeddings.words.num_embeddings,
        "positions": embeddings.positions.num_embeddings,
        "segments": 0 if segments is None else segments.num_embeddings,
        "eps": float(epsilons.pop()),
        "pad_id": embeddings.pad_id,
        "sep_id": embeddings.sep_id,
        "position_offset": embeddings.position_offset,
        "head": head,
        "outputs": outputs,
        "pooler": pooler,
        "pooling": model.pooling,
    }
    return made


def _array(tensor: Any, where: str) -> np.ndarray:
    array = tensor.detach().float().cpu().numpy()
    wrong = int((~np.isfinite(array)).sum())
    if wrong:
        raise InvalidValue(f"{where} holds {wrong} values that are NaN or infinite")
    return np.ascontiguousarray(array)


def _norm(made: Extracted, name: str, module: Any) -> None:
    for part in ("weight", "bias"):
        made.floats[f"{name}.{part}"] = _array(getattr(module, part), f"{name}.{part}")


def _linear(where: str, module: Any) -> Linear:
    from torch import nn

    from sparing.engine.linear import Int8Linear

    rows = module.out_features if isinstance(module, Int8Linear | nn.Linear) else 0
    if not rows or rows % 4 or module.in_features % 4:
        found = f"{rows} × {module.in_features}" if rows else f"a {type(module).__name__}"
        raise InvalidValue(f"{where} is {found}; linear layers whose sizes are multiples of 4 are expected")
    bias = np.zeros(rows, dtype=np.float32) if module.bias is None else _array(module.bias, f"{where}.bias")
    if isinstance(module, nn.Linear):
        return Linear(_array(module.weight, f"{where}.weight"), bias)
    scale = _array(module.weight_scale, f"{where}.weight_scale")
    outputs: tuple[GridOf, ...] = ()
    if module.output_scale is not None and where.rsplit(".", 1)[1] in ATTENTION:
        outputs = (_grid(where, module.output_scale, module.output_zero),)
    grid = _grid(where, module.input_scale, module.input_zero)
    weight = np.ascontiguousarray(module.weight.cpu().numpy())
    return Linear(weight, bias, np.float32(grid.scale) * scale, grid, outputs)


def _grid(where: str, scale: Any, zero: Any) -> GridOf:
    value = float(scale)
    if not 1e-30 < value < 1e30:
        raise InvalidValue(f"{where}: an activation's scale of {value} is out of all proportion")
    return GridOf(scale=value, zero=int(zero))


def _merged(layers: dict[str, Linear]) -> dict[str, Linear]:
    """Query, key and value as one layer, where they read the same integers and write the same kind of output."""
    parts = [layers[name] for name in ATTENTION]
    if len({part.input for part in parts}) > 1 or len({bool(part.outputs) for part in parts}) > 1:
        return layers
    together = Linear(
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.bias for part in parts]),
        None if parts[0].scale is None else np.concatenate([part.scale for part in parts if part.scale is not None]),
        parts[0].input,
        tuple(grid for part in parts for grid in part.outputs),
    )
    return {"qkv": together} | {name: layer for name, layer in layers.items() if name not in ATTENTION}


def _head(made: Extracted, name: str, module: Any, per_sequence: bool) -> None:
    weight, bias = _array(module.weight, f"{name}.weight"), _array(module.bias, f"{name}.bias")
    missing = -len(weight) % (16 if per_sequence else 4)
    weight = np.pad(weight, ((0, missing), (0, 0)))
    made.floats[f"{name}.weight"] = np.ascontiguousarray(weight.T) if per_sequence else weight
    made.floats[f"{name}.bias"] = np.pad(bias, (0, missing))


# ------------------------------------------------------------------------------------------------------------- native


def _manifest(
    found: Extracted,
    kind: Literal["native", "onnx"],
    max_batch: int,
    max_length: int,
    formats: Mapping[str, Format] | None = None,
    timings: Sequence[dict[str, Any]] = (),
) -> Manifest:
    plain: dict[str, Format] = {name: "dense" if linear.input else "float" for name, linear in found.layers().items()}
    return Manifest(
        kind=kind,
        max_batch=max_batch,
        max_length=max_length,
        encoder=found.encoder(formats or plain),
        timings=tuple(timings),
    )


def _native(
    found: Extracted,
    max_batch: int,
    max_length: int,
    engine: Literal["auto", "sparse", "dense"],
    tokens: Sequence[int] | None,
    isa: str | None,
    reason: str,
) -> Engine:
    path = choose_path(isa)
    counts = list(tokens) if tokens else sorted({max_length, max_batch * max_length})
    formats, timings = _choose(found, path, engine, counts)
    manifest = _manifest(found, "native", max_batch, max_length, formats, timings)
    content = packs.to_bytes(manifest, {**found.floats, **_weights(found, formats)})
    pack = packs.read(content)
    return NativeEngine(pack, path_for(pack.manifest, isa), reason)


def _choose(
    found: Extracted, path: str, engine: str, counts: Sequence[int]
) -> tuple[dict[str, Format], list[dict[str, Any]]]:
    """A format for each layer, and the timings that decided. Layers of one size are timed once."""
    formats: dict[str, Format] = {}
    timings: list[dict[str, Any]] = []
    sparsities = {name: linear.sparsity for name, linear in found.layers().items()}
    eligible = {name for name, sparsity in sparsities.items() if sparsity >= SPARSE_FROM}
    fitting = {name for name in eligible if packing.fits_tiles(*found.layers()[name].weight.shape)}
    if path == "amx" and engine == "auto":  # a 4×1 layer would take the whole model off this path
        eligible = fitting
    sparse: Format = "tiles" if path == "amx" and eligible == fitting else "4x1"
    known: dict[tuple[tuple[int, ...], int], bool] = {}
    for name, linear in found.layers().items():
        if linear.input is None:
            formats[name] = "float"
        elif name not in eligible or engine == "dense":
            formats[name] = "dense"
        elif engine == "sparse":
            formats[name] = sparse
        else:
            key = (linear.weight.shape, round(sparsities[name] * 20))
            if key not in known:
                record = measure(linear, path, sparse, counts)
                record |= {"layer": name, "block_sparsity": round(sparsities[name], 4)}
                known[key] = record["chosen"] == sparse
                timings.append(record)
            formats[name] = sparse if known[key] else "dense"
    return formats, timings


def measure(linear: Linear, path: str, sparse: Format, counts: Sequence[int]) -> dict[str, Any]:
    """Time a layer's product by both kernels, and choose: the sparse one must win by MARGIN over all ``counts``.

    The ratio is the geometric mean over the counts of tokens.
    """
    seconds: dict[str, list[float]] = {sparse: [], "dense": []}
    ratio = 1.0
    for count in counts:
        calls = {form: _Product(linear, path, form, count) for form in seconds}
        taken = {form: min(calls[form].seconds() for _ in range(2)) for form in calls}
        for _ in range(4):  # in turns, so that both see the same weather
            for form, call in calls.items():
                taken[form] = min(taken[form], call.seconds())
        for form, value in taken.items():
            seconds[form].append(round(value * 1e3, 5))
        ratio *= (taken[sparse] / taken["dense"]) ** (1 / len(counts))
    return {
        "path": path,
        "tokens": list(counts),
        "milliseconds": seconds,
        "ratio": round(ratio, 4),
        "chosen": sparse if ratio <= 1 - MARGIN else "dense",
    }


class _Product:
    """One layer's product on random activations, its weights not in the caches nearest to the core, as in a model."""

    def __init__(self, linear: Linear, path: str, form: str, count: int) -> None:
        from sparing.engine import program

        rows, columns = linear.weight.shape
        tokens = program.padded_tokens(1, count, path)
        arrays = _weights_of("w", linear, form)
        kept = sum(array.nbytes for array in arrays.values())
        weights = [
            {name: aligned(array) for name, array in arrays.items()}
            for _ in range(max(1, math.ceil(COLD_BYTES / kept)))
        ]
        rng = np.random.default_rng(0)
        arrays = {"input": rng.integers(0, 256, columns * tokens, dtype=np.uint8)}
        arrays["output"] = np.zeros(rows * tokens, dtype=np.float32)
        arrays["scratch"] = np.zeros(32 * columns + 2 * 4096 + 64, dtype=np.uint8)
        work = {name: aligned(array) for name, array in arrays.items()}
        self._kept, self._path, self.form = (weights, work), path, form
        formats = {"dense": program.DENSE, "4x1": program.SPARSE_4X1, "tiles": program.TILES}
        chunk = max(1, program.CHUNK_BYTES // (columns * native.SLAB[path]))
        op = native.Op(kind=program.GEMM, format=formats[form], epilogue=program.PLAIN, rows=rows, columns=columns)
        op.out_rows, op.chunk = rows, chunk
        names = {"input": "input", "output": "output", "scratch": "scratch", "bias": "w.bias", "scale": "w.scale"}
        names |= {"compensation": "w.compensation"}
        names |= {
            "dense": {"weight": "w.weight"},
            "4x1": {"weight": "w.values", "index": "w.col_index", "pointer": "w.row_ptr"},
            "tiles": {"weight": "w.tile_values", "index": "w.masks", "pointer": "w.tile_ptr"},
        }[form]
        ops = []
        for copy in weights:
            ops.append(native.Op.from_buffer_copy(op))
            for argument, name in names.items():
                setattr(ops[-1], argument, (copy | work)[name].ctypes.data)
        self._ops = (native.Op * len(ops))(*ops)
        self._call = native.Run(batch=1, tokens=-(-count // program.GROUP) * program.GROUP, length=count)

    def seconds(self) -> float:
        """Time of one product, from a few in a row, as the processor counts it for this thread."""
        start, repetitions = time.thread_time(), 0
        while True:
            native.run(self._path, self._ops, self._call)
            repetitions += 1
            taken = time.thread_time() - start
            if taken > 0.003:
                return taken / repetitions / len(self._ops)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins at a multiple of 64 bytes, as sections of a pack do."""
    room = np.zeros(array.nbytes + 64, dtype=np.uint8)
    start = -room.ctypes.data % 64
    made = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    made[...] = array
    return made


def _weights(found: Extracted, formats: Mapping[str, Format]) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for name, linear in found.layers().items():
        made |= _weights_of(name, linear, formats[name])
    return made


def _weights_of(name: str, linear: Linear, form: str) -> dict[str, np.ndarray]:
    """A layer's sections."""
    made = {f"{name}.bias": linear.bias}
    if linear.input is None or linear.scale is None:
        return made | {f"{name}.weight": linear.weight}
    sums = linear.weight.astype(np.int64).sum(axis=1) * linear.input.zero
    made |= {f"{name}.scale": linear.scale.astype(np.float32), f"{name}.compensation": sums.astype(np.int32)}
    if form == "dense":
        return made | {f"{name}.weight": linear.weight}
    packed = packing.pack_4x1(linear.weight)
    made |= {
        f"{name}.row_ptr": packed.row_ptr,
        f"{name}.col_index": packed.col_index.astype(np.uint16),
        f"{name}.values": packed.values,
    }
    if form == "tiles":
        tiles = packing.pack_tiles(linear.weight)
        made |= {f"{name}.masks": tiles.masks, f"{name}.tile_ptr": tiles.pointers, f"{name}.tile_values": tiles.values}
    return made
