"""What a user's steps and models rest on is in their fingerprint: helpers, constants, attributes, ties."""

from __future__ import annotations

import importlib
import linecache
import sys
import textwrap

import pytest
import torch
from torch import nn

from sparing.core.fingerprint import NoFingerprint, fingerprint
from sparing.core.pipeline import begin
from sparing.core.store import Store

HELPERS = """
SCALE = 2.0

def helper(x):
    return x * SCALE

def stranger(x):
    return x
"""
METHOD = """
from pydantic import Field

from sparing.core.step import Stage, Step, step
import helpers_of_mine

NAMES = {"a": [1, 2], "b": [3]}
UNUSED = 1

def double(x):
    return helpers_of_mine.helper(x)

class Base(Step):
    def shared(self, x):
        return double(x)

@step("mine")
class Mine(Base):
    stage = Stage.DATA
    times: int = Field(1, ge=1)

    def apply(self, job):
        self.shared(NAMES["a"])
        return [job for _ in range(2)]
"""


TASK = """
from sparing.core.task import Metric, Splits, Task

def penalty(x):
    return x.abs()

class Mine(Task):
    name = "mine"
    metrics = (Metric("error"),)
    def splits(self, root):
        return Splits(*[[(0, 0)]] * 4)
    def loss(self, outputs, batch):
        return penalty(outputs)
    def evaluate(self, predictor, split): ...
    def example_input(self, batch=2): ...
    def default_model(self): ...
"""


@pytest.fixture
def key(tmp_path, monkeypatch):
    """A step's fingerprint after replacing texts in its own module or in the module of its helpers."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def made(*changes: tuple[str, str]) -> str:
        for name, text in {"helpers_of_mine": HELPERS, "method_of_mine": METHOD}.items():
            for old, new in changes:
                text = text.replace(old, new)
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        linecache.clearcache()
        return fingerprint(importlib.import_module("method_of_mine").Mine())

    yield made
    for name in ("helpers_of_mine", "method_of_mine"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("range(2)", "range(3)"),
        ("times: int = Field(1", "times: int = Field(2"),
        ("return double(x)", "return double(-x)"),
        ("helpers_of_mine.helper(x)", "helpers_of_mine.helper(x) + 1"),
        ("return x * SCALE", "return x + SCALE"),
        ("SCALE = 2.0", "SCALE = 2.5"),
        ('"b": [3]', '"b": [4]'),
    ],
    ids=["the method", "a default", "a base class", "a helper", "a helper's helper", "a constant", "a table"],
)
def test_what_a_step_rests_on_changes_its_fingerprint(key, old, new):
    assert key() != key((old, new))


@pytest.mark.parametrize(("old", "new"), [("return x\n", "return -x\n"), ("UNUSED = 1", "UNUSED = 2")])
def test_what_it_does_not_name_does_not(key, old, new):
    assert key() == key((old, new))


def test_an_edited_loss_of_a_users_task_is_in_the_key(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    model, keys = nn.Linear(1, 1), []
    for text in (TASK, TASK, TASK.replace("x.abs()", "x.square()")):
        (tmp_path / "task_of_mine.py").write_text(text)
        sys.modules.pop("task_of_mine", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        task = importlib.import_module("task_of_mine").Mine()
        keys.append(begin(task, model, store=Store(tmp_path / "store")).store.key())
    sys.modules.pop("task_of_mine", None)
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))


def tied(model: nn.Module) -> None:
    model[2].weight = model[0].weight


CHANGES = {
    "a weight": lambda model: model[0].weight.data.add_(1),
    "a frozen parameter": lambda model: model[0].weight.requires_grad_(False),
    "an attribute of torch's": lambda model: setattr(model[0], "in_features", 4),
    "a buffer that is not saved": lambda model: model.register_buffer("mask", torch.ones(2), persistent=False),
    "a hook": lambda model: model[0].register_forward_hook(lambda module, args, output: output * 2),
    "another class": lambda model: model.__setitem__(1, nn.GELU()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_model_is_made_of_changes_its_fingerprint(change):
    before, after = net(), net()
    assert fingerprint(before) == fingerprint(after)
    change(after)
    assert fingerprint(before) != fingerprint(after)


def test_a_tie_is_told_from_equal_values():
    one, other = net(), net()
    one[2].weight.data = one[0].weight.data.clone()
    tied(other)
    assert fingerprint(one.state_dict()) == fingerprint(other.state_dict())
    assert fingerprint(one) != fingerprint(other)


class Scaled(nn.Module):
    def __init__(self, scale, settings) -> None:
        super().__init__()
        self._scale, self.settings = scale, settings


def test_attributes_of_a_users_module_count_private_ones_as_far_as_they_can_be_read():
    assert fingerprint(Scaled(1.0, {"a": 1})) != fingerprint(Scaled(2.0, {"a": 1}))
    assert fingerprint(Scaled(1.0, {"a": 1})) != fingerprint(Scaled(1.0, {"a": 2}))
    assert fingerprint(Scaled(object(), torch.relu)) == fingerprint(Scaled(object(), torch.relu))
    with pytest.raises(
        NoFingerprint, match=r"the attribute 'settings' of Scaled: cannot fingerprint a builtins.object"
    ):
        fingerprint(Scaled(1.0, object()))
