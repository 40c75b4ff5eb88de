"""How difficulty, or the number of tokens kept, grows with training (Li et al. 2022, arXiv:2212.03597, section 3.1).

A pacing function gives a number for each optimizer step. A curriculum asks it from t = 1 on, the schedule of random
layerwise token dropping from t = 0.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sparing.core.errors import InvalidValue, did_you_mean, shown
from sparing.data_efficiency.settings import known_keys, number, required, whole_number


@dataclass(frozen=True)
class PacingFunction(ABC):
    """Step → difficulty, from ``min_difficulty`` up to ``max_difficulty``.

    A call is stateless. :meth:`after` is what a training follows: once the greatest difficulty is reached, it stays.
    """

    min_difficulty: float
    max_difficulty: float

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in ("min_difficulty", "max_difficulty"):
            number(name, getattr(self, name))
        if self.min_difficulty > self.max_difficulty:
            raise InvalidValue(
                f"min_difficulty = {self.min_difficulty}, max_difficulty = {self.max_difficulty}; "
                "min_difficulty ≤ max_difficulty is needed"
            )

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The difficulty of one step ≥ 0."""

    def after(self, current: float | None, step: int) -> float:
        """The difficulty at ``step`` after it has been ``current`` (None: nothing yet): frozen at the greatest."""
        return current if current is not None and current >= self.max_difficulty else self(step)

    def config(self) -> dict[str, Any]:
        """Kind and fields as plain values."""
        fields = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {"kind": type(self).__name__, **fields}


@dataclass(frozen=True)
class RootPacing(PacingFunction):
    """min + (max − min) · (t/T)^(1/r), rounded down to a multiple of ``difficulty_step``, at most max.

    When ``difficulty_step`` does not divide the greatest difficulty, that is reached a little after T.

    Args:
        min_difficulty: where it starts.
        max_difficulty: where it ends.
        total_steps: T > 0.
        difficulty_step: what values are multiples of, > 0. If this and both ends are whole numbers, so are all values.
        degree: r > 0; 1 is linear, 2 the square root.
        clamp_min: never below ``min_difficulty``. Rounding down takes a start of 10 to 8 when the step is 8; the
            reference leaves it there, and so does False, with a warning.
    """

    total_steps: float
    difficulty_step: float = 1
    degree: float = 1
    clamp_min: bool = True

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        for name in ("total_steps", "difficulty_step", "degree"):
            if number(name, getattr(self, name)) <= 0:
                raise InvalidValue(f"{name} = {getattr(self, name)}; a number > 0 is needed")
        if not self.clamp_min and self.min_difficulty % self.difficulty_step:
            warnings.warn(
                f"min_difficulty = {self.min_difficulty} is no multiple of difficulty_step = {self.difficulty_step}, "
                f"so it starts at {self(0)}; clamp_min=True starts at {self.min_difficulty}",
                stacklevel=3,
            )

    def __call__(self, step: int) -> float:
        """The difficulty of one step ≥ 0."""
        share = (whole_number("step", step, 0) / self.total_steps) ** (1.0 / self.degree)
        value: float = share * (self.max_difficulty - self.min_difficulty) + self.min_difficulty
        if all(float(x).is_integer() for x in (self.min_difficulty, self.max_difficulty, self.difficulty_step)):
            value = math.floor(value)
        value = min(value - value % self.difficulty_step, self.max_difficulty)
        return max(value, self.min_difficulty) if self.clamp_min else value


@dataclass(frozen=True)
class DiscretePacing(PacingFunction):
    """The first of ``difficulties`` whose ``max_steps`` has not been passed; the last one after all of them.

    Args:
        min_difficulty: at most the least of ``difficulties``.
        max_difficulty: at least the greatest of them.
        difficulties: n values.
        max_steps: the last step of each but the last value, n − 1 in growing order.
    """

    difficulties: tuple[float, ...]
    max_steps: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        values, steps = self.difficulties, self.max_steps
        if not values or len(steps) != len(values) - 1:
            raise InvalidValue(
                f"{len(values)} difficulties and {len(steps)} max_steps; n ≥ 1 difficulties need n − 1 max_steps"
            )
        for value in values:
            if not self.min_difficulty <= number("a difficulty", value) <= self.max_difficulty:
                raise InvalidValue(
                    f"the difficulty {value} lies outside {self.min_difficulty} … {self.max_difficulty} "
                    "(min_difficulty, max_difficulty)"
                )
        if list(steps) != sorted(set(steps)):
            raise InvalidValue(f"max_steps = {list(steps)}; growing numbers are needed")

    def __call__(self, step: int) -> float:
        """The difficulty of one step ≥ 0."""
        step = whole_number("step", step, 0)
        return next((d for d, last in zip(self.difficulties, self.max_steps, strict=False) if step <= last),
                    self.difficulties[-1])  # fmt: skip


@dataclass(frozen=True)
class CustomPacing(PacingFunction):
    """A function of your own, step → difficulty; values outside the two ends are refused."""

    function: Callable[[int], float]

    def __call__(self, step: int) -> float:
        """The difficulty of one step ≥ 0."""
        value = number("the pacing function's value", self.function(whole_number("step", step, 0)))
        if not self.min_difficulty <= value <= self.max_difficulty:
            raise InvalidValue(
                f"the pacing function gives {value} at step {step}; {self.min_difficulty} … {self.max_difficulty} "
                "(min_difficulty, max_difficulty) is expected"
            )
        return value

    def config(self) -> dict[str, Any]:
        """Kind and fields; the function by its name."""
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        return {
            "kind": "CustomPacing",
            "min_difficulty": self.min_difficulty,
            "max_difficulty": self.max_difficulty,
            "function": name,
        }


def linear(
    min_difficulty: float,
    max_difficulty: float,
    total_steps: float,
    difficulty_step: float = 1,
    *,
    clamp_min: bool = True,
) -> RootPacing:
    """:class:`RootPacing` of degree 1."""
    return RootPacing(min_difficulty, max_difficulty, total_steps, difficulty_step, 1, clamp_min)


def root(
    min_difficulty: float,
    max_difficulty: float,
    total_steps: float,
    difficulty_step: float = 1,
    degree: float = 2,
    *,
    clamp_min: bool = True,
) -> RootPacing:
    """:class:`RootPacing`; the square root if no degree is given."""
    return RootPacing(min_difficulty, max_difficulty, total_steps, difficulty_step, degree, clamp_min)


def discrete(difficulties: Sequence[float], max_steps: Sequence[int]) -> DiscretePacing:
    """:class:`DiscretePacing` between the least and the greatest of ``difficulties``."""
    if not difficulties:
        raise InvalidValue("difficulties is empty; at least one is needed")
    return DiscretePacing(min(difficulties), max(difficulties), tuple(difficulties), tuple(max_steps))


SCHEDULES = ("fixed_linear", "fixed_root", "fixed_discrete", "custom")


def pacing_from_config(config: Mapping[str, Any], *, clamp_min: bool = True) -> PacingFunction:
    """The pacing function of a ``curriculum_metrics`` entry in the reference's configuration.

    Args:
        config: ``min_difficulty``, ``max_difficulty``, ``schedule_type`` (one of :data:`SCHEDULES`) and
            ``schedule_config``: ``total_curriculum_step``, ``difficulty_step`` and, for a root, ``root_degree``; for
            "fixed_discrete" ``difficulty`` and ``max_step``; for "custom" a ``function``. Other keys are not looked at.
        clamp_min: see :class:`RootPacing`.

    Raises:
        InvalidValue: a missing or unknown key, or a value that the pacing function refuses.
    """
    low, high = (required(config, name, "the metric") for name in ("min_difficulty", "max_difficulty"))
    kind = required(config, "schedule_type", "the metric")
    given = required(config, "schedule_config", "the metric")
    if kind not in SCHEDULES:
        hint = did_you_mean(kind, SCHEDULES) if isinstance(kind, str) else ""
        raise InvalidValue(f"schedule_type = {shown(kind)}; one of {', '.join(SCHEDULES)} is needed.{hint}")
    if kind == "fixed_discrete":
        known_keys(given, ("difficulty", "max_step"), "schedule_config")
        values, steps = (required(given, name, "schedule_config") for name in ("difficulty", "max_step"))
        return DiscretePacing(low, high, tuple(values), tuple(steps))
    if kind == "custom":
        known_keys(given, ("function",), "schedule_config")
        return CustomPacing(low, high, required(given, "function", "schedule_config"))
    names = ("total_curriculum_step", "difficulty_step") + (("root_degree",) if kind == "fixed_root" else ())
    known_keys(given, names, "schedule_config")
    total, multiple, *degree = (required(given, name, "schedule_config") for name in names)
    return RootPacing(low, high, total, multiple, degree[0] if degree else 1, clamp_min)
