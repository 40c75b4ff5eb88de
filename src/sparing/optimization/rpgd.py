"""rPGD for networks: gradient steps on unit directions and on scales (Wu et al., NeurIPS 2020, arXiv:1911.07956).

A layer's weight is W[k] = g_k w_k with ‖w_k‖ = 1 (:func:`~sparing.optimization.weight_norm.unit_direction`). One step:

    v = w − η ∇_w,  w ← v/‖v‖,  g ← g − γ ∇_g,  η_k = lr/g_k²

with the old w and g in both. In a loop of your own::

    model = unit_direction(model)
    optimizer = RPGD(model, lr=0.1, g_shrink=0.25, freeze_g_steps=300)     # two phases
    ...
    bake(model)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from sparing.core.errors import InvalidValue, NoEffect, did_you_mean, shown
from sparing.core.step import Stage, Step, step
from sparing.optimization.weight_norm import (
    UnitDirection,
    bake,
    direction_norm,
    parametrization_of,
    parametrized_layers,
    scale_and_direction,
    shrink_scales,
    unit_direction,
)

if TYPE_CHECKING:
    from sparing.core.job import Job

SCALINGS = ("inverse_square", "none")
FLOOR = 1e-4
"""The smallest g² that a step is divided by."""


def rpgd_groups(module: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups of a module for :class:`RPGD`: its layers of scale and direction, and all the rest.

    Args:
        module: with layers under :func:`~sparing.optimization.weight_norm.unit_direction`.
        settings: of these groups, such as ``lr``.

    Raises:
        NoEffect: there is no such layer that is trained.
    """
    layers = [
        (w, g, parametrization_of(layer).dim)
        for layer in parametrized_layers(module).values()
        for g, w in [scale_and_direction(layer)]
        if isinstance(parametrization_of(layer), UnitDirection) and (w.requires_grad or g.requires_grad)
    ]
    if not layers:
        raise NoEffect(f"{type(module).__name__} has no layer under unit_direction that is trained")
    members = {id(tensor) for w, g, _ in layers for tensor in (w, g)}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in members]
    groups: list[dict[str, Any]] = [
        {"params": [p for w, g, _ in layers for p in (w, g)], "dims": [dim for _, _, dim in layers], **settings}
    ]
    return [*groups, {"params": rest, **settings}] if rest else groups


class RPGD(Optimizer):
    """Gradient descent that keeps the directions of layers at length 1; plain SGD on all other parameters.

    Schedules act on ``lr``; γ, the rate of the scales, keeps its ratio to it.

    Args:
        params: a module with layers under :func:`~sparing.optimization.weight_norm.unit_direction`, or groups made by
            :func:`rpgd_groups`.
        lr: η of the directions, before scaling, and the learning rate of the other parameters.
        lr_g: γ of the scales; None: ``lr``. Smaller is nearer to minimum norm, and slower.
        g_scaling: "inverse_square": η_k = lr/max(g_k², 1e-4) for the direction of unit k, so that the tangential part
            of its step is that of SGD on W. "none": η_k = lr, by which W moves g_k² as far: it diverges where g is
            large.
        momentum: μ of m ← μm + ∇, which takes the place of ∇.
        momentum_w: of directions, "project": m is projected onto the tangent at the new w after each step, without
            which it would drift; "reset": directions have no momentum.
        weight_decay: added to the gradient of scales as weight_decay · g. On directions it would mean nothing; others
            have none.
        freeze_g_steps: phase I: so many steps in which scales stay as they are.
        g_shrink: all scales are multiplied by it, now. Weights that are loaded from a training that is resumed have it
            in them already: load them after this.

    Raises:
        InvalidValue: arguments outside these bounds; sparse gradients.
        NoEffect: there is no layer with a unit direction to be trained.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[dict[str, Any]],
        lr: float,
        lr_g: float | None = None,
        g_scaling: Literal["inverse_square", "none"] = "inverse_square",
        momentum: float = 0.0,
        momentum_w: Literal["project", "reset"] = "project",
        weight_decay: float = 0.0,
        freeze_g_steps: int = 0,
        g_shrink: float = 1.0,
    ) -> None:
        check_settings(lr, lr_g, g_scaling, momentum, momentum_w, weight_decay, freeze_g_steps, g_shrink)
        groups: Any = rpgd_groups(params) if isinstance(params, nn.Module) else list(params)
        defaults = {
            "lr": lr,
            "ratio": 1.0 if lr_g is None else lr_g / lr,
            "g_scaling": g_scaling,
            "momentum": momentum,
            "momentum_w": momentum_w,
            "weight_decay": weight_decay,
            "freeze_g_steps": freeze_g_steps,
            "steps": 0,
            "dims": None,
        }
        super().__init__(groups, defaults)
        layers = [layer for group in self.param_groups if group["dims"] is not None for layer in _layers(group)]
        if not layers:
            raise NoEffect("none of these parameters is a unit direction; give the module, or rpgd_groups(module)")
        if g_shrink != 1:
            with torch.no_grad():
                for _, g, _ in layers:
                    g.mul_(g_shrink)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` evaluates the loss anew and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["dims"] is None:
                for parameter in group["params"]:
                    if (slope := _gradient(parameter)) is not None:
                        parameter.sub_(group["lr"] * self._with_momentum(parameter, slope, group["momentum"]))
            else:
                for w, g, dim in _layers(group):
                    self._step_layer(w, g, dim, group)
            group["steps"] += 1
        return loss

    # --- inside

    def _step_layer(self, w: Tensor, g: Tensor, dim: int | None, group: dict[str, Any]) -> None:
        slope_w, slope_g = _gradient(w), _gradient(g)
        wide = torch.promote_types(w.dtype, torch.float32)
        old = g.to(wide, copy=True)
        if slope_g is not None and group["steps"] >= group["freeze_g_steps"]:
            slope_g = slope_g + group["weight_decay"] * g
            g.sub_(group["lr"] * group["ratio"] * self._with_momentum(g, slope_g, group["momentum"]))
        if slope_w is None:
            return
        rate = group["lr"] / (old**2).clamp_min(FLOOR) if group["g_scaling"] == "inverse_square" else group["lr"]
        kept = group["momentum"] if group["momentum_w"] == "project" else 0.0
        v = w.to(wide) - rate * self._with_momentum(w, slope_w, kept).to(wide)
        w.copy_(v / direction_norm(v, dim))
        if kept:
            buffer = self.state[w]["momentum_buffer"]
            product = buffer * w
            along = product.sum() if dim is None else product.sum([d for d in range(w.ndim) if d != dim], keepdim=True)
            buffer.sub_(along * w)

    def _with_momentum(self, parameter: Tensor, slope: Tensor, momentum: float) -> Tensor:
        if not momentum:
            return slope
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = slope.clone()
            return state["momentum_buffer"]
        return state["momentum_buffer"].mul_(momentum).add_(slope)


def _layers(group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, int | None]]:
    """(w, g, dim) of each layer of a group."""
    parameters = group["params"]
    return zip(parameters[::2], parameters[1::2], group["dims"], strict=True)


def _gradient(parameter: Tensor) -> Tensor | None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise InvalidValue(
            f"RPGD takes no sparse gradients; a parameter of shape {tuple(parameter.shape)} has one (an embedding "
            "with sparse=True?)"
        )
    return parameter.grad


def check_settings(
    lr: float,
    lr_g: float | None,
    g_scaling: str,
    momentum: float,
    momentum_w: str,
    weight_decay: float,
    freeze_g_steps: int,
    g_shrink: float,
) -> None:
    """Raise :class:`InvalidValue` for settings that :class:`RPGD` refuses."""
    for name, value in (("lr", lr), ("lr_g", lr_g), ("g_shrink", g_shrink)):
        if value is not None and not 0 < value < math.inf:
            raise InvalidValue(f"{name} = {value}; a finite number > 0 is needed")
    for name, choice, known in (("g_scaling", g_scaling, SCALINGS), ("momentum_w", momentum_w, ("project", "reset"))):
        if choice not in known:
            hint = did_you_mean(choice, known) if isinstance(choice, str) else ""
            raise InvalidValue(f"{name} = {shown(choice)}; one of {', '.join(known)} is needed.{hint}")
    if not 0 <= momentum < 1:
        raise InvalidValue(f"momentum = {momentum}; 0 ≤ momentum < 1 is needed")
    if not 0 <= weight_decay < math.inf:
        raise InvalidValue(f"weight_decay = {weight_decay}; a finite number ≥ 0 is needed")
    if not isinstance(freeze_g_steps, int) or freeze_g_steps < 0:
        raise InvalidValue(f"freeze_g_steps = {shown(freeze_g_steps)}; a whole number ≥ 0 is needed")


# --- the step ------------------------------------------------------------------------------------------------------


@step("rpgd")
class Rpgd(Step):
    """Train unit directions and scales of each layer's weights by projected gradient descent, in one phase or two.

    It is the optimizer of the next training, with a learning rate of its own.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    # masks and scales do not go on one weight
    slots: ClassVar[frozenset[str]] = frozenset({"optimizer", "scales of weights", "pattern of zeros"})
    source: ClassVar[str] = (
        "Wu et al. 2020, Implicit Regularization and Convergence for Weight Normalization, NeurIPS, arXiv:1911.07956"
    )

    lr: float = Field(default=0.1, gt=0)
    """Learning rate of directions (divided by g² of each unit) and of biases, norms and embeddings."""
    lr_g: float | None = Field(default=None, gt=0)
    """Learning rate of scales; None: as ``lr``. Smaller keeps nearer to the minimum norm, and is slower."""
    g_scaling: Literal["inverse_square", "none"] = "inverse_square"
    """"none" leaves the rate of directions undivided, and diverges where scales are large."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """Momentum of all parameters."""
    momentum_w: Literal["project", "reset"] = "project"
    """What becomes of the momentum of directions: projected onto the tangent after each step, or none."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay, on scales only."""
    freeze_g_steps: int = Field(default=0, ge=0)
    """Optimizer steps of the first phase, in which scales stay as they are."""
    g_shrink: float = Field(default=1.0, gt=0)
    """Factor on all scales before the training; 0.25, say, for two phases."""
    dim: int | None = Field(default=0, ge=0)
    """The dimension of a weight along which each index has a scale of its own; 0: outputs. None: one for each layer."""
    exclude: tuple[str, ...] = ()
    """Patterns of names of layers to leave alone, e.g. "head"."""

    def apply(self, job: Job) -> Job:
        """The job, whose next training is made by :class:`RPGD`."""
        layers = parametrized_layers(unit_direction(job.fresh_model(), self.dim, self.exclude))
        shrunk = f", scales × {self.g_shrink:g}" if self.g_shrink != 1 else ""
        frozen = f", scales kept for {self.freeze_g_steps} steps" if self.freeze_g_steps else ""
        job.notes.remarks.append(f"the next training has unit directions in {len(layers)} layers{shrunk}{frozen}")

        def wrap(model: nn.Module) -> tuple[nn.Module, Callable[[], nn.Module]]:
            unit_direction(model, self.dim, self.exclude)
            # here and not by the optimizer, which is made again when a killed training goes on
            shrink_scales(model, self.g_shrink)
            return model, lambda: bake(model)

        def optimizer(model: nn.Module) -> RPGD:
            return RPGD(
                model,
                lr=self.lr,
                lr_g=self.lr_g,
                g_scaling=self.g_scaling,
                momentum=self.momentum,
                momentum_w=self.momentum_w,
                weight_decay=self.weight_decay,
                freeze_g_steps=self.freeze_g_steps,
            )

        return job.replace(training=job.training.adding(model_wraps=wrap, optimizer=optimizer))
