"""Torch module → ONNX graph with a dynamic batch, checked against the module.

``torch.onnx.export`` has two routes in the torch this project is pinned to. Tracing (``dynamo=False``) takes tens of
milliseconds and yields the operators ONNX Runtime has kernels and int8 rules for (GlobalAveragePool, Flatten,
convolutions with the batch norm folded in); it is deprecated, and it bakes control flow that depends on values into the
graph. ``dynamo=True`` has the future; it takes a second for each graph and four for the first, and writes source paths
into the file. We trace a module that reads no value of a tensor while it runs and whose graph agrees with it on two
batch sizes, and use ``torch.export`` for the rest; which one made the graph is recorded in the predictor's ``origin``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import InvalidValue, NotExportable
from sparing.core.predictor.base import Context, Predictor
from sparing.core.predictor.graph import strip
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

    Without ``example`` the task's inputs for batches of 2 and of 3 are the examples, and the sizes in which they differ
    are free in the graph: the batch, the length of texts, the number of nodes … ``example`` is a tuple of model inputs
    whose first dimension is the batch and alone is free. Trees of tensors are flattened to positional graph inputs. The
    outputs are compared with the module's on both examples; the largest difference is in ``origin["max_abs_diff"]``.

    Raises :class:`NotExportable` naming the operator or the output that stands in the way.
    """
    if isinstance(model, OnnxPredictor):
        return model
    if isinstance(model, Predictor) and not isinstance(model, ModulePredictor):
        raise NotExportable(f"a predictor of kind {model.kind!r} cannot be written as one ONNX graph")
    if isinstance(model, ModulePredictor):
        task = model.context if task is None else task
    two, three = example_of(task, 2), example_of(task, 3)
    if example is None and isinstance(model, ModulePredictor) and two is None:
        example = model.example
    if example is None and two is None:
        raise InvalidValue("exporting needs an example input: a tuple of model inputs, or a task that gives one")
    if example is not None:
        inputs = batched(example)
        other = more(inputs)
    else:
        inputs, other = (tuple(map_leaves(_tensor, item) for item in made or ()) for made in (two, three))
    source = model if isinstance(model, ModulePredictor) else ModulePredictor(model, task, example=example)
    module = baked(source.model).cpu().eval()
    flat = [leaf for _, leaf in leaves(inputs)]
    paths = [path for path, _ in leaves(inputs)]
    expected = _run(module, inputs)
    free = (_free(inputs, other), _free(expected, _run(module, other)))
    for path, leaf in leaves(expected):
        if not hasattr(leaf, "detach"):
            raise NotExportable(f"output {path or '0'} is a {type(leaf).__name__}; an ONNX graph gives tensors only")
    described = source.describe()
    wrapped = _flat_module(module, skeleton(inputs))
    names = ([f"input{index}" for index in range(len(flat))], [f"output{i}" for i, _ in enumerate(leaves(expected))])
    problems = []
    read_at = _value_read(module, inputs)
    if read_at:
        problems.append(f"Python reads a tensor's value while it runs ({read_at})")
    for exporter in (_torch_export,) if read_at else (_trace, _torch_export):
        try:
            content = _tidy(exporter(wrapped, flat, names, free))
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
                difference(made, module, inputs, tolerance), difference(made, module, other, tolerance)
            )
            made.attachments = dict(source.attachments)
            return made
        except Exception as error:  # exporters raise anything; the last reason is reported below
            problems.append(f"{exporter.__name__.strip('_')}: {reason(error)}")
    raise NotExportable(f"{type(source.model).__name__} cannot be written as ONNX. " + " | ".join(problems))


def _free(one: Any, other: Any) -> list[list[int]]:
    """For each leaf the dimensions whose sizes differ between two examples."""
    pairs = zip((leaf for _, leaf in leaves(one)), (leaf for _, leaf in leaves(other)), strict=True)
    found = []
    for position, (a, b) in enumerate(pairs):
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in (a, b)]
        if len(shapes[0]) != len(shapes[1]):
            raise NotExportable(f"input or output {position} has shape {shapes[0]} once and {shapes[1]} then")
        found.append([axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if sizes[0] != sizes[1]])
    return found


Names = tuple[list[str], list[str]]
"""Of the graph's inputs and outputs."""
Free = tuple[list[list[int]], list[list[int]]]
"""The dimensions of each input and output whose size is free."""


def batched(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """An example as tensors on the CPU, with a batch of at least 2: a batch of one would be taken for a constant."""
    inputs = tuple(map_leaves(_tensor, item) for item in example)
    flat = [leaf for _, leaf in leaves(inputs)]
    if len(flat) == 0 or any(leaf.ndim == 0 for leaf in flat):
        raise NotExportable("every input needs a batch dimension; the example holds a scalar or nothing")
    if min(leaf.shape[0] for leaf in flat) >= 2:
        return inputs
    return tuple(map_leaves(lambda leaf: leaf.repeat_interleave(2, dim=0), item) for item in inputs)


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


def _value_read(module: nn.Module, inputs: tuple[Any, ...]) -> str:
    """Where Python looks at a tensor's value while the module runs, as ``if x.max() > 0`` or ``x.item()`` do, or ""."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        seen = ""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default and not self.seen:
                stack = traceback.extract_stack()
                forwards = [inner for outer, inner in itertools.pairwise(stack) if outer.name == "_call_impl"]
                frame = ([f for f in forwards if "/torch/nn/" not in f.filename] or forwards)[-1]
                self.seen = f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
            return function(*args, **(kwargs or {}))

    with Watch() as watch:
        _run(module, inputs)
    return watch.seen


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


def _trace(module: nn.Module, flat: Sequence[Tensor], names: Names, free: Free) -> bytes:
    import torch

    buffer = io.BytesIO()
    # what tracing warns of are shapes (values were looked for before): constants, or a batch size the comparison finds
    with quiet(), _added_by_index():
        torch.onnx.export(
            module,
            tuple(flat),
            buffer,  # type: ignore[arg-type]  # the tracing exporter takes a buffer
            dynamo=False,
            opset_version=OPSET,
            input_names=names[0],
            output_names=names[1],
            dynamic_axes={
                name: {axis: "batch" if axis == 0 else f"{name}_{axis}" for axis in axes}
                for name, axes in zip([*names[0], *names[1]], [*free[0], *free[1]], strict=True)
            },
        )
    return buffer.getvalue()


@contextlib.contextmanager
def _added_by_index() -> Iterator[None]:
    """Let the tracing exporter write ``index_add`` along dimension 0 as :func:`_index_add` does.

    Its own form is wrong where an index occurs twice.
    """
    import torch
    from torch.onnx import errors

    def index_add(g: Any, into: Any, dim: Any, index: Any, rows: Any, alpha: Any) -> Any:
        if dim.node().t("value") != 0 or alpha.node().t("value") != 1:
            raise errors.SymbolicValueError("index_add along another dimension than 0, or scaled", into)
        if inner := rows.type().dim() - 1:
            axes = g.op("Constant", value_t=torch.arange(1, inner + 1))
            index = g.op("Expand", g.op("Unsqueeze", index, axes), g.op("Shape", rows))
        return g.op("ScatterElements", into, index, rows, axis_i=0, reduction_s="add").setType(into.type())

    torch.onnx.register_custom_op_symbolic("aten::index_add", index_add, OPSET)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic("aten::index_add", OPSET)


def _index_add(into: Any, dim: int, index: Any, rows: Any, alpha: float = 1) -> Any:
    """``index_add`` as a ScatterElements that adds.

    As a ScatterND, which is 20 times as fast for rows of 128, ONNX Runtime adds with several threads at once, and loses
    sums where an index occurs twice.
    """
    import onnxscript

    operators: Any = onnxscript.opset20  # which takes numbers for constants, whatever its types say
    if alpha != 1:
        raise NotExportable("index_add is scaled; add what is multiplied before")
    for axis in range(len(rows.shape)):
        if axis != dim % len(rows.shape):
            index = operators.Unsqueeze(index, [axis])
    return operators.ScatterElements(
        into, operators.Expand(index, operators.Shape(rows)), rows, axis=dim, reduction="add"
    )


def _torch_export(module: nn.Module, flat: Sequence[Tensor], names: Names, free: Free) -> bytes:
    import torch

    # one size in common for all first dimensions is the batch; how others hang together the exporter finds out
    plain = all(axes == [0] for axes in free[0]) and len({leaf.shape[0] for leaf in flat}) == 1
    size: Any = torch.export.Dim("batch") if plain else torch.export.Dim.AUTO
    with quiet():
        program = torch.onnx.export(
            module,
            tuple(flat),
            dynamo=True,
            opset_version=OPSET,
            input_names=names[0],
            output_names=names[1],
            dynamic_shapes=(tuple(dict.fromkeys(axes, size) for axes in free[0]),),
            custom_translation_table={torch.ops.aten.index_add.default: _index_add},
            verbose=False,
        )
    assert program is not None
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporters say of their own inner workings; what they raise is reported."""
    import torch

    names = ("torch.onnx._internal.exporter._registration", "torch.fx.experimental.symbolic_shapes")
    levels = {name: logging.getLogger(name).level for name in names}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    internals: Any = torch._C
    graph_printer = getattr(internals, "_jit_onnx_log", None)
    try:
        # the tracing exporter switches this printer on by mistake (a function tested instead of called)
        internals._jit_onnx_log = lambda *_: None
        torch.backends.mha.set_fastpath_enabled(False)  # its fused layers have no ONNX counterpart
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            for category in (DeprecationWarning, FutureWarning, UserWarning, torch.jit.TracerWarning):
                warnings.filterwarnings("ignore", category=category)
            yield
    finally:
        internals._jit_onnx_log = graph_printer
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _tidy(content: bytes) -> bytes:
    """The graph without stack traces, source paths and recorded intermediate shapes: none is needed to answer."""
    import onnx

    model = onnx.load_model_from_string(content)
    strip(model)
    for node in model.graph.node:
        node.name = node.name.removeprefix("/model/")  # the wrapper's part of the layer path
    return model.SerializeToString(deterministic=True)


def more(inputs: Any) -> Any:
    """The example with one row more, in another order."""
    import torch

    return map_leaves(lambda leaf: torch.cat([leaf.flip(0), leaf[:1]]), inputs)


def difference(graph: Callable[..., Any], module: nn.Module, inputs: Any, tolerance: float) -> float:
    """The largest difference of what ``graph`` and ``module`` answer; more than ``tolerance`` is refused."""
    worst = 0.0
    for (path, one), (_, other) in zip(
        leaves(map_leaves(to_numpy, graph(*inputs))), leaves(_run(module, inputs)), strict=True
    ):
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


def reason(error: BaseException) -> str:
    """What an exporter's innermost error says, without colours and advice on the exporter."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400] or 'no message'}"
