"""Predictors that are an ONNX graph, run by ONNX Runtime. Nothing here imports torch, except :func:`to_onnx`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from sparing.core.errors import CorruptFile, InvalidValue
from sparing.core.predictor.base import Context, Description, Predictor
from sparing.core.predictor.tree import grow, leaves, to_numpy

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from sparing.core.predictor.folder import Manifest
    from sparing.core.task import Task

GRAPH = "model.onnx"


class OnnxPredictor(Predictor):
    """An ONNX graph in an ONNX Runtime session.

    ``content`` is the serialised graph, self-contained. ``inputs`` are the tree paths of the graph's inputs in order
    (default ``"0", "1", …``: one array each); ``outputs`` is the skeleton of the output tree (default: the bare array
    of a single output, else a tuple). ``macs`` and ``macs_rule`` come from the module the graph was made of;
    ``precision`` says what quantisation did (default: from the stored number formats). ``origin`` says how the graph
    came to be.
    """

    kind: ClassVar[str] = "onnx"

    def __init__(
        self,
        content: bytes,
        task: Context | Task | Predictor | None = None,
        *,
        inputs: Sequence[str] | None = None,
        outputs: Any = None,
        macs: int | None = None,
        macs_rule: str = "",
        precision: str | None = None,
        origin: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        self.content = content
        self._session: Any = None
        super().__init__(task, threads=threads)
        self.macs, self.macs_rule = macs, macs_rule
        self.precision = precision
        self.origin = dict(origin or {})
        self._description: Description | None = None
        names = [item.name for item in self.session.get_inputs()]
        self.input_paths = list(inputs) if inputs is not None else [str(i) for i in range(len(names))]
        made = [item.name for item in self.session.get_outputs()]
        self.output_shape = outputs if outputs is not None else (0 if len(made) == 1 else list(range(len(made))))
        positions = sorted(_positions(self.output_shape) or [])
        if len(self.input_paths) != len(names) or positions != list(range(len(made))):
            raise InvalidValue(
                f"the graph has the inputs {names} and outputs {made}; "
                f"the settings describe {len(self.input_paths)} and {len(positions)}"
            )

    @property
    def runtime(self) -> str:
        """ONNX Runtime, whatever the precision."""
        return "onnxruntime"

    @property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``, made again after :meth:`set_threads`."""
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads or 0
            options.inter_op_num_threads = 1
            options.log_severity_level = 4
            try:
                self._session = onnxruntime.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # its exceptions have no common base
                raise CorruptFile(f"ONNX Runtime cannot read the graph: {error}") from error
        return self._session

    def set_threads(self, threads: int | None) -> None:
        """Use this many threads from now on; None for the runtime's default (all physical cores)."""
        super().set_threads(threads)
        self._session = None

    def __call__(self, *inputs: Any) -> Any:
        """Arrays (or tensors) in the tree the graph was exported with → arrays in its output tree."""
        given = {path: to_numpy(leaf) for path, leaf in leaves(inputs)}
        if sorted(given) != sorted(self.input_paths):
            raise InvalidValue(f"the inputs are {sorted(given)}; this graph takes {sorted(self.input_paths)}")
        feeds = {
            item.name: _cast(np.asarray(given[path]), item.type, path)
            for path, item in zip(self.input_paths, self.session.get_inputs(), strict=True)
        }
        try:
            flat = self.session.run(None, feeds)
        except Exception as error:  # its exceptions have no common base
            wanted = ", ".join(
                f"{path}: {item.shape}" for path, item in zip(self.input_paths, self.session.get_inputs(), strict=True)
            )
            shapes = ", ".join(f"{path}: {list(np.shape(leaf))}" for path, leaf in given.items())
            raise InvalidValue(f"the graph cannot run on inputs {shapes} (it takes {wanted}): {error}") from error
        return grow(self.output_shape, flat)

    def describe(self) -> Description:
        """Counts over the graph's weights (scales and zero points are not counted)."""
        if self._description is None:
            layers, parameters, nonzero, formats = weights_of(self.graph())
            self._description = Description(
                kind=self.kind,
                runtime=self.runtime,
                precision=self.precision or " + ".join(sorted(formats)) or "n.a.",
                parameters=parameters,
                nonzero=nonzero,
                macs=self.macs,
                macs_rule=self.macs_rule,
                model_bytes=len(self.content),
                layers=tuple(layers),
            )
        return self._description

    def graph(self) -> ModelProto:
        """The graph as a fresh ``onnx.ModelProto``."""
        import onnx

        return onnx.load_model_from_string(self.content)

    def with_graph(self, content: bytes, precision: str | None = None, **origin: Any) -> OnnxPredictor:
        """Another graph for the same inputs and outputs: labels, preprocessing and multiply-accumulates are kept."""
        return OnnxPredictor(
            content,
            self.context,
            inputs=self.input_paths,
            outputs=self.output_shape,
            macs=self.macs,
            macs_rule=self.macs_rule,
            precision=precision,
            origin={**self.origin, **origin},
            threads=self.threads,
        )

    def fingerprint(self) -> str:
        """Changes with the graph."""
        return hashlib.sha256(self.content).hexdigest()

    def payload(self) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The graph, and how trees of arrays map onto it."""
        return {GRAPH: self.content}, {
            "inputs": self.input_paths,
            "outputs": self.output_shape,
            "origin": self.origin,
        }

    @classmethod
    def load_files(cls, files: Mapping[str, bytes], manifest: Manifest, trust: Collection[str] = ()) -> Self:
        """A session on the verified graph; external data, which could reach outside the folder, are refused."""
        config, described = manifest.config, manifest.description
        inputs, outputs, origin = config.get("inputs"), config.get("outputs"), config.get("origin")
        if (
            set(files) != {GRAPH}
            or not (isinstance(inputs, list) and all(isinstance(path, str) for path in inputs))
            or _positions(outputs) is None
            or not isinstance(origin, dict)
        ):
            raise CorruptFile(f"an onnx predictor needs {GRAPH} and the settings inputs, outputs and origin")
        if b"location" in files[GRAPH]:  # the key every reference to external data has; spares importing onnx
            _refuse_external(files[GRAPH])
        try:
            predictor = cls(
                files[GRAPH],
                manifest.context(),
                inputs=inputs,
                outputs=outputs,
                macs=described.macs,
                macs_rule=described.macs_rule,
                precision=described.precision,
                origin=origin,
            )
        except InvalidValue as error:
            raise CorruptFile(f"{GRAPH} does not fit its settings: {error}") from error
        predictor._description = described
        return predictor


def _refuse_external(content: bytes) -> None:
    import onnx

    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError
        raise CorruptFile(f"{GRAPH} is not an ONNX graph: {error}") from error
    for tensor in _all_tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise CorruptFile(f"{GRAPH} keeps the tensor {tensor.name!r} in another file; a model folder must not")


def _all_tensors(graph: Any) -> list[Any]:
    found = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                found.append(attribute.t)
            found.extend(attribute.tensors)
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                found.extend(_all_tensors(inner))
    return found


def _positions(shape: Any) -> list[int] | None:
    """The leaf positions in an output skeleton; None when it is none."""
    if isinstance(shape, bool):
        return None
    if isinstance(shape, int):
        return [shape]
    if isinstance(shape, dict | list | tuple):
        inside = [_positions(item) for item in (shape.values() if isinstance(shape, dict) else shape)]
        return None if any(item is None for item in inside) else [p for item in inside for p in item or []]
    return None


_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def _cast(array: np.ndarray, wanted: str, path: str) -> np.ndarray:
    dtype = _NUMPY_TYPES.get(wanted)
    if dtype is None or array.dtype == dtype:
        return array
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise InvalidValue(f"input {path} holds {array.dtype}; this graph takes {np.dtype(dtype)}")
    return array.astype(dtype)


def weights_of(model: ModelProto) -> tuple[list[dict[str, Any]], int, int, set[str]]:
    """(layers, parameters, non-zero parameters, number formats) of a graph's weights.

    A weight is an initialiser of floats or quantised integers that a node reads as data: not a scale or zero point, not
    a shape. A quantised weight is zero where it equals its zero point.
    """
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    names = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16", 2: "uint8", 3: "int8", 21: "uint4", 22: "int4", 6: "int32"}
    layers: dict[str, dict[str, Any]] = {}
    total = nonzero_total = 0
    formats: set[str] = set()
    for name, tensor in stored.items():
        users = readers.get(name, [])
        auxiliary = bool(users) and all(_is_auxiliary(node, name) for node in users)
        quantised = any(node.op_type == "DequantizeLinear" and node.input[0] == name for node in users)
        integer = tensor.data_type not in (1, 10, 11, 16)
        if not users or auxiliary or (integer and not quantised and not _integer_weight(users, name)):
            continue
        values = numpy_helper.to_array(tensor)
        zero = _zero_point(users, name, stored)
        nonzero = int(np.count_nonzero(values != zero if zero is not None else values))
        total, nonzero_total = total + values.size, nonzero_total + nonzero
        if not (integer and tensor.data_type == 6):
            formats.add(names.get(tensor.data_type, str(tensor.data_type)))
        node = next((n for n in users), None)
        if node is not None and node.op_type == "DequantizeLinear":
            node = next(iter(readers.get(node.output[0], [node])))
        if node is None:
            continue
        layer = layers.setdefault(
            node.name or node.op_type,
            {"name": node.name or node.op_type, "type": node.op_type, "parameters": 0, "nonzero": 0},
        )
        layer["parameters"] += values.size
        layer["nonzero"] += nonzero
        if values.ndim > 1:
            layer["format"] = names.get(tensor.data_type, str(tensor.data_type))
    return list(layers.values()), total, nonzero_total, formats


_QUANTISED_OPERATORS: Mapping[str, Mapping[int, int]] = {
    # operator → {input that is a weight: input that is its zero point}
    "QLinearConv": {3: 5},
    "QLinearMatMul": {3: 5},
    "QGemm": {3: 5},
    "MatMulInteger": {1: 3},
    "ConvInteger": {1: 3},
    "DynamicQuantizeMatMul": {1: 3},
}


def _integer_weight(users: Sequence[Any], name: str) -> bool:
    return any(
        position in _QUANTISED_OPERATORS.get(node.op_type, {})
        for node in users
        for position, given in enumerate(node.input)
        if given == name
    )


def _zero_point(users: Sequence[Any], name: str, stored: Mapping[str, Any]) -> np.ndarray | None:
    from onnx import numpy_helper

    for node in users:
        for position, given in enumerate(node.input):
            if given != name:
                continue
            at = 2 if node.op_type == "DequantizeLinear" else _QUANTISED_OPERATORS.get(node.op_type, {}).get(position)
            if at is not None and len(node.input) > at and node.input[at] in stored:
                zero = numpy_helper.to_array(stored[node.input[at]])
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                rank = len(stored[name].dims)
                if zero.ndim == 1 and zero.size > 1 and rank > 1:
                    zero = zero.reshape([-1 if d == axis % rank else 1 for d in range(rank)])
                return zero
    return None


def _is_auxiliary(node: Any, name: str) -> bool:
    """True when ``name`` enters ``node`` as a scale, a zero point or another setting, not as data."""
    positions = [index for index, given in enumerate(node.input) if given == name]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Clip", "Pad", "Resize", "Reshape", "Expand", "Slice"):
        return 0 not in positions
    if node.op_type.startswith("QLinear") or node.op_type in (
        "QGemm",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
    ):
        return not any(position in _QUANTISED_OPERATORS.get(node.op_type, {}) for position in positions)
    return False


def to_onnx(
    model: nn.Module | Predictor,
    example: tuple[Any, ...] | None = None,
    task: Context | Task | Predictor | None = None,
    **options: Any,
) -> OnnxPredictor:
    """A torch module as an ONNX graph with a dynamic batch: :func:`sparing.core.predictor.torch_to_onnx.export`."""
    from sparing.core.predictor.torch_to_onnx import export

    return export(model, example, task, **options)
