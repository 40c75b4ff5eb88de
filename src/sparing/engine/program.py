"""A pack as a list of fused operators over one workspace, planned once by the life-times of its buffers."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparing.core.errors import InvalidValue
from sparing.engine import native
from sparing.engine.pack import GridOf, Layer, Manifest, Pack

EMBED, NORM, QUANTISE, GEMM, ATTEND_INT, ATTEND_FLOAT, FIRST, MEAN, OUT_TOKENS, OUT_COLUMNS = range(10)
FLOAT32, DENSE, SPARSE_4X1, TILES, COLUMNS = range(5)
PLAIN, RESIDUAL, GELU, GELU_U8, QKV, TANH, RELU, ROUNDED = range(8)
NONE, FEATURES, QUADS = range(3)
GROUP = 16
"""Tokens of a vector; a sequence takes whole ones."""
CHUNK_BYTES = 768 << 10
"""Activations that a matrix product goes over again and again stay within about this much, to fit a level-2 cache."""


@dataclass(frozen=True)
class Buffer:
    """A part of the workspace: operators ``first`` … ``last`` use it."""

    name: str
    nbytes: int
    first: int
    last: int
    offset: int = 0


@dataclass(frozen=True)
class MemoryPlan:
    """Where every buffer lies. Buffers share bytes when their life-times do not meet."""

    nbytes: int
    buffers: tuple[Buffer, ...]

    @property
    def without_sharing(self) -> int:
        """Bytes if every buffer had its own."""
        return sum(_whole(buffer.nbytes) for buffer in self.buffers)


def plan_memory(buffers: list[Buffer]) -> MemoryPlan:
    """Place the largest first, each at the lowest offset that is free throughout its life-time."""
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda item: (-item.nbytes, item.first, item.name)):
        offset = 0
        for other in sorted(placed, key=lambda item: item.offset):
            apart = other.last < buffer.first or buffer.last < other.first
            if not apart and other.offset < offset + _whole(buffer.nbytes):
                offset = max(offset, other.offset + _whole(other.nbytes))
        placed.append(Buffer(buffer.name, buffer.nbytes, buffer.first, buffer.last, offset))
    total = max((buffer.offset + _whole(buffer.nbytes) for buffer in placed), default=0)
    return MemoryPlan(total, tuple(sorted(placed, key=lambda item: (item.first, item.offset))))


def _whole(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


@dataclass
class Step:
    """An operator before addresses: fields as they are, arrays and buffers by name."""

    name: str
    kind: int
    fields: dict[str, Any]
    grids: dict[int, GridOf] = field(default_factory=dict)
    arrays: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)


def padded_tokens(batch: int, length: int, path: str) -> int:
    """Tokens that a batch can take up: whole vectors for each sequence, whole slabs for all."""
    slab = native.SLAB[path]
    return -(-batch * -(-length // GROUP) * GROUP // slab) * slab


class _Builder:
    def __init__(self, manifest: Manifest, path: str) -> None:
        self.about, self.path = manifest.encoder, path
        self.tokens = padded_tokens(manifest.max_batch, manifest.max_length, path)
        self.length = -(-manifest.max_length // 64) * 64
        self.columns = -(-manifest.max_batch // native.SLAB[path]) * native.SLAB[path]
        self.stride = self.tokens + 64
        self.steps: list[Step] = []
        self.sizes: dict[str, int] = {}
        self.normed: Step | None = None
        """The layer norm whose output has not been asked for yet; it can write integers in the same pass."""

    def add(self, name: str, kind: int, **fields: Any) -> Step:
        step = Step(name, kind, fields)
        self.steps.append(step)
        return step

    def buffer(self, name: str, nbytes: int) -> str:
        self.sizes[name] = max(nbytes, self.sizes.get(name, 0))
        return name

    def norm(self, name: str) -> None:
        step = self.add(name, NORM, rows=self.about.dim, constant=self.about.eps)
        step.arrays = {"extra": f"{name}.weight", "bias": f"{name}.bias"}
        step.buffers = {"input": "x", "output": "x"}
        self.normed = step

    def integers(self, name: str, grid: GridOf, layout: int) -> str:
        """A buffer with ``x`` as uint8."""
        buffer = self.buffer(f"{name}.uint8", self.about.dim * self.tokens)
        step, self.normed = self.normed, None
        if step is None:
            step = self.add(name, QUANTISE, rows=self.about.dim)
            step.buffers = {"input": "x"}
        step.grids[0], step.fields["layout"], step.buffers["output8"] = grid, layout, buffer
        return buffer

    def layout(self, layer: Layer) -> int:
        return FEATURES if self.format(layer) == SPARSE_4X1 else QUADS

    def format(self, layer: Layer) -> int:
        if layer.format == "tiles":
            return TILES if self.path == "amx" else SPARSE_4X1
        return {"float": FLOAT32, "dense": DENSE, "4x1": SPARSE_4X1}[layer.format]

    def product(self, name: str, layer: Layer, source: str, epilogue: int, **fields: Any) -> Step:
        kind = self.format(layer)
        step = self.add(name, GEMM, rows=layer.rows, columns=layer.columns, format=kind, epilogue=epilogue, **fields)
        step.fields.setdefault("out_rows", layer.rows)
        step.fields["chunk"] = max(1, CHUNK_BYTES // (layer.columns * native.SLAB[self.path]))
        step.arrays = {"bias": f"{name}.bias"}
        if kind != FLOAT32:
            step.arrays |= {"scale": f"{name}.scale", "compensation": f"{name}.compensation"}
        parts = {
            FLOAT32: {"weight": "weight"},
            DENSE: {"weight": "weight"},
            SPARSE_4X1: {"weight": "values", "index": "col_index", "pointer": "row_ptr"},
            TILES: {"weight": "tile_values", "index": "masks", "pointer": "tile_ptr"},
        }[kind]
        step.arrays |= {argument: f"{name}.{part}" for argument, part in parts.items()}
        step.buffers = {
            "input": source,
            "scratch": self.buffer(f"{name}.scratch", 2 * GROUP * layer.columns + 2 * 4096),
        }
        return step

    def block(self, number: int, layers: Mapping[str, Layer]) -> None:
        dim, heads = self.about.dim, self.about.heads
        size = dim // heads
        attention = [name for name in ("qkv", "query", "key", "value") if name in layers]
        in_integers = all(layers[name].outputs for name in attention)
        made: dict[tuple[GridOf, int], str] = {}
        sources = {}
        for name in attention:
            layer = layers[name]
            if layer.input is None:
                sources[name] = "x"
                continue
            key = (layer.input, self.layout(layer))
            if key not in made:
                made[key] = self.integers(f"{number}.{name}", *key)
            sources[name] = made[key]
        at = f"{number}.attention"
        parts = {
            "query": self.buffer(f"{at}.query", dim * self.stride),
            "key": self.buffer(f"{at}.key", dim * self.stride),
            "value": self.buffer(f"{at}.value", dim * self.stride),
            "key_sum": self.buffer(f"{at}.key_sum", heads * self.stride * 4),
        }
        for place, name in enumerate(attention):
            layer = layers[name]
            if in_integers:
                step = self.product(f"{number}.{name}", layer, sources[name], QKV)
                step.fields |= {"heads": heads, "part": size << 2 | place, "stride": self.stride}
                step.grids = {place + index: grid for index, grid in enumerate(layer.outputs)}
                step.buffers |= parts
            else:
                step = self.product(
                    f"{number}.{name}", layer, sources[name], PLAIN, out_rows=3 * dim, out_row=place * dim
                )
                if layer.outputs:  # its neighbours are in float, and so attention is
                    (grid,) = layer.outputs
                    step.fields |= {"epilogue": ROUNDED, "factor": grid.scale}
                    step.grids = {0: grid}
                step.buffers["output"] = self.buffer(f"{at}.qkv", 3 * dim * self.tokens * 4)
        out = layers["attention_out"]
        if in_integers:
            grids = [grid for name in attention for grid in layers[name].outputs]
            scale = np.float32(grids[0].scale) * np.float32(grids[1].scale)
            step = self.add(at, ATTEND_INT, columns=size, heads=heads, stride=self.stride)
            step.fields |= {"constant": attention_constant(float(scale), size), "factor": grids[2].scale}
            step.grids = {1: grids[0], 2: grids[2]}
            step.buffers = dict(parts)
            scratch = max(self.length, size) * 32 * 4 + self.length * 4 + self.length * 32
        else:
            step = self.add(at, ATTEND_FLOAT, columns=size, heads=heads, constant=attention_constant(1.0, size))
            step.buffers = {"input": f"{at}.qkv"}
            scratch = self.length * GROUP * 4
        step.buffers["scratch"] = self.buffer(f"{at}.scratch", scratch)
        if out.input is None:
            context = step.buffers["output"] = self.buffer(f"{at}.context", dim * self.tokens * 4)
        else:
            context = step.buffers["output8"] = self.buffer(f"{at}.context", dim * self.tokens)
            step.grids[0], step.fields["layout"] = out.input, self.layout(out)
        self.product(f"{number}.attention_out", out, context, RESIDUAL).buffers["output"] = "x"
        self.norm(f"{number}.attention_norm")
        up, down = layers["up"], layers["down"]
        source = "x" if up.input is None else self.integers(f"{number}.up", up.input, self.layout(up))
        step = self.product(f"{number}.up", up, source, GELU if down.input is None else GELU_U8)
        if down.input is None:
            hidden = step.buffers["output"] = self.buffer(f"{number}.hidden", up.rows * self.tokens * 4)
        else:
            hidden = step.buffers["output8"] = self.buffer(f"{number}.hidden", up.rows * self.tokens)
            step.grids[0], step.fields["layout"] = down.input, self.layout(down)
        self.product(f"{number}.down", down, hidden, RESIDUAL).buffers["output"] = "x"
        self.norm(f"{number}.output_norm")

    def encoder(self) -> None:
        about, dim = self.about, self.about.dim
        self.buffer("x", dim * self.tokens * 4)
        step = self.add("embeddings", EMBED, rows=dim)
        step.arrays = {"weight": "embeddings.words", "extra": "embeddings.positions"}
        if about.segments:
            step.arrays["bias"] = "embeddings.segments"
        step.buffers = {"output": "x", "scratch": self.buffer("embeddings.scratch", GROUP * dim * 4)}
        self.norm("embeddings.norm")
        for number, layers in enumerate(about.blocks):
            self.block(number, layers)
        if about.head == "tokens":
            self.add("output", OUT_TOKENS, rows=dim).buffers = {"input": "x"}
        elif about.head == "span":
            rows = -(-about.outputs // 4) * 4
            layer = Layer(rows=rows, columns=dim, format="float")
            step = self.product("head.classifier", layer, "x", PLAIN)
            step.buffers["output"] = self.buffer("head.classifier", rows * self.tokens * 4)
            self.add("output", OUT_TOKENS, rows=rows).buffers = {"input": "head.classifier"}
        else:
            kind = MEAN if about.head == "embedding" and about.pooling == "mean" else FIRST
            pooled = self.buffer("pooled", -(-dim // GROUP) * GROUP * self.columns * 4)
            self.add("pooled", kind, rows=dim).buffers = {"input": "x", "output": pooled}
            rows = dim
            if about.head == "classifier":
                if about.pooler != "none":
                    activation = {"tanh": TANH, "relu": RELU}[about.pooler]
                    pooled, rows = self.head("head.pooler", pooled, rows, activation, dim)
                pooled, rows = self.head("head.classifier", pooled, rows, PLAIN, about.outputs)
            self.add("output", OUT_COLUMNS, rows=rows).buffers = {"input": pooled}

    def head(self, name: str, source: str, in_rows: int, epilogue: int, outputs: int) -> tuple[str, int]:
        """A layer on one column for each sequence, out of a buffer of ``in_rows``: (its buffer, its features)."""
        rows = -(-outputs // GROUP) * GROUP
        step = self.add(name, GEMM, format=COLUMNS, epilogue=epilogue, rows=rows, columns=self.about.dim)
        step.fields["in_rows"] = in_rows
        step.arrays = {"weight": f"{name}.weight", "bias": f"{name}.bias"}
        step.buffers = {"input": source, "output": self.buffer(name, rows * self.columns * 4)}
        return name, rows


def attention_constant(scale: float, size: int) -> float:
    """What a score is multiplied by to be an exponent of two."""
    return float(np.float32(scale / math.sqrt(size) * math.log2(math.e)))


def grid_of(grid: GridOf) -> native.Grid:
    """The grid as native code wants it."""
    return native.Grid(float(np.float32(1) / np.float32(grid.scale)), -grid.zero, 255 - grid.zero, grid.zero)


class Program:
    """The operators of a pack for one instruction path, with a workspace of their own.

    Not for two threads at a time: the workspace is one call's. Further instances share the pack.
    """

    def __init__(self, pack: Pack, path: str) -> None:
        builder = _Builder(pack.manifest, path)
        builder.encoder()
        self.pack, self.path, self.steps = pack, path, builder.steps
        used: dict[str, list[int]] = {}
        for index, step in enumerate(self.steps):
            for name in step.buffers.values():
                used.setdefault(name, []).append(index)
        self.plan = plan_memory(
            [Buffer(name, builder.sizes[name], min(where), max(where)) for name, where in used.items()]
        )
        try:
            self._workspace = mmap.mmap(-1, self.plan.nbytes + 64)
        except (OSError, OverflowError) as error:
            raise InvalidValue(
                f"a workspace of {self.plan.nbytes} bytes cannot be had ({error}); fewer sequences or tokens are needed"
            ) from error
        # the view keeps the map alive and gives its address
        self._memory = np.frombuffer(self._workspace, np.uint8)
        places = {buffer.name: self._memory.ctypes.data + buffer.offset for buffer in self.plan.buffers}
        self.ops = (native.Op * len(self.steps))(*(self._op(step, places) for step in self.steps))
        self._seconds = (ctypes.c_double * len(self.steps))()
        self.profiling = False

    def _op(self, step: Step, places: Mapping[str, int]) -> native.Op:
        made = native.Op(kind=step.kind, **step.fields)
        for index, grid in step.grids.items():
            made.grid[index] = grid_of(grid)
        for argument, name in step.arrays.items():
            setattr(made, argument, self.pack.arrays[name].ctypes.data)
        for argument, name in step.buffers.items():
            setattr(made, argument, places[name])
        return made

    def run(self, call: native.Run) -> None:
        """Carry out all operators."""
        native.run(self.path, self.ops, call, self._seconds if self.profiling else None)

    def seconds(self) -> list[float]:
        """Time spent in each operator while ``profiling`` was on; starts from zero again."""
        found = list(self._seconds)
        ctypes.memset(self._seconds, 0, ctypes.sizeof(self._seconds))
        return found
