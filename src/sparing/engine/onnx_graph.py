"""The same INT8 encoder as an ONNX graph, for where native code was not compiled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.engine.pack import ATTENTION, GridOf

if TYPE_CHECKING:
    from sparing.engine.compiler import Extracted, Linear

OPSET = 20


class _Graph:
    """Nodes and constants, named as they come."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def constant(self, value: np.ndarray, name: str = "") -> str:
        name = name or f"constant_{len(self.constants)}"
        self.constants[name] = value
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        from onnx import helper

        names = [f"{kind}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def rounded(self, x: str, grid: GridOf) -> str:
        """To the grid's integers and back; the runtime fuses these pairs into integer kernels."""
        scale, zero = self.number(grid.scale), self.constant(np.array(grid.zero, dtype=np.uint8))
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, scale, zero), scale, zero)

    def norm(self, x: str, found: Extracted, name: str) -> str:
        weight, bias = (self.constant(found.floats[f"{name}.{part}"], f"{name}.{part}") for part in ("weight", "bias"))
        return self.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=found.about["eps"])

    def linear(self, x: str, linear: Linear, name: str) -> str:
        weight = self.constant(np.ascontiguousarray(linear.weight.T), f"{name}.weight")
        if linear.input is not None and linear.scale is not None:
            x = self.rounded(x, linear.input)
            scale = self.constant((linear.scale / np.float32(linear.input.scale)).astype(np.float32), f"{name}.scale")
            zero = self.constant(np.zeros(len(linear.scale), dtype=np.int8))
            weight = self.add("DequantizeLinear", weight, scale, zero, axis=1)
        return self.add("Add", self.add("MatMul", x, weight), self.constant(linear.bias, f"{name}.bias"))


def graph(found: Extracted) -> bytes:
    """The graph: inputs ids int64 (n, t), keep bool (n, t), and segments int64 (n, t) for models that have them."""
    from onnx import TensorProto, helper, numpy_helper

    g, about = _Graph(), found.about
    inputs = {"ids": TensorProto.INT64, "keep": TensorProto.BOOL}
    if about["segments"]:
        inputs["segments"] = TensorProto.INT64
    x = g.norm(_embedded(g, found), found, "embeddings.norm")
    bias = g.add("Mul", g.add("Sub", g.number(1), g.add("Cast", "keep", to=TensorProto.FLOAT)), g.number(-1e9))
    bias = g.add("Unsqueeze", bias, g.ints(1, 2))
    for number, block in enumerate(found.blocks):
        x = _block(g, found, number, block, x, bias)
    x = _head(g, found, x)
    nodes = [*g.nodes, helper.make_node("Identity", [x], ["output"])]
    made = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info(name, kind, ["n", "t"]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return model.SerializeToString()


def _embedded(g: _Graph, found: Extracted) -> str:
    from onnx import TensorProto

    words, positions = (g.constant(found.floats[f"embeddings.{part}"], part) for part in ("words", "positions"))
    if offset := found.about["position_offset"]:
        counted = g.add("Cast", "keep", to=TensorProto.INT64)
        places = g.add("Mul", g.add("CumSum", counted, g.constant(np.array(1, dtype=np.int64))), counted)
        places = g.add("Add", places, g.ints(offset - 1))
    else:
        length = g.add("Squeeze", g.add("Shape", "ids", start=1, end=2), g.ints(0))
        whole = [g.constant(np.array(value, dtype=np.int64)) for value in (0, 1)]
        places = g.add("Range", whole[0], length, whole[1])
    x = g.add("Add", g.add("Gather", words, "ids"), g.add("Gather", positions, places))
    if found.about["segments"]:
        x = g.add("Add", x, g.add("Gather", g.constant(found.floats["embeddings.segments"], "types"), "segments"))
    return x


def _block(g: _Graph, found: Extracted, number: int, block: dict[str, Linear], x: str, bias: str) -> str:
    heads = found.about["heads"]
    size = found.about["dim"] // heads
    if "qkv" in block:
        parts = g.add("Split", g.linear(x, block["qkv"], f"{number}.qkv"), axis=-1, num_outputs=3, outputs=3)
        grids: list[GridOf | None] = [*block["qkv"].outputs] or [None] * 3
    else:
        parts = [g.linear(x, block[name], f"{number}.{name}") for name in ATTENTION]
        grids = [next(iter(block[name].outputs), None) for name in ATTENTION]
    parts = [part if grid is None else g.rounded(part, grid) for part, grid in zip(parts, grids, strict=True)]
    shape = g.ints(0, 0, heads, size)
    q, k, v = (
        g.add("Transpose", g.add("Reshape", part, shape), perm=perm)
        for part, perm in zip(parts, ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]), strict=True)
    )
    scores = g.add("Mul", g.add("MatMul", q, k), g.number(1 / math.sqrt(size)))
    mixed = g.add("MatMul", g.add("Softmax", g.add("Add", scores, bias), axis=-1), v)
    context = g.add("Reshape", g.add("Transpose", mixed, perm=[0, 2, 1, 3]), g.ints(0, 0, heads * size))
    x = g.add("Add", g.linear(context, block["attention_out"], f"{number}.attention_out"), x)
    x = g.norm(x, found, f"{number}.attention_norm")
    hidden = g.add("Gelu", g.linear(x, block["up"], f"{number}.up"))
    x = g.add("Add", g.linear(hidden, block["down"], f"{number}.down"), x)
    return g.norm(x, found, f"{number}.output_norm")


def _head(g: _Graph, found: Extracted, x: str) -> str:
    from onnx import TensorProto

    about = found.about
    if about["head"] == "tokens":
        return x
    if about["head"] == "embedding" and about["pooling"] == "mean":
        keep = g.add("Unsqueeze", g.add("Cast", "keep", to=TensorProto.FLOAT), g.ints(2))
        total = g.add("ReduceSum", g.add("Mul", x, keep), g.ints(1), keepdims=0)
        return g.add("Div", total, g.add("ReduceSum", keep, g.ints(1), keepdims=0))
    if about["head"] != "span":
        x = g.add("Gather", x, g.constant(np.array(0, dtype=np.int64)), axis=1)
    if about["head"] == "embedding":
        return x
    for name, rows in (("head.pooler", about["dim"]), ("head.classifier", about["outputs"])):
        if f"{name}.weight" not in found.floats:
            continue
        weight = found.floats[f"{name}.weight"]
        weight = weight[:, :rows] if about["head"] == "classifier" else weight[:rows].T
        product = g.add("MatMul", x, g.constant(np.ascontiguousarray(weight)))
        x = g.add("Add", product, g.constant(found.floats[f"{name}.bias"][:rows]))
        if name == "head.pooler":
            x = g.add("Tanh" if about["pooler"] == "tanh" else "Relu", x)
    return x
