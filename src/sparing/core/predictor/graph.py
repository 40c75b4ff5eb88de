"""Reading and tidying ONNX graphs (``onnx.ModelProto``)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import CorruptFile

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

FORMATS = {
    1: "fp32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    10: "fp16",
    11: "fp64",
    16: "bf16",
    21: "uint4",
    22: "int4",
}
"""``TensorProto.DataType`` → what we call it."""
FLOATS = (1, 10, 11, 16)
_INTEGER_WEIGHTS: Mapping[str, Mapping[int, int]] = {
    "DequantizeLinear": {0: 2},
    "QLinearConv": {3: 5, 8: -1},
    "QLinearMatMul": {3: 5},
    "QGemm": {3: 5, 6: -1},
    "MatMulInteger": {1: 3},
    "MatMulIntegerToFloat": {1: 5},
    "ConvInteger": {1: 3},
    "DynamicQuantizeMatMul": {1: 3},
}
"""Operator → {input that is an integer weight: input that holds its zero point, or -1 for none}."""
_FIRST_IS_DATA = ("QuantizeLinear", "Clip", "Pad", "Resize", "Reshape", "Expand", "Slice", "Tile", "TopK", "Unsqueeze")
"""Operators whose further inputs are settings, not weights."""


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs a node holds: branches of If, bodies of Loop and Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def loses_sums(content: bytes) -> bool:
    """Whether the graph holds a ScatterND with a reduction, of which ONNX Runtime loses some with several threads."""
    import onnx

    def nodes_of(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
        for node in nodes:
            yield node
            for inner in subgraphs(node):
                yield from nodes_of(inner.node)

    model = onnx.load_model_from_string(content)
    everywhere = itertools.chain(model.graph.node, *(function.node for function in model.functions))
    return any(
        node.op_type == "ScatterND" and any(each.name == "reduction" and each.s != b"none" for each in node.attribute)
        for node in nodes_of(everywhere)
    )


def refuse_external(content: bytes, name: str) -> None:
    """Raise :class:`CorruptFile` when a graph refers to data in other files, which could lie anywhere."""
    import onnx

    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError
        raise CorruptFile(f"{name} is not an ONNX graph: {error}") from error
    nodes = [node for function in model.functions for node in function.node]
    for tensor in _tensors(model.graph, nodes):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise CorruptFile(f"{name} keeps the tensor {tensor.name!r} in another file; a model folder must not")


def _tensors(graph: GraphProto | None, nodes: Sequence[NodeProto] = ()) -> Iterator[TensorProto]:
    if graph is not None:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        nodes = [*graph.node, *nodes]
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                yield from (sparse.values, sparse.indices)
        for inner in subgraphs(node):
            yield from _tensors(inner)


def strip(model: ModelProto) -> None:
    """Remove documentation, metadata and recorded intermediate shapes in place: none is needed to answer."""

    def visit(graph: Any) -> None:
        for part in (graph, *graph.node, *graph.input, *graph.output, *getattr(graph, "initializer", ())):
            if hasattr(part, "doc_string"):  # inputs and outputs of a function are plain names
                part.ClearField("doc_string")
                part.ClearField("metadata_props")
        graph.ClearField("value_info")
        for node in graph.node:
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
            for inner in subgraphs(node):
                visit(inner)

    visit(model.graph)
    for function in model.functions:
        visit(function)
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    used = {node.domain for node in model.graph.node} | {f.domain for f in model.functions} | {""}
    if not model.functions and not any(True for node in model.graph.node for _ in subgraphs(node)):
        kept = [opset for opset in model.opset_import if opset.domain in used]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def lean(model: ModelProto, keep_names: Sequence[str] = ()) -> None:
    """Make a graph smaller in place without changing what it computes.

    On top of :func:`strip`, equal constants are kept once and inner names become short. Graph inputs and outputs keep
    their names, and so do the nodes in ``keep_names``.
    """
    strip(model)
    graph = model.graph
    if any(True for node in graph.node for _ in subgraphs(node)):
        return  # inner graphs refer to outer names
    fixed = {item.name for item in (*graph.input, *graph.output)}
    first: dict[bytes, str] = {}
    new_name: dict[str, str] = {"": ""}
    kept = []
    for tensor in graph.initializer:
        own, tensor.name = tensor.name, ""
        content = tensor.SerializeToString(deterministic=True)
        tensor.name = own
        if own not in fixed and content in first:
            new_name[own] = first[content]
            continue
        new_name[own] = own if own in fixed else _short(len(new_name), fixed)
        first.setdefault(content, new_name[own])
        kept.append(tensor)
    for tensor in kept:
        tensor.name = new_name[tensor.name]
    copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name not in new_name:
                    new_name[name] = name if name in fixed else _short(len(new_name), fixed)
                names[index] = new_name[name]
        if node.name not in keep_names:
            node.ClearField("name")


def _short(number: int, taken: set[str]) -> str:
    digits = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    name = ""
    while True:
        number, digit = divmod(number, len(digits))
        name = digits[digit] + name
        if number == 0:
            return f"_{name}" if name in taken else name


def weights_of(model: ModelProto) -> tuple[list[dict[str, Any]], int, int, set[str]]:
    """(layers, parameters, non-zero parameters, number formats) of a graph's weights.

    A weight is a stored tensor of floats or quantised integers that a node reads as data: not a scale, a zero point or
    a shape. A quantised weight counts as zero where it equals its zero point. Formats are those of the tensors of more
    than one dimension, when there are any (an int8 graph keeps its biases in int32).
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[tuple[Any, int]]] = {}
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, position))
    # dynamic quantisation multiplies the scale of a weight with that of the activations, which it finds as it runs
    scales = {name for node in model.graph.node if node.op_type == "DynamicQuantizeLinear" for name in node.output}
    layers: dict[str, dict[str, Any]] = {}
    total = nonzero_total = 0
    formats: dict[bool, set[str]] = {True: set(), False: set()}
    for name, tensor in stored.items():
        uses = [
            (node, at)
            for node, at in readers.get(name, [])
            if _is_weight(node, at, tensor.data_type) and not (node.op_type == "Mul" and scales & set(node.input))
        ]
        if not uses:
            continue
        node, at = uses[0]
        values = numpy_helper.to_array(tensor)
        nonzero = int(np.count_nonzero(values != _zero_point(node, at, values.ndim, stored)))
        total, nonzero_total = total + values.size, nonzero_total + nonzero
        shown = FORMATS.get(tensor.data_type, str(tensor.data_type))
        formats[values.ndim > 1].add(shown)
        if node.op_type == "DequantizeLinear" and node.output[0] in readers:
            node = readers[node.output[0]][0][0]
        label = node.name or f"{node.op_type} → {node.output[0]}"
        layer = layers.setdefault(label, {"name": label, "type": node.op_type, "parameters": 0, "nonzero": 0})
        layer["parameters"] += values.size
        layer["nonzero"] += nonzero
        if values.ndim > 1:
            layer["format"] = shown
    return list(layers.values()), total, nonzero_total, formats[True] or formats[False]


def _is_weight(node: NodeProto, position: int, data_type: int) -> bool:
    if node.op_type in _INTEGER_WEIGHTS:
        return position in _INTEGER_WEIGHTS[node.op_type]
    if node.op_type.startswith("QLinear") or (node.op_type in _FIRST_IS_DATA and position > 0):
        return False
    return data_type in FLOATS


def _zero_point(node: NodeProto, position: int, rank: int, stored: Mapping[str, TensorProto]) -> Any:
    from onnx import numpy_helper

    at = _INTEGER_WEIGHTS.get(node.op_type, {}).get(position, -1)
    if at < 0 or len(node.input) <= at or node.input[at] not in stored:
        return 0
    zero = numpy_helper.to_array(stored[node.input[at]])
    if zero.size <= 1 or rank <= 1:
        return zero.reshape(-1) if zero.size > 1 else zero.reshape(())
    default = {"DequantizeLinear": 1, "QLinearConv": 0}.get(node.op_type, rank - 1)
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), default)
    return zero.reshape([-1 if dimension == axis % rank else 1 for dimension in range(rank)])
