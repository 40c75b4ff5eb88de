"""One economy: a validated, frozen set of hyper-parameters that turns a job into the job it becomes."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sparing.core.errors import InvalidValue, SparingError, did_you_mean, shown

if TYPE_CHECKING:
    from sparing.core.job import Job
    from sparing.core.task import Task


class Stage(StrEnum):
    """Where in a pipeline a step belongs."""

    DATA = "data"
    TRAINING = "training"
    MODEL = "model"
    INFERENCE = "inference"
    FLEET = "fleet"
    AUDIT = "audit"


RowId = Annotated[str, Field(min_length=1, json_schema_extra={"row_id": True})]
"""The type of a step field that names an earlier row of the recipe; planning checks that the row exists."""

_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False, validate_default=True)
_ID = r"[A-Za-z0-9_.-]*"
StepType = TypeVar("StepType", bound="type[Step]")


@pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Step:
    """Base of all steps. Subclasses declare their fields, the class variables below, and :meth:`apply`."""

    name: ClassVar[str] = ""
    stage: ClassVar[Stage]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Capabilities the job must have when the step runs."""
    gives: ClassVar[frozenset[str]] = frozenset()
    """Capabilities the job has afterwards."""
    removes: ClassVar[frozenset[str]] = frozenset()
    """Capabilities the job no longer has afterwards."""
    promises: ClassVar[frozenset[str]] = frozenset()
    """What a later step must realise (e.g. "sparsity"); a recipe that leaves a promise open is refused."""
    realises: ClassVar[frozenset[str]] = frozenset()
    """Promises of earlier steps that this step makes real."""
    fragile: ClassVar[frozenset[str]] = frozenset()
    """Promises that a further training would undo: one that follows is refused, unless a step before it promises the
    same again (as ``lock_pattern`` does for the zeros of a pruned model)."""
    slots: ClassVar[frozenset[str]] = frozenset()
    """Exclusive slots of the training plan this step fills; no two steps up to and with a training may fill one."""
    by_clock: ClassVar[bool] = False
    """Whether the step chooses by timings; the recipe's meter is then part of what its result depends on."""
    source: ClassVar[str] = ""
    """Paper, section and equation the step implements, or "ours"."""

    id: str = Field(default="", pattern=f"^{_ID}$", max_length=64)
    """Unique in a recipe; the step's name by default."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Refuse a class that nobody made a step: its fields would not be checked, nor known to recipes."""
        if not vars(cls).get("name"):
            raise InvalidValue(
                f"{cls.__module__}.{cls.__qualname__} is no step yet: decorate it with @step('its_name')"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", self.name)

    def apply(self, job: Job) -> Job:
        """The job this one becomes. Pure in ``job``; anything expensive goes through ``job.store``."""
        raise NotImplementedError(f"{type(self).__name__} does not define apply")

    def check(self, task: Task) -> None:
        """Raise a :class:`SparingError` for what can be known to be wrong before anything runs.

        Planning calls it with the task the job will have. It must be quick and leave no trace.
        """

    def target_task(self) -> Task | None:
        """The task this step changes the job to, or None when it keeps the task."""
        return None

    def row_references(self) -> Mapping[str, str]:
        """Field name → the earlier row it names, for fields of type :data:`RowId`."""
        hints = typing.get_type_hints(type(self), include_extras=True)
        return {
            field_.name: value
            for field_ in fields(self)
            if _is_row_id(hints.get(field_.name)) and isinstance(value := getattr(self, field_.name), str)
        }

    def config(self) -> dict[str, Any]:
        """The fields as JSON values: what a recipe would say; live objects are shown by their class."""
        return {field_.name: _plain(getattr(self, field_.name)) for field_ in fields(self)}

    def nested(self) -> Mapping[str, Step]:
        """The steps held in this step's fields, by field name (with an index for lists).

        Planning takes them for one sequence, run in the order of the fields on a fork of the job.
        """
        found: dict[str, Step] = {}
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if isinstance(value, Step):
                found[field_.name] = value
            elif isinstance(value, tuple | list):
                found |= {f"{field_.name}[{i}]": item for i, item in enumerate(value) if isinstance(item, Step)}
        return found


def _is_row_id(annotation: Any) -> bool:
    if annotation == RowId:
        return True
    return any(_is_row_id(argument) for argument in typing.get_args(annotation))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Step):
        return {value.name: value.config()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


class InvalidFields(InvalidValue):
    """Fields of a step that were refused. ``problems`` holds (field or an empty text, what is wrong with it)."""

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        self.problems = problems
        super().__init__("\n".join(line for _, line in problems))


def step(name: str) -> Callable[[StepType], StepType]:
    """Class decorator: make ``cls`` a frozen, keyword-only, validated step called ``name``.

    Fields are checked by pydantic when the step is built; an invalid one raises :class:`InvalidValue` that names the
    field, the value and the allowed range. So does a class without a stage or without ``apply``, when it is decorated.
    """
    if not re.fullmatch(_ID, name) or not 0 < len(name) <= 64:
        raise InvalidValue(f"@step({name!r}): a step's name is made of up to 64 letters, digits, '_', '.' and '-'")

    def decorate(cls: StepType) -> StepType:
        _check_declarations(cls, name)
        cls.name = name
        made = pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)
        validated_init = made.__init__

        def __init__(self: Step, /, **values: Any) -> None:  # noqa: N807
            try:
                validated_init(self, **values)
            except ValidationError as error:
                raise InvalidFields(_problems(type(self), error)) from None

        __init__.__doc__ = validated_init.__doc__
        made.__init__ = __init__  # type: ignore[assignment,method-assign]
        return made  # type: ignore[return-value]

    return decorate


def _check_declarations(cls: type[Step], name: str) -> None:
    where = f"step {name!r} ({cls.__module__}.{cls.__qualname__})"
    if not isinstance(getattr(cls, "stage", None), Stage):
        raise InvalidValue(f"{where} declares no stage; one of Stage.{', Stage.'.join(Stage.__members__)} is needed")
    if cls.apply is Step.apply:
        raise InvalidValue(f"{where} does not define apply(self, job)")
    for attribute in ("needs", "gives", "removes", "promises", "realises", "fragile", "slots"):
        value = getattr(cls, attribute)
        if not isinstance(value, property) and not (
            isinstance(value, frozenset | set) and all(isinstance(word, str) for word in value)
        ):
            raise InvalidValue(f"{where}: {attribute} = {shown(value)}; a set of words is needed, e.g. {{'trained'}}")


def field_problems(cls: type[Step], error: ValidationError) -> list[str]:
    """One line for each field that pydantic refused, with did-you-mean for unknown fields."""
    return [line for _, line in _problems(cls, error)]


def _problems(cls: type[Step], error: ValidationError) -> list[tuple[str, str]]:
    known = [field_.name for field_ in fields(cls)]
    found = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
            line = f"unknown field {shown(place)}.{did_you_mean(place, known)} Fields: {', '.join(known)}"
        elif item["type"] in {"missing", "missing_keyword_only_argument", "missing_argument"}:
            line = f"field {place!r} is required"
        elif not place:  # raised by __post_init__, about several fields
            line = message
        else:
            line = f"{place} = {shown(item['input'])}: {message}"
        found.append((str(item["loc"][0]) if item["loc"] else "", f"{cls.name}: {line}"))
    return found


def declared(kind: type[Step], attribute: str) -> Iterable[str]:
    """The words of a step's class, e.g. what it ``gives``; those that depend on its fields, as they are by default."""
    words = getattr(kind, attribute)
    if not isinstance(words, property):
        return words
    try:
        return getattr(kind(), attribute)
    except SparingError:  # a field has no default
        return ()
