"""A client whose model is elsewhere: a pretended device that refuses, as a GPU does, what is on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from federated.test_clients import BLOCKS, VARIANTS, client, named, same, samples

AWAY = torch.device("xpu")
MAY_MIX = {"copy_", "__getitem__", "__get__", "__set__"}


class Elsewhere(Tensor):
    """Says that it is away; so is what is computed with it."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return AWAY

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        twin = self.detach().clone()
        return nn.Parameter(twin, self.requires_grad) if isinstance(self, nn.Parameter) else twin

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function.__name__, kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        mixed = any(type(each) is Tensor and each.ndim for each in tensors)
        assert not mixed or name in MAY_MIX, f"{name}: tensors on two devices"
        assert name != "numpy", "numpy: of a tensor that is away"
        with torch._C.DisableTorchFunctionSubclass():
            if name == "cpu" or (name == "to" and str(kwargs.get("device", args[1:2] and args[1])) == "cpu"):
                return args[0].as_subclass(Tensor).clone()
            if name == "to":
                kinds = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, torch.dtype)]
                return marked(function(args[0], *kinds)) if kinds else args[0]
            return marked(function(*args, **kwargs))


def marked(found: Any) -> Any:
    return tree_map(lambda each: each.as_subclass(Elsewhere) if type(each) is Tensor else each, found)


def without(given: Any) -> Any:
    """Arguments but for a device."""
    if isinstance(given, dict):
        return {name: each for name, each in given.items() if not isinstance(each, torch.device)}
    return tuple(each for each in given if not isinstance(each, torch.device))


class Pretended(TorchFunctionMode):
    """Takes tensors away when a device is asked for."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if AWAY in [*kwargs.values(), *args[1:]] and not any(isinstance(each, Elsewhere) for each in args):
            args, kwargs = without(args), without(kwargs)
            found = args[0] if function is Tensor.to and len(args) == 1 else function(*args, **kwargs)
            return found.as_subclass(Elsewhere)
        return function(*args, **kwargs)


def moved(made: Any) -> Any:
    """The client with its models away."""
    packnet = getattr(made, "packnet", None)
    for module in [*made.model.modules(), *(packnet.model.modules() if packnet else ())]:
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().as_subclass(Elsewhere)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.as_subclass(Elsewhere))
    return made


def on_the_cpu(tensors: dict[str, Tensor]) -> bool:
    return all(type(each) is Tensor for each in tensors.values())


@pytest.mark.parametrize(("method", "fields"), VARIANTS, ids=named)
def test_a_client_works_where_its_model_is_and_what_leaves_it_is_on_the_cpu(method: str, fields: dict[str, Any]):
    told = []
    for there in (False, True):
        with Pretended():
            made = moved(client(method, **fields)) if there else client(method, **fields)
            weights = {name: tensor.as_subclass(Tensor) for name, tensor in client(method).model.state_dict().items()}
            for t in range(3):
                made.start_task(t, samples(t), BLOCKS[t])
                weights = made.train_round(weights, t).weights
                assert on_the_cpu(weights)
                made.end_task(t)
                assert on_the_cpu(made.state())
                again = moved(client(method, **fields)) if there else client(method, **fields)
                again.load_state(copy.deepcopy(made.state()))
                made = again
            told.append((weights, made.evaluate(0, samples(0), weights)))
    assert same(told[0][0], told[1][0])
    assert told[0][1] == told[1][1]
