"""Planning a recipe as a whole, then running it: job after job, row after row."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparing.core import files
from sparing.core.environment import DATA_FOLDER
from sparing.core.errors import (
    DataError,
    IncompatibleStep,
    InvalidValue,
    NotExportable,
    RecipeError,
    SparingError,
    StoreError,
    did_you_mean,
    shown,
)
from sparing.core.fingerprint import NoFingerprint, environment_fingerprint, fingerprint
from sparing.core.job import Job
from sparing.core.ledger import CPU, WALL, Figure, Ledger, Notes, Row
from sparing.core.meter import Meter, comparable
from sparing.core.randomness import isolated_rng
from sparing.core.recipe import PartRef, Recipe, load_recipe
from sparing.core.registry import parts, resolve
from sparing.core.step import Stage, Step, declared
from sparing.core.store import ARRAYS, JSON, PREDICTOR, All, BoundStore, Store

if TYPE_CHECKING:
    from torch import nn

    from sparing.core.predictor import Predictor
    from sparing.core.task import Splits, Task

log = logging.getLogger("sparing")
SEEDS_LOOKED_AT = 32
"""Seeds 0 … whose stored results tell a plan how long a step takes."""
MEASUREMENT: All[Any] = All({"row": JSON, "outcomes": ARRAYS})


# ---------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan and what the store already holds for it: (results, their wall seconds) or None."""

    step: Step
    place: str
    stored: tuple[int, float] | None
    estimate: float | None
    """Wall seconds it took with another seed on this machine; None when it never ran."""


@dataclass(frozen=True)
class Plan:
    """A recipe found to be consistent, before anything is computed."""

    recipe: Recipe
    task: Task
    meter: Meter
    steps: Sequence[PlannedStep]
    remarks: Sequence[str] = ()

    def describe(self) -> dict[str, Any]:
        """The plan as JSON values, for ``--dry-run``."""
        names = [("steps", planned.step.name) for planned in self.steps]
        names += [("tasks", self.task.name)]
        names += [("models", self.recipe.model.name)] if isinstance(self.recipe.model, PartRef) else []
        foreign = {parts(kind)[name].target for kind, name in names if name in parts(kind)}
        return {
            "recipe": self.recipe.name,
            "task": self.task.name,
            "seed": self.recipe.seed,
            "meter": asdict(self.meter),
            "steps": [
                {
                    "id": planned.step.id,
                    "step": planned.step.name,
                    "stage": str(planned.step.stage),
                    "place": planned.place,
                    "fields": planned.step.config(),
                    "stored_results": planned.stored[0] if planned.stored else 0,
                    "seconds_when_made": planned.stored[1] if planned.stored else None,
                    "estimated_seconds": 0.0 if planned.stored else planned.estimate,
                }
                for planned in self.steps
            ],
            "user_code": sorted(
                {target for target in foreign if not target.startswith("sparing.")} | set(self.recipe.trust)
            ),
            "remarks": list(self.remarks),
        }


def plan(
    recipe: Recipe | str | Path,
    data: Path | str | None = None,
    store: Store | Path | str | None = None,
    until: str | None = None,
) -> Plan:
    """Check a whole recipe without computing anything; raises :class:`RecipeError` with every problem at once.

    Data are read (to know what is stored already), nothing is trained or measured.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    problems: list[str] = []
    recipe = _cut(recipe, until, problems)
    task, meter = _task(recipe, problems), _meter(recipe, problems)
    if task is not None:
        before = DATA_FOLDER.set(Path(data) if data else None)
        try:
            of_model = _planned_model(recipe, task, problems)
            check_steps(recipe, task, of_model, problems, whole=until is None)
        finally:
            DATA_FOLDER.reset(before)
    if problems or task is None or meter is None:
        raise RecipeError(problems)
    planned, remarks = _look_up(recipe, task, meter, Path(data) if data else None, _store(store))
    return Plan(recipe, task, meter, planned, remarks)


def _cut(recipe: Recipe, until: str | None, problems: list[str]) -> Recipe:
    if until is None:
        return recipe
    ids = [step.id for step in recipe.steps]
    if until not in ids:
        problems.append(f"--until {until}: no such step.{did_you_mean(until, ids)} Ids: {', '.join(ids)}")
        return recipe
    end = ids.index(until) + 1
    return replace(recipe, steps=recipe.steps[:end], places=recipe.places[:end])


def _task(recipe: Recipe, problems: list[str]) -> Task | None:
    ref = recipe.task
    if isinstance(ref, PartRef):
        try:
            task = resolve("tasks", ref.name)(**ref.fields)
        except (TypeError, SparingError) as error:
            problems.append(f"{ref.place}: task {ref.name}: {error}")
            return None
    else:
        task = ref
    name = getattr(task, "name", None)
    if not isinstance(name, str) or not name:
        problems.append(f"{recipe.name}: task {type(task).__qualname__}: name = {shown(name)}; a text is needed")
    elif not getattr(task, "metrics", ()):
        problems.append(f"{recipe.name}: task {name}: it declares no metrics; the headline at least is needed")
    else:
        return task
    return None


def _splits(task: Task, root: Path | None) -> Splits:
    """The task's data: four data sets that hold something."""
    splits = task.splits(root)
    for part in ("train", "val", "calibration", "test"):
        dataset: Any = getattr(splits, part, None)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            found = "missing" if dataset is None else f"a {type(dataset).__name__}"
            raise DataError(f"task {task.name!r}: {part} is {found}; a data set with __len__ and __getitem__ is needed")
        if len(dataset) == 0:
            raise DataError(f"task {task.name!r}: {part} is empty; at least one item is needed")
    return splits


def _meter(recipe: Recipe, problems: list[str]) -> Meter | None:
    try:
        return Meter(**recipe.meter)
    except (TypeError, SparingError) as error:
        problems.append(f"{recipe.name}: {error}")
        return None


def _planned_model(recipe: Recipe, task: Task, problems: list[str]) -> frozenset[str]:
    """What the model is capable of; that it cannot be built or loaded is a problem found before anything runs."""
    from sparing.core.predictor import load, outline

    source = recipe.model
    place = source.place if isinstance(source, PartRef) else recipe.name
    model: Any = source
    try:
        if isinstance(source, Path):
            model = getattr(load(source, recipe.trust), "model", None)
        elif source is None or isinstance(source, PartRef):
            model = outline(lambda: _build(source, task))
    except (TypeError, SparingError) as error:
        problems.append(f"{place}: model {_called(source)}: {error}")
        return frozenset({"module"})  # so that no step complains of a model that is wrong for another reason
    return capabilities_of(model)


def _called(source: Any) -> str:
    return source.name if isinstance(source, PartRef) else "of the task" if source is None else str(source)


def capabilities_of(model: Any) -> frozenset[str]:
    """What steps may expect of a model: what it declares, and "module" for a torch module that can be trained or cut.

    A model that was loaded from a folder of another kind, e.g. an ONNX graph, has no module.
    """
    if model is None or isinstance(model, Path | PartRef):
        return frozenset()
    return frozenset(getattr(model, "capabilities", ())) | {"module"}


def check_steps(
    recipe: Recipe, task: Task, of_model: frozenset[str], problems: list[str], *, whole: bool = True
) -> None:
    """Append every reason why these steps cannot run in this order: ids, capabilities, slots, promises, row names.

    Promises may stay open unless the recipe is the ``whole`` of what is to be run.
    """
    capabilities = task.capabilities | of_model
    stand = _Standing(set(capabilities), task)
    if recipe.trained:
        stand.capabilities.add("trained")
        stand.rows.append("given")
    ids = list(stand.rows)
    for index, step in enumerate(recipe.steps):
        if step.id in ids:
            problems.append(
                f"{recipe.place(index)}: the id {step.id!r} is taken by an earlier step; give this one 'id: …'"
            )
        ids.append(step.id)
    _check_sequence([(recipe.place(index), step) for index, step in enumerate(recipe.steps)], stand, problems)
    for promise, (step, place) in stand.promises.items() if whole else ():
        realisers = _steps_with("realises", promise)
        problems.append(
            f"{place}: {step.id!r} promises {promise}, which no later step realises; "
            f"add one of: {', '.join(realisers) or 'none of the installed steps does'}"
        )


@dataclass
class _Standing:
    """What is known of the job between two planned steps."""

    capabilities: set[str]
    task: Task
    rows: list[str] = field(default_factory=list)
    """Those with a model, which a later step may name."""
    slots: dict[str, str] = field(default_factory=dict)
    promises: dict[str, tuple[Step, str]] = field(default_factory=dict)
    at_risk: set[str] = field(default_factory=set)
    """Promises that the next training would undo."""
    removed: dict[str, str] = field(default_factory=dict)
    """Capability → the step that took it away."""

    def copy(self) -> _Standing:
        return _Standing(
            set(self.capabilities), self.task, list(self.rows), dict(self.slots), removed=dict(self.removed)
        )


def _check_sequence(steps: Sequence[tuple[str, Step]], stand: _Standing, problems: list[str]) -> None:
    for place, step in steps:
        _check_one(step, place, stand, problems)
        try:
            step.check(stand.task)
        except SparingError as error:
            said = str(error)  # most name the step themselves
            problems.append(f"{place}: {said if said.startswith(repr(step.id)) else f'{step.id!r}: {said}'}")
        # steps held by a step run inside it, on a fork of the job and into a ledger of their own; what they promise is
        # the affair of the step that holds them
        inner = [(f"{place} {step.id!r}.{name}", nested) for name, nested in step.nested().items()]
        _check_sequence(inner, stand.copy(), problems)
        if target := step.target_task():
            if problem := _same_name(stand.task, target):
                problems.append(f"{place}: {step.id!r} {problem}")
            stand.capabilities = (stand.capabilities - stand.task.capabilities) | target.capabilities
            stand.task = target
        stand.removed |= dict.fromkeys(step.removes & stand.capabilities, f"{step.id!r} at {place}")
        stand.capabilities = (stand.capabilities - step.removes) | step.gives
        for promise in step.realises:
            maker, made = stand.promises.pop(promise, (None, ""))
            if maker and promise in maker.fragile and "training" in maker.promises and promise not in stand.at_risk:
                problems.append(
                    f"{place}: {step.id!r} comes before the training in which {maker.id!r} at {made} makes {promise}"
                )
        for slot in step.slots:
            if slot in stand.slots:
                problems.append(
                    f"{place}: {step.id!r} sets the training plan's {slot}, which {stand.slots[slot]} has set"
                )
            stand.slots[slot] = f"{step.id!r} at {place}"
        if "training" in step.realises:
            stand.slots.clear()
            _check_fragile(step, place, stand, problems)
        for promise in step.promises:
            stand.promises[promise] = (step, place)
            stand.at_risk.discard(promise)
            if promise in step.fragile and "training" not in step.promises:
                stand.at_risk.add(promise)  # it is kept already; other steps keep theirs in the training that follows
        if "trained" in stand.capabilities:
            stand.rows.append(step.id)


def _check_fragile(training: Step, place: str, stand: _Standing, problems: list[str]) -> None:
    """A training keeps what was promised since the last one, and undoes what is fragile and older."""
    for promise, (step, made) in stand.promises.items():
        if promise not in step.fragile:
            continue
        if promise in stand.at_risk:
            keepers = sorted({*_steps_with("fragile", promise)} & {*_steps_with("promises", "training")})
            problems.append(
                f"{place}: {training.id!r} would undo the {promise} of {step.id!r} at {made}; "
                f"put a step before it that keeps it: {', '.join(keepers) or 'none of the installed steps does'}"
            )
        stand.at_risk.add(promise)


def _same_name(old: Task, new: Task) -> str:
    """Why a job cannot go from one task to the other, or an empty text."""
    if old.name != new.name:
        return ""
    return (
        f"changes the task to one that is also called {new.name!r}; rows are compared within a task, which they know "
        "by its name, so the two need different names"
    )


def _check_one(step: Step, place: str, stand: _Standing, problems: list[str]) -> None:
    for need in sorted(step.needs - stand.capabilities):
        givers = _steps_with("gives", need)
        taken = f"{stand.removed[need]} takes it away; " if need in stand.removed else ""
        if givers:
            cure = f"{taken}steps that give it: {', '.join(givers)}"
        elif taken:
            cure = f"{taken}put {step.id!r} before that"
        else:
            cure = "no installed step gives it: it comes with the task or the model"
        problems.append(f"{place}: {step.id!r} needs {need!r}, which the job does not have there; {cure}")
    for field_name, row in step.row_references().items():
        if row not in stand.rows:
            known = f"Earlier rows with a model: {', '.join(stand.rows) or 'none'}"
            problems.append(
                f"{place}: {step.name}.{field_name} = {row!r} names no such row.{did_you_mean(row, stand.rows)} {known}"
            )


def _steps_with(attribute: str, value: str) -> list[str]:
    """Names of the steps that declare it, with their fields as they are by default."""
    return sorted(name for name in parts("steps") if value in declared(resolve("steps", name), attribute))


def _look_up(
    recipe: Recipe, task: Task, meter: Meter, data: Path | None, store: Store
) -> tuple[list[PlannedStep], list[str]]:
    """What the store holds for each step of the recipe's first seed."""
    job, _, remarks = _start(recipe, task, meter, recipe.seed, data, store)
    planned = []
    for index, step in enumerate(recipe.steps):
        bound = _store_of(job, step)
        stored = bound.stored_cost()
        others = (replace(bound, seed=seed).stored_cost() for seed in range(SEEDS_LOOKED_AT))
        estimate = None if stored else next((cost[1] for cost in others if cost), None)
        planned.append(PlannedStep(step, recipe.place(index), stored, estimate))
        if target := step.target_task():
            bound = bound.child("data", type(target), target, target.splits(data))
        job = job.replace(store=bound)
    return planned, remarks


# ----------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Run:
    """What a run left: the ledger, the folder it was written to (if any), and the last row's predictor."""

    ledger: Ledger
    folder: Path | None
    predictor: Predictor | None
    job: Job = field(repr=False)


def run(
    recipe: Recipe | str | Path | None = None,
    *,
    task: Task | str | Mapping[str, Any] | None = None,
    model: nn.Module | str | Path | Mapping[str, Any] | None = None,
    steps: Iterable[Step] = (),
    trained: bool = False,
    meter: Mapping[str, Any] | None = None,
    seeds: int | Sequence[int] = 1,
    data: Path | str | None = None,
    out: Path | str | None = None,
    until: str | None = None,
    trust: Sequence[str] = (),
    store: Store | Path | str | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> Run:
    """Run a recipe and measure a row after every step.

    Either a ``recipe`` (object, file or packaged name), or ``task`` and ``steps`` (and ``model``: a module, a
    registered name, ``{"name": …, field: value}`` or a saved model's folder; ``trained=True`` when a given module needs
    no training). ``seeds``: how many, counted from the recipe's, or which. With ``out``, ledger, outcomes, recipe and
    the last row's model are written there, the ledger after every row. Raises :class:`RecipeError` with every problem
    before anything is computed.
    """
    recipe = _recipe_of(recipe, task, model, steps, trained, meter)
    recipe = replace(recipe, trust=(*recipe.trust, *trust))
    numbers = _seeds(seeds, recipe.seed)
    root, folder = (Path(data) if data else None), (Path(out) if out else None)
    names = {seed: "model" if seed == numbers[0] else f"model-seed{seed}" for seed in numbers}
    if folder:
        _check_out(folder, names.values())
    checked = plan(recipe, root, store, until)
    store = _store(store)
    if folder:
        _make(folder)
    recipe = checked.recipe
    ledger = Ledger.begin(recipe.name, recipe.text, checked.meter)
    if folder and recipe.text:
        files.write_atomic(folder / "recipe.yaml", recipe.text.encode())
    first: Job | None = None
    for seed in numbers:
        job, test, remarks = _start(recipe, checked.task, checked.meter, seed, root, store)

        def keep(job: Job, row: Row, outcomes: np.ndarray | None) -> None:
            ledger.tasks = {**ledger.tasks, job.task.name: job.data_key}
            kept = ledger.add(row, outcomes)
            if folder:
                if row.id in job.folders:
                    job.folders[row.id](folder / (row.id if row.seed == numbers[0] else f"{row.id}-seed{row.seed}"))
                ledger.save(folder)
            if on_row:
                on_row(kept)

        try:
            job = _run_steps(job, recipe, test, remarks, keep)
        except BaseException as error:
            reason = str(error) if isinstance(error, SparingError) else f"{type(error).__name__}: {error}"
            ledger.stop(" ".join([f"seed {seed}:", reason, *getattr(error, "__notes__", ())]))
            if folder:
                ledger.save(folder)
            raise
        if folder and job.predictor is not None:
            _save_model(_deployed(job), folder / names[seed], ledger, seed)
        first = first or job
    assert first is not None
    return Run(ledger, folder, _deployed(first) if first.predictor else None, first)


def begin(
    task: Task | str | Mapping[str, Any],
    model: nn.Module | str | Path | Mapping[str, Any] | None = None,
    *,
    trained: bool = False,
    seed: int = 0,
    data: Path | str | None = None,
    store: Store | Path | str | None = None,
    meter: Mapping[str, Any] | None = None,
) -> Job:
    """The job that a run on ``task`` begins with, to try steps on by hand; arguments as of :func:`run`."""
    recipe = _live_recipe(task, model, (), trained, meter)
    problems: list[str] = []
    live, measuring = _task(recipe, problems), _meter(recipe, problems)
    if live is None or measuring is None:
        raise RecipeError(problems)
    return _start(recipe, live, measuring, seed, Path(data) if data else None, _store(store))[0]


def _store(store: Store | Path | str | None) -> Store:
    return store if isinstance(store, Store) else Store(store)


def _seeds(seeds: int | Sequence[int], first: int) -> list[int]:
    """The seeds to run, in order."""
    if isinstance(seeds, int):
        numbers = list(range(first, first + seeds))
    else:
        numbers = list(seeds) if isinstance(seeds, Iterable) else []
    wrong = [seed for seed in numbers if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31]
    if isinstance(seeds, bool) or not numbers or wrong or len(set(numbers)) != len(numbers):
        raise InvalidValue(
            f"seeds = {shown(seeds)}: how many (1 or more), or a list of different whole numbers in 0 … 2³¹−1"
        )
    return numbers


def _check_out(folder: Path, names: Iterable[str]) -> None:
    """Refuse, before anything is computed, an output folder that could not be written to in the end."""
    if folder.exists() and not folder.is_dir():
        raise InvalidValue(f"out = {folder} is a file; a folder is needed")
    for path in (folder / name for name in names):
        if path.exists() and not (path / "sparing.json").is_file() and not (path.is_dir() and not any(path.iterdir())):
            raise InvalidValue(f"out = {folder}: {path.name} in it is no saved model, which would take its place")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def _save_model(predictor: Predictor, folder: Path, ledger: Ledger, seed: int) -> None:
    """Save a seed's last model; where it cannot be, e.g. a module built by hand, the ledger says why."""
    try:
        predictor.save(folder, ledger=ledger.to_markdown(seed))
    except InvalidValue as error:
        log.warning("the model is not saved: %s", error)
        ledger.rows[-1].remarks.append(f"the model is not saved: {error}")
        ledger.save(folder.parent)


def _recipe_of(
    recipe: Recipe | str | Path | None,
    task: Task | str | Mapping[str, Any] | None,
    model: nn.Module | str | Path | Mapping[str, Any] | None,
    steps: Iterable[Step],
    trained: bool,
    meter: Mapping[str, Any] | None,
) -> Recipe:
    if recipe is not None:
        if task is not None or model is not None or steps or trained or meter is not None:
            raise InvalidValue("run takes a recipe, or task, model, steps, trained and meter, not both")
        return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if task is None or not steps:
        raise InvalidValue("run needs a recipe, or a task and at least one step")
    if not isinstance(steps, Iterable):
        raise InvalidValue(f"steps = {shown(steps)}: a list of steps is needed; for example steps=[Train(epochs=5)]")
    steps = tuple(steps)
    for step in steps:
        if not isinstance(step, Step):
            raise InvalidValue(f"steps holds {shown(step)}, which is no Step; for example steps=[Train(epochs=5)]")
    return _live_recipe(task, model, steps, trained, meter)


def _live_recipe(
    task: Task | str | Mapping[str, Any],
    model: nn.Module | str | Path | Mapping[str, Any] | None,
    steps: Sequence[Step],
    trained: bool,
    meter: Mapping[str, Any] | None,
) -> Recipe:
    from torch import nn

    from sparing.core.task import Task

    if not isinstance(task, Task | str | Mapping):
        raise InvalidValue(
            f"task = {shown(task)}: a registered task's name, {{name: …, field: value}} or a Task object is needed"
        )
    if not isinstance(model, nn.Module | str | Path | Mapping | None):
        raise InvalidValue(
            f"model = {shown(model)}: an nn.Module object, a registered model's name, {{name: …, field: value}} or a "
            "saved folder is needed"
        )
    if isinstance(model, str) and model not in parts("models") and (Path(model) / "sparing.json").is_file():
        model = Path(model)
    part: Any = _named("task", task)
    given: Any = _named("model", model)
    return Recipe(part, steps, given, trained or isinstance(model, Path), meter=dict(meter or {}))


def _named(what: str, part: Any) -> Any:
    """A name, or a mapping of a name and fields, as a reference; live objects as they are."""
    if isinstance(part, str):
        return PartRef(part, place=what)
    if not isinstance(part, Mapping):
        return part
    fields = dict(part)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise InvalidValue(f"{what} = {shown(part)}: the key 'name' is needed")
    return PartRef(name, fields, place=what)


def _start(
    recipe: Recipe, task: Task, meter: Meter, seed: int, root: Path | None, store: Store
) -> tuple[Job, Any, list[str]]:
    """The job before the first step, the test split, and remarks for the ledger."""
    from sparing.core.predictor import ModulePredictor, load

    splits = _splits(task, root)
    predictor: Predictor | None = None
    if isinstance(recipe.model, Path):
        predictor = load(recipe.model, recipe.trust)
        model = getattr(predictor, "model", None)
        if model is not None:  # a predictor's own parameters are frozen; those a step is to train must not be
            model = copy.deepcopy(model).requires_grad_(True)
    else:
        with isolated_rng("model", seed):
            model = _build(recipe.model, task)
        if recipe.trained:
            predictor = ModulePredictor(model, task)
    data_key, bound, remarks = _bind(store, task, splits, recipe.model, model, seed)
    capabilities = task.capabilities | capabilities_of(model)
    job = Job(
        task=task,
        train=splits.train,
        val=splits.val,
        calibration=splits.calibration,
        model=model,
        seed=seed,
        store=bound,
        root=root,
        trust=tuple(recipe.trust),
        data_key=data_key,
        predictor=predictor,
        capabilities=capabilities | ({"trained"} if recipe.trained else frozenset()),
        meter=meter,
    )
    return job, splits.test, remarks


def _build(model: Any, task: Task) -> Any:
    from sparing.core.predictor import build_model

    if model is None:
        return task.default_model()
    if isinstance(model, PartRef):
        return build_model(model.name, task, **model.fields)
    return model


def _bind(
    store: Store, task: Task, splits: Splits, source: Any, model: Any, seed: int
) -> tuple[str, BoundStore, list[str]]:
    """The data's key, the job's view of the store (one that keeps nothing without fingerprints), and remarks."""
    import torch

    data_key = ""
    try:
        data_key = fingerprint([task, splits])
        named = [source.name, dict(source.fields)] if isinstance(source, PartRef) and _is_ours(source) else None
        content = named or (source if isinstance(source, Path) else model)
        environment_key = environment_fingerprint(torch.get_num_threads())
        return data_key, store.bind(environment_key, type(task), data_key, content, seed=seed), []
    except NoFingerprint as error:
        return data_key, BoundStore(None, (), seed), [f"nothing of this run is kept for later runs: {error}"]


def _is_ours(model: PartRef) -> bool:
    """True for a model whose code is in every store key already, as all of Sparing's is."""
    return parts("models")[model.name].target.startswith("sparing.")


def _run_steps(
    job: Job,
    recipe: Recipe,
    test: Any,
    remarks: list[str],
    keep: Callable[[Job, Row, np.ndarray | None], None],
) -> Job:
    if job.predictor is not None:
        job, row, outcomes = _finish(job, job, None, test)
        keep(job, replace(row, remarks=[*remarks, *row.remarks]), outcomes)
        remarks = []
    for index, step in enumerate(recipe.steps):
        try:
            after, row, outcomes = advance(job, step, test)
        except SparingError as error:
            error.add_note(f"in step {step.id!r} ({recipe.place(index)})")
            raise
        if after.task is not job.task:
            test = after.task.splits(after.root).test
        keep(after, replace(row, remarks=[*remarks, *row.remarks]) if index == 0 else row, outcomes)
        job = after
    return job


def advance(job: Job, step: Step, test: Any) -> tuple[Job, Row, np.ndarray | None]:
    """Apply one step to a job and measure what it became: (job, row, per-unit outcomes of the headline).

    ``test`` is the test split of the job's task.
    """
    missing = sorted(step.needs - job.capabilities)
    if missing:
        raise IncompatibleStep(
            f"{step.id!r} needs {', '.join(missing)}; the job has {', '.join(sorted(job.capabilities))}"
        )
    bound = _store_of(job, step)
    before = job.replace(store=bound, notes=Notes())
    if bound.store is None and job.store.store is not None:
        before.notes.remarks.append("this row and those after it are not kept: the step has no fingerprint")
    with isolated_rng("step", job.seed, step.id):
        after = step.apply(before)
    _check_result(step, job, after)
    capabilities = after.capabilities
    if after.task is not job.task:
        if problem := _same_name(job.task, after.task):
            raise IncompatibleStep(f"{step.id!r} {problem}")
        capabilities = (capabilities - job.task.capabilities) | after.task.capabilities
        splits = _splits(after.task, after.root)
        moved, data_key = bound.child("data", type(after.task), after.task, splits), ""
        if moved.store is not None:
            data_key = fingerprint([after.task, splits])
        after = after.replace(store=replace(moved, cost=bound.cost), data_key=data_key)
        test = splits.test
    else:
        after = after.replace(store=bound)
    capabilities = (capabilities - step.removes) | step.gives
    return _finish(job, after.replace(capabilities=capabilities, notes=before.notes), step, test)


def apply_steps(job: Job, steps: Iterable[Step]) -> Job:
    """Apply steps to a job without measuring rows: for estimators, whose user asks for the model alone."""
    for step in steps:
        before = job.replace(store=_store_of(job, step))
        with isolated_rng("step", job.seed, step.id):
            job = step.apply(before)
    return job


def _store_of(job: Job, step: Step) -> BoundStore:
    """The store as this step sees it; how rows are measured is in the key only where the step chooses by it."""
    return job.store.child("step", step, asdict(job.meter) if step.by_clock and job.meter else None)


def _check_result(step: Step, before: Job, after: Any) -> None:
    """Refuse what a later step would misunderstand: mistakes of a step's author."""
    if not isinstance(after, Job):
        raise SparingError(f"step {step.name!r} returned {type(after).__name__}; apply must return a Job")
    if before.predictor is not None and after.predictor is before.predictor and after.model is not before.model:
        raise SparingError(
            f"step {step.name!r} changed the model and left the predictor of the old one: replace both, with "
            "predictor=ModulePredictor(model, job.task), or with predictor=None for a model that must be trained first"
        )
    if after.training != before.training and not after.training.empty and "training" not in step.promises:
        raise SparingError(
            f"step {step.name!r} adds to the training plan, so a training must follow: declare "
            "promises = frozenset({'training'})"
        )


def _finish(job: Job, after: Job, step: Step | None, test: Any) -> tuple[Job, Row, np.ndarray | None]:
    """Measure the job's predictor, if this step made a new one, and write the row."""
    notes, cost = after.notes, after.store.cost
    row_id = step.id if step else "given"
    figures: dict[str, Figure] = {}
    by_class: Mapping[str, float] = {}
    outcomes: np.ndarray | None = None
    runtime = kind = ""
    if after.predictor is not None and (step is None or after.predictor is not job.predictor):
        kind = after.predictor.kind
        after = _settle_runtime(after)
        deployed = _deployed(after)
        runtime = deployed.runtime
        figures, outcomes, by_class = _measure(after, deployed, test)
    figures |= notes.figures
    if step is not None:
        inner = [row.figures for child in notes.children.values() for row in child.rows]
        wall_s, cpu_s = (sum(figures[name].number or 0.0 for figures in inner) for name in (WALL, CPU))
        figures[WALL] = Figure(cost.wall_s + wall_s, "s", note="making this row's results, when they were made")
        figures[CPU] = Figure(cost.cpu_s + cpu_s, "s", note="this process and its finished children")
    row = Row(
        id=row_id,
        step=step.name if step else "given",
        stage=str(step.stage if step else Stage.MODEL),
        task=after.task.name,
        seed=after.seed,
        headline=after.task.headline.name,
        runtime=runtime,
        kind=kind,
        figures=figures,
        outcome=notes.outcome,
        by_class=by_class,
        curves=notes.curves,
        pictures=notes.pictures,
        candidates=notes.candidates,
        remarks=list(notes.remarks),
        sub={reason: child.rows for reason, child in notes.children.items()},
        config=step.config() if step else {},
    )
    earlier = {**after.earlier, row_id: after.predictor} if after.predictor is not None else after.earlier
    return after.replace(earlier=earlier, notes=job.notes), row, outcomes


def _settle_runtime(job: Job) -> Job:
    """The job with a meter that can measure its predictor: torch's for all rows from the first that has no export."""
    assert job.meter is not None
    try:
        _deployed(job)
    except NotExportable as error:
        job.notes.remarks.append(f"measured in torch, as are the rows after it: {error}")
        return job.replace(meter=replace(job.meter, runtime="module"))
    return job


def _deployed(job: Job) -> Predictor:
    """The job's predictor in the runtime all rows of its task are measured in."""
    assert job.predictor is not None
    assert job.meter is not None
    predictor, task, meter = job.predictor, job.task, job.meter
    if predictor.kind != "module" or meter.runtime == "module":
        return comparable(predictor, task, meter.runtime)
    bound = job.store.child("deployed")
    return bound.once("predictor", lambda: comparable(predictor, task, meter.runtime), PREDICTOR)


def _measure(
    job: Job, deployed: Predictor, test: Any
) -> tuple[dict[str, Figure], np.ndarray | None, Mapping[str, float]]:
    assert job.meter is not None
    meter, task = job.meter, job.task

    def compute() -> dict[str, Any]:
        figures, outcomes, by_class = meter.measure(task, deployed, test, job.predictor)
        return {
            "row": {"figures": {name: asdict(f) for name, f in figures.items()}, "by_class": dict(by_class)},
            "outcomes": {} if outcomes is None else {"headline": np.asarray(outcomes)},
        }

    found = job.store.child("measured", asdict(meter)).once("row", compute, MEASUREMENT)
    figures = {name: Figure.from_json(value) for name, value in found["row"]["figures"].items()}
    return figures, found["outcomes"].get("headline"), found["row"]["by_class"]


def run_inner(job: Job, steps: Sequence[Step]) -> Job:
    """Run steps on a forked job (:meth:`Job.fork`), for audits and other steps that hold steps.

    The rows go to the fork's notes and from there into a sub-ledger of the outer row. Only steps that may see the test
    split (audits) may call this, since inner rows are measured on it.
    """
    test = job.task.splits(job.root).test
    rows = job.notes.rows
    for step in steps:
        after, row, _ = advance(job, step, test)
        if after.task is not job.task:
            test = after.task.splits(after.root).test
        rows.append(row)
        job = after
    return job


__all__ = ["Plan", "PlannedStep", "Run", "advance", "apply_steps", "begin", "check_steps", "plan", "run", "run_inner"]
