"""Finished networks: other blocks in the place of some of their own, and running them on inputs of any form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sparing.core.errors import InvalidValue, NoEffect
from sparing.core.predictor.tree import map_leaves

Model = TypeVar("Model", bound=nn.Module)


def replace_blocks(model: Model, fn: Callable[[str, nn.Module], nn.Module | None]) -> tuple[Model, list[str]]:
    """Put other modules in the place of some of a network's.

    ``fn(name, module)`` is asked for every submodule of a copy of ``model``, from the outside in, and returns what is
    to stand there, or None to keep it and to be asked for what is inside. It is not asked for what it has just put in.
    A module that stands in several places is asked for once, by its first name, and replaced in all of them.

    Returns (the new model, names of what was replaced); ``model`` itself stays as it is.

    The new model no longer is what its builder makes, so it is deployed as an ONNX graph; build it by a function of
    your own and :func:`sparing.build_model` to save it as weights.

    Raises :class:`NoEffect` when nothing was replaced, and :class:`InvalidValue` when ``fn`` returns something else
    than a module.
    """
    changed = copy.deepcopy(model)
    replaced: list[str] = []
    seen: dict[nn.Module, nn.Module | None] = {}
    kinds: dict[str, int] = {}

    def visit(parent: nn.Module, prefix: str) -> None:
        for child_name, child in list(parent._modules.items()):
            if child is None:
                continue
            name = f"{prefix}{child_name}"
            if child not in seen:
                kinds[type(child).__name__] = kinds.get(type(child).__name__, 0) + 1
                other = fn(name, child)
                if other is not None and not isinstance(other, nn.Module):
                    raise InvalidValue(
                        f"replace_blocks: for {name!r} the function returned a {type(other).__name__}; an nn.Module is "
                        "expected, or None to keep what is there"
                    )
                seen[child] = None if other is child else other
                if seen[child] is None:
                    visit(child, f"{name}.")
            standing = seen[child]
            if standing is not None:
                parent._modules[child_name] = standing
                replaced.append(name)

    visit(changed, "")
    if not replaced:
        asked = ", ".join(f"{number} × {kind}" for kind, number in sorted(kinds.items()))
        raise NoEffect(f"replace_blocks: the function kept every module of {type(model).__name__}: {asked or 'none'}")
    changed.__dict__.pop("_sparing_spec", None)  # its builder makes another network
    return changed, replaced


def arguments_of(item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, named) inputs of a model: of a tensor, a tuple of positional or a mapping of named ones."""

    def tensor(leaf: Any) -> Any:
        return torch.from_numpy(np.require(leaf, requirements=["C", "W"])) if isinstance(leaf, np.ndarray) else leaf

    if isinstance(item, Mapping):
        return (), {str(name): map_leaves(tensor, value) for name, value in item.items()}
    given = tuple(item) if isinstance(item, tuple | list) else (item,)
    return tuple(map_leaves(tensor, value) for value in given), {}


def run_on(model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """What a model answers, without gradients, on the device it is on."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def place(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    positional, named = inputs
    with torch.no_grad():
        return model(*(map_leaves(place, value) for value in positional), **map_leaves(place, named))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode within the block; each module's mode is put back after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def fill(model: nn.Module, state: Mapping[str, Tensor], what: str, ignored: Sequence[str] = ()) -> None:
    """Copy a state dict into a model, without the tensors whose names begin with one of ``ignored``.

    Nothing else may be missing or too much. Raises :class:`InvalidValue` that lists every tensor that does not fit;
    ``what`` begins the message.
    """
    state = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(ignored))}
    own = model.state_dict()
    wrong = [f"{name}: missing" for name in own if name not in state]
    wrong += [f"{name}: not of this model" for name in state if name not in own]
    wrong += [
        f"{name}: {tuple(state[name].shape)}, here {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if wrong:
        raise InvalidValue(
            f"{what}: {len(wrong)} tensors of the checkpoint do not fit this model; {'; '.join(wrong)}. "
            "Build the model with the checkpoint's variant, classes and channels"
        )
    model.load_state_dict(state)
