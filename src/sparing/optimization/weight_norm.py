"""Layers whose weights are scale times direction: weight normalisation (WN), and unit directions for rPGD.

Both are parametrisations of torch, with the scales g as ``original0`` and the directions as ``original1``, one g for
each index along ``dim``. :func:`weight_normalize` is W[k] = g_k v_k/‖v_k‖ (Salimans and Kingma 2016, arXiv:1602.07868),
trained by any optimizer. :func:`unit_direction` is W[k] = g_k w_k with ‖w_k‖ = 1 (Wu et al., NeurIPS 2020,
arXiv:1911.07956), trained by :class:`sparing.optimization.rpgd.RPGD`, which keeps the length. :func:`bake` makes the
layers plain again::

    weight_normalize(model)                       # before the optimizer is made
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ...
    bake(model)                                   # before the model is saved or exported
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import Subset

from sparing.core.collation import batches_of
from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, did_you_mean, shown
from sparing.core.randomness import derive_seed
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from sparing.core.job import Job

Model = TypeVar("Model", bound=nn.Module)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers that are taken; biases, norms and embeddings are not reparametrised."""


def direction_norm(v: Float[Tensor, "..."], dim: int | None = 0) -> Float[Tensor, "..."]:
    """‖v_k‖ over all dimensions but ``dim``, which stays (others become 1); over all of them for None, shape ().

    Half types are added up in float32.
    """
    v = v.float() if v.dtype.itemsize < 4 else v
    if dim is None:
        return torch.linalg.vector_norm(v)
    return torch.linalg.vector_norm(v, dim=[d for d in range(v.ndim) if d != dim], keepdim=True)


class WeightNorm(nn.Module):
    """Parametrisation W = v · (g/‖v‖): a weight begins with g = ‖W‖ and v = W, and is then W itself, bit for bit
    (in float32 and float64).

    The gradients are ∇_g = Σ ∇_W ⊙ v/‖v‖ and ∇_v = (g/‖v‖)(∇_W − (∇_g/‖v‖) v).
    """

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        """W of g, with 1 for all sizes but that of ``dim``, and v, in the type of v."""
        norm = direction_norm(v, self.dim)
        return (v * (g / norm)).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(g, v) of a weight."""
        return direction_norm(weight, self.dim).to(weight.dtype), weight

    def extra_repr(self) -> str:
        """As torch shows it."""
        return f"dim={self.dim}"


class UnitDirection(WeightNorm):
    """Parametrisation W = g · w with ‖w_k‖ = 1, which the optimizer has to keep: see :func:`renormalize_`.

    The gradients are ∇_w = g ∇_W, without projection to the tangent, and ∇_g = ⟨∇_W, w⟩.
    """

    def forward(self, g: Tensor, w: Tensor) -> Tensor:
        """W of g, with 1 for all sizes but that of ``dim``, and w."""
        return g * w

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(g, w) of a weight."""
        norm = direction_norm(weight, self.dim)
        return norm.to(weight.dtype), (weight / norm).to(weight.dtype)


def weight_normalize(
    module: Model,
    dim: int | None = 0,
    init: Literal["weight", "data"] = "weight",
    batch: Any = None,
    exclude: Sequence[str] = (),
) -> Model:
    """Weight normalisation on a layer, or on all linear and convolutional layers of a network, in place.

    Layers begin with the weights they have, and ``dim`` and the names of the parameters are those of
    ``torch.nn.utils.parametrizations.weight_norm``. Biases, norms and embeddings stay as they are, and so do weights
    that are shared and layers that have a parametrisation.

    Args:
        module: a layer or a network.
        dim: the dimension along which each index has a g of its own; 0 are a layer's outputs. None: one g for all.
        init: "data": then set scales and biases by one batch, as :func:`init_from_data` does.
        batch: what the module is called with for it: a tensor, a tuple of positional or a dict of named inputs.
        exclude: patterns of names of layers to leave alone, as shells have them.

    Returns: the module.

    Raises:
        InvalidValue: a dimension that a weight does not have, a unit whose weights are all zero (it has no
            direction), a pattern that names no layer, another ``init``, or a batch without need or a need without
            batch.
        NoEffect: no layer is taken; the message says why each was passed over.
    """
    if init not in ("weight", "data"):
        raise InvalidValue(f"init = {shown(init)}; 'weight' or 'data' is needed")
    if (init == "data") != (batch is not None):
        raise InvalidValue(
            f"init = {init!r} {'needs a batch' if init == 'data' else 'looks at no batch; leave it out'}"
        )
    if init == "data" and dim != 0:
        raise InvalidValue(f"init = 'data' sets a scale for each output, which needs dim = 0; it is {dim}")
    _parametrize(module, lambda: WeightNorm(dim), dim, exclude)
    if init == "data":
        try:
            init_from_data(module, lambda: _call(module, batch))
        except BaseException:
            bake(module)
            raise
    return module


def unit_direction(module: Model, dim: int | None = 0, exclude: Sequence[str] = ()) -> Model:
    """Scales and unit directions, for :class:`~sparing.optimization.rpgd.RPGD`, in place; else as weight_normalize.

    Weights are the same but for rounding.
    """
    _parametrize(module, lambda: UnitDirection(dim), dim, exclude)
    return module


def init_from_data(module: nn.Module, run: Callable[[], Any]) -> None:
    """Set scales and biases so that every unit's pre-activations have mean 0 and deviation 1 on one batch.

    With μ and σ of t = Wx over the batch and all positions: g ← g/σ, b ← −μ/σ (Salimans and Kingma 2016, section 3),
    layer after layer in one pass, each on what the layers before it then give. A layer without bias keeps its mean. The
    pass is made in evaluation mode, without gradients. (Directions stay as they are; that paper draws v ~ N(0, 0.05²).)

    Args:
        module: has layers under :func:`weight_normalize` or :func:`unit_direction`, with ``dim=0``.
        run: calls the module on the batch; what it returns is not looked at.

    Raises:
        InvalidValue: a unit whose pre-activation does not vary, or is not finite; one sample; layers of another dim.
        NoEffect: no layer is parametrised, or ``run`` reaches none of them.
    """
    layers = parametrized_layers(module)
    if not layers:
        raise NoEffect(f"{type(module).__name__} has no layer under weight_normalize or unit_direction")
    names = {layer: name for name, layer in layers.items()}
    for name, layer in layers.items():
        if parametrization_of(layer).dim != 0:
            raise InvalidValue(f"{_called(name)}: dim = {parametrization_of(layer).dim}; 0 is needed for data")
    seen: set[nn.Module] = set()

    def hook(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if layer in seen:
            return None
        seen.add(layer)
        channel = output.ndim - 1 if isinstance(layer, nn.Linear) else output.ndim - (layer.weight.ndim - 1)
        shape = [-1 if d == channel else 1 for d in range(output.ndim)]
        t = output if layer.bias is None else output - layer.bias.view(shape)
        rows = t.movedim(channel, 0).flatten(1)
        rows = rows.float() if rows.dtype.itemsize < 4 else rows
        if rows.shape[1] < 2:
            raise InvalidValue(f"{_called(names[layer])}: one value for each unit has no deviation; give more samples")
        sigma, mean = torch.std_mean(rows, dim=1, correction=0)
        bad = ~(torch.isfinite(sigma) & (sigma > 0))
        if bad.any():
            unit = int(bad.nonzero()[0])
            raise InvalidValue(
                f"{_called(names[layer])}: the pre-activation of unit {unit} has deviation {float(sigma[unit])} on "
                "this batch; a finite one above 0 is needed to divide by"
            )
        g, _ = scale_and_direction(layer)
        g.div_(sigma.view(g.shape))
        t = t / sigma.view(shape)
        if layer.bias is not None:
            layer.bias.copy_(-mean / sigma)
            t = t + layer.bias.view(shape)
        return t.to(output.dtype)

    hooks = [layer.register_forward_hook(hook) for layer in layers.values()]
    try:
        with _evaluating(module), torch.no_grad():
            run()
    finally:
        for handle in hooks:
            handle.remove()
    if not seen:
        raise NoEffect("the batch went through none of the layers: run() has to call the module")


@torch.no_grad()
def shrink_scales(module: nn.Module, factor: float) -> None:
    """Multiply every scale g by ``factor`` > 0, as a training in two phases begins with.

    Raises:
        InvalidValue: a factor that is not a finite number above 0.
        NoEffect: no layer is parametrised.
    """
    if not 0 < factor < float("inf"):
        raise InvalidValue(f"factor = {factor}; a finite number > 0 is needed")
    layers = parametrized_layers(module)
    if not layers:
        raise NoEffect(f"{type(module).__name__} has no layer under weight_normalize or unit_direction")
    for layer in layers.values():
        scale_and_direction(layer)[0].mul_(factor)


@torch.no_grad()
def renormalize_(w: Float[Tensor, "..."], dim: int | None = 0) -> None:
    """w_k ← w_k/‖w_k‖ in place: the projection of rPGD, after each optimizer step."""
    w.copy_(w / direction_norm(w, dim))


def bake(module: Model) -> Model:
    """Fold scales and directions into plain weights, in place: outputs are the same bits, and cost no more than before.

    Weights are trainable afterwards if they were; an optimizer made before has to be made anew. Returns the module.

    Raises:
        NoEffect: no layer is parametrised.
        IncompatibleStep: a layer has another parametrisation on top, which has to be folded first.
    """
    layers = parametrized_layers(module)
    if not layers:
        raise NoEffect(f"{type(module).__name__} has no layer under weight_normalize or unit_direction")
    for name, layer in layers.items():
        others = [type(one).__name__ for stack in layer.parametrizations.values() for one in stack]
        if len(others) > 1:
            raise IncompatibleStep(f"{_called(name)} has other parametrisations ({', '.join(others)}); fold them first")
    for layer in layers.values():
        trained = scale_and_direction(layer)[1].requires_grad
        weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=trained)
        # not by torch's remove_parametrizations: copies share the class, which that would break for them
        del layer.parametrizations
        layer.__class__ = type(layer).__bases__[0]
        rest = dict(layer._parameters)
        layer._parameters.clear()
        layer._parameters.update({"weight": weight, **rest})  # first, as the layer was built
    return module


def parametrized_layers(module: nn.Module) -> dict[str, Any]:
    """Layers under :func:`weight_normalize` or :func:`unit_direction`, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if parametrize.is_parametrized(layer, "weight") and isinstance(parametrization_of(layer), WeightNorm)
    }


def parametrization_of(layer: Any) -> WeightNorm:
    """That of the weight of one of :func:`parametrized_layers`."""
    return layer.parametrizations.weight[0]


def scale_and_direction(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """(g, v) of one of :func:`parametrized_layers`."""
    stack = layer.parametrizations.weight
    return stack.original0, stack.original1


# --- inside --------------------------------------------------------------------------------------------------------


def _called(name: str) -> str:
    return f"layer {name!r}" if name else "the layer"


def _parametrize(module: nn.Module, make: Callable[[], WeightNorm], dim: int | None, exclude: Sequence[str]) -> None:
    """Check all layers, then put parametrisations on those that are taken."""
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, LAYERS)}
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InvalidValue(
                f"exclude: {pattern!r} matches no layer.{did_you_mean(pattern, layers)} Layers: "
                f"{', '.join(layers) or 'none'}"
            )
    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        for parameter in part._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    taken: list[nn.Module] = []
    passed: dict[str, str] = {}
    for name, layer in layers.items():
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            passed[name] = "excluded"
        elif parametrize.is_parametrized(layer):
            passed[name] = "it is parametrised already"
        elif others := [owner for owner in owners.get(id(layer.weight), []) if owner != name]:
            passed[name] = f"its weight is that of {', '.join(others)}"
        elif not layer.weight.numel():
            passed[name] = "its weight is empty"
        else:
            _check_weight(name, layer.weight, dim)
            taken.append(layer)
    if not taken:
        why = "; ".join(f"{name or type(module).__name__}: {reason}" for name, reason in passed.items())
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise NoEffect(
            f"{type(module).__name__} has no layer to reparametrise ({kinds}); passed over: {why or 'none is there'}"
        )
    for one in taken:
        parametrize.register_parametrization(one, "weight", make())


def _check_weight(name: str, weight: Tensor, dim: int | None) -> None:
    if dim is not None and not (isinstance(dim, int) and 0 <= dim < weight.ndim):
        raise InvalidValue(
            f"{_called(name)}: dim = {shown(dim)}; 0 … {weight.ndim - 1} of its weight {tuple(weight.shape)}, or None "
            "for one scale of all, is needed"
        )
    norm = direction_norm(weight.detach(), dim).reshape(-1)
    bad = ~(torch.isfinite(norm) & (norm > 0))
    if bad.any():
        unit = int(bad.nonzero()[0])
        which = "its weight" if dim is None else f"unit {unit}"
        raise InvalidValue(
            f"{_called(name)}: {which} has norm {float(norm[unit])}, and so no direction; initialise it with small "
            "random numbers, or exclude the layer"
        )


def _call(module: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return module(**batch)
    return module(*batch) if isinstance(batch, tuple | list) else module(batch)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


# --- the step ------------------------------------------------------------------------------------------------------


@step("weight_norm")
class WeightNormalization(Step):
    """Train scale and direction of each layer's weights apart, with any optimizer, and fold them together after it."""

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    # masks and scales do not go on one weight
    slots: ClassVar[frozenset[str]] = frozenset({"scales of weights", "pattern of zeros"})
    source: ClassVar[str] = "Salimans and Kingma 2016, Weight Normalization, NIPS, arXiv:1602.07868"

    dim: int | None = Field(default=0, ge=0)
    """The dimension of a weight along which each index has a scale of its own; 0: outputs. None: one for each layer."""
    init: Literal["weight", "data"] = "weight"
    """"data": begin with scales and biases by which pre-activations have mean 0 and deviation 1 on one batch."""
    samples: int = Field(default=128, ge=2)
    """Training samples in that batch, drawn by the seed."""
    exclude: tuple[str, ...] = ()
    """Patterns of names of layers to leave alone, e.g. "head"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init == "data" and self.dim != 0:
            raise InvalidValue(f"{self.id}: init = 'data' needs dim = 0; it is {self.dim}")

    def apply(self, job: Job) -> Job:
        """The job, whose next training is made on scales and directions."""
        layers = parametrized_layers(weight_normalize(job.fresh_model(), self.dim, exclude=self.exclude))
        job.notes.remarks.append(f"the next training has weight normalisation in {len(layers)} layers")
        task, train, seed = job.task, job.train, derive_seed(job.seed, "weight_norm")

        def wrap(model: nn.Module) -> tuple[nn.Module, Callable[[], nn.Module]]:
            weight_normalize(model, self.dim, exclude=self.exclude)
            if self.init == "data":
                size = min(self.samples, len(train))
                chosen = np.random.default_rng(seed).choice(len(train), size, replace=False)
                (batch,) = batches_of(Subset(train, chosen.tolist()), size, task.collate)
                init_from_data(model, lambda: task.outputs(model, batch))
            return model, lambda: bake(model)

        return job.replace(training=job.training.adding(model_wraps=wrap))
