"""Finding layers of a network by the order in which an input passes them, and reading what they put out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.surgery import evaluating


@contextmanager
def hooked(modules: dict[str, nn.Module], seen: Callable[[str, Any, Any], None]) -> Iterator[None]:
    """Within the block ``seen(name, inputs, output)`` is called after each run of the ``modules``."""
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: seen(name, inputs, output))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weight_layers(model: nn.Module, example: Tensor) -> list[tuple[str, nn.Module]]:
    """(name, module) of every module that owns a parameter ``weight``, in the order in which ``example`` meets them."""
    owners = {name: module for name, module in model.named_modules() if module._parameters.get("weight") is not None}
    order: list[str] = []

    def note(name: str, inputs: Any, output: Any) -> None:
        if name not in order:
            order.append(name)

    with torch.no_grad(), evaluating(model), hooked(owners, note):
        model(example)
    return [(name, owners[name]) for name in order]


def linear_layer(model: nn.Module, example: Tensor, layer: int) -> nn.Linear:
    """The linear layer number ``layer`` among the :func:`weight_layers` (negative: from the end).

    Raises :class:`InvalidValue` when there is no such layer or when it is of another kind.
    """
    found = weight_layers(model, example)
    names = ", ".join(f"{name} ({type(module).__name__})" for name, module in found)
    if not -len(found) <= layer < len(found):
        raise InvalidValue(f"layer = {layer}; the network has {len(found)} layers with weights: {names}")
    name, module = found[layer]
    if not isinstance(module, nn.Linear):
        raise InvalidValue(f"layer = {layer} is {name}, a {type(module).__name__}; a Linear is expected among {names}")
    return module


def last_linear(model: nn.Module, example: Tensor) -> nn.Linear:
    """The layer that makes the logits; :class:`InvalidValue` when the last layer with weights is not linear."""
    return linear_layer(model, example, -1)


def logits_and_features(
    model: nn.Module, x: Float[Tensor, "n c h w"], head: nn.Linear
) -> tuple[Float[Tensor, "n classes"], Float[Tensor, "n units"]]:
    """(logits, what ``head`` is given) of images: the activation of the penultimate layer, with gradients."""
    inputs: list[Tensor] = []
    with hooked({"head": head}, lambda _, given, __: inputs.append(given[0])):
        logits = model(x)
    return logits, inputs[-1]


@torch.no_grad()
def predict(model: nn.Module, x: Float[Tensor, "n c h w"], batch: int = 500) -> Float[Tensor, "n classes"]:
    """Logits in eval mode, without gradients."""
    with evaluating(model):
        return torch.cat([model(part) for part in x.split(batch)])


@torch.no_grad()
def penultimate_features(model: nn.Module, x: Float[Tensor, "n c h w"], batch: int = 500) -> Float[Tensor, "n units"]:
    """Activations of the penultimate layer in eval mode, without gradients."""
    head = last_linear(model, x[:1])
    with evaluating(model):
        return torch.cat([logits_and_features(model, part, head)[1] for part in x.split(batch)])


def block_ends(model: nn.Module, example: Tensor) -> list[tuple[str, nn.Module]]:
    """(name, module) whose outputs are the blocks' of a convolutional network, in order.

    A block is one convolution with what follows it up to the next; its end is the last module in it that puts out
    images of features. :class:`InvalidValue` for a network without convolutions.
    """
    leaves = {name: module for name, module in model.named_modules() if not any(module.children())}
    passed: list[str] = []

    def note(name: str, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            passed.append(name)

    with torch.no_grad(), evaluating(model), hooked(leaves, note):
        model(example)
    starts = [i for i, name in enumerate(passed) if isinstance(leaves[name], nn.Conv2d)]
    if not starts:
        raise InvalidValue(f"{type(model).__name__} has no convolution; blocks are cut before convolutions")
    ends = [passed[i - 1] for i in starts[1:]] + [passed[-1]]
    if len(set(ends)) < len(ends):
        shared = next(name for name in ends if ends.count(name) > 1)
        raise InvalidValue(f"{type(model).__name__} ends several blocks by the one module {shared}; give each its own")
    return [(name, leaves[name]) for name in ends]


def block_outputs(
    model: nn.Module, x: Float[Tensor, "n c h w"], ends: list[tuple[str, nn.Module]]
) -> tuple[Float[Tensor, "n classes"], list[Float[Tensor, "n _ _ _"]]]:
    """(logits, output of each block) of images, with gradients."""
    found: dict[str, Tensor] = {}

    def note(name: str, inputs: Any, output: Any) -> None:
        found[name] = output

    with hooked(dict(ends), note):
        logits = model(x)
    return logits, [found[name] for name, _ in ends]
