"""Post-training INT8 for torch modules: linear layers that multiply integers, from calibration data alone.

What the ``quantize`` step does to an ONNX graph, this does to a module, layer by layer, in the arithmetic of
:mod:`sparing.engine.arithmetic`; the engine compiles what comes out. Zeros of a pruned model stay zeros.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.compression.calibration import attempts, calibration_batches
from sparing.compression.pruning import prunable_layers, reasons
from sparing.core.errors import InvalidValue, NoEffect, shown
from sparing.core.predictor.tree import leaves
from sparing.engine import arithmetic
from sparing.engine.linear import Int8Linear
from sparing.engine.pack import ATTENTION
from sparing.models.surgery import arguments_of, replace_blocks, run_on

if TYPE_CHECKING:
    from sparing.core.task import Task

Mode = Literal["static", "dynamic"]
Better = Literal["higher", "lower"]
ATTENDED = (*ATTENTION, "q_lin", "k_lin", "v_lin")
"""Last parts of the names of layers whose outputs an attention in integers reads."""


@dataclass(frozen=True)
class PTQReport:
    """What :func:`quantize_ptq` did to each layer, and what it cost."""

    quantised: tuple[str, ...]
    """Layers in INT8."""
    in_float: Mapping[str, str]
    """Every other linear layer → why it computes in floating point."""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """(lo, hi) of the inputs of each layer that was calibrated."""
    damage: Mapping[str, float] = field(default_factory=dict)
    """Layer → mean squared change of the model's outputs when it alone is in INT8, over their variance. Measured when
    layers had to return to floating point."""
    score_float: float | None = None
    """Of the model that was given."""
    score: float | None = None
    """Of the one that is returned."""
    candidates: tuple[tuple[int, float], ...] = ()
    """(layers returned to floating point, score) of each attempt."""

    def __str__(self) -> str:
        text = f"{len(self.quantised)} linear layers in INT8; in floating point: {reasons(self.in_float)}"
        return text if self.score is None else f"{text}; score {self.score:.6g}, {self.score_float:.6g} before"


class DynamicInt8Linear(nn.Module):
    """:class:`~sparing.engine.linear.Int8Linear` whose input range is that of each call, so that it needs no
    calibration.

    One range for all that a call is given: its outputs for a sample depend on the others in the batch.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, per_channel: bool = True) -> None:
        super().__init__()
        weight, scale = arithmetic.quantize_weight(linear.weight.detach().float().cpu().numpy(), per_channel)
        self.register_buffer("weight", torch.from_numpy(weight).to(linear.weight.device))
        self.register_buffer("weight_scale", torch.from_numpy(scale).to(linear.weight.device))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """(…, in) → (…, out)."""
        low, high = x.detach().aminmax() if x.numel() else (0.0, 0.0)
        scale, zero = arithmetic.activation_scale(float(low), float(high))
        rounded = (torch.round(x.float() / scale) + zero).clamp(0, arithmetic.LEVELS) - zero
        y = ((rounded.double() @ self.weight.double().T) * (scale * self.weight_scale)).float()
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def quantize_ptq(
    model: nn.Module,
    calibration: Iterable[Any],
    per_channel: bool = True,
    method: arithmetic.RangeMethod = "minmax",
    tolerance: float = 0.01,
    score: Callable[[nn.Module], float] | None = None,
    *,
    better: Better = "higher",
    mode: Mode = "static",
    percentile: float = 0.1,
    integer_attention: bool = True,
    exclude: Sequence[str] = (),
) -> tuple[nn.Module, PTQReport]:
    """Put linear layers of a trained model into INT8; (a new model in evaluation mode, what was done).

    Of an encoder all linear layers of its blocks, of another model all but the last (as :func:`prunable_layers`
    chooses). Embeddings, norms, softmax, residual sums and the head stay in floating point.

    With a ``score``, the relative loss of the whole is held within ``tolerance``: where it is larger, the damage of
    each layer alone is measured on the calibration data, and layers return to floating point, the most damaging first,
    until the loss is small enough (one more at a time, beyond eight in powers of two; at last all of them).

    Args:
        model: stays as it is.
        calibration: inputs of the model, each a tensor or array, a tuple of positional inputs, or a mapping of named
            ones. Some hundred samples like those to come.
        per_channel: a weight scale for each output instead of one for the tensor.
        method: how observed values become a range: "minmax", "percentile" or "kl".
        tolerance: accepted loss of the score, as a share of it, ≥ 0.
        score: model → a number; without one there is no fall-back.
        better: whether a higher or a lower score is the better.
        mode: "static": ranges from calibration; "dynamic": each call's own (:class:`DynamicInt8Linear`).
        percentile: what "percentile" cuts off at each end, in percent of all calibration values.
        integer_attention: round the outputs of query, key and value layers as well, as an attention in integers does.
        exclude: patterns of names of layers that stay in floating point.

    Raises:
        InvalidValue: empty calibration data, or values that are NaN or infinite, naming the layer.
        NoEffect: the model has no linear layer that could be quantised.
    """
    _check(method, tolerance, better, mode)
    inputs = [arguments_of(item) for item in calibration]
    if not inputs and mode == "static":
        raise InvalidValue("calibration is empty; inputs of the model are needed, some hundred samples of them")
    source = _copied(model)
    taken, passed = _layers(source, exclude)
    ranges: dict[str, tuple[float, float]] = {}
    outputs: dict[str, tuple[float, float]] = {}
    if mode == "static":
        ranges, outputs = _calibrated(source, inputs, list(taken), method, percentile, integer_attention)
        for name in [name for name in taken if name not in ranges]:
            del taken[name]
            passed[name] = "the calibration inputs do not reach it"
    if not taken:
        raise NoEffect(f"no linear layer of {type(model).__name__} to quantise; passed over: {reasons(passed)}")
    made: dict[str, nn.Module] = {}
    for name, layer in taken.items():
        try:
            made[name] = (
                Int8Linear.of(layer, ranges[name], outputs.get(name), per_channel)
                if mode == "static"
                else DynamicInt8Linear(layer, per_channel)
            ).to(layer.weight.device)
        except InvalidValue as error:
            raise InvalidValue(f"{name}: {error}") from None

    def with_int8(names: Iterable[str]) -> nn.Module:
        chosen = set(names)
        if not chosen:
            return _copied(source)
        return replace_blocks(source, lambda name, _: made[name] if name in chosen else None)[0].eval()

    found = with_int8(made)
    if score is None:
        return found, PTQReport(tuple(made), passed, ranges)
    base, scored = _scored(score, source), _scored(score, found)
    candidates, damage, returned = [(0, scored)], {}, []

    def too_bad(value: float) -> bool:
        loss = base - value if better == "higher" else value - base
        return loss > tolerance * abs(base)

    if too_bad(scored):
        damage = {name: _damage(source, with_int8([name]), inputs) for name in made}
        order = sorted(made, key=lambda name: -damage[name])
        for count in [*attempts(len(order)), len(order)]:
            returned = order[:count]
            found = with_int8(name for name in made if name not in returned)
            scored = _scored(score, found)
            candidates.append((count, scored))
            if not too_bad(scored):
                break
    passed |= {name: f"returned: alone it changes the outputs by {damage[name]:.3g}" for name in returned}
    kept = tuple(name for name in made if name not in returned)
    return found, PTQReport(kept, passed, ranges, damage, base, scored, tuple(candidates))


def _check(method: Any, tolerance: Any, better: Any, mode: Any) -> None:
    for name, value, known in (
        ("method", method, ("minmax", "percentile", "kl")),
        ("better", better, ("higher", "lower")),
        ("mode", mode, ("static", "dynamic")),
    ):
        if value not in known:
            raise InvalidValue(f"{name} = {shown(value)}; one of {', '.join(known)} is expected")
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < math.inf:
        raise InvalidValue(f"tolerance = {shown(tolerance)}; a share of the score, 0 or more, is expected")


def _copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()


def _layers(model: nn.Module, exclude: Sequence[str]) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The layers to quantise, and why others are passed over."""
    taken, passed = prunable_layers(model, exclude)
    passed = {name: reason for name, reason in passed.items() if isinstance(model.get_submodule(name), nn.Linear)}
    found: dict[str, nn.Linear] = {}
    for name, layer in taken.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            passed[name] = f"torch's {type(parent).__name__} takes its weight without calling it"
        elif isinstance(layer, nn.Linear):
            found[name] = layer
    return found, passed


def _calibrated(
    model: nn.Module, inputs: list[Any], names: list[str], method: Any, percentile: float, integer_attention: bool
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Ranges of the layers' inputs, and of the outputs of those that feed an attention.

    Extremes are kept while all inputs run once. The other methods want all values at once: they are collected for the
    layers of one parent at a time, so that memory holds no more than those.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault("" if method == "minmax" else name.rpartition(".")[0], []).append(name)
    ranges: dict[str, tuple[float, float]] = {}
    outputs: dict[str, tuple[float, float]] = {}
    for group in groups.values():
        seen: dict[tuple[str, str], list[np.ndarray]] = {}
        hooks = []
        for name in group:
            attends = integer_attention and name.rpartition(".")[2] in ATTENDED
            watching = _watch(name, ("input", "output") if attends else ("input",), method == "minmax", seen)
            hooks.append(model.get_submodule(name).register_forward_hook(watching))
        try:
            for item in inputs:
                run_on(model, item)
        finally:
            for handle in hooks:
                handle.remove()
        for (name, side), parts in seen.items():
            found = arithmetic.activation_range(np.concatenate(parts), method, percentile)
            (ranges if side == "input" else outputs)[name] = found
    return ranges, outputs


def _watch(name: str, sides: Sequence[str], extremes: bool, seen: dict[tuple[str, str], list[np.ndarray]]) -> Any:
    """A forward hook that adds the values of a layer's sides, or only their extremes, to ``seen``."""

    def hook(module: nn.Module, given: tuple[Any, ...], answer: Tensor) -> None:
        for side in sides:
            values = (given[0] if side == "input" else answer).detach().float().cpu().numpy().ravel()
            if not np.isfinite(values).all():
                raise InvalidValue(
                    f"{name}: its {side} holds NaN or infinity on the calibration data; finite numbers are needed"
                )
            if values.size:
                kept = np.array([values.min(), values.max()]) if extremes else values
                seen.setdefault((name, side), []).append(kept)

    return hook


def _scored(score: Callable[[nn.Module], float], model: nn.Module) -> float:
    value = float(score(model))
    if not math.isfinite(value):
        raise InvalidValue(f"score returned {value}; a finite number is needed")
    return value


def _flat(tree: Any) -> Tensor:
    found = [
        leaf.double().flatten() for _, leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    return torch.cat(found) if found else torch.zeros(0)


def _damage(model: nn.Module, changed: nn.Module, inputs: list[Any]) -> float:
    """Mean squared change of all outputs, over their variance."""
    reference = torch.cat([_flat(run_on(model, item)) for item in inputs])
    moved = torch.cat([_flat(run_on(changed, item)) for item in inputs])
    return float((moved - reference).square().mean() / reference.var().clamp(min=1e-12))


def calibration_inputs(task: Task, model: nn.Module, dataset: Any, samples: int = 512) -> list[tuple[Any, ...]]:
    """Inputs of ``model`` for up to ``samples`` items spread evenly over ``dataset``, as the task feeds its models.

    Raises :class:`~sparing.core.errors.DataError` for an empty data set.
    """
    recorder = _Recorder(model)
    for batch in calibration_batches(task, dataset, samples):
        task.outputs(recorder, batch)
    return recorder.seen


class _Recorder(nn.Module):
    """Stands in for a model and remembers what it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = _copied(model)
        self.seen: list[tuple[Any, ...]] = []

    def forward(self, *inputs: Any) -> Any:
        self.seen.append(inputs)
        return run_on(self.model, arguments_of(inputs))
