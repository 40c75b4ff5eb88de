"""The checks of a step, each ``check(case, folder)`` with an empty folder to work in."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, RecipeError, SparingError
from sparing.core.fingerprint import fingerprint
from sparing.core.ledger import Ledger
from sparing.core.pipeline import advance, begin, run
from sparing.core.randomness import isolated_rng
from sparing.core.step import Stage, Step
from sparing.core.store import Store
from sparing.core.task import Splits, Task
from sparing.testing.cases import QUICK, StepCase, flat, generators, kept_store, offline, refusal, registered, reseed
from sparing.testing.kills import survives_kills

if TYPE_CHECKING:
    from sparing.core.job import Job

# ------------------------------------------------------------------------------------------------------------- fields


def builds_with_defaults_or_names_what_is_missing(case: StepCase, folder: Path) -> None:
    """Without fields it is built, or says which it needs; its id is its name."""
    items = [item for item in dataclasses.fields(case.kind) if item.name != "id"]
    missing = [item.name for item in items if item.default is MISSING and item.default_factory is MISSING]
    message = refusal(case.kind, InvalidValue)
    if message is None:
        assert not missing, f"was built without the required {missing}"
        assert case.kind().id == case.kind.name
    else:
        # a rule over several fields may refuse the defaults, too
        named = missing or [item.name for item in items if item.name in message]
        assert named, f"cannot be built without fields, and does not name one to set: {message}"
        assert all(name in message for name in named), f"does not name what is missing, {named}: {message}"


WRONG = (object(), "no such value", -1, 0, -0.5, 1.5, math.nan, math.inf, 10**12, [object()], {"x": 1}, ())
"""Values of which every field must refuse some."""


def validates_every_field(case: StepCase, folder: Path) -> None:
    """Each field refuses wrong values with an :class:`InvalidValue` that names field and value; limits are kept."""

    def message(name: str, value: Any) -> str | None:
        return refusal(lambda: dataclasses.replace(case.step, **{name: value}), InvalidValue)

    for name in case.fields:
        answers = {index: message(name, value) for index, value in enumerate(WRONG)}
        assert any(answers.values()), f"{name} takes anything: {WRONG}"
        for index, answer in answers.items():
            assert answer is None or name in answer, f"{name} = {WRONG[index]!r} is refused without naming it: {answer}"
        for value, limit in _beyond(case.kind, name):
            answer = message(name, value)
            assert answer is not None, f"{name} = {value} is beyond its limit {limit} but accepted"
            assert str(value) in answer, f"the message does not show the value {value}: {answer}"
            assert f"{limit:g}" in answer, f"the message does not show the limit {limit}: {answer}"


def _beyond(kind: type[Step], name: str) -> Iterator[tuple[Any, float]]:
    """(a value just outside, the limit) for each limit of a field."""
    described = kind.__pydantic_fields__[name]  # type: ignore[attr-defined]
    small = 1 if "int" in str(described.annotation) else 1e-3
    for limit in described.metadata:
        for attribute, outside in {"ge": -small, "gt": 0, "le": small, "lt": 0}.items():
            if (bound := getattr(limit, attribute, None)) is not None:
                yield bound + outside, bound


def an_unknown_field_is_told_with_the_closest(case: StepCase, folder: Path) -> None:
    """A typing error in a field's name is answered with the name that was meant."""
    for name in [*case.fields, "id"]:
        wrong: dict[str, Any] = {f"{name}x": 1}
        message = refusal(lambda wrong=wrong: case.kind(**wrong), InvalidValue)  # type: ignore[misc]
        assert message is not None, f"the unknown field {name}x was accepted"
        assert f"unknown field '{name}x'" in message, message
        assert f"Did you mean {name!r}?" in message or f"{name}x" in case.fields, message


def a_recipe_says_the_same(case: StepCase, folder: Path) -> None:
    """Written into a recipe's YAML and read again, it is the same step."""
    import yaml

    from sparing.core.recipe import parse_recipe

    with registered(case.kind, *(type(inner) for inner in case.step.nested().values())):
        text = yaml.safe_dump({"task": "digits", "steps": [{case.kind.name: case.step.config()}]}, allow_unicode=True)
        (again,) = parse_recipe(text).steps
    assert again == case.step, f"{case.step!r} came back as {again!r}"
    assert fingerprint(again) == fingerprint(case.step)


def its_repr_builds_it(case: StepCase, folder: Path) -> None:
    """``eval(repr(step))`` is the same step."""
    steps = (case.step, *case.step.nested().values())
    names = {type(step).__name__: type(step) for step in steps} | {"PosixPath": Path, "WindowsPath": Path}
    again = eval(repr(case.step), names)
    assert again == case.step, f"{case.step!r} came back as {again!r}"


def says_what_it_is_and_where_from(case: StepCase, folder: Path) -> None:
    """A docstring of its own, a stage, and the source of the method."""
    kind = case.kind
    text = kind.__doc__ or ""
    assert text, "has no docstring"
    assert text not in {base.__doc__ for base in kind.__mro__[1:]}, "has its parent's docstring"
    assert not text.startswith(f"{kind.__name__}("), "its docstring is only the signature"
    assert isinstance(kind.stage, Stage), "names no stage"
    assert kind.source.strip(), "names no source: a paper with section and equation, or 'ours'"


# ------------------------------------------------------------------------------------------------------------ running


def refuses_a_job_without_what_it_needs(case: StepCase, folder: Path) -> None:
    """Each missing capability is named, by planning and by the step that is about to run."""
    job = case.job()
    for need in sorted(case.step.needs):
        without = job.replace(capabilities=job.capabilities - {need})
        message = refusal(lambda without=without: advance(without, case.step, ()), IncompatibleStep)  # type: ignore[misc]
        assert message is not None, f"runs on a job without {need!r}"
        assert need in message, message
    needed = case.step.needs - begin(case.task(), store=kept_store(), meter=QUICK).capabilities
    if needed:
        alone = case.recipe() | {"steps": [case.step]}
        message = refusal(lambda: run(**alone, store=kept_store()), RecipeError)
        assert message is not None, f"is planned on a job without {sorted(needed)}"
        assert all(repr(need) in message for need in needed), message


def leaves_the_job_as_it_was(case: StepCase, folder: Path) -> None:
    """Model, data and plan of the job it was given are the same bits afterwards."""
    job = case.fresh(folder)
    before = _look(job)
    advance(job, case.step, job.task.splits(job.root).test)
    after = _look(job)
    assert before == after, f"changed the job it was given: {[name for name in before if before[name] != after[name]]}"


def _look(job: Job) -> dict[str, Any]:
    """What a step must not change, as digests."""
    looked = {
        "model": None if job.model is None else fingerprint(job.model),
        "modes": None if job.model is None else [module.training for module in job.model.modules()],
        "predictor": None if job.predictor is None else _payload(job.predictor),
        "plan": job.training,
    }
    return looked | {name: _content(getattr(job, name)) for name in ("train", "val", "calibration")}


def _content(dataset: Any) -> str:
    with isolated_rng("content"):  # an augmented item differs with every draw
        return fingerprint([dataset[index] for index in range(len(dataset))])


def _payload(predictor: Any) -> dict[str, str]:
    from sparing.core.predictor.folder import pack

    return {name: hashlib.sha256(content).hexdigest() for name, content in pack(predictor)[1].items()}


def gives_the_same_under_the_same_seed(case: StepCase, folder: Path) -> None:
    """The same bits whatever the state of the caller's generators, which stay as they were."""
    looks, rows = [], []
    for number in (1, 2):
        reseed(number)
        job = case.fresh(folder / str(number))
        before = generators()
        after, row, outcomes = advance(job, case.step, job.task.splits(job.root).test)
        assert generators() == before, "left the caller's random generators changed"
        ledger = Ledger()
        ledger.add(row, outcomes)
        looks.append(_look(after) | {"plan": None})  # factories have no content to compare
        rows.append(ledger.canonical())
    one, other = looks
    assert one == other, f"two runs differ in {[name for name in one if one[name] != other[name]]}"
    assert rows[0] == rows[1], f"two runs differ in their rows:\n{rows[0]}\n{rows[1]}"


class SawTheTestSplit(BaseException):
    """Raised by a test split that is touched; no handler of errors catches it."""


class _Forbidden:
    def __getattr__(self, name: str) -> Any:
        raise SawTheTestSplit(name)

    def __len__(self) -> int:
        raise SawTheTestSplit("len")

    def __getitem__(self, index: Any) -> Any:
        raise SawTheTestSplit(f"item {index}")

    def __iter__(self) -> Any:
        raise SawTheTestSplit("iter")


def never_looks_at_the_test_split(case: StepCase, folder: Path) -> None:
    """Offline, and with a test split that raises when it is touched, it runs all the same; audits may look."""
    job = case.fresh(folder)
    task = job.task if case.kind.stage is Stage.AUDIT else _guarded(job.task)
    with offline():
        try:
            case.step.apply(job.replace(task=task, store=job.store.child("step", case.step)))
        except SawTheTestSplit as error:
            raise AssertionError(f"looks at the test split: {error}") from None


def _guarded(task: Task) -> Task:
    """The same task, whose test split raises."""
    guarded = copy.copy(task)

    def splits(root: Path | None = None) -> Splits:
        return dataclasses.replace(task.splits(root), test=_Forbidden())

    guarded.splits = splits  # type: ignore[method-assign]
    return guarded


class _Items(list[Any]):
    """A data set in memory."""


def _with_nan(items: list[Any]) -> list[Any]:
    import torch

    from sparing.core.predictor.tree import map_leaves

    def spoil(leaf: Any) -> Any:
        return torch.full_like(leaf, math.nan) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return [(map_leaves(spoil, item[0]), *item[1:]) for item in items]


ODD: Mapping[str, Callable[[list[Any]], list[Any]]] = {
    "NaN": _with_nan,
    "empty": lambda items: [],
    "one-sample": lambda items: items[:1],
    "one-class": lambda items: [item for item in items if str(item[1]) == str(items[0][1])],
}
"""Name → the items of a data set as no step wants it."""


def stands_odd_data(case: StepCase, folder: Path) -> None:
    """NaN, nothing, one sample, one class: a :class:`SparingError`, or a predictor whose answers are finite."""
    for name, change in ODD.items():
        job = case.fresh(folder / name)
        parts = {part: getattr(job, part) for part in ("train", "val", "calibration")}
        odd = {part: _Items(change([data[i] for i in range(len(data))])) for part, data in parts.items()}
        try:
            after, _, _ = advance(
                job.replace(store=job.store.child(name), **odd), case.step, job.task.splits(job.root).test
            )
        except SparingError:
            continue
        except Exception as error:
            raise AssertionError(f"{name}: a {type(error).__name__} came out, no SparingError: {error}") from error
        if after.predictor is not None and after.predictor is not job.predictor:
            answers = flat(after.predictor(*job.task.example_input(2)))
            assert all(np.isfinite(answer).all() for answer in answers), f"{name}: the model handed on answers NaN"


def says_when_there_is_nothing_to_do(case: StepCase, folder: Path) -> None:
    """:class:`NoEffect` where it has nothing to act on, saying what it looked at."""
    nothing = case.nothing
    if isinstance(nothing, str):
        assert nothing.strip(), "the case must say why the step always has an effect, or name one where it has none"
        return
    message = refusal(lambda: nothing.step.apply(nothing.fresh(folder)), NoEffect)
    assert message is not None, "finds nothing to act on, and hands on a job as if it had"
    assert len(message) > len(nothing.step.id) + 10, f"does not say what it looked at: {message}"


def what_it_makes_can_be_saved(case: StepCase, folder: Path) -> None:
    """A predictor it hands on answers the same bits after it was saved and loaded."""
    from sparing.core.predictor import load

    job = case.fresh(folder / "store")
    after, _, _ = advance(job, case.step, job.task.splits(job.root).test)
    if after.predictor is None or after.predictor is job.predictor:
        return
    inputs = after.task.example_input(3)
    again = load(after.predictor.save(folder / "model"))
    for one, other in zip(flat(after.predictor(*inputs)), flat(again(*inputs)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert again.describe() == after.predictor.describe()


def is_done_once(case: StepCase, folder: Path) -> None:
    """A second run reads what the first has stored: the same row, and nothing new in the store."""
    store = Store(folder)
    first = run(**case.recipe(), store=store)
    made = {entry.folder: entry.made for entry in store.entries()}
    again = run(**case.recipe(), store=store)
    assert again.ledger.canonical() == first.ledger.canonical(), "the ledgers differ"
    assert {entry.folder: entry.made for entry in store.entries()} == made, "a second run made something anew"


def survives_being_killed(case: StepCase, folder: Path) -> None:
    """Killed in its write windows and started again, a run leaves the same ledger and the same tensors."""

    def start(place: Path) -> Any:
        return run(**case.recipe(), store=Store(place / "store"), out=place / "out")

    survives_kills(start, folder, deaths=3)


STEP_CHECKS: tuple[Callable[[StepCase, Path], None], ...] = (
    builds_with_defaults_or_names_what_is_missing,
    validates_every_field,
    an_unknown_field_is_told_with_the_closest,
    a_recipe_says_the_same,
    its_repr_builds_it,
    says_what_it_is_and_where_from,
    refuses_a_job_without_what_it_needs,
    leaves_the_job_as_it_was,
    gives_the_same_under_the_same_seed,
    never_looks_at_the_test_split,
    stands_odd_data,
    says_when_there_is_nothing_to_do,
    what_it_makes_can_be_saved,
    is_done_once,
    survives_being_killed,
)


def check_step(case: StepCase, folder: Path) -> None:
    """Put a step through every check; ``folder`` is an empty one to work in. Raises the first AssertionError."""
    for check in STEP_CHECKS:
        check(case, folder / check.__name__)
