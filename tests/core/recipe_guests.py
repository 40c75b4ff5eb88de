"""Steps with the kinds of fields a recipe may fill, registered for the tests of recipes and planning."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from sparing.core.errors import InvalidValue
from sparing.core.job import Job
from sparing.core.step import RowId, Stage, Step, step


class Guest(Step):
    stage: ClassVar[Stage] = Stage.MODEL
    source: ClassVar[str] = "these tests"

    def apply(self, job: Job) -> Job:
        return job


@step("plain")
class Plain(Guest):
    """A step with fields of every plain kind."""

    rate: float = Field(0.5, ge=0, le=1)
    count: int = Field(1, ge=1)
    label: str = ""
    flag: bool = False
    sizes: tuple[int, ...] = ()
    options: dict[str, float] = Field(default_factory=dict)
    maybe: int | None = None


@step("needy")
class Needy(Guest):
    """A step with a field that has no default."""

    rate: float = Field(ge=0)


@step("ordered")
class Ordered(Guest):
    """A step whose two fields must be in order."""

    low: int = 0
    high: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise InvalidValue(f"low = {self.low} is above high = {self.high}")


@step("audit")
class Audit(Guest):
    """A step that holds steps."""

    stage: ClassVar[Stage] = Stage.AUDIT
    inner: Step | None = None
    steps: tuple[Step, ...] = ()


@step("pointing")
class Pointing(Guest):
    """A step that names an earlier row."""

    teacher: RowId
    others: Annotated[str, Field(min_length=1)] | None = None
