"""Torch module → ONNX graph with a dynamic batch, checked against the module.

``torch.onnx.export`` has two routes in the torch this project is pinned to. Tracing (``dynamo=False``) takes tens of
milliseconds and yields the operators ONNX Runtime has kernels and int8 rules for (GlobalAveragePool, Flatten,
convolutions with the batch norm folded in); it is deprecated, and it bakes data-dependent control flow into the graph,
saying so in a ``TracerWarning``. ``dynamo=True`` has the future; it takes a second for each graph and four for the
first, and writes source paths into the file. We trace where tracing is silent and the outputs agree on two batch sizes,
and use ``torch.export`` for the rest; which one made the graph is recorded in the predictor's ``origin``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import InvalidValue, NotExportable
from sparing.core.predictor.base import Context, Predictor
from sparing.core.predictor.module import ModulePredictor, baked, example_of
from sparing.core.predictor.onnx import OnnxPredictor
from sparing.core.predictor.tree import grow, leaves, map_leaves, skeleton, to_numpy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.task import Task

OPSET = 20
TOLERANCE = 1e-4
"""Largest accepted difference between graph and module, relative to the largest output of the module."""


def export(
    model: nn.Module | Predictor,
    example: tuple[Any, ...] | None = None,
    task: Context | Task | Predictor | None = None,
    *,
    tolerance: float = TOLERANCE,
    threads: int | None = None,
) -> OnnxPredictor:
    """Export a torch module, or a module predictor, to ONNX.

    ``example`` is a tuple of model inputs whose first dimension is the batch, of size 2 or more (default: the task's);
    trees of tensors are flattened to positional graph inputs. The outputs are compared with the module's on the example
    and on another batch size; the largest difference is kept in ``origin["max_abs_diff"]``.

    Raises :class:`NotExportable` naming the operator or the output that stands in the way.
    """
    if isinstance(model, OnnxPredictor):
        return model
    if isinstance(model, Predictor) and not isinstance(model, ModulePredictor):
        raise NotExportable(f"a predictor of kind {model.kind!r} cannot be written as one ONNX graph")
    if isinstance(model, ModulePredictor):
        task = model.context if task is None else task
        example = model.example if example is None else example
    if example is None:
        example = example_of(task, 2)
    if example is None:
        raise InvalidValue("exporting needs an example input: a tuple of model inputs, or a task that gives one")
    source = model if isinstance(model, ModulePredictor) else ModulePredictor(model, task, example=example)
    module = baked(source.model).cpu().eval()
    inputs = tuple(map_leaves(_tensor, item) for item in example)
    flat = [leaf for _, leaf in leaves(inputs)]
    if len(flat) == 0 or any(leaf.ndim == 0 for leaf in flat):
        raise NotExportable("every input needs a batch dimension; the example holds a scalar or nothing")
    if min(leaf.shape[0] for leaf in flat) < 2:
        # a batch of one would be taken for a constant
        inputs = map_leaves(lambda leaf: leaf.repeat_interleave(2, dim=0), inputs)
        flat = [leaf for _, leaf in leaves(inputs)]
    paths = [path for path, _ in leaves(inputs)]
    expected = _run(module, inputs)
    for path, leaf in leaves(expected):
        if not hasattr(leaf, "detach"):
            raise NotExportable(f"output {path or '0'} is a {type(leaf).__name__}; an ONNX graph gives tensors only")
    described = source.describe()
    wrapped = _flat_module(module, skeleton(inputs))
    names = ([f"input{index}" for index in range(len(flat))], [f"output{i}" for i, _ in enumerate(leaves(expected))])
    problems = []
    for exporter in (_trace, _torch_export):
        try:
            content = _tidy(exporter(wrapped, flat, *names))
            made = OnnxPredictor(
                content,
                source.context,
                inputs=paths,
                outputs=skeleton(expected),
                macs=described.macs,
                macs_rule=described.macs_rule,
                origin={"exporter": exporter.__name__.strip("_"), "opset": OPSET},
                threads=threads,
            )
            made.origin["max_abs_diff"] = max(
                _difference(made, module, inputs, tolerance), _difference(made, module, _more(inputs), tolerance)
            )
            return made
        except Exception as error:  # exporters raise anything; the last reason is reported below
            problems.append(f"{exporter.__name__.strip('_')}: {_reason(error)}")
    raise NotExportable(f"{type(source.model).__name__} cannot be written as ONNX. " + " | ".join(problems))


def _tensor(leaf: Any) -> Tensor:
    import torch

    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(leaf.copy())
    if not isinstance(leaf, torch.Tensor):
        raise NotExportable(f"an input is a {type(leaf).__name__}; an ONNX graph takes tensors only")
    return leaf.detach().cpu().clone()


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    import torch

    with torch.no_grad():
        return module(*inputs)


def _flat_module(module: nn.Module, shape: Any) -> nn.Module:
    """A module over a flat list of tensors, in :func:`leaves` order on both sides."""
    from torch import nn

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
            return tuple(leaf for _, leaf in leaves(self.model(*grow(shape, list(flat)))))

    return Flat().eval()


def _trace(module: nn.Module, flat: Sequence[Tensor], inputs: list[str], outputs: list[str]) -> bytes:
    import torch
    from torch.jit import TracerWarning

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error", TracerWarning)
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*legacy TorchScript-based ONNX export", category=UserWarning)
        torch.onnx.export(
            module,
            tuple(flat),
            buffer,  # type: ignore[arg-type]  # the tracing exporter takes a buffer
            dynamo=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes={name: {0: "batch"} for name in (*inputs, *outputs)},
        )
    return buffer.getvalue()


def _torch_export(module: nn.Module, flat: Sequence[Tensor], inputs: list[str], outputs: list[str]) -> bytes:
    import torch

    batch = torch.export.Dim("batch")
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(flat),
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=(tuple({0: batch} for _ in flat),),
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says of its own inner workings and of torchvision, which nothing here uses."""

    def unrelated(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    logger.addFilter(unrelated)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
            warnings.filterwarnings("ignore", message="_check_is_size will be removed", category=FutureWarning)
            warnings.filterwarnings("ignore", message="The tensor attributes? .*_flat_weights", category=UserWarning)
            warnings.filterwarnings("ignore", message="# The axis name: batch will not be used", category=UserWarning)
            yield
    finally:
        logger.removeFilter(unrelated)


def _tidy(content: bytes) -> bytes:
    """The graph without stack traces, source paths and recorded intermediate shapes: none is needed to answer."""
    import onnx

    model = onnx.load_model_from_string(content)
    strip(model)
    return model.SerializeToString(deterministic=True)


def strip(model: Any) -> None:
    """Remove documentation strings, metadata and intermediate shapes from a graph, in place."""

    def visit(graph: Any) -> None:
        for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
        graph.ClearField("value_info")
        for node in graph.node:
            for attribute in node.attribute:
                attribute.ClearField("doc_string")
                for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                    visit(inner)

    visit(model.graph)
    model.ClearField("metadata_props")
    model.ClearField("doc_string")
    for function in model.functions:
        function.ClearField("doc_string")
        function.ClearField("metadata_props")
        function.ClearField("value_info")
        for node in function.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")


def _more(inputs: Any) -> Any:
    """The example with one row more, in another order."""
    import torch

    return map_leaves(lambda leaf: torch.cat([leaf.flip(0), leaf[:1]]), inputs)


def _difference(graph: OnnxPredictor, module: nn.Module, inputs: Any, tolerance: float) -> float:
    worst = 0.0
    for (path, one), (_, other) in zip(leaves(graph(*inputs)), leaves(_run(module, inputs)), strict=True):
        reference = np.asarray(to_numpy(other))
        if one.shape != reference.shape:
            raise NotExportable(f"output {path or '0'} has shape {one.shape}, the module's is {reference.shape}")
        finite = np.isfinite(reference)
        if not np.array_equal(finite, np.isfinite(one)):
            raise NotExportable(f"output {path or '0'} is not finite where the module's is, or the other way round")
        gap = np.abs(one[finite].astype(np.float64) - reference[finite].astype(np.float64))
        scale = float(np.abs(reference[finite]).max(initial=0.0)) if reference.dtype.kind == "f" else 0.0
        if gap.size and gap.max() > tolerance * max(scale, 1e-6):
            raise NotExportable(
                f"output {path or '0'} differs from the module's by {gap.max():.3g} at scale {scale:.3g}, "
                f"more than {tolerance:g} of it"
            )
        worst = max(worst, float(gap.max(initial=0.0)))
    return worst


def _reason(error: Exception) -> str:
    """The lines of an exporter's message that name what stands in the way."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if any(word in line for word in ("operator", "aten", "Converting", "cannot", "not support"))
    ]
    return f"{type(error).__name__}: " + " ".join((telling or lines or ["no message"])[:2])[:400]
