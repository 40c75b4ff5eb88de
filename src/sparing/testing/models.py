"""The checks of a registered model, each ``check(case)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core import registry
from sparing.core.collation import batches_of
from sparing.core.errors import InvalidValue
from sparing.core.fingerprint import fingerprint
from sparing.core.predictor import ModulePredictor, build_model, load, spec_of, to_onnx
from sparing.core.predictor.tree import map_leaves
from sparing.core.task import Task
from sparing.testing.cases import flat, generators, refusal, reseed

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelCase:
    """How to try a model."""

    builder: str | Callable[..., nn.Module]
    """Its registered name, or the class or function."""
    task: Callable[[], Task]
    """A task it can be built for and whose example input it takes."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields that make it small."""
    exports: bool = True
    """Whether it can be written as ONNX."""
    apart: bool = True
    """Whether each sample is answered by itself; not so the nodes of one graph."""
    sample: Callable[[Any, int], Any] = lambda inputs, index: map_leaves(itemgetter(slice(index, index + 1)), inputs)
    """(inputs, number of a sample) → the inputs of that sample alone."""
    free: tuple[str, ...] = ()
    """Fields that take any value of their type, so that none is refused."""

    def build(self, **more: Any) -> nn.Module:
        """The model for the task."""
        return build_model(self.builder, self.task(), **{**self.fields, **more})


def builds_for_its_task_and_knows_how(case: ModelCase, folder: Path) -> None:
    """Built with what the task says, it takes the example input, and its spec builds the same structure again."""
    model = case.build()
    spec = spec_of(model)
    assert spec is not None
    again = build_model(spec)
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }
    inputs = case.task().example_input(2)
    answers, count = flat(ModulePredictor(model, case.task())(*inputs)), 2 if case.apart else len(flat(inputs)[0])
    assert all(len(a) == count for a in answers), f"{count} samples, answers of shapes {[a.shape for a in answers]}"
    assert all(np.isfinite(answer).all() for answer in answers)


def is_the_same_under_the_same_seed(case: ModelCase, folder: Path) -> None:
    """Initial weights depend on the generators' state alone."""
    made = []
    for seed in (1, 1, 2):
        reseed(seed)
        made.append(fingerprint(case.build().state_dict()))
    assert made[0] == made[1]
    assert made[0] != made[2] or not any(True for _ in case.build().parameters())


def answers_each_sample_alone(case: ModelCase, folder: Path) -> None:
    """In evaluation mode a sample's answer depends neither on its batch nor on chance, and draws no random number.

    Where samples are not apart, on chance alone is looked.
    """
    predictor, task = ModulePredictor(case.build(), case.task()), case.task()
    inputs = task.example_input(3)
    before = generators()
    together = flat(predictor(*inputs))
    assert generators() == before, "draws random numbers in evaluation mode"
    if not case.apart:
        for one, other in zip(flat(predictor(*inputs)), together, strict=True):
            np.testing.assert_array_equal(one, other)
        return
    for index in range(3):
        alone = flat(predictor(*case.sample(inputs, index)))
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], other[index], rtol=1e-4, atol=1e-5)


def learns_in_all_its_parts(case: ModelCase, folder: Path) -> None:
    """Every parameter gets a gradient from the task's loss."""
    task = case.task()
    model = case.build().train()
    batch = next(batches_of(task.splits(None).train, 8, task.collate))
    task.loss(task.outputs(model, batch), batch).backward()
    idle = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle, f"no gradient reaches {idle}"


def is_saved_and_loaded(case: ModelCase, folder: Path) -> None:
    """The saved folder answers the same bits."""
    predictor = ModulePredictor(case.build(), case.task())
    trust = () if isinstance(case.builder, str) else (case.builder.__module__.split(".")[0],)
    again = load(predictor.save(folder), trust)
    for one, other in zip(*(flat(p(*case.task().example_input(2))) for p in (predictor, again)), strict=True):
        np.testing.assert_array_equal(one, other)


def is_exported(case: ModelCase, folder: Path) -> None:
    """It can be written as ONNX, for any batch size, if the case says so."""
    if case.exports:
        predictor = ModulePredictor(case.build(), case.task())
        graph = to_onnx(predictor, task=case.task())
        inputs = case.task().example_input(5)
        for one, other in zip(flat(predictor(*inputs)), flat(graph(*inputs)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def refuses_wrong_fields(case: ModelCase, folder: Path) -> None:
    """An unknown field is told with the closest; a number no size can be, or a word that is no choice, by name."""
    make = registry.resolve("models", case.builder) if isinstance(case.builder, str) else case.builder
    for name, parameter in inspect.signature(make).parameters.items():
        unknown: dict[str, Any] = {f"{name}x": 1}
        message = refusal(partial(case.build, **unknown), InvalidValue)
        assert message is not None, f"the unknown field {name}x was accepted"
        assert f"Did you mean {name!r}?" in message, message
        usual = case.fields.get(name, parameter.default)
        if name in case.free or isinstance(usual, bool) or not isinstance(usual, int | float | str):
            continue
        wrong = "no such choice" if isinstance(usual, str) else -3
        message = refusal(partial(case.build, **{name: wrong}), InvalidValue)
        assert message is not None, f"{name} = {wrong!r} was accepted"
        assert name in message, message
        assert repr(wrong) in message, message


def says_its_shapes(case: ModelCase, folder: Path) -> None:
    """A docstring that says what goes in and what comes out."""
    built = case.build()
    text = inspect.getdoc(type(built)) or ""
    assert text.splitlines(), "has no docstring"
    assert "Shapes:" in text, "its docstring has no line 'Shapes: …'"


MODEL_CHECKS: tuple[Callable[[ModelCase, Path], None], ...] = (
    builds_for_its_task_and_knows_how,
    is_the_same_under_the_same_seed,
    answers_each_sample_alone,
    learns_in_all_its_parts,
    is_saved_and_loaded,
    is_exported,
    refuses_wrong_fields,
    says_its_shapes,
)


def check_model(case: ModelCase, folder: Path) -> None:
    """Put a model through every check; ``folder`` is an empty one to work in. Raises the first AssertionError."""
    for check in MODEL_CHECKS:
        check(case, folder / check.__name__)
