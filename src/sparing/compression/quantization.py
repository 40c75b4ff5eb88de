"""INT8 weights and activations through ONNX Runtime.

Each real tensor becomes integers by real = scale · (integer − zero point) (Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", eq. 1). Static quantisation fixes the
scales of activations from calibration data; the graph holds pairs of QuantizeLinear and DequantizeLinear that the
runtime fuses into integer kernels. Dynamic quantisation takes the scales of activations from each input, and serves
linear layers only.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from sparing.compression.calibration import attempts, calibration_batches
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, SparingError, did_you_mean
from sparing.core.predictor import ModulePredictor, OnnxPredictor, Predictor, to_onnx
from sparing.core.predictor.graph import lean, subgraphs
from sparing.core.predictor.tree import leaves
from sparing.core.step import Stage, Step, step
from sparing.core.store import JSON, PREDICTOR, All

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from sparing.core.job import Job
    from sparing.core.task import Task

Feeds = Sequence[Mapping[str, np.ndarray]]
"""Batches of graph inputs by name."""
LAYERS = ("Conv", "Gemm", "MatMul")
"""Operators whose stored weights are quantised."""
KEPT_FP32 = "kept FP32"
SENSITIVITY_BATCHES = 2
"""Calibration batches by which single layers are judged."""
Mode = Literal["static", "dynamic"]
Method = Literal["minmax", "percentile", "kl"]


@dataclass(frozen=True)
class Scheme:
    """One way to quantise a graph."""

    mode: Mode = "static"
    per_channel: bool = True
    """A weight scale for each output channel instead of one for the whole tensor."""
    method: Method = "minmax"
    """How calibration turns observed activations into a range; without meaning when dynamic."""
    keep_float: tuple[str, ...] = ()
    """Names of layers that stay in floating point."""

    def __str__(self) -> str:
        grain = "per channel" if self.per_channel else "per tensor"
        kept = f" + fp32 (in float: {', '.join(self.keep_float)})" if self.keep_float else ""
        return f"int8 ({'QDQ static' if self.mode == 'static' else 'dynamic'}, {grain}){kept}"


def prepare(content: bytes) -> ModelProto:
    """An ONNX graph as ONNX Runtime's quantiser wants it: constants folded, batch norms fused, shapes known, all named.

    Without this, batch norms stay between the integer kernels and the int8 graph is slower than the float one.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(_optimised(content, "ORT_ENABLE_BASIC"))
    names: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in names:
            node.name = f"{node.op_type}_{index}"
        names.add(node.name)
    return model


def _optimised(content: bytes, level: str) -> ModelProto:
    """The graph that ONNX Runtime makes of a graph, for this machine, at a ``GraphOptimizationLevel``."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="sparing-int8-") as scratch:
        options.optimized_model_filepath = str(Path(scratch) / "optimised.onnx")
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        return onnx.load(options.optimized_model_filepath)


def _fed_in_float(model: ModelProto) -> set[str]:
    """Names of the nodes that still read what DequantizeLinear gives."""
    floats = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    return {node.name for node in model.graph.node if floats & set(node.input)}


def layers_of(model: ModelProto) -> list[NodeProto]:
    """The operators whose stored weights can be quantised, in graph order."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in LAYERS and node.input[1] in stored]


def quantize_onnx(model: ModelProto, scheme: Scheme, feeds: Feeds = (), only: Sequence[str] = ()) -> ModelProto:
    """Quantise a graph from :func:`prepare`; the graph given is not changed.

    ``feeds`` are calibration batches (static only). ``only``: names of the nodes to quantise; default: all that the
    runtime has integer kernels for. Weights are signed and symmetric, activations unsigned with a zero point.
    """
    import onnx
    from onnxruntime import quantization as ort

    if scheme.mode == "static" and not feeds:
        raise InvalidValue("static quantisation needs calibration batches")
    common: dict[str, Any] = {
        "per_channel": scheme.per_channel,
        "weight_type": ort.QuantType.QInt8,
        "nodes_to_quantize": list(only),
        "nodes_to_exclude": list(scheme.keep_float),
        "reduce_range": products_saturate(),
    }
    with tempfile.TemporaryDirectory(prefix="sparing-int8-") as scratch, _quiet():
        source, target = str(Path(scratch) / "float.onnx"), str(Path(scratch) / "int8.onnx")
        onnx.save(model, source)
        if scheme.mode == "dynamic":
            ort.quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], **common)
        else:
            methods = {
                "minmax": ort.CalibrationMethod.MinMax,
                "percentile": ort.CalibrationMethod.Percentile,
                "kl": ort.CalibrationMethod.Entropy,
            }
            ort.quantize_static(
                source,
                target,
                _Reader(feeds),
                quant_format=ort.QuantFormat.QDQ,
                activation_type=ort.QuantType.QUInt8,
                calibrate_method=methods[scheme.method],
                **common,
            )
        return onnx.load(target)


class _Reader:
    """Calibration batches as the runtime's calibrator asks for them."""

    def __init__(self, feeds: Feeds) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Mapping[str, np.ndarray] | None:
        return next(self._feeds, None)


@functools.cache
def products_saturate() -> bool:
    """Whether this CPU adds pairs of 8-bit products in 16 bits, which can overflow: x86 without VNNI.

    Weights are then kept to 7 bits. Where the processor's features cannot be read, the cautious answer is given.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return "vnni" not in flags


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the runtime's quantiser, which prints its progress and advises a preparation that was done."""
    root = logging.getLogger()

    def ours(record: logging.LogRecord) -> bool:
        # the second: gains of a layer norm have one dimension, so that one scale for all is what there is
        silenced = ("pre-processing before quantization", "is out-of-range for weight")
        return not any(phrase in record.getMessage() for phrase in silenced)

    root.addFilter(ours)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        root.removeFilter(ours)


def float_operators(original: ModelProto, quantised: ModelProto) -> list[str]:
    """``"name (operator)"`` for each operator of ``original`` that computes in floating point in ``quantised``.

    An operator computes in integers when it was replaced by an integer one, or when all its computed or stored inputs
    come out of DequantizeLinear and the runtime fuses them into an integer kernel. It has none for layer norm and GELU,
    for example: what it leaves them is found in the graph that it would run.
    """
    unfused = _fed_in_float(_optimised(quantised.SerializeToString(), "ORT_ENABLE_ALL"))
    now = {node.name: node for node in quantised.graph.node}
    by_output = {name: node for node in quantised.graph.node for name in node.output}
    types = {value.name: value.type.tensor_type.elem_type for value in original.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in original.graph.output}
    found = []
    for node in original.graph.node:
        same = now.get(node.name)
        if same is None or same.op_type != node.op_type or types.get(node.output[0], 1) not in (1, 10, 11, 16):
            continue
        sources = [by_output[name].op_type for name in same.input if name in by_output]
        if node.name in unfused or not sources or any(source != "DequantizeLinear" for source in sources):
            found.append(f"{node.name} ({node.op_type})")
    return found


def layer_sensitivity(model: ModelProto, scheme: Scheme, feeds: Feeds) -> dict[str, float]:
    """Layer → how far the outputs move when it alone is quantised: mean squared change over the outputs' variance."""
    reference = _outputs(model, feeds)
    scale = max(float(np.var(reference)), 1e-12)
    return {
        node.name: float(np.mean((_outputs(quantize_onnx(model, scheme, feeds, [node.name]), feeds) - reference) ** 2))
        / scale
        for node in layers_of(model)
        if node.name not in scheme.keep_float
    }


def _outputs(model: ModelProto, feeds: Feeds) -> np.ndarray:
    """All outputs for all batches in one vector."""
    predictor = OnnxPredictor(model.SerializeToString(), threads=1)
    flat = [array for feed in feeds for array in predictor.session.run(None, dict(feed))]
    return np.concatenate([np.asarray(array, dtype=np.float64).ravel() for array in flat])


def calibration_feeds(task: Task, predictor: OnnxPredictor, dataset: Any, samples: int) -> list[dict[str, np.ndarray]]:
    """Graph inputs for up to ``samples`` items spread evenly over ``dataset``, as the task feeds its models."""
    recorder = _Recorder(predictor)
    for batch in calibration_batches(task, dataset, samples):
        task.outputs(recorder, batch)
    return recorder.feeds_seen


class _Recorder(OnnxPredictor):
    """Stands in for a predictor and remembers what it is fed."""

    def __init__(self, predictor: OnnxPredictor) -> None:
        super().__init__(
            predictor.content, predictor, inputs=predictor.input_paths, outputs=predictor.output_shape, threads=1
        )
        self.feeds_seen: list[dict[str, np.ndarray]] = []

    def __call__(self, *inputs: Any) -> Any:
        self.feeds_seen.append(self.feeds(*inputs))
        return super().__call__(*inputs)


@dataclass
class _Candidate:
    """A quantised graph and what is known of it."""

    name: str
    predictor: OnnxPredictor
    score: float
    loss: float
    in_float: list[str]
    p50_ms: float | None = None
    note: str = ""

    def figures(self, headline: str) -> dict[str, Any]:
        return {
            "name": self.name,
            f"val {headline}": self.score,
            "loss": self.loss,
            "model bytes": len(self.predictor.content),
            "p50 ms": self.p50_ms,
            "operators in float": len(self.in_float),
            "note": self.note,
        }


@step("quantize")
class Quantize(Step):
    """INT8 weights and activations through ONNX Runtime, kept only when they win.

    Every candidate is scored on the validation split. One that loses more than ``max_loss`` gets its most sensitive
    layers back in FP32, one more at a time (beyond eight in powers of two), until it does not. What is left competes
    with FP32 on the goal, on this machine; a tie within ``margin`` goes to FP32, or to the candidate tried first. The
    row lists all candidates and the operators left in floating point.
    """

    stage: ClassVar[Stage] = Stage.INFERENCE
    needs: ClassVar[frozenset[str]] = frozenset({"trained"})
    by_clock: ClassVar[bool] = True
    source: ClassVar[str] = (
        "Jacob et al. 2018, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only "
        "Inference, eq. 1; choice and fall-back: ours"
    )

    goal: Literal["latency", "bytes"] = "latency"
    """What must get better: the p50 at batch 1 on this machine, or the bytes of the saved model."""
    max_loss: float = Field(default=0.005, ge=0)
    """Accepted loss on the validation split, in units of the task's headline metric."""
    max_relative_loss: float | None = Field(default=None, ge=0)
    """Accepted loss as a share of FP32's own value, in place of ``max_loss``: 0.01 of an accuracy of 0.9 is 0.009."""
    mode: Literal["auto", "static", "dynamic"] = "auto"
    """"auto": static, and dynamic too where all layers are linear."""
    per_channel: bool | None = None
    """A scale for each output channel. None: yes; and for the goal "bytes" one for each tensor is tried as well."""
    method: Method = "minmax"
    """How calibration turns observed activations into a range."""
    samples: int = Field(default=512, ge=1)
    """Calibration samples, spread evenly over the calibration split."""
    keep_float: tuple[str, ...] = ()
    """Names of layers (as in the graph) that stay in FP32 in any case."""
    margin: float = Field(default=0.05, ge=0.05, lt=1)
    """A candidate must win by this share; less is a tie."""

    def accepted(self, base: float) -> float:
        """Loss that is accepted where FP32 has the value ``base``, in units of the headline metric."""
        return self.max_loss if self.max_relative_loss is None else self.max_relative_loss * abs(base)

    def apply(self, job: Job) -> Job:
        """The job with an int8 predictor, or with the FP32 one when that is the better."""
        if not isinstance(job.predictor, ModulePredictor | OnnxPredictor):
            kind = "none yet" if job.predictor is None else f"one of kind {job.predictor.kind!r}"
            raise IncompatibleStep(f"{self.id!r} quantises a module or onnx predictor; the job has {kind}")
        found = job.store.once("quantised", lambda: self._compute(job), All({"predictor": PREDICTOR, "report": JSON}))
        report: dict[str, Any] = found["report"]
        job.notes.outcome = report["outcome"]
        job.notes.candidates.extend(report["candidates"])
        job.notes.remarks.extend(report["remarks"])
        job.record("operators in float", report["in_float"], "operators", better="lower")
        return job.replace(predictor=found["predictor"])

    def _compute(self, job: Job) -> dict[str, Any]:
        assert job.predictor is not None
        source = to_onnx(job.predictor, task=job.task)
        model = prepare(source.content)
        self._check_layers(model)
        feeds = calibration_feeds(job.task, source, job.calibration, self.samples)
        headline = job.task.headline
        base = self._score(job, source)
        fp32 = _Candidate("FP32", source, base, 0.0, [f"{node.name} ({node.op_type})" for node in model.graph.node])
        tried, failures = [], []
        schemes = self._schemes(model)
        for scheme in schemes:
            try:
                tried += self._fall_back(job, scheme, model, source, feeds, base)
            except SparingError:
                raise
            except Exception as error:  # the runtime's quantiser raises anything; FP32 still stands
                failures.append({"name": str(scheme), "note": f"failed: {type(error).__name__}: {str(error)[:200]}"})
        chosen = self._choose(job, fp32, [candidate for candidate in tried if candidate.loss <= self.accepted(base)])
        figures = [candidate.figures(headline.name) for candidate in (fp32, *tried)] + failures
        remarks = [f"operators in float: {'all' if chosen is fp32 else ', '.join(chosen.in_float) or 'none'}"]
        if any(scheme.mode == "static" for scheme in schemes):
            remarks.insert(0, f"static candidates are calibrated on {sum(_rows(feed) for feed in feeds)} samples")
        return {
            "predictor": chosen.predictor,
            "report": {
                "outcome": KEPT_FP32 if chosen is fp32 else chosen.name,
                "candidates": [{**entry, "chosen": entry["name"] == chosen.name} for entry in figures],
                "in_float": len(chosen.in_float),
                "remarks": remarks,
            },
        }

    def _check_layers(self, model: ModelProto) -> None:
        kinds = Counter(node.op_type for node in model.graph.node)
        seen = ", ".join(f"{kind} ×{count}" for kind, count in sorted(kinds.items())) or "an empty graph"
        if "QuantizeLinear" in kinds or any("Integer" in kind or kind.startswith("Q") for kind in kinds):
            raise NoEffect(f"{self.id!r}: the model is quantised already; looked at {seen}")
        names = [node.name for node in layers_of(model)]
        linear = [node.name for node in layers_of(model) if node.op_type != "Conv"]
        for name in self.keep_float:
            if name not in names:
                raise InvalidValue(
                    f"{self.id}: keep_float names no layer {name!r}.{did_you_mean(name, names)} "
                    f"Layers: {', '.join(names)}"
                )
        left = [name for name in (linear if self.mode == "dynamic" else names) if name not in self.keep_float]
        if not left:
            wanted = "Gemm and MatMul" if self.mode == "dynamic" else "Conv, Gemm and MatMul"
            kept = f", keep_float holds {', '.join(self.keep_float)}" if self.keep_float else ""
            inner = " (operators inside If and Loop are not looked at)" if _has_subgraphs(model) else ""
            raise NoEffect(
                f"{self.id!r}: nothing to quantise. Looked at {seen}{inner}; only {wanted} with stored weights are "
                f"quantised{' in dynamic mode' if self.mode == 'dynamic' else ''}{kept}"
            )

    def _schemes(self, model: ModelProto) -> list[Scheme]:
        """What to try, in order of preference."""
        linear = all(node.op_type != "Conv" for node in layers_of(model))
        modes: list[Mode] = [self.mode] if self.mode != "auto" else ["static", "dynamic"] if linear else ["static"]
        both = self.per_channel is None and self.goal == "bytes"
        grains = [True, False] if both else [self.per_channel is not False]
        return [Scheme(mode, grain, self.method, self.keep_float) for mode in modes for grain in grains]

    def _score(self, job: Job, predictor: Predictor) -> float:
        return float(job.task.evaluate(predictor, job.val).metrics[job.task.headline.name])

    def _fall_back(
        self, job: Job, scheme: Scheme, model: ModelProto, source: OnnxPredictor, feeds: Feeds, base: float
    ) -> list[_Candidate]:
        """The scheme, and where it loses too much, versions of it with more and more layers in float."""
        tried = [self._candidate(job, scheme, model, source, feeds, base)]
        if tried[0].loss <= self.accepted(base):
            return tried
        found = layer_sensitivity(model, scheme, feeds[:SENSITIVITY_BATCHES])
        if scheme.mode == "dynamic":
            found = {
                node.name: found[node.name]
                for node in layers_of(model)
                if node.op_type != "Conv" and node.name in found
            }
        ordered = sorted(found, key=lambda name: -found[name])
        for count in attempts(len(ordered)):
            kept = replace(scheme, keep_float=(*scheme.keep_float, *ordered[:count]))
            tried.append(self._candidate(job, kept, model, source, feeds, base))
            if tried[-1].loss <= self.accepted(base):
                break
        return tried

    def _candidate(
        self, job: Job, scheme: Scheme, model: ModelProto, source: OnnxPredictor, feeds: Feeds, base: float
    ) -> _Candidate:
        quantised = quantize_onnx(model, scheme, feeds)
        in_float = float_operators(model, quantised)
        lean(quantised, keep_names=[node.name for node in layers_of(model)])
        content = quantised.SerializeToString(deterministic=True)
        calibrated = self.method if scheme.mode == "static" else ""
        predictor = source.with_graph(content, str(scheme), reduced_range=products_saturate(), calibrated=calibrated)
        score = self._score(job, predictor)
        loss = base - score if job.task.headline.better == "higher" else score - base
        limit = "max_loss" if self.max_relative_loss is None else "max_relative_loss"
        note = "" if loss <= self.accepted(base) else f"loses more than {limit} = {getattr(self, limit):g}"
        return _Candidate(str(scheme), predictor, score, loss, in_float, note=note)

    def _choose(self, job: Job, fp32: _Candidate, accepted: list[_Candidate]) -> _Candidate:
        """The winner by the goal; each must beat the best before it by the margin."""
        if not accepted:
            return fp32
        runners = [fp32, *accepted]
        if self.goal == "latency":
            from sparing.core.meter import Meter

            timings = (job.meter or Meter()).latency({runner.name: runner.predictor for runner in runners}, job.task)
            for runner in runners:
                runner.p50_ms = timings[runner.name].p50 * 1e3
                runner.note = timings[runner.name].note
        best = fp32
        for runner in accepted:
            if self._cost(runner) <= (1 - self.margin) * self._cost(best):
                best = runner
        return best

    def _cost(self, candidate: _Candidate) -> float:
        if self.goal == "bytes":
            return len(candidate.predictor.content)
        assert candidate.p50_ms is not None
        return candidate.p50_ms


def _rows(feed: Mapping[str, np.ndarray]) -> int:
    return max((array.shape[0] for _, array in leaves(dict(feed)) if array.ndim), default=1)


def _has_subgraphs(model: ModelProto) -> bool:
    return any(True for node in model.graph.node for _ in subgraphs(node))
