"""Things of every kind that has a fingerprint, made anew at each call, and some that have none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, StrEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset


class Colour(Enum):
    RED = 1
    BLUE = 2


class Word(StrEnum):
    RED = "red"


class Pair(NamedTuple):
    one: Any
    other: Any


@dataclass(frozen=True)
class Settings:
    rate: float = 0.1
    inner: Any = None


class Own:
    def __init__(self, text: str) -> None:
        self.text = text

    def fingerprint(self) -> str:
        return self.text


class Net(nn.Module):
    def __init__(self, width: int = 2, act: Callable[[Any], Any] = torch.relu) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.width, self.act = width, act
        nn.init.constant_(self.layer.weight, 0.5)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Any) -> Any:
        return self.act(self.layer(x)) * self.width


class Flipped(TensorDataset):
    def __init__(self, *tensors: torch.Tensor, how: Any = None) -> None:
        super().__init__(*tensors)
        self.how = how


def closure(value: Any) -> Callable[[], Any]:
    return lambda: value


def with_default(value: int) -> Callable[..., Any]:
    def function(*, key: int = value) -> int:
        return key

    return function


def method_of(text: str) -> Callable[[], str]:
    return Own(text).fingerprint


def cyclic(depth: int = 0) -> list[Any]:
    inner: list[Any] = [1]
    outer = [0, inner]
    inner.append((inner, outer)[depth])
    return outer


def calling_itself(n: int) -> int:
    return n and calling_itself(n - 1)


def dense() -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 4)


def data() -> TensorDataset:
    return TensorDataset(torch.arange(6.0), torch.arange(6))


def quantized() -> torch.Tensor:
    return torch._empty_affine_quantized([2], scale=1.0, zero_point=0, dtype=torch.quint8)


THINGS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "true": lambda: True,
    "false": lambda: False,
    "one": lambda: 1,
    "minus one": lambda: -1,
    "one as a float": lambda: 1.0,
    "one as text": lambda: "1",
    "one as bytes": lambda: b"1",
    "a huge number": lambda: 10**6000,
    "another huge number": lambda: 10**6000 + 1,
    "a complex number": lambda: 1 + 2j,
    "infinity": lambda: float("inf"),
    "not a number": lambda: float("nan"),
    "empty text": lambda: "",
    "text with a surrogate": lambda: "\ud800",
    "text like a list": lambda: "[1, 2]",
    "a list": lambda: [1, 2],
    "a tuple": lambda: (1, 2),
    "a named tuple": lambda: Pair(1, 2),
    "a list in another order": lambda: [2, 1],
    "a nested list": lambda: [[1], 2],
    "nested otherwise": lambda: [[1, 2]],
    "an empty list": list,
    "an empty tuple": tuple,
    "an empty dict": dict,
    "an empty set": set,
    "a set": lambda: {"b", "a", 1, 2.5, None},
    "a dict": lambda: {"a": 1, "b": [2]},
    "a dict with other keys": lambda: {"a": 1, "c": [2]},
    "a dict with mixed keys": lambda: {1: "a", "1": "b", (2, "x"): "c", None: "d", b"y": "e"},
    "mixed keys, other values": lambda: {1: "b", "1": "a", (2, "x"): "c", None: "d", b"y": "e"},
    "a range": lambda: range(0, 10, 2),
    "a slice": lambda: slice(0, 10, 2),
    "a member": lambda: Colour.RED,
    "another member": lambda: Colour.BLUE,
    "a member that is text": lambda: Word.RED,
    "text like a member": lambda: "red",
    "a cycle": cyclic,
    "a cycle one higher": lambda: cyclic(1),
    "a tuple that holds itself through a list": lambda: (lambda box: box.append((box,)) or box)([]),
    "an array": lambda: np.arange(6),
    "an array of int32": lambda: np.arange(6, dtype=np.int32),
    "an array of floats": lambda: np.arange(6.0),
    "an array of other shape": lambda: np.arange(6).reshape(2, 3),
    "transposed": lambda: np.arange(6).reshape(2, 3).T,
    "big-endian": lambda: np.arange(6, dtype=">i8"),
    "an array of no dimension": lambda: np.array(3),
    "a numpy number": lambda: np.int16(3),
    "an empty array": lambda: np.zeros(0),
    "an empty array of other shape": lambda: np.zeros((0, 3)),
    "an array of text": lambda: np.array(["a", "bc"]),
    "an array of times": lambda: np.array(["2020-01-01"], dtype="M8[D]"),
    "an array of finer times": lambda: np.array(["2020-01-01"], dtype="M8[s]"),
    "records": lambda: np.ones(2, dtype=[("x", "i4"), ("y", "f4")]),
    "records of other names": lambda: np.ones(2, dtype=[("x", "i4"), ("z", "f4")]),
    "masked": lambda: np.ma.masked_array([1, 2, 3], [0, 1, 0]),
    "masked elsewhere": lambda: np.ma.masked_array([1, 2, 3], [0, 0, 1]),
    "a tensor": dense,
    "a tensor of float64": lambda: dense().double(),
    "a tensor of bfloat16": lambda: dense().bfloat16(),
    "a tensor of other shape": lambda: dense().reshape(4, 3),
    "a transposed tensor": lambda: dense().T,
    "a tensor of other values": lambda: dense() + 1,
    "a boolean tensor": lambda: dense() > 3,
    "a tensor of no dimension": lambda: torch.tensor(1.0),
    "an empty tensor": lambda: torch.zeros(0, 3),
    "an empty tensor of other shape": lambda: torch.zeros(3, 0),
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a sparse tensor of other values": lambda: (2 * torch.eye(3)).to_sparse(),
    "a sparse tensor of other shape": lambda: torch.eye(3, 4).to_sparse(),
    "complex": lambda: torch.view_as_complex(torch.ones(2, 2)),
    "conjugate": lambda: torch.view_as_complex(torch.ones(2, 2)).conj(),
    "negative view": lambda: torch.view_as_complex(torch.ones(2, 2)).conj().imag,
    "a dtype": lambda: torch.float16,
    "a device": lambda: torch.device("cpu"),
    "a size": lambda: torch.Size([1, 2]),
    "a generator": lambda: torch.Generator().manual_seed(1),
    "a generator further on": lambda: (lambda g: (torch.rand(1, generator=g), g)[1])(torch.Generator().manual_seed(1)),
    "a dataset": data,
    "a part of it": lambda: Subset(data(), [0, 2]),
    "another part of it": lambda: Subset(data(), [0, 3]),
    "both": lambda: ConcatDataset([data(), Subset(data(), [1])]),
    "both in another order": lambda: ConcatDataset([Subset(data(), [1]), data()]),
    "a dataset of a user's class": lambda: Flipped(torch.arange(6.0), torch.arange(6)),
    "with another field": lambda: Flipped(torch.arange(6.0), torch.arange(6), how="up"),
    "a module": Net,
    "a module with another field": lambda: Net(3),
    "a module with another function": lambda: Net(act=torch.tanh),
    "a module that holds its own method": lambda: (lambda net: setattr(net, "act", net.forward) or net)(Net()),
    "a module of torch": lambda: nn.Sequential(nn.ReLU(), nn.Flatten()),
    "a module of torch, in another order": lambda: nn.Sequential(nn.Flatten(), nn.ReLU()),
    "eps": lambda: nn.LayerNorm(2, eps=1e-5),
    "another eps": lambda: nn.LayerNorm(2, eps=1e-6),
    "a dataclass": lambda: Settings(),
    "a dataclass of other values": lambda: Settings(0.2),
    "a dataclass in a dataclass": lambda: Settings(inner=Settings()),
    "a class": lambda: Settings,
    "another class": lambda: Pair,
    "a class of torch": lambda: nn.Linear,
    "a function": lambda: closure,
    "a function that calls itself": lambda: calling_itself,
    "a closure": lambda: closure(1),
    "a closure of another value": lambda: closure(2),
    "a closure of an array": lambda: closure(np.zeros(3)),
    "a keyword's default": lambda: with_default(1),
    "another keyword's default": lambda: with_default(2),
    "one lambda": lambda: [lambda x: x + 1, lambda x: x + 2][0],
    "another lambda of the same line": lambda: [lambda x: x + 1, lambda x: x + 2][1],
    "a set inside a function": lambda: lambda x: x in {"a", "b", "c", "d"},
    "a builtin": lambda: len,
    "another builtin": lambda: max,
    "a function of torch": lambda: torch.relu,
    "a method": lambda: method_of("a"),
    "a method of another object": lambda: method_of("b"),
    "a builtin method": lambda: {"a": 1}.get,
    "a builtin method of another object": lambda: {"a": 2}.get,
    "partial": lambda: partial(closure, 1),
    "partial with another argument": lambda: partial(closure, 2),
    "partial with a keyword": lambda: partial(closure, value=1),
    "its own": lambda: Own("1"),
    "its own other": lambda: Own("2"),
    "a file": lambda: Path(__file__),
}

SAME: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "order of a dict": (lambda: {"a": 1, "b": 2}, lambda: {"b": 2, "a": 1}),
    "order of mixed keys": (lambda: {1: 2, "x": 3, None: 4}, lambda: {None: 4, "x": 3, 1: 2}),
    "kind of mapping": (lambda: {"a": 1}, lambda: OrderedDict(a=1)),
    "order of a set": (lambda: {"a", "b", "c"}, lambda: frozenset("cba")),
    "memory order of an array": (lambda: np.ones((2, 3)), lambda: np.asfortranarray(np.ones((2, 3)))),
    "strides of an array": (lambda: np.arange(0, 10, 2), lambda: np.arange(10)[::2]),
    "memory order of a tensor": (dense, lambda: dense().T.contiguous().T),
    "a tensor's history": (dense, lambda: dense().requires_grad_() * 1),
    "a parameter": (dense, lambda: nn.Parameter(dense())),
    "an uncoalesced tensor": (
        lambda: torch.sparse_coo_tensor([[0]], [2.0], (2,)),
        lambda: torch.sparse_coo_tensor([[0, 0]], [1.0, 1.0], (2,)),
    ),
    "rows or coordinates": (lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3).to_sparse_csr()),
    "a conjugate": (lambda: torch.tensor([1 - 1j]), lambda: torch.tensor([1 + 1j]).conj()),
    "what is under a mask": (
        lambda: np.ma.masked_array([1, 2], [0, 1]),
        lambda: np.ma.masked_array([1, 9], [0, 1]),
    ),
    "mode of a module": (Net, lambda: Net().eval()),
    "kinds of bytes": (lambda: b"ab", lambda: bytearray(b"ab")),
    "a view of bytes": (lambda: b"ab", lambda: memoryview(b"a-b")[::2]),
}

UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "an object": (object, "builtins.object"),
    "a plain object with attributes": (lambda: SimpleNamespace(a=1), "types.SimpleNamespace"),
    "a generator": (lambda: (i for i in range(3)), "builtins.generator"),
    "objects in an array": (lambda: np.array([{}]), "array of Python objects"),
    "a tensor without data": (lambda: torch.zeros(2, device="meta"), "on meta"),
    "a quantized tensor": (quantized, "quint8"),
    "deep inside": (lambda: {"a": [1, (2, object())]}, "builtins.object"),
    "a key": (lambda: {SimpleNamespace: 1, "a": SimpleNamespace()}, "types.SimpleNamespace"),
    "in a closure": (lambda: closure(object()), "builtins.object"),
    "in a dataset": (lambda: Flipped(torch.ones(1), how=object()), "builtins.object"),
    "in a module": (lambda: Net(act=SimpleNamespace()), "attribute 'act' of Net"),
    "no file": (lambda: Path("/nonexistent/file"), "/nonexistent/file: there is no such file"),
    "code without source": (lambda: eval("lambda: 1", {"__name__": "nowhere"}), "source of nowhere.<lambda>"),
    "hundreds of levels": (lambda: (lambda n: [n := [n] for _ in range(3000)][-1])([]), "hundreds of levels deep"),
}
