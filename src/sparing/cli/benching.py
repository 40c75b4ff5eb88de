"""``sparing bench``: the measured figures of one saved model, or how it is served best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.cli import output
from sparing.core.errors import InvalidValue, SparingError

if TYPE_CHECKING:
    from sparing.core.ledger import Figure
    from sparing.core.meter import Examples
    from sparing.core.predictor import Predictor
    from sparing.core.task import Task
    from sparing.engine.tuner import Row

RAW_SIZE = 256
"""Height and width of the image that stands in for a raw input when the task is not there to give one."""


RAW_TEXT = "The committee, which had met twice that week already, could not agree on where the new bridge should stand."
"""The text that stands in for a raw input."""


def bench_folder(folder: Path, *, threads: int, batch: int, data: Path | None, trust: Sequence[str], json: bool) -> Any:
    """Measure a saved model as it is, in its own runtime; quality too when its task and data are there. A document."""
    from sparing.core.environment import environment
    from sparing.core.meter import Meter
    from sparing.core.predictor import load

    predictor = load(folder, trust=trust, threads=threads)
    meter = Meter(threads=threads, batch=batch)
    task, reason = _task_of(predictor)
    figures: dict[str, Figure] = {}
    remarks: list[str] = []
    if task is not None:
        try:
            figures |= meter.quality(task, predictor, task.splits(data).test).figures
        except SparingError as error:
            reason = str(error)
    if reason:
        remarks.append(f"quality is not measured: {reason}")
    figures |= meter.costs(_examples_of(task, predictor), predictor)
    described = predictor.describe()
    if not json:
        output.say(f"{folder}: {described.kind}, {described.precision}, in {described.runtime}, {threads} threads")
        shown = output.table("figure", "value", "how", "note", right=("value",))
        from sparing.core import text

        for name, figure in figures.items():
            value = text.number(figure.value, figure.unit) + text.plus_minus(figure)
            shown.add_row(*map(output.literal, (name, value, figure.how, figure.note)))
        output.console().print(shown)
        output.say(*remarks)
    return {
        "folder": str(folder),
        "description": asdict(described),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "meter": asdict(meter),
        "remarks": remarks,
        "environment": environment(),
    }


def serve_folder(folder: Path, max_latency_ms: float, length: int | None, *, json: bool) -> Any:
    """Find batch × instances × cores with the most throughput within the limit. A document."""
    from sparing.core.environment import environment
    from sparing.core.predictor import load
    from sparing.engine.predictor import EnginePredictor
    from sparing.engine.tuner import tune_production

    predictor = load(folder)
    if not isinstance(predictor, EnginePredictor):
        raise InvalidValue(
            f"{folder} holds a model of kind {predictor.kind!r}; --max-latency-ms is for compiled ones: end its recipe "
            "with the step compile"
        )
    found = tune_production(predictor.engine, max_latency_ms, length=length)
    if not json:
        shown = output.table("batch", "instances", "cores each", "p50 ms", "p99 ms", "sequences a second", "", right=())
        for row in found.table:
            mark = "best" if row is found.best else "" if row.p99_ms <= max_latency_ms else "too slow"
            figures = (f"{row.p50_ms:.3f}", f"{row.p99_ms:.3f}", f"{row.throughput:.0f}")
            shown.add_row(*map(str, (row.batch, row.instances, row.cores)), *figures, mark)
        output.console().print(shown)
        output.say(
            f"most throughput with a p99 of at most {max_latency_ms:g} ms: batch {found.best.batch}, "
            f"{found.best.instances} instances: {found.best.throughput:.0f} sequences a second"
        )
    return {
        "folder": str(folder),
        "max_latency_ms": max_latency_ms,
        "tokens": length or predictor.engine.max_length,
        "best": _row(found.best),
        "table": [_row(row) for row in found.table],
        "environment": environment(),
    }


def _row(row: Row) -> dict[str, Any]:
    return asdict(row) | {"throughput": row.throughput}


def _task_of(predictor: Predictor) -> tuple[Task | None, str]:
    """The registered task the model was made for, or why there is none."""
    from sparing.core.registry import parts, resolve

    name = predictor.context.task
    if name not in parts("tasks"):
        return None, f"the model's task {name!r} is not a registered one" if name else "the folder names no task"
    try:
        task: Task = resolve("tasks", name)()
        if tuple(task.labels) != predictor.labels:
            return None, f"the model's labels are not those of the task {name!r}"
    except (TypeError, SparingError):
        return None, f"the task {name!r} cannot be built without its fields"
    return task, ""


def _examples_of(task: Task | None, predictor: Predictor) -> Examples:
    """The task's example inputs, or made-up ones where there is no task or its examples come from data it lacks."""
    try:
        if task is not None:
            task.example_input(1)
            return task
    except SparingError:
        pass
    return examples_for(predictor)


@dataclass(frozen=True)
class _Examples:
    """Example inputs made without a task."""

    make: Callable[[int], tuple[Any, ...]]
    raw: Sequence[Any] | None = None

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        return self.make(batch)

    def raw_example(self) -> Sequence[Any] | None:
        return self.raw


def examples_for(predictor: Predictor) -> _Examples:
    """Example inputs for a predictor alone: an image or a text through its preprocessing, or what it asks for."""
    import numpy as np

    from sparing.core.predictor.onnx import OnnxPredictor
    from sparing.engine.predictor import EnginePredictor

    preprocessing = predictor.preprocessing
    if preprocessing is not None:
        image = np.random.RandomState(0).randint(0, 256, (RAW_SIZE, RAW_SIZE, 3)).astype(np.uint8)
        for raw in ([image], [RAW_TEXT]):
            try:
                preprocessing(raw)
            except SparingError:
                continue  # made for something else; the graph may tell what it takes
            return _Examples(lambda batch, raw=raw: (preprocessing(raw * batch),), raw)  # type: ignore[misc]
    if isinstance(predictor, EnginePredictor):
        from sparing.engine.runtime import example_ids

        engine = predictor.engine
        return _Examples(lambda batch: (example_ids(engine.encoder, batch, engine.max_length),))
    if isinstance(predictor, OnnxPredictor):
        wanted = predictor.session.get_inputs()
        plain = predictor.input_paths == [str(index) for index in range(len(wanted))]
        shapes = [tuple(item.shape) for item in wanted]
        fixed = all(isinstance(size, int) for shape in shapes for size in shape[1:])
        if plain and fixed and all(item.type == "tensor(float)" for item in wanted):

            def make(batch: int) -> tuple[Any, ...]:
                generator = np.random.RandomState(0)
                return tuple(generator.randn(batch, *shape[1:]).astype(np.float32) for shape in shapes)

            return _Examples(make)
    raise InvalidValue(
        "no inputs can be made up for this model: it has no preprocessing for images or texts, and its graph does not "
        "fix the shape of float inputs. Measure it from Python: sparing.core.meter.Meter().costs(task, "
        "sparing.load(folder))"
    )
