"""Patches that switch a backdoor on: fixed (NAIVEATTACK) or optimised with the network (DOORPING).

Liu, Li, Backes, Shen and Zhang, "Backdoor Attacks Against Dataset Distillation", NDSS 2023, arXiv 2301.01197. For
evaluating defences on one's own data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from sparing.audits.backdoor.layers import hooked, linear_layer
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.core.errors import InvalidValue
from sparing.models.surgery import evaluating

Position = Literal["top_left", "top_right", "bottom_left", "bottom_right"] | tuple[int, int]

LEARNING_RATE, BETAS = 0.08, (0.9, 0.99)
ENOUGH = 0.5
"""A loss below this ends an update."""


class PatchTrigger:
    """A square patch at a fixed place: images become x·(1 - mask) + mask·image.

    Args:
        image_shape: (channels, height, width) of the images.
        pixels: the space in which they are given.
        size: side of the patch in pixels.
        position: a corner, from which ``margin`` pixels stay free, or (row, column) of the patch's upper left pixel.
        value: "white", "random" (whole numbers 1 to 255 for each pixel and channel, drawn from ``seed``) or 8-bit
            pixels (channels, size, size).

    Raises :class:`InvalidValue` for a patch that does not lie inside the image or has other pixels than that.

    Attributes:
        mask: (channels, height, width), 1 on the patch.
        image: (channels, height, width), the patch on a canvas of pixel 0, normalised; only the patch counts.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        pixels: PixelSpace,
        size: int = 2,
        position: Position = "bottom_right",
        margin: int = 1,
        value: Literal["white", "random"] | np.ndarray | Tensor = "white",
        seed: int = 0,
    ) -> None:
        channels, height, width = image_shape
        if len(pixels.mean) != channels:
            raise InvalidValue(f"trigger: images of {channels} channels in a space of {len(pixels.mean)}")
        if isinstance(position, str):
            vertical, _, horizontal = position.partition("_")
            if vertical not in ("top", "bottom") or horizontal not in ("left", "right"):
                raise InvalidValue(
                    f"trigger: position = {position!r}; top_left, top_right, bottom_left, bottom_right or (row, column)"
                )
            row = margin if vertical == "top" else height - margin - size
            column = margin if horizontal == "left" else width - margin - size
        else:
            row, column = position
        if size < 1 or row < 0 or column < 0 or row + size > height or column + size > width:
            raise InvalidValue(
                f"trigger: a patch of {size} x {size} pixels at row {row}, column {column} is not inside an image of "
                f"{height} x {width}"
            )
        self.image_shape, self.pixels = (channels, height, width), pixels
        self.size, self.row, self.column = size, row, column
        shape = (channels, size, size)
        if isinstance(value, str):
            if value not in ("white", "random"):
                raise InvalidValue(f"trigger: value = {value!r}; white, random or an array of 8-bit pixels is expected")
            patch = torch.full(shape, 255, dtype=torch.uint8)
            if value == "random":
                generator = torch.Generator().manual_seed(seed)
                patch = torch.randint(1, 256, shape, generator=generator).to(torch.uint8)
        else:
            patch = torch.as_tensor(value)
            if patch.dtype != torch.uint8 or patch.shape != shape:
                raise InvalidValue(
                    f"trigger: a patch of {patch.dtype}, shape {tuple(patch.shape)}; uint8 of shape {shape} is expected"
                )
        self.mask = torch.zeros(self.image_shape)
        self.mask[:, row : row + size, column : column + size] = 1
        canvas = torch.zeros(self.image_shape, dtype=torch.uint8)
        canvas[:, row : row + size, column : column + size] = patch
        self.image = pixels.from_uint8(canvas)

    @property
    def patch(self) -> Float[Tensor, "c size size"]:
        """The patch itself, in the images' space."""
        return self.image[:, self.row : self.row + self.size, self.column : self.column + self.size]

    def apply(self, x: Float[Tensor, "*n c h w"]) -> Float[Tensor, "*n c h w"]:
        """Copies of normalised images that carry the patch."""
        if x.shape[-3:] != self.image_shape:
            raise InvalidValue(f"trigger: images of shape {tuple(x.shape)}; (…, {self.image_shape}) is expected")
        mask, image = self.mask.to(x), self.image.to(x)
        return x * (1 - mask) + mask * image

    def to_uint8(self) -> UInt8[Tensor, "c size size"]:
        """The patch in 8-bit pixels; :class:`InvalidValue` when its values are no pixels."""
        return self.pixels.to_uint8(self.patch)

    def clamped(self) -> PatchTrigger:
        """The same patch at the same place, each value moved to the nearest valid pixel, in whole 8-bit steps."""
        pixels = self.pixels.to_uint8(self.pixels.clamp(self.patch))
        return PatchTrigger(self.image_shape, self.pixels, self.size, (self.row, self.column), value=pixels)

    def describe(self) -> dict[str, Any]:
        """Place, size, range and [0, 1] pixels of the patch, for a report."""
        unit = self.pixels.to_unit(self.patch)
        return {
            "kind": "patch",
            "size": self.size,
            "row": self.row,
            "column": self.column,
            "lowest": float(unit.min()),
            "highest": float(unit.max()),
            "valid_pixels": self.pixels.excess(self.patch) <= 1e-3,
            "patch": unit.tolist(),
        }

    @classmethod
    def described(cls, image_shape: Sequence[int], pixels: PixelSpace, description: Mapping[str, Any]) -> PatchTrigger:
        """The trigger that :meth:`describe` told of, in any space; its values are not changed if they are no pixels."""
        made = PatchTrigger(image_shape, pixels, description["size"], (description["row"], description["column"]))
        unit = torch.zeros(made.image_shape)
        rows, columns = slice(made.row, made.row + made.size), slice(made.column, made.column + made.size)
        unit[:, rows, columns] = torch.tensor(description["patch"])
        made.image = pixels.normalise(unit)
        return made


@dataclass(frozen=True)
class TriggerUpdate:
    """What one call of :func:`update_trigger` did."""

    image: Float[Tensor, "c h w"]
    """The trigger after it."""
    units: tuple[int, ...]
    """Units whose activation was driven up; none when all were dead."""
    start: tuple[float, ...]
    """Their activations before."""
    losses: tuple[float, ...]
    """One for each round, evaluated before its step."""
    steps: int
    moved: bool
    """False when the trigger is what it was: the units were dead, or the first loss was small enough."""


def rank_units(weight: Float[Tensor, "units inputs"]) -> Int[Tensor, " units"]:
    """Units of a linear layer by the sum of the absolute values of their incoming weights, largest first."""
    return weight.detach().abs().sum(dim=1).argsort(descending=True, stable=True)


def activations(model: nn.Module, layer: nn.Linear, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n units"]:
    """Outputs of ``layer`` after a ReLU, with gradients."""
    found: list[Tensor] = []
    # the network's own ReLU may work in place: it must not be left to chance which of the two is seen
    with hooked({"layer": layer}, lambda _, __, output: found.append(torch.relu(output))):
        model(x)
    return found[-1]


class Driven(NamedTuple):
    """What :func:`drive_units` did."""

    values: Tensor
    """As they became."""
    units: Int[Tensor, " k"]
    start: Float[Tensor, " k"]
    """Activations of these units to begin with."""
    losses: list[float]
    steps: int


def check_driving(topk: int, alpha: float, max_steps: int) -> None:
    """Raise :class:`InvalidValue` for settings that :func:`drive_units` does not take."""
    if topk < 1 or max_steps < 1 or alpha <= 0:
        raise InvalidValue(f"topk = {topk}, max_steps = {max_steps}, alpha = {alpha}; at least 1, 1 and above 0")


def drive_units(
    activations: Callable[[Tensor], Tensor],
    values: Tensor,
    weight: Float[Tensor, "units inputs"],
    topk: int,
    alpha: float,
    max_steps: int,
    skip_dead: bool,
    mask: Tensor | None = None,
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Driven:
    """Drive the units of largest incoming weight to ``alpha`` times their activation by changing ``values``.

    Adam minimises the mean squared distance until it is below 0.5, or for ``max_steps`` steps.

    Args:
        activations: values → activation of each unit, (units,).
        values: of any shape.
        weight: of the layer whose units they are.
        topk: how many.
        alpha: times their activation is the goal.
        max_steps: of Adam.
        skip_dead: pass over units that are not active, which have no gradient.
        mask: multiplies the gradient.
        keep: values after a step → as they may be.
    """
    moving = values.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([moving], lr=LEARNING_RATE, betas=BETAS)
    losses, steps = list[float](), 0
    with torch.enable_grad():
        before = activations(moving).detach()
        units = rank_units(weight)
        if skip_dead:
            units = units[before[units] > 0]
        units = units[:topk]
        target = alpha * before[units]
        for _ in range(max_steps if len(units) else 0):
            loss = (activations(moving)[units] - target).square().mean()
            losses.append(float(loss.detach()))
            if losses[-1] < ENOUGH:
                break
            (gradient,) = torch.autograd.grad(loss, moving)
            moving.grad = gradient if mask is None else gradient * mask
            optimizer.step()
            steps += 1
            if keep is not None:
                with torch.no_grad():
                    moving.copy_(keep(moving))
    return Driven(moving.detach(), units, before[units], losses, steps)


def update_trigger(
    model: nn.Module,
    image: Float[Tensor, "c h w"],
    mask: Float[Tensor, "c h w"],
    layer: int = -2,
    topk: int = 1,
    alpha: float = 10.0,
    max_steps: int = 1000,
    clip: PixelSpace | None = None,
    skip_dead: bool = False,
) -> TriggerUpdate:
    """Drive the most important units of a layer to ``alpha`` times their activation by changing the patch (DOORPING).

    The units are the ``topk`` of largest incoming weight among the linear layer number ``layer`` (of the layers that
    have weights, in forward order). Adam minimises the mean squared distance of their activations for the trigger
    image alone from ``alpha`` times what they were, until it is below 0.5 or for ``max_steps`` steps.

    ``clip`` keeps the patch inside the valid pixels of that space; without it, as in the paper's code, values leave
    the range of pixels. ``skip_dead`` passes over units that the trigger does not activate, which have no gradient;
    without it such units leave the trigger as it is.

    The network's parameters get no gradients and its mode stays as it was. :class:`InvalidValue` when ``layer`` is
    not a Linear, or for ``topk``, ``alpha`` or ``max_steps`` below 1, 0 and 1.
    """
    check_driving(topk, alpha, max_steps)
    start = image.detach()[None]
    linear = linear_layer(model, start, layer)
    if topk > linear.out_features:
        raise InvalidValue(f"topk = {topk}; layer {layer} has {linear.out_features} units")
    mask = mask.to(start)

    def keep(trigger: Tensor) -> Tensor:
        return trigger if clip is None else torch.where(mask > 0, clip.clamp(trigger), trigger)

    with evaluating(model):
        done = drive_units(
            lambda trigger: activations(model, linear, trigger)[0],
            *(start, linear.weight, topk, alpha, max_steps, skip_dead, mask, keep),
        )
    after = done.values[0]
    return TriggerUpdate(
        image=after,
        units=tuple(done.units.tolist()),
        start=tuple(done.start.tolist()),
        losses=tuple(done.losses),
        steps=done.steps,
        moved=bool((after != image).any()),
    )


@dataclass
class TriggerHistory:
    """Counts over all updates of a trigger."""

    updates: int = 0
    moved: int = 0
    steps: int = 0
    images: list[Tensor] = field(default_factory=list)
    """The trigger, (C, H, W), or a subgraph's rows after each update that moved it: a defence fitted to one of them may
    miss another."""

    def add(self, values: Tensor, steps: int, moved: bool) -> None:
        """Count an update of ``steps`` steps that ended at ``values``."""
        self.updates += 1
        self.moved += moved
        self.steps += steps
        if moved:
            self.images.append(values.clone())

    def counts(self) -> dict[str, int]:
        """Updates, those that moved the trigger, and steps, for a report."""
        return {"updates": self.updates, "moved": self.moved, "steps": self.steps}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return self.counts() | {"images": [image.clone() for image in self.images]}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> TriggerHistory:
        """From a :meth:`state_dict`, which may hold more."""
        return cls(state["updates"], state["moved"], state["steps"], list(state["images"]))


class OptimisedTrigger(PatchTrigger):
    """A patch that :meth:`update` fits to a network again and again (DOORPING).

    As :class:`PatchTrigger`, started from random pixels, with the settings of :func:`update_trigger`. The paper's code
    is ``clip=None, skip_dead=False``; the default keeps the patch a picture and never waits for a dead unit.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        pixels: PixelSpace,
        size: int = 2,
        position: Position = "bottom_right",
        margin: int = 1,
        value: Literal["white", "random"] | np.ndarray | Tensor = "random",
        seed: int = 0,
        *,
        layer: int = -2,
        topk: int = 1,
        alpha: float = 10.0,
        max_steps: int = 1000,
        clip: Literal["valid"] | None = "valid",
        skip_dead: bool = True,
    ) -> None:
        super().__init__(image_shape, pixels, size, position, margin, value, seed)
        if clip not in ("valid", None):
            raise InvalidValue(f"trigger: clip = {clip!r}; 'valid' or None is expected")
        self.layer, self.topk, self.alpha, self.max_steps = layer, topk, alpha, max_steps
        self.clip, self.skip_dead = clip, skip_dead
        self.history = TriggerHistory()

    def update(self, model: nn.Module) -> TriggerUpdate:
        """Fit the patch to ``model``; :attr:`history` counts what happened."""
        device = next((p.device for p in model.parameters()), self.image.device)
        done = update_trigger(
            model,
            self.image.to(device),
            self.mask.to(device),
            self.layer,
            self.topk,
            self.alpha,
            self.max_steps,
            self.pixels if self.clip == "valid" else None,
            self.skip_dead,
        )
        self.image = done.image.to(self.image.device)
        self.history.add(self.image, done.steps, done.moved)
        return done

    def describe(self) -> dict[str, Any]:
        """Also the settings, the number of updates and how many of them moved the patch."""
        settings = ("layer", "topk", "alpha", "max_steps", "clip", "skip_dead")
        return super().describe() | {name: getattr(self, name) for name in settings} | self.history.counts()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"image": self.image.clone(), **self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`."""
        self.image = state["image"].clone()
        self.history = TriggerHistory.of(state)
