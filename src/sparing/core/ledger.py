"""The rows: what each step saved and what it lost; differences between them; and the files they are kept in.

A ledger's folder holds ``ledger.json`` (schema version 1, see :func:`json_schema`) and ``outcomes.npz``: for each row
that has them, the headline's outcome of every test unit, under ``<seed>/<row id>``.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparing.core.errors import CorruptFile, InvalidValue, did_you_mean

if TYPE_CHECKING:
    import numpy as np

    from sparing.core.statistics import Difference

VERSION = 1
FILE = "ledger.json"
OUTCOMES = "outcomes.npz"
VOLATILE_UNITS = frozenset({"s", "ms", "µs", "J", "mJ", "W", "1/s", "MiB", "inferences"})
"""Units of time, energy, rate, resident memory and what is derived from them (break-even points, in inferences): such
figures differ from run to run of the same recipe."""

MODEL_BYTES = "model bytes"
FOLDER_BYTES = "folder bytes"
PARAMETERS = "parameters"
NONZERO = "non-zero parameters"
MACS = "MACs"
ADDITIONS = "additions"
P50 = "latency p50"
P99 = "latency p99"
RAW_P50 = "latency p50 with preprocessing"
RAW_P99 = "latency p99 with preprocessing"
THROUGHPUT = "throughput"
THREADS = "threads"
PEAK_MEMORY = "peak memory"
OWN_MEMORY = "memory above runtime"
ENERGY = "energy"
WALL = "wall"
CPU = "cpu"
BREAK_EVEN = "break-even"
RATIOS = (
    MODEL_BYTES,
    FOLDER_BYTES,
    PARAMETERS,
    NONZERO,
    MACS,
    ADDITIONS,
    P50,
    P99,
    RAW_P50,
    RAW_P99,
    THROUGHPUT,
    PEAK_MEMORY,
    OWN_MEMORY,
    ENERGY,
)
"""Columns whose ratio to the first row means something, where both rows ran in one runtime."""

METERED = (*RATIOS, THREADS, WALL, CPU, BREAK_EVEN)
"""Columns that a step cannot record: the pipeline and the meter fill them."""

_STRICT = {"extra": "forbid", "strict": True, "allow_inf_nan": False, "use_attribute_docstrings": True}
_ROW_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Figure:
    """One figure of a row.

    ``how`` is "measured" (counted, clocked or scored), "est" (from a model, named in ``note``), "derived" (from other
    figures) or "n.a."; ``better`` the direction that is an improvement ("" for neither); ``interval`` a 95 % interval.
    A figure without a value is "n.a."; NaN and infinities are refused.
    """

    __pydantic_config__ = _STRICT
    value: int | float | str | None
    unit: str = ""
    how: Literal["measured", "est", "derived", "n.a."] = "measured"
    better: Literal["lower", "higher", ""] = "lower"
    interval: tuple[float, float] | None = None
    note: str = ""
    """Method or counter behind the figure, the word "noisy", or why there is none."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Figure:
        """A figure from its fields as JSON; raises :class:`CorruptFile` when they are not a figure's."""
        try:
            return cls(**value)
        except (TypeError, ValueError) as error:
            raise CorruptFile(f"{dict(value)} is not a figure of a ledger: {error}") from error

    def __post_init__(self) -> None:
        value: Any = self.value
        value = value.item() if hasattr(value, "item") else value  # NumPy's scalars
        if isinstance(value, bool) or not isinstance(value, int | float | str | None):
            raise InvalidValue(f"a figure is a number, a text or None, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidValue(f"a figure cannot be {value}; record None and say in the note why there is none")
        if self.how == "n.a." and value is not None:
            raise InvalidValue(f'a figure marked "n.a." cannot have the value {value!r}')
        object.__setattr__(self, "value", value)
        if value is None:
            object.__setattr__(self, "how", "n.a.")
        if self.interval is not None:
            low, high = (float(bound) for bound in self.interval)
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise InvalidValue(f"an interval is two finite numbers, the lower first, not {self.interval!r}")
            object.__setattr__(self, "interval", (low, high))

    @property
    def number(self) -> float | None:
        """The value when it is a number."""
        return self.value if isinstance(self.value, int | float) else None

    @property
    def volatile(self) -> bool:
        """True for time, energy and memory in use, which no two runs share."""
        return self.unit in VOLATILE_UNITS


PICTURE_SIDE = 1024
"""Pixels that a ledger's picture may have along a side."""
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A small picture of a row, e.g. the images that a step made."""

    __pydantic_config__ = _STRICT
    png: str
    """A PNG file in base64."""
    caption: str
    """What it shows, also for those who cannot see it."""

    @classmethod
    def of(cls, pixels: np.ndarray, caption: str) -> Picture:
        """A picture from its pixels.

        Args:
            pixels: uint8 (height, width) grey, or (height, width, 3) red, green and blue.
            caption: what it shows.

        Raises:
            InvalidValue: other pixels, more than 1024 along a side, or no caption.
        """
        import numpy as np
        from PIL import Image

        pixels = np.asarray(pixels)
        shape = pixels.shape
        if pixels.dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (3,)):
            raise InvalidValue(f"a picture is uint8 (height, width) or (height, width, 3), not {pixels.dtype} {shape}")
        if not 0 < min(shape[:2]) <= max(shape[:2]) <= PICTURE_SIDE:
            raise InvalidValue(f"a picture of {shape[0]}×{shape[1]} pixels; 1…{PICTURE_SIDE} along each side go in")
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", optimize=True)
        return cls(base64.b64encode(file.getvalue()).decode(), caption)

    def __post_init__(self) -> None:
        try:
            content = base64.b64decode(self.png, validate=True)
        except (binascii.Error, ValueError):
            content = b""
        if not content.startswith(_PNG):
            raise InvalidValue(f"a picture is a PNG file in base64, not {self.png[:40]!r}")
        if not self.caption:
            raise InvalidValue("a picture needs a caption: not everybody can see it")


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
    pictures: dict[str, Picture] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    children: dict[str, Notes] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    """Rows of an inner pipeline (a sub-ledger)."""

    def child(self, reason: str) -> Notes:
        """The notes of an inner pipeline; refuses a reason used before."""
        if reason in self.children:
            raise InvalidValue(
                f"a step forks its job twice for the reason {reason!r}; each fork needs a reason of its own"
            )
        self.children[reason] = Notes()
        return self.children[reason]


@dataclass(frozen=True)
class Row:
    """One step of one seed as the ledger shows it. All columns are entries of ``figures``, in display order."""

    __pydantic_config__ = _STRICT
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
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    sub: Mapping[str, list[Row]] = field(default_factory=dict)
    """Sub-ledgers of inner pipelines, by reason."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The step's fields as they were."""


@dataclass(frozen=True)
class OutcomeRecord:
    """What ``ledger.json`` says about one array of ``outcomes.npz``."""

    __pydantic_config__ = _STRICT
    units: int
    """Number of test units."""
    sha256: str
    """Of the array's dtype, length and content."""


@dataclass(frozen=True)
class Document:
    """The content of ``ledger.json``."""

    __pydantic_config__ = _STRICT
    version: Literal[1]
    name: str
    """The recipe's name."""
    created: str
    """ISO 8601, UTC."""
    recipe: str
    """The recipe's text; empty when it was given in Python."""
    meter: Mapping[str, Any]
    """The meter's fields."""
    stopped: str
    """Why the run ended before its recipe did; empty when it did not."""
    environment: Mapping[str, Any]
    """The machine and the versions the ledger was made with."""
    tasks: Mapping[str, str]
    """Task name → fingerprint of its definition and data; ledgers are compared where these agree."""
    rows: list[Row]
    """In the order the steps ran, seed after seed."""
    outcomes: Mapping[str, OutcomeRecord]
    """``<seed>/<row id>`` → the array of that name in ``outcomes.npz``."""


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Document)


def json_schema() -> dict[str, Any]:
    """The JSON schema of ``ledger.json``, as the documentation prints it."""
    return _adapter().json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


@dataclass(frozen=True)
class Ratio:
    """A figure divided by the same figure of the first row of its task, in the same runtime.

    ``interval`` holds every quotient of two values inside the two figures' intervals; None when one has no interval.
    """

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Summary:
    """One step over all its seeds: what a table or report shows in one line."""

    id: str
    step: str
    stage: str
    task: str
    headline: str
    runtime: str
    kind: str
    seeds: tuple[int, ...]
    figures: Mapping[str, Figure]
    """Means over the seeds with Student intervals; a single seed's figures as they are."""
    first: str
    """Id of the first measured row of the same task."""
    previous: str
    """Id of the measured row before of the same task; empty for the first."""
    first_runtime: str
    to_first: Difference | None
    """Paired difference of the headline; None for the first row itself and where there is nothing to compare."""
    to_previous: Difference | None
    ratios: Mapping[str, Ratio]
    """Figure name → ratio to the first row of the task; empty when the runtimes differ."""
    outcome: str = ""


@dataclass
class Ledger:
    """The rows of one run over all its seeds, with what is needed to read them."""

    name: str = ""
    recipe: str = ""
    meter: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)
    """Task name → fingerprint of its definition and data."""
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    rows: list[Row] = field(default_factory=list)
    outcomes: dict[str, np.ndarray] = field(default_factory=dict)
    """``<seed>/<row id>`` → the headline's outcome of each test unit (n_units,)."""
    stopped: str = ""
    """Why the run ended before its recipe did."""

    @classmethod
    def begin(cls, name: str, recipe: str, meter: Any) -> Ledger:
        """An empty ledger of a run that starts now on this machine."""
        from dataclasses import asdict

        from sparing.core.environment import environment

        return cls(name=name, recipe=recipe, meter=asdict(meter), environment=environment())

    def stop(self, reason: str) -> None:
        """Note why the run ends before its recipe does."""
        self.stopped = reason

    def add(self, row: Row, outcomes: np.ndarray | None = None) -> Row:
        """Append a row, with its break-even point when there is an earlier one to save against; returns it as kept.

        ``outcomes`` (n_units,) are the headline's outcomes, of which it is the mean.
        """
        if not _ROW_ID.fullmatch(row.id):
            raise InvalidValue(f"a row's id is made of letters, digits, '_', '.' and '-', not {row.id!r}")
        if any((row.seed, row.id) == (known.seed, known.id) for known in self.rows):
            raise InvalidValue(f"the ledger already has a row {row.id!r} of seed {row.seed}")
        if outcomes is not None:
            self.outcomes[key(row.seed, row.id)] = _checked(outcomes, row.id)
        row = self._with_break_even(row)
        self.rows.append(row)
        return row

    def _with_break_even(self, row: Row) -> Row:
        """The row with what it and the unmeasured rows before it cost, over what it saves."""
        if P50 not in row.figures or BREAK_EVEN in row.figures:
            return row
        steps = [row]
        for earlier in reversed([known for known in self.rows if (known.seed, known.task) == (row.seed, row.task)]):
            if P50 in earlier.figures:
                break
            if earlier.stage != "audit":
                steps.append(earlier)
        else:
            return row
        seconds = sum(one.figures[WALL].number or 0.0 for one in steps if WALL in one.figures)
        if earlier.runtime != row.runtime:
            reason = f"the row before ran in {earlier.runtime}, this one in {row.runtime}"
            found = Figure(None, "inferences", "n.a.", note=reason)
        else:
            found = break_even(seconds, earlier.figures[P50], row.figures[P50])
        return replace(row, figures={**row.figures, BREAK_EVEN: found})

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds, in the order they ran."""
        return tuple(dict.fromkeys(row.seed for row in self.rows))

    @property
    def ids(self) -> tuple[str, ...]:
        """All row ids, in the order they ran."""
        return tuple(dict.fromkeys(row.id for row in self.rows))

    def of(self, row_id: str) -> list[Row]:
        """The rows of one step, one for each seed; raises :class:`InvalidValue` naming the ids there are."""
        found = [row for row in self.rows if row.id == row_id]
        if not found:
            known = ", ".join(self.ids) or "none"
            raise InvalidValue(f"no row {row_id!r}.{did_you_mean(row_id, self.ids)} Rows: {known}")
        return found

    def difference(self, before: str, after: str) -> Difference | None:
        """How much the headline of ``after`` differs from that of ``before``.

        Within one seed it is paired over the stored outcomes of the test units; over several seeds Student-t of the
        seeds' differences. None across tasks or headlines, and when a row has no headline.
        """
        return _difference(self, before, self, after)

    def summary(self) -> list[Summary]:
        """One line for each step, seeds taken together, with differences to the first and previous row of its task."""
        lines: list[Summary] = []
        for row_id in self.ids:
            rows = self.of(row_id)
            head = rows[0]
            earlier = [line for line in lines if line.task == head.task and line.headline in line.figures]
            first, previous = (earlier[0], earlier[-1]) if earlier else (None, None)
            figures = {
                name: aggregate([row.figures[name] for row in rows if name in row.figures], len(rows))
                for name in ordered(row.figures for row in rows)
            }
            runtime = " / ".join(dict.fromkeys(row.runtime for row in rows))
            lines.append(
                Summary(
                    id=row_id,
                    step=head.step,
                    stage=head.stage,
                    task=head.task,
                    headline=head.headline,
                    runtime=runtime,
                    kind=" / ".join(dict.fromkeys(row.kind for row in rows)),
                    seeds=tuple(row.seed for row in rows),
                    figures=figures,
                    first=first.id if first else row_id,
                    previous=previous.id if previous else "",
                    first_runtime=first.runtime if first else runtime,
                    to_first=self.difference(first.id, row_id) if first else None,
                    to_previous=self.difference(previous.id, row_id) if previous else None,
                    ratios=ratios(first.figures, figures) if first and first.runtime == runtime else {},
                    outcome="; ".join(dict.fromkeys(row.outcome for row in rows if row.outcome)),
                )
            )
        return lines

    def document(self) -> dict[str, Any]:
        """The content of ``ledger.json``: plain JSON values, checked against the schema."""
        from pydantic import ValidationError
        from pydantic_core import PydanticSerializationError, to_jsonable_python

        raw = {
            "version": VERSION,
            "name": self.name,
            "created": self.created,
            "recipe": self.recipe,
            "meter": self.meter,
            "stopped": self.stopped,
            "environment": self.environment,
            "tasks": self.tasks,
            "rows": self.rows,
            "outcomes": {
                name: OutcomeRecord(len(values), _array_digest(values)) for name, values in self.outcomes.items()
            },
        }
        try:
            text = json.dumps(to_jsonable_python(raw), allow_nan=False)
            # read back before it is handed out, so that what was written and what is loaded are one
            return _adapter().dump_python(_adapter().validate_json(text), mode="json")
        except ValidationError as error:
            raise InvalidValue(f"the ledger cannot be written: {_first_problem(error)}") from error
        except (PydanticSerializationError, ValueError, TypeError) as error:
            raise InvalidValue(f"the ledger cannot be written: {error}") from error

    def save(self, folder: Path | str) -> None:
        """Write ``ledger.json`` and, when there are outcomes, ``outcomes.npz``, each atomically.

        The arrays come first: a ledger is readable beside arrays of rows it does not know yet.
        """
        from sparing.core import files

        folder, document = Path(folder), self.document()
        if self.outcomes:
            files.write_arrays(folder / OUTCOMES, self.outcomes)
        files.write_json(folder / FILE, document)

    @classmethod
    def load(cls, folder: Path | str) -> Ledger:
        """Read what :meth:`save` wrote; anything off raises :class:`CorruptFile` naming the place."""
        from pydantic import ValidationError

        from sparing.core import files

        folder = Path(folder)
        source = folder / FILE
        value = files.read_json(source)
        if not isinstance(value, dict) or "version" not in value:
            raise CorruptFile(f"{source} is not a ledger: the entry 'version' is missing")
        if type(value["version"]) is not int or value["version"] != VERSION:
            raise CorruptFile(f"{source} has version {value['version']!r}; this release reads {VERSION}")
        try:
            found: Document = _adapter().validate_json(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
        except ValidationError as error:
            raise CorruptFile(f"{source}: {_first_problem(error)}") from error
        except (ValueError, RecursionError) as error:  # an overflowing number, a lone surrogate, endless nesting
            raise CorruptFile(f"{source}: {error}") from error
        ledger = cls(
            name=found.name,
            recipe=found.recipe,
            meter=found.meter,
            environment=found.environment,
            tasks=dict(found.tasks),
            created=found.created,
            stopped=found.stopped,
        )
        try:
            for row in found.rows:
                ledger.add(row)
        except InvalidValue as error:
            raise CorruptFile(f"{source}: {error}") from error
        if strangers := found.outcomes.keys() - {key(row.seed, row.id) for row in ledger.rows}:
            raise CorruptFile(f"{source}: it lists outcomes of rows it does not have: {', '.join(sorted(strangers))}")
        ledger.outcomes = _read_outcomes(folder / OUTCOMES, found.outcomes)
        return ledger

    def canonical(self) -> str:
        """Canonical JSON of everything that two runs of one recipe must share.

        Left out: figures of time, energy and memory in use, the candidates' figures (timings may be among them), the
        environment, and when it was made.
        """
        from sparing.core.files import canonical_json

        document = self.document()
        return canonical_json(
            {name: document[name] for name in ("version", "name", "recipe", "meter", "stopped", "tasks", "outcomes")}
            | {"rows": [_stable(row) for row in document["rows"]]}
        )

    def digest(self) -> str:
        """SHA-256 of :meth:`canonical`."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """:meth:`document` with the :meth:`summary` beside it, for ``--json``."""
        from pydantic_core import to_jsonable_python

        return self.document() | {"summary": to_jsonable_python(self.summary())}

    def to_markdown(self, seed: int | None = None) -> str:
        """The key columns as a Markdown table, of one seed or of all, for a model card."""
        from sparing.core.table import markdown

        return markdown(self if seed is None else self.only(seed))

    def only(self, seed: int) -> Ledger:
        """The same ledger with the rows of one seed."""
        rows = [row for row in self.rows if row.seed == seed]
        kept = {name: self.outcomes[name] for row in rows if (name := key(seed, row.id)) in self.outcomes}
        return replace(self, rows=rows, outcomes=kept)


def key(seed: int, row_id: str) -> str:
    """The name of a row's outcomes."""
    return f"{seed}/{row_id}"


def ordered(names: Iterable[Iterable[str]]) -> list[str]:
    """All names in the order they are first met; a later list's newcomers stand beside their neighbours."""
    result: list[str] = []
    for some in names:
        place = 0
        for name in some:
            if name in result:
                place = result.index(name) + 1
            else:
                result.insert(place, name)
                place += 1
    return result


def aggregate(figures: Sequence[Figure], seeds: int) -> Figure:
    """One figure for several seeds: mean and Student's interval of the numbers, or the texts that occur."""
    head = figures[0]
    if seeds == 1:
        return head
    numbers = [figure.number for figure in figures if figure.number is not None]
    notes = list(dict.fromkeys(figure.note for figure in figures))
    noisy = sum("noisy" in figure.note for figure in figures)
    note = notes[0] if len(notes) == 1 else f"noisy in {noisy} of {seeds} seeds" if noisy else ""
    if not numbers:
        texts = dict.fromkeys(str(figure.value) for figure in figures if figure.value is not None)
        return Figure(" / ".join(texts) or None, head.unit, head.how, head.better, note=note)
    how = next(figure.how for figure in figures if figure.number is not None)
    if len(numbers) < seeds:
        note = ", ".join(filter(None, (note, f"{len(numbers)} of {seeds} seeds")))
    if len(set(numbers)) == 1:
        return Figure(numbers[0], head.unit, how, head.better, note=note)
    from sparing.core.statistics import t_interval

    return Figure(sum(numbers) / len(numbers), head.unit, how, head.better, t_interval(numbers), note)


def ratios(before: Mapping[str, Figure], after: Mapping[str, Figure]) -> dict[str, Ratio]:
    """Ratios of all :data:`RATIOS` that both rows have; the rows must have run in one runtime."""
    found: dict[str, Ratio] = {}
    for name in RATIOS:
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old.number is None or new.number is None or old.number <= 0:
            continue
        if old.how != new.how or old.unit != new.unit:  # e.g. energy read from a counter against an estimate
            continue
        interval = None
        if old.interval and new.interval and old.interval[0] > 0:
            interval = (new.interval[0] / old.interval[1], new.interval[1] / old.interval[0])
        found[name] = Ratio(new.number / old.number, interval)
    return found


def break_even(cost_s: float, before: Figure, after: Figure) -> Figure:
    """After how many inferences at batch 1 the seconds that ``after`` took to make are won back.

    ``before`` and ``after`` are latencies in ms. n.a. unless latency fell by more than their intervals allow for; the
    break-even point's interval comes from theirs.
    """
    unit = "inferences"
    if before.number is None or after.number is None or after.number >= before.number:
        return Figure(None, unit, "n.a.", note="latency did not fall")
    if before.interval is None or after.interval is None or after.interval[1] >= before.interval[0]:
        return Figure(None, unit, "n.a.", note="the fall in latency is within its uncertainty")
    low, high = before.interval[0] - after.interval[1], before.interval[1] - after.interval[0]
    note = "wall time since the measured row before, over the fall in latency p50"
    value = 1e3 * cost_s / (before.number - after.number)
    return Figure(value, unit, "derived", interval=(1e3 * cost_s / high, 1e3 * cost_s / low), note=note)


def cross_difference(before: tuple[Ledger, str], after: tuple[Ledger, str]) -> Difference | None:
    """:meth:`Ledger.difference` between rows of two ledgers; None unless both know the task's data to be the same."""
    (old, old_id), (new, new_id) = before, after
    task = new.of(new_id)[0].task
    if old.tasks.get(task) is None or old.tasks.get(task) != new.tasks.get(task):
        return None
    return _difference(old, old_id, new, new_id)


def _difference(old: Ledger, before: str, new: Ledger, after: str) -> Difference | None:
    from sparing.core.statistics import Difference, difference_over_seeds, paired_difference

    earlier = {row.seed: row for row in old.of(before)}
    pairs: list[tuple[int, float]] = []
    for row in new.of(after):
        other = earlier.get(row.seed)
        if other is None or (row.task, row.headline) != (other.task, other.headline):
            continue
        now, then = (one.figures.get(one.headline) for one in (row, other))
        if now is not None and then is not None and now.number is not None and then.number is not None:
            pairs.append((row.seed, now.number - then.number))
    if not pairs:
        return None
    if len(pairs) > 1:
        return difference_over_seeds([change for _, change in pairs])
    seed, change = pairs[0]
    then_units, now_units = old.outcomes.get(key(seed, before)), new.outcomes.get(key(seed, after))
    if then_units is None or now_units is None or then_units.shape != now_units.shape:
        return Difference(change, None, 1, "no outcomes of the same units to pair: no interval")
    return paired_difference(then_units, now_units)


def _checked(outcomes: np.ndarray, row_id: str) -> np.ndarray:
    """Outcomes as a boolean array when all are 0 or 1, as float64 otherwise."""
    import numpy as np

    from sparing.core.statistics import is_binary

    values = np.asarray(outcomes)
    wanted = f"row {row_id!r}: outcomes are finite numbers, one for each test unit (n_units,)"
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "biuf":
        raise InvalidValue(f"{wanted}, not an array of shape {values.shape} and dtype {values.dtype}")
    if not np.isfinite(values).all():
        raise InvalidValue(f"{wanted}; unit {int(np.argmin(np.isfinite(values)))} has none")
    return values.astype(bool) if is_binary(values) else values.astype(np.float64)


def _array_digest(values: np.ndarray) -> str:
    return hashlib.sha256(f"{values.dtype.str} {values.shape}\n".encode() + values.tobytes()).hexdigest()


def _read_outcomes(source: Path, records: Mapping[str, OutcomeRecord]) -> dict[str, np.ndarray]:
    from sparing.core import files

    if not records:
        return {}
    arrays = files.read_arrays(source)
    for name, record in records.items():
        array = arrays.get(name)
        if array is None:
            raise CorruptFile(f"{source}: the outcomes of {name} are missing")
        if array.shape != (record.units,) or _array_digest(array) != record.sha256:
            raise CorruptFile(f"{source}: the outcomes of {name} are not those that were written")
    return {name: arrays[name] for name in records}


def _stable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON without what differs from run to run."""
    return dict(row) | {
        "figures": {name: figure for name, figure in row["figures"].items() if figure["unit"] not in VOLATILE_UNITS},
        "candidates": [candidate.get("name") for candidate in row["candidates"]],
        "sub": {reason: [_stable(inner) for inner in rows] for reason, rows in row["sub"].items()},
    }


def _first_problem(error: Any) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
