"""What a network costs before anything is trained: parameters, multiply-accumulates, memory, time.

Multiply-accumulates do not predict time: :func:`cost_report` therefore gives both, beside each other.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from sparing.core.clock import Timing, clock
from sparing.core.errors import InvalidValue
from sparing.core.predictor.module import MACS_RULE, ModulePredictor, count_operations
from sparing.core.predictor.onnx import to_onnx
from sparing.core.predictor.tree import leaves, map_leaves, to_numpy

if TYPE_CHECKING:
    from torch import nn

Rule = Literal["strict", "fvcore"]
RULES: Mapping[Rule, str] = {
    "strict": MACS_RULE,
    "fvcore": (
        "products of matrix multiplications, convolutions and attention for one sample, 2 for each element of a batch "
        "norm and 5 for each of a layer, group or instance norm (1 and 4 without gain and bias), as the package fvcore "
        "counts a model in evaluation mode; activations, soft-max, pooling, means, sums and bias not counted"
    ),
}
"""Rule → what it counts."""
OPERATORS = {
    "convolution": "conv",
    "mm": "linear",
    "addmm": "linear",
    "bmm": "matmul",
    "baddbmm": "matmul",
    "native_batch_norm": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "miopen_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_batch_norm_no_update": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
}
"""torch's operator → its name in a :class:`MacCount`: products of two matrices are "linear", of batches "matmul"."""


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one sample."""

    rule: str
    """What was counted."""
    total: int
    by_operator: Mapping[str, int]
    """"conv", "linear", "matmul", "batch_norm", "layer_norm" …"""
    by_module: Mapping[str, int]
    """Module name → what it and all inside it take."""


@dataclass(frozen=True)
class CostReport:
    """What :func:`cost_report` found for one sample."""

    model: str
    """Its class."""
    inputs: tuple[tuple[int, ...], ...]
    """Shapes of its inputs."""
    parameters: int
    buffers: int
    """Numbers in the state that are not trained, such as batch norm's statistics."""
    bytes: int
    """Of parameters and buffers."""
    macs: Mapping[str, MacCount]
    """By :data:`RULES`."""
    peak_activation_bytes: int
    """See :func:`peak_activation_bytes`."""
    latency: Timing
    """Seconds of one call at batch 1."""
    runtime: str
    threads: int

    def __str__(self) -> str:
        """Several lines for people."""
        ms = [f"{name} {1e3 * t:.3g} ms" for name, t in (("p50", self.latency.p50), ("p95", self.latency.p95)) if t]
        lines = [
            f"{self.model} on {', '.join('×'.join(map(str, shape)) for shape in self.inputs)}",
            f"parameters   {self.parameters:,} + {self.buffers:,} in buffers: {self.bytes:,} bytes",
            *(f"MACs         {count.total:,} ({name})" for name, count in self.macs.items()),
            f"activations  {self.peak_activation_bytes:,} bytes at the most",
            f"latency      {', '.join(ms)} in {self.runtime} with {self.threads} threads ({self.latency.note})",
            "MACs do not predict latency: compare models by both.",
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON."""
        return asdict(self)


def cost_report(
    model: nn.Module,
    input_size: int | Sequence[int] | None = None,
    *,
    example: tuple[Any, ...] | None = None,
    runtime: Literal["onnxruntime", "torch"] = "onnxruntime",
    threads: int = 1,
    min_seconds: float = 1.0,
    max_seconds: float = 4.0,
) -> CostReport:
    """What one sample costs a network in evaluation mode.

    Args:
        model: any module; it stays as it is.
        input_size: shape of one sample, e.g. (3, 224, 224); one number for colour images of that height and width.
        example: instead of ``input_size``, a tuple of the model's inputs, with a batch of 1 as their first dimension.
        runtime: what the latency is measured in: "onnxruntime", on the exported graph, or "torch", eagerly.
        threads: of the runtime.
        min_seconds: shortest time of measuring the latency.
        max_seconds: longest time of measuring it.

    Raises :class:`InvalidValue` for a size that is none or that the model refuses, and :class:`NotExportable` for a
    model that cannot be written as ONNX (``runtime="torch"`` measures it all the same).
    """
    if runtime not in ("onnxruntime", "torch"):
        raise InvalidValue(f'cost_report: runtime = {runtime!r}; "onnxruntime" or "torch" is expected')
    inputs = _example(input_size, example)
    predictor: Any = ModulePredictor(model, example=inputs, threads=threads)
    if runtime == "onnxruntime":
        predictor = to_onnx(predictor, inputs)
        predictor.set_threads(threads)
    arrays = tuple(map_leaves(to_numpy, item) for item in inputs)
    timing = clock(
        {"call": lambda: predictor(*arrays)}, min_seconds=min_seconds, max_seconds=max_seconds, threads=threads
    )["call"]
    parameters, buffers = list(model.parameters()), list(model.buffers())
    return CostReport(
        model=type(model).__name__,
        inputs=tuple(tuple(leaf.shape) for _, leaf in leaves(inputs) if hasattr(leaf, "shape")),
        parameters=sum(p.numel() for p in parameters),
        buffers=sum(b.numel() for b in buffers),
        bytes=sum(t.nbytes for t in (*parameters, *buffers)),
        macs={rule: mac_count(model, inputs, rule) for rule in RULES},
        peak_activation_bytes=peak_activation_bytes(model, inputs),
        latency=timing,
        runtime=runtime,
        threads=threads,
    )


def mac_count(model: nn.Module, example: tuple[Any, ...], rule: Rule = "strict") -> MacCount:
    """Multiply-accumulates of one sample by one of :data:`RULES`, by operator and by module.

    ``example`` is a tuple of model inputs with the batch as their first dimension; the count is divided by it.
    """
    if rule not in RULES:
        raise InvalidValue(f"mac_count: rule = {rule!r}; one of {', '.join(map(repr, RULES))} is expected")
    counts, batch = count_operations(model, example, _norms() if rule == "fvcore" else None)
    by_operator: dict[str, int] = {}
    for operator, operations in counts.pop("").items():
        name = str(operator).removeprefix("aten.")
        name = OPERATORS.get(name, "matmul" if "attention" in name else name)
        by_operator[name] = by_operator.get(name, 0) + operations
    return MacCount(
        RULES[rule],
        sum(by_operator.values()) // 2 // batch,
        {name: operations // 2 // batch for name, operations in by_operator.items()},
        {name: sum(operations.values()) // 2 // batch for name, operations in counts.items()},
    )


def _norms() -> dict[Any, Callable[..., int]]:
    """Operator → its operations by fvcore's rule (twice what it calls flops, which are multiply-accumulates)."""
    import torch

    def elements(shape: Sequence[int]) -> int:
        return 2 * math.prod(shape)

    def batch_norm(shape: Any, weight: Any, bias: Any, *rest: Any, **_: Any) -> int:
        over_the_batch = any(argument is True for argument in rest)  # "training", after the statistics if there are any
        affine = weight is not None
        return elements(shape) * ((5 if affine else 4) if over_the_batch else (2 if affine else 1))

    def fixed_batch_norm(shape: Any, weight: Any, *_: Any, **__: Any) -> int:
        return elements(shape) * (2 if weight is not None else 1)

    def instance_norm(shape: Any, weight: Any, *_: Any, **__: Any) -> int:
        return elements(shape) * (5 if weight is not None else 4)

    def layer_norm(shape: Any, normalised: Any, weight: Any, *_: Any, **__: Any) -> int:
        return elements(shape) * (5 if weight is not None else 4)

    formulas: dict[str, Callable[..., int]] = {
        "native_batch_norm": batch_norm,
        "cudnn_batch_norm": batch_norm,
        "miopen_batch_norm": batch_norm,
        "_native_batch_norm_legit": batch_norm,
        "_native_batch_norm_legit_no_training": fixed_batch_norm,
        "_batch_norm_no_update": fixed_batch_norm,
        "native_layer_norm": layer_norm,
        "native_group_norm": instance_norm,
    }
    return {
        getattr(torch.ops.aten, name): formula for name, formula in formulas.items() if hasattr(torch.ops.aten, name)
    }


def peak_activation_bytes(model: nn.Module, example: tuple[Any, ...]) -> int:
    """Largest sum of bytes of the inputs, outputs and intermediate tensors that are alive at once in a forward pass.

    In evaluation mode and eager torch, where an operator's input is kept until its output is there. Weights are not
    counted, nor is memory that a kernel takes for itself; a view of a tensor takes none.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    copied = copy.deepcopy(model).eval()
    device = next((p.device for p in copied.parameters()), torch.device("cpu"))

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known = {t.untyped_storage()._cdata for t in _strided((*copied.parameters(), *copied.buffers()))}
            self.now = self.peak = 0

        def see(self, tree: Any) -> None:
            for tensor in _strided(leaf for _, leaf in leaves(tree)):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.known:
                    self.known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.forget, key, size)

        def forget(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            self.see(out)
            return out

    inputs = tuple(
        map_leaves(lambda leaf: leaf.clone().to(device) if isinstance(leaf, torch.Tensor) else leaf, item)
        for item in example
    )
    with torch.no_grad(), Watch() as watch:
        watch.see(inputs)
        copied(*inputs)
    return watch.peak


def _strided(tensors: Any) -> Iterator[Any]:
    import torch

    return (t for t in tensors if isinstance(t, torch.Tensor) and t.layout == torch.strided)


def _example(input_size: int | Sequence[int] | None, example: tuple[Any, ...] | None) -> tuple[Any, ...]:
    import torch

    if (input_size is None) == (example is None):
        raise InvalidValue("cost_report: give either input_size, e.g. (3, 224, 224), or an example tuple of inputs")
    if example is not None:
        sizes = {leaf.shape[0] for _, leaf in leaves(example) if getattr(leaf, "ndim", 0)}
        if sizes != {1}:
            raise InvalidValue(
                f"cost_report: inputs with first dimensions {sorted(sizes)}; a batch of 1 is expected in all of them"
            )
        return tuple(
            map_leaves(lambda leaf: leaf if isinstance(leaf, torch.Tensor) else torch.as_tensor(leaf), item)
            for item in example
        )
    shape = (3, input_size, input_size) if isinstance(input_size, int) else tuple(input_size or ())
    if not shape or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in shape):
        raise InvalidValue(
            f"cost_report: input_size = {input_size!r}; the shape of one sample is expected, e.g. (3, 224, 224)"
        )
    return (torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)),)
