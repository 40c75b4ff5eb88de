"""``sparing bench``: the measured figures of one saved model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.cli import output
from sparing.core.errors import InvalidValue, SparingError

if TYPE_CHECKING:
    from sparing.core.ledger import Figure
    from sparing.core.predictor import Predictor
    from sparing.core.task import Task

RAW_SIZE = 256
"""Height and width of the image that stands in for a raw input when the task is not there to give one."""


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
    examples = task if task is not None else examples_for(predictor)
    figures |= meter.costs(examples, predictor)
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
    """Example inputs for a predictor alone: a random image through its preprocessing, or what its graph asks for."""
    import numpy as np

    from sparing.core.predictor.onnx import OnnxPredictor

    preprocessing = predictor.preprocessing
    if preprocessing is not None:
        raw = [np.random.RandomState(0).randint(0, 256, (RAW_SIZE, RAW_SIZE, 3)).astype(np.uint8)]
        try:
            preprocessing(raw)
        except SparingError:
            pass  # not made for images; the graph may tell what it takes
        else:
            return _Examples(lambda batch: (preprocessing(raw * batch),), raw)
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
        "no inputs can be made up for this model: it has no image preprocessing, and its graph does not fix the shape "
        "of float inputs. Measure it from Python: sparing.core.meter.Meter().costs(task, sparing.load(folder))"
    )
