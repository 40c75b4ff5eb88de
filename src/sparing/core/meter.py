"""Measuring one row: quality, size, speed, memory and energy of a predictor.

A row's figures are a function of the predictor, the task and the split, apart from the clocks. Quality and cost are
measured on one and the same predictor, in the runtime the row names.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from sparing.core import ledger as columns
from sparing.core.clock import Timing, clock
from sparing.core.energy import counter_missing, estimate_mj
from sparing.core.errors import InvalidValue, SparingError, UntrustedCode
from sparing.core.ledger import Figure
from sparing.core.predictor import Description, ModulePredictor, Operations, Predictor, to_onnx
from sparing.core.predictor.module import samples_of
from sparing.core.predictor.tree import map_leaves, to_numpy
from sparing.core.probe import Probe, probe
from sparing.core.statistics import group_gap, units_interval
from sparing.core.step import field_problems

if TYPE_CHECKING:
    from sparing.core.task import Evaluation, Metric, Task

Runtime = Literal["onnxruntime", "module"]
T = TypeVar("T")


class Examples(Protocol):
    """What can be measured without knowing what is right: the part of a :class:`Task` that makes example inputs."""

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """See :meth:`Task.example_input`."""
        ...

    def raw_example(self) -> Sequence[Any] | None:
        """See :meth:`Task.raw_example`."""
        ...


class Measurement(NamedTuple):
    """What the meter found for one row."""

    figures: dict[str, Figure]
    """In display order."""
    outcomes: np.ndarray | None
    """The headline's outcome of each test unit (n_units,), where the task gives them."""
    by_class: dict[str, float]


_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True, strict=True)


def _plainly(cls: type[T]) -> type[T]:
    """Let the class raise :class:`InvalidValue`, with the field and its range, for what pydantic refuses."""
    validated: Callable[..., None] = cls.__init__

    def __init__(self: Any, **values: Any) -> None:  # noqa: N807
        try:
            validated(self, **values)
        except ValidationError as error:
            raise InvalidValue("\n".join(field_problems(cls, error))) from None  # type: ignore[arg-type]

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_plainly
@pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Meter:
    """How rows are measured; the ``meter:`` mapping of a recipe holds these fields."""

    name: ClassVar[str] = "meter"

    runtime: Runtime = "onnxruntime"
    """What every row is measured in. "module" (eager torch) only where a task's models cannot be exported at all."""
    threads: int = Field(default=1, ge=1, le=1024)
    """Threads of the runtime. One by default: it repeats best, and does not mix an economy with parallel speed-up."""
    batch: int = Field(default=64, ge=1)
    """Batch size of the throughput column."""
    precision: float = Field(default=0.03, gt=0, le=0.5)
    """Repeat until the 95 % interval of the p50 is within this share of it; a row that gets there too late is noisy."""
    min_seconds: float = Field(default=2.0, ge=0)
    """Spend at least this long on the clocks, so that the interval has seen some of the machine's weather."""
    max_seconds: float = Field(default=6.0, gt=0)
    """Spend at most this long on the clocks."""
    memory: bool = True
    """Measure peak memory in a fresh process."""
    energy: Literal["auto", "counter", "estimate", "off"] = "auto"
    """"counter": only what a counter says; "estimate": only the operations model; "auto": the first there is."""
    energy_seconds: float = Field(default=2.0, gt=0)
    """How long inferences are repeated while a counter is read."""

    def __post_init__(self) -> None:
        if self.min_seconds > self.max_seconds:
            raise InvalidValue(f"min_seconds = {self.min_seconds} is more than max_seconds = {self.max_seconds}")

    def measure(self, task: Task, predictor: Predictor, split: Any, source: Predictor | None = None) -> Measurement:
        """All columns that can be measured on a predictor; ``split`` is the task's test split.

        ``predictor`` is measured as it is: hand in what :func:`comparable` returns. What the row cost to make is the
        pipeline's to add, and the break-even point the ledger's. ``source`` is what ``predictor`` was exported from: it
        is asked for operations that depend on the data.
        """
        quality = self.quality(task, predictor, split)
        operations = (predictor if source is None else source).operations_on(task, split)
        costs = self.costs(task, predictor, operations)
        return Measurement(quality.figures | costs, quality.outcomes, quality.by_class)

    def costs(self, task: Examples, predictor: Predictor, operations: Operations | None = None) -> dict[str, Figure]:
        """Sizes, counts, times, memory and energy; the inputs are the task's examples.

        ``operations``: those of a sample where they depend on the data, instead of the predictor's own count.
        """
        figures: dict[str, Figure] = {}
        description = predictor.describe().counting(operations)
        with self._threads_of(predictor), tempfile.TemporaryDirectory(prefix="sparing-meter-") as scratch:
            inputs, several = (map_leaves(to_numpy, task.example_input(count)) for count in (1, self.batch))
            timings = self._timings(task, predictor, inputs, several)
            folder, refused = _saved(predictor, Path(scratch) / "model")
            found, missing = self._probe(folder, refused, inputs, predictor.runtime)
            figures |= _sizes(description, folder, refused)
            figures |= _speed(timings, self.batch, self._together(predictor, several), self.threads, predictor)
            figures |= _memory(found, missing)
            figures[columns.ENERGY] = self._energy(description, found, missing)
        return figures

    def quality(self, task: Task, predictor: Predictor, split: Any) -> Measurement:
        """The task's metrics, the headline under each of the task's corruptions, and the gap between groups."""
        evaluation = task.evaluate(predictor, split)
        outcomes = _outcomes(task, evaluation)
        figures = _metrics(task, evaluation, outcomes)
        for name, corrupted in task.corruptions(split).items():
            worse = task.evaluate(predictor, corrupted)
            shown = _metrics(task, worse, _outcomes(task, worse), only=task.headline)
            figures[f"{task.headline.name} under {name}"] = shown[task.headline.name]
        if task.groups is not None:
            figures[f"{task.headline.name} gap between groups"] = _gap(task, outcomes)
        return Measurement(figures, outcomes, dict(evaluation.by_class))

    def latency(self, predictors: Mapping[str, Predictor], task: Task, batch: int = 1) -> dict[str, Timing]:
        """Timings of several predictors on the same example input, in turns: the fair way to choose among them."""
        inputs = map_leaves(to_numpy, task.example_input(batch))
        before = {name: predictor.threads for name, predictor in predictors.items()}
        try:
            for predictor in predictors.values():
                predictor.set_threads(self.threads)
            return self._clock({name: partial(predictor, *inputs) for name, predictor in predictors.items()})
        finally:
            for name, predictor in predictors.items():
                predictor.set_threads(before[name])

    def _clock(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        return clock(
            calls,
            precision=self.precision,
            min_seconds=self.min_seconds,
            max_seconds=self.max_seconds,
            threads=self.threads,
        )

    def _timings(
        self, task: Examples, predictor: Predictor, inputs: tuple[Any, ...], several: tuple[Any, ...]
    ) -> dict[str, Timing]:
        calls: dict[str, Callable[[], Any]] = {"call": partial(predictor, *inputs)}
        raw = task.raw_example()
        if raw is not None and predictor.preprocessing is not None:
            calls["raw"] = partial(predictor.predict, raw)
        calls["batch"] = partial(predictor, *several)
        return self._clock(calls)

    def _together(self, predictor: Predictor, inputs: tuple[Any, ...]) -> int:
        """Samples in the throughput's batch: as for multiply-accumulates, as many as the predictor answers.

        It is more than the batch where one input holds many samples, as a graph holds nodes.
        """
        return max(samples_of(predictor(*inputs), inputs), self.batch)

    def _probe(
        self, folder: Path | None, refused: str, inputs: tuple[Any, ...], runtime: str
    ) -> tuple[Probe | None, str]:
        """(what a fresh process found, or why it was not asked)."""
        counter = self.energy in ("auto", "counter") and not counter_missing()
        if folder is None:
            return None, refused
        if not (self.memory or counter):
            return None, "memory is switched off in the meter"
        try:
            seconds = self.energy_seconds if counter else 0.0
            return probe(folder, inputs, runtime, threads=self.threads, energy_seconds=seconds), ""
        except UntrustedCode as error:
            return None, f"a fresh process is not told to trust this model's own class: {error}"

    def _energy(self, description: Description, found: Probe | None, missing: str) -> Figure:
        if self.energy == "off":
            return _none("mJ", "energy is switched off in the meter")
        reasons = []
        if self.energy in ("auto", "counter"):
            if found is not None and found.energy_mj is not None:
                return Figure(found.energy_mj, "mJ", note=found.energy_note)
            reasons.append(counter_missing() or (found.energy_note if found else missing))
        if self.energy in ("auto", "estimate"):
            value, note = estimate_mj(description)
            if value is not None:
                return Figure(value, "mJ", "est", note=note)
            reasons.append(note)
        return _none("mJ", "; ".join(reasons))

    @contextmanager
    def _threads_of(self, predictor: Predictor) -> Iterator[None]:
        before = predictor.threads
        predictor.set_threads(self.threads)
        try:
            yield
        finally:
            predictor.set_threads(before)


def comparable(
    predictor: Predictor, task: Task, runtime: Runtime = "onnxruntime", export: Callable[..., Predictor] = to_onnx
) -> Predictor:
    """The predictor a row is measured with, so that all rows of a task share one runtime.

    A torch module is exported to ONNX, unless ``runtime`` is "module"; any other predictor has a deployed runtime of
    its own and is returned as it is. Raises :class:`NotExportable`: when it does for a task's first model, the caller
    measures every row of that task with ``runtime="module"``. ``export(predictor, None, task)`` may be a function
    that remembers.
    """
    if runtime == "module" or not isinstance(predictor, ModulePredictor):
        return predictor
    return export(predictor, None, task)


def _none(unit: str, reason: str, better: Literal["lower", "higher", ""] = "lower") -> Figure:
    return Figure(None, unit, "n.a.", better, note=reason)


def _outcomes(task: Task, evaluation: Evaluation) -> np.ndarray | None:
    """The headline's outcomes, checked against the headline; None when there are none or the headline is not finite."""
    headline = task.headline.name
    if headline not in evaluation.metrics:
        raise SparingError(
            f"task {task.name!r}: evaluate returned {', '.join(evaluation.metrics) or 'nothing'}, "
            f"but not the headline {headline!r}"
        )
    value = float(evaluation.metrics[headline])
    if evaluation.per_unit is None or not math.isfinite(value):
        return None
    outcomes = np.asarray(evaluation.per_unit)
    if outcomes.ndim != 1 or not len(outcomes) or not math.isclose(outcomes.mean(), value, rel_tol=1e-5, abs_tol=1e-6):
        shape = f"{outcomes.shape} and mean {outcomes.mean() if outcomes.size else 'none'}"
        raise SparingError(
            f"task {task.name!r}: per_unit must be one outcome for each {task.unit} with the headline {headline} = "
            f"{value:.6g} as its mean; it has shape {shape}"
        )
    return outcomes


def _metrics(
    task: Task, evaluation: Evaluation, outcomes: np.ndarray | None, only: Metric | None = None
) -> dict[str, Figure]:
    figures = {}
    for metric in task.metrics if only is None else (only,):
        if metric.name not in evaluation.metrics:
            raise SparingError(f"task {task.name!r}: evaluate did not return its metric {metric.name!r}")
        value = float(evaluation.metrics[metric.name])
        if not math.isfinite(value):
            figures[metric.name] = _none(metric.unit, f"evaluated to {value}", metric.better)
        elif metric == task.headline and outcomes is not None:
            interval, note = units_interval(outcomes)
            figures[metric.name] = Figure(value, metric.unit, "measured", metric.better, interval, note)
        else:
            figures[metric.name] = Figure(value, metric.unit, "measured", metric.better)
    return figures


def _gap(task: Task, outcomes: np.ndarray | None) -> Figure:
    if outcomes is None:
        return _none(task.headline.unit, "the headline has no outcome for each unit")
    groups = np.asarray(task.groups)
    if groups.shape == outcomes.shape:  # other shapes are refused below
        compared = np.array([name is not None for name in groups.tolist()])
        groups, outcomes = groups[compared], outcomes[compared]
        if len(present := np.unique(groups)) < 2:
            who = (
                f"all {task.unit}s that are compared are in {str(present[0])!r}" if len(present) else "nobody is in one"
            )
            return _none(task.headline.unit, f"a gap needs two groups; {who}")
    try:
        gap, interval, note = group_gap(outcomes, groups)
    except InvalidValue as error:
        raise SparingError(f"task {task.name!r}: {error}") from error
    return Figure(gap, task.headline.unit, "measured", "lower", interval, note)


def _saved(predictor: Predictor, folder: Path) -> tuple[Path | None, str]:
    """(the folder it was saved into, or why it cannot be saved)."""
    try:
        predictor.save(folder)
    except SparingError as error:
        return None, f"cannot be saved: {error}"
    return folder, ""


def _sizes(description: Description, folder: Path | None, refused: str) -> dict[str, Figure]:
    card = "README.md"  # for people; nothing in it is needed to answer
    if folder is None:
        whole = _none("B", refused)
    else:
        total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != card)
        whole = Figure(total, "B", note=f"all files but {card}")
    counts = {columns.PARAMETERS: description.parameters, columns.NONZERO: description.nonzero}
    rule = description.macs_rule
    added = description.accumulates
    return {
        columns.MODEL_BYTES: Figure(description.model_bytes, "B", note="payload files"),
        columns.FOLDER_BYTES: whole,
        **{
            name: _none("", "not known for this kind of predictor") if count is None else Figure(count)
            for name, count in counts.items()
        },
        columns.MACS: _none("", rule or "not counted")
        if description.macs is None
        else Figure(description.macs, "", "derived", note=rule),
        **({} if added is None else {columns.ADDITIONS: Figure(added, "", "derived", note=rule)}),
    }


def _speed(
    timings: Mapping[str, Timing], batch: int, together: int, threads: int, predictor: Predictor
) -> dict[str, Figure]:
    figures: dict[str, Figure] = {}
    pairs = (("call", columns.P50, columns.P99), ("raw", columns.RAW_P50, columns.RAW_P99))
    for name, middle, tail in pairs:
        timing = timings.get(name)
        if timing is None:
            kept = predictor.preprocessing is None
            reason = "the predictor has no preprocessing" if kept else "the task gives no raw example"
            figures[middle] = figures[tail] = _none("ms", reason)
            continue
        figures[middle] = Figure(timing.p50 * 1e3, "ms", interval=_times(timing.interval, 1e3), note=timing.note)
        if timing.p99 is None:
            figures[tail] = _none("ms", f"only {timing.repetitions} repetitions fitted into the time allowed")
        else:
            figures[tail] = Figure(timing.p99 * 1e3, "ms", interval=_times(timing.p99_interval, 1e3), note=timing.note)
    timing = timings["batch"]
    bounds = None if timing.interval is None else (together / timing.interval[1], together / timing.interval[0])
    size = f"batch {batch}" if together == batch else f"{together} at once"
    figures[columns.THROUGHPUT] = Figure(
        together / timing.p50, "1/s", "measured", "higher", bounds, f"{size}; {timing.note}"
    )
    figures[columns.THREADS] = Figure(threads, "", "measured", "", note="threads of the runtime")
    return figures


def _times(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return None if interval is None else (interval[0] * factor, interval[1] * factor)


def _memory(found: Probe | None, missing: str) -> dict[str, Figure]:
    if found is None:
        return {name: _none("MiB", missing) for name in (columns.PEAK_MEMORY, columns.OWN_MEMORY)}
    note = "fresh process, from start to the third answer at batch 1"
    return {
        columns.PEAK_MEMORY: Figure(found.peak_mib, "MiB", note=note),
        columns.OWN_MEMORY: Figure(
            found.peak_mib - found.runtime_mib,
            "MiB",
            "derived",
            note=f"above the {found.runtime_mib:.0f} MiB of interpreter and runtime",
        ),
    }
