"""Predictors that are an ONNX graph, run by ONNX Runtime. Nothing here imports torch, except :func:`to_onnx`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
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
        """The ``onnxruntime.InferenceSession``, made again after :meth:`set_threads`.

        A graph with a ScatterND that adds runs on one thread: with several, ONNX Runtime loses sums.
        """
        if self._session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.inter_op_num_threads = 1
            options.log_severity_level = 4
            try:
                options.intra_op_num_threads = 1 if self._serial else self.threads or 0
                self._session = onnxruntime.InferenceSession(
                    self.content, options, providers=["CPUExecutionProvider"], enable_fallback=0
                )
            except Exception as error:  # its exceptions have no common base
                raise CorruptFile(f"ONNX Runtime cannot read the graph: {error}") from error
        return self._session

    @cached_property
    def _serial(self) -> bool:
        """Whether several threads would make the answers wrong, so that one runs the graph whatever is asked for."""
        if not (b"ScatterND" in self.content and b"reduction" in self.content):  # spares importing onnx
            return False
        from sparing.core.predictor.graph import loses_sums

        return loses_sums(self.content)

    def set_threads(self, threads: int | None) -> None:
        """Use this many threads from now on; None for the runtime's default (all physical cores)."""
        super().set_threads(threads)
        self._session = None

    def __call__(self, *inputs: Any) -> Any:
        """Arrays (or tensors) in the tree the graph was exported with → arrays in its output tree."""
        feeds = self.feeds(*inputs)
        try:
            flat = self.session.run(None, feeds)
        except Exception as error:  # its exceptions have no common base
            takes = ", ".join(f"{item.name}: {item.shape}" for item in self.session.get_inputs())
            shapes = ", ".join(f"{name}: {list(array.shape)}" for name, array in feeds.items())
            raise InvalidValue(f"the graph cannot run on {shapes} (it takes {takes}): {error}") from error
        return grow(self.output_shape, flat)

    def feeds(self, *inputs: Any) -> dict[str, np.ndarray]:
        """What the session is fed for these inputs: graph input name → array of the graph's dtype."""
        given = {path: to_numpy(leaf) for path, leaf in leaves(inputs)}
        if given.keys() != set(self.input_paths):
            raise InvalidValue(f"the inputs are {sorted(given)}; this graph takes {sorted(self.input_paths)}")
        return {
            item.name: _cast(np.asarray(given[path]), item.type, path)
            for path, item in zip(self.input_paths, self.session.get_inputs(), strict=True)
        }

    def describe(self) -> Description:
        """Counts over the graph's weights (scales and zero points are not counted)."""
        if self._description is None:
            from sparing.core.predictor.graph import weights_of

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
            from sparing.core.predictor.graph import refuse_external

            refuse_external(files[GRAPH], GRAPH)
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


def to_onnx(
    model: nn.Module | Predictor,
    example: tuple[Any, ...] | None = None,
    task: Context | Task | Predictor | None = None,
    **options: Any,
) -> OnnxPredictor:
    """A torch module as an ONNX graph with a dynamic batch: :func:`sparing.core.predictor.torch_to_onnx.export`."""
    from sparing.core.predictor.torch_to_onnx import export

    return export(model, example, task, **options)
