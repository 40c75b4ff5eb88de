"""The rows: what each step saved and what it lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

VOLATILE_UNITS = frozenset({"s", "ms", "µs", "J", "mJ", "W", "1/s", "MiB"})
"""Units of time, energy, rate and resident memory: such figures differ from run to run of the same recipe."""


@dataclass(frozen=True)
class Figure:
    """One figure of a row.

    ``how`` is "measured" (counted, clocked or scored), "est" (from a model, named in ``note``), "derived" (from other
    figures) or "n.a."; ``better`` the direction that is an improvement ("" for neither); ``interval`` a 95 % interval.
    """

    value: float | str | None
    unit: str = ""
    how: Literal["measured", "est", "derived", "n.a."] = "measured"
    better: Literal["lower", "higher", ""] = "lower"
    interval: tuple[float, float] | None = None
    note: str = ""
    """Method or counter behind the figure, the word "noisy", or why there is none."""

    @property
    def volatile(self) -> bool:
        """True for time, energy and memory in use, which no two runs share."""
        return self.unit in VOLATILE_UNITS


@dataclass
class Notes:
    """What a step tells the ledger about itself while it runs."""

    figures: dict[str, Figure] = field(default_factory=dict)
    outcome: str = ""
    """What the step decided when it had a choice, e.g. "kept FP32"."""
    candidates: list[dict[str, Any]] = field(default_factory=list)
    """The options it chose among, each {"name": …, figure name: value …}."""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Name → [(step, value)], e.g. training loss."""
    remarks: list[str] = field(default_factory=list)
    children: dict[str, Notes] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """Rows of an inner pipeline (a sub-ledger)."""

    def child(self, reason: str) -> Notes:
        """The notes of an inner pipeline; refuses a reason used before."""
        return self.children.setdefault(reason, Notes())


@dataclass(frozen=True)
class Row:
    """One step of one seed as the ledger shows it. All columns are entries of ``figures``, in display order."""

    id: str
    step: str
    stage: str
    task: str
    seed: int
    headline: str
    """Name of the figure that rows are compared by."""
    runtime: str
    """What ran the predictor for every figure of this row, e.g. "onnxruntime"."""
    kind: str
    """Kind of predictor, e.g. "module", "onnx"."""
    figures: Mapping[str, Figure]
    outcome: str = ""
    by_class: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, list[tuple[float, float]]] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    sub: Mapping[str, list[Row]] = field(default_factory=dict)
    """Sub-ledgers of inner pipelines, by reason."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The step's fields as they were."""
