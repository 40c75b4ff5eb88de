"""Recipes: a YAML file naming a task, a model and a list of steps, read with the place of everything in it.

.. code-block:: yaml

    task: digits                      # or {name: image_folder, path: photos}
    model: {name: convnet, widths: [16, 32]}   # a saved model: {path: folder}; default: the task's own
    seed: 0
    meter: {threads: 1}
    steps:
      - train: {id: baseline, epochs: 20}
      - quantize

Nothing is run or imported from the user while a recipe is read.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparing.core import files
from sparing.core.errors import CorruptFile, RecipeError, SparingError, UnknownName, did_you_mean, shown
from sparing.core.registry import resolve
from sparing.core.step import InvalidFields, Step

if TYPE_CHECKING:
    from torch import nn

    from sparing.core.task import Task

VERSION = 1
MAX_BYTES = 32 << 10
MAX_VALUES = 4000
MAX_DEPTH = 20
KEYS = ("version", "task", "model", "seed", "meter", "steps")


@dataclass(frozen=True)
class PartRef:
    """A registered part by name, with the fields to build it with."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True)
class Recipe:
    """What to do: a task, a model and steps. Build one in Python, or read one with :func:`load_recipe`.

    ``task`` and ``model`` are registered parts by name, or live objects; a ``Path`` is a saved model's folder.
    ``trained`` says that ``model`` needs no training: it is then measured as the first row, "given". ``places`` holds
    "file:line" of each step. ``trust`` lists packages whose classes a saved model's folder may ask for.
    """

    task: PartRef | Task
    steps: Sequence[Step]
    model: PartRef | Path | nn.Module | None = None
    trained: bool = False
    seed: int = 0
    meter: Mapping[str, Any] = field(default_factory=dict)
    name: str = "recipe"
    text: str = ""
    places: Sequence[str] = ()
    trust: Sequence[str] = ()

    def place(self, index: int) -> str:
        """Where step ``index`` stands."""
        return self.places[index] if index < len(self.places) else f"steps[{index}]"


class _Mapping(dict[str, Any]):
    """A mapping that knows its line and that of each of its keys; 0: not in the file, but an override."""

    def __init__(self, line: int = 0) -> None:
        super().__init__()
        self.line = line
        self.lines: dict[str, int] = {}


class _List(list[Any]):
    """A list that knows the line of each of its items."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[int] = []


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or by the name of a packaged one, and apply ``--set`` overrides.

    Everything wrong is reported at once in a :class:`RecipeError`, each problem with file and line.
    """
    path, known = Path(source), packaged()
    try:
        if not path.exists() and path.suffix not in {".yaml", ".yml"}:
            if str(source) not in known:
                raise UnknownName(
                    f"no recipe file or packaged recipe {shown(str(source))}.{did_you_mean(str(source), known)} "
                    f"Packaged recipes: {', '.join(sorted(known)) or 'none'}"
                )
            path = known[str(source)]
        if not path.is_file():
            raise RecipeError([f"{path}: {'a folder' if path.is_dir() else 'no such file'}; a recipe is a YAML file"])
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot be read as UTF-8 text: {error}"]) from None
    name = next((name.replace("/", "-") for name, place in known.items() if place == path), path.stem)
    return parse_recipe(text, name=name, file=str(path), overrides=overrides)


def packaged() -> dict[str, Path]:
    """The recipes that come with Sparing, by name; ``full/NAME`` are of published sizes, for machines with GPUs."""
    folder = Path(__file__).parents[1] / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def parse_recipe(text: str, name: str = "recipe", file: str = "<text>", overrides: Sequence[str] = ()) -> Recipe:
    """Parse and validate the text of a recipe; raises :class:`RecipeError` with every problem found."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise RecipeError([f"{file}: larger than {MAX_BYTES} bytes, which no recipe needs"])
    problems: list[str] = []
    tree = _Reader(text, file, problems).read()
    if tree is None and not problems:
        tree = _Mapping(1)  # an empty file lacks everything
    if not isinstance(tree, _Mapping):
        raise RecipeError(problems or [f"{file}:1: a recipe is a mapping with the keys {', '.join(KEYS)}"])
    for override in overrides:
        _apply_override(tree, override, problems)
    for key in tree:
        if key not in KEYS:
            problems.append(
                f"{_at(file, tree, key)}: unknown key {shown(key)}.{did_you_mean(key, KEYS)} Keys: {', '.join(KEYS)}"
            )
    version = tree.get("version", VERSION)
    if isinstance(version, bool) or version != VERSION:
        problems.append(f"{_at(file, tree, 'version')}: recipe version {shown(version)}; this release reads {VERSION}")
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        problems.append(f"{_at(file, tree, 'seed')}: seed = {shown(seed)}: a whole number in 0 … 2³¹−1 is needed")
    meter = {} if tree.get("meter") is None else tree["meter"]
    if not isinstance(meter, dict):
        problems.append(f"{_at(file, tree, 'meter')}: meter must be a mapping of fields, not {shown(meter)}")
    task = _part(tree, "task", "tasks", file, problems)
    if tree.get("task") is None:
        problems.append(f"{_at(file, tree, 'task')}: the key 'task' is missing or empty; for example 'task: digits'")
    model: PartRef | Path | None
    if isinstance(tree.get("model"), dict) and "path" in tree["model"]:
        model = _model_path(tree["model"], file, problems)
    else:
        model = _part(tree, "model", "models", file, problems)
    steps, places = _steps(tree, file, problems)
    if problems or task is None:
        raise RecipeError(problems)
    if overrides:
        text = f"# {name} with --set {shown(list(overrides), 1000)}\n" + yaml.safe_dump(_plain(tree), sort_keys=False)
    return Recipe(task, tuple(steps), model, isinstance(model, Path), seed, _plain(meter), name, text, tuple(places))


def read_yaml(path: Path) -> Any:
    """A document of plain values from a YAML file, read as recipes are: no tags, no anchors, no endless depth.

    Raises :class:`CorruptFile` for a file that is none, with the lines.
    """
    text = files.read_bytes(path).decode(errors="replace")
    if len(text) > MAX_BYTES:
        raise CorruptFile(f"{path}: larger than {MAX_BYTES} bytes, which no settings need")
    problems: list[str] = []
    tree = _Reader(text, str(path), problems).read()
    if problems:
        raise CorruptFile("\n".join(problems))
    return _plain(tree)


class _Refused(Exception):
    """The text is no recipe; the message says where and why."""


class _Reader:
    """Reads one YAML document: mappings, lists, numbers and text, without anchors, tags and endless depth.

    A value that is refused is kept as its text, so that the rest can be checked as well.
    """

    def __init__(self, text: str, file: str, problems: list[str], numbered: bool = True) -> None:
        self.text, self.file, self.problems = text, file, problems
        self.numbered = numbered
        """False for text that is in no file, whose lines mean nothing."""
        self.count = 0

    def read(self) -> Any:
        """The document, or None when there is none; what is wrong with it goes to ``problems``."""
        try:
            self.loader = yaml.SafeLoader(self.text)
            self.loader.get_event()  # the start of the stream
            if self.loader.check_event(yaml.StreamEndEvent):
                return None
            self.loader.get_event()  # the start of the document
            value = self._value(0)
            self.loader.get_event()
            if not self.loader.check_event(yaml.StreamEndEvent):
                raise _Refused(f"{self._at(self.loader.peek_event())}: a second document begins here; one is read")
            return value
        except _Refused as error:
            self.problems.append(str(error))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            line = 1 if mark is None else mark.line + 1
            self.problems.append(f"{self._place(line)}: not valid YAML: {error.problem}")
        except yaml.reader.ReaderError as error:
            line = self.text.count("\n", 0, error.position) + 1
            self.problems.append(f"{self._place(line)}: not valid YAML: the character #x{error.character:04x}")
        return None

    def _place(self, line: int) -> str:
        return f"{self.file}:{line}" if self.numbered else self.file

    def _line(self, event: yaml.Event) -> int:
        return event.start_mark.line + 1 if event.start_mark else 1

    def _at(self, event: yaml.Event) -> str:
        return self._place(self._line(event))

    def _value(self, depth: int) -> Any:
        event = self.loader.get_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _Refused(f"{self._at(event)}: anchors and aliases (&{event.anchor}) are not read")
        if event.tag is not None:
            raise _Refused(f"{self._at(event)}: tags ({event.tag}) are not read")
        self.count += 1
        if self.count > MAX_VALUES:
            raise _Refused(f"{self._at(event)}: more than {MAX_VALUES} values, which no recipe needs")
        if depth > MAX_DEPTH:
            raise _Refused(f"{self._at(event)}: nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(event, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            items = _List()
            while not self.loader.check_event(yaml.SequenceEndEvent):
                items.lines.append(self._line(self.loader.peek_event()) if self.numbered else 0)
                items.append(self._value(depth + 1))
            self.loader.get_event()
            return items
        return self._scalar(event)

    def _mapping(self, event: yaml.Event, depth: int) -> _Mapping:
        mapping = _Mapping(self._line(event) if self.numbered else 0)
        while not self.loader.check_event(yaml.MappingEndEvent):
            place = self.loader.peek_event()
            key = self._value(depth + 1)
            if not isinstance(key, str):
                self.problems.append(f"{self._at(place)}: keys are text, not {shown(key)}")
            elif key in mapping:
                first = f" (first at line {mapping.lines[key]})" if self.numbered else ""
                self.problems.append(f"{self._at(place)}: the key {shown(key)} appears twice{first}")
            value = self._value(depth + 1)
            if isinstance(key, str) and key not in mapping:
                mapping[key] = value
                mapping.lines[key] = self._line(place) if self.numbered else 0
        self.loader.get_event()
        return mapping

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        """None, a truth value, a number or text; what YAML 1.1 would make something else of is to be quoted."""
        tag = self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        kind = tag.rpartition(":")[2]
        try:
            value = self.loader.construct_object(yaml.ScalarNode(tag, event.value))
        except (ValueError, yaml.YAMLError):
            problem = f"is no {kind}"
        else:
            if value is None or isinstance(value, bool | str):
                return value
            if not isinstance(value, int | float):
                problem = f"reads as a {kind}"
            elif ":" in event.value:
                problem = f"reads as {shown(value)}, a number to base sixty"
            elif not math.isfinite(value) if isinstance(value, float) else abs(value) >= 2**63:
                problem = "is no finite number of 64 bits"
            else:
                return value
        self.problems.append(f"{self._at(event)}: {shown(event.value)} {problem}; quote it to make it text")
        return event.value


def _plain(value: Any) -> Any:
    """Lists and dicts that have forgotten their lines."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _at(file: str, mapping: _Mapping, key: str) -> str:
    """The place of a key, or of the mapping that lacks it."""
    line = mapping.lines.get(key, mapping.line)
    return f"{file}:{line}" if line else "--set"


def _item_at(file: str, items: _List, index: int) -> str:
    return f"{file}:{items.lines[index]}" if items.lines[index] else "--set"


def _part(tree: _Mapping, key: str, kind: str, file: str, problems: list[str]) -> PartRef | None:
    value = tree.get(key)
    if value is None:
        return None
    place = _at(file, tree, key)
    fields: Mapping[str, Any] = {}
    if isinstance(value, dict):
        name, fields = value.get("name"), _plain({k: v for k, v in value.items() if k != "name"})
    else:
        name = value
    if not isinstance(name, str):
        problems.append(f"{place}: {key} is a name, or a mapping with the key 'name'; got {shown(value)}")
        return None
    try:
        resolve(kind, name)
    except SparingError as error:
        problems.append(f"{place}: {error}")
        return None
    return PartRef(name, fields, place)


def _model_path(value: _Mapping, file: str, problems: list[str]) -> Path | None:
    if not isinstance(value["path"], str) or len(value) > 1:
        problems.append(
            f"{_at(file, value, 'path')}: a saved model is named by 'path: folder' alone, got {shown(dict(value))}"
        )
        return None
    return Path(value["path"])


def _steps(tree: _Mapping, file: str, problems: list[str]) -> tuple[list[Step], list[str]]:
    items = tree.get("steps")
    if not isinstance(items, _List) or not items:
        problems.append(f"{_at(file, tree, 'steps')}: 'steps' is a list with at least one step; got {shown(items)}")
        return [], []
    steps, places = [], []
    for index, item in enumerate(items):
        made = _step(item, _item_at(file, items, index), file, problems)
        if made is not None:
            steps.append(made[0])
            places.append(made[1])
    return steps, places


def _step(item: Any, place: str, file: str, problems: list[str]) -> tuple[Step, str] | None:
    """One step from ``name``, ``{name: {field: value}}`` or ``{name: null}``, and its place."""
    item_fields: Any = None
    if isinstance(item, str):
        name = item
    elif isinstance(item, _Mapping) and len(item) == 1:
        name, item_fields = next(iter(item.items()))
        place = _at(file, item, name)
    else:
        problems.append(f"{place}: a step is 'name' or 'name: {{field: value}}', one a list item; got {shown(item)}")
        return None
    if item_fields is None:
        item_fields = _Mapping()
    if not isinstance(item_fields, _Mapping):
        problems.append(f"{place}: the fields of {shown(name)} are a mapping, not {shown(item_fields)}")
        return None
    try:
        cls = resolve("steps", name)
    except SparingError as error:
        problems.append(f"{place}: {error}")
        return None
    before = len(problems)
    values = {key: _field_value(cls, key, value, item_fields, file, problems) for key, value in item_fields.items()}
    if len(problems) > before:
        return None
    try:
        return cls(**values), place
    except InvalidFields as error:
        for key, line in error.problems:
            problems.append(f"{_at(file, item_fields, key) if key in item_fields else place}: {line}")
        return None


def _field_value(cls: type[Step], key: str, value: Any, item_fields: _Mapping, file: str, problems: list[str]) -> Any:
    """``value`` as it is, or with steps built in it where the field holds steps."""
    if key not in {field_.name for field_ in dataclasses.fields(cls)} or not _holds_steps(cls, key):
        return _plain(value)
    if isinstance(value, _List):
        made = [_step(item, _item_at(file, value, index), file, problems) for index, item in enumerate(value)]
        return tuple(item[0] for item in made if item is not None)
    if not isinstance(value, str | _Mapping):
        return value
    single = _step(value, _at(file, item_fields, key), file, problems)
    return single[0] if single is not None else None


def _holds_steps(cls: type[Step], key: str) -> bool:
    def mentions(annotation: Any) -> bool:
        if isinstance(annotation, type) and issubclass(annotation, Step):
            return True
        return any(mentions(argument) for argument in typing.get_args(annotation))

    return mentions(typing.get_type_hints(cls).get(key))


def _apply_override(tree: _Mapping, override: str, problems: list[str]) -> None:
    """Apply one ``path=value``; a path is ``steps.<id>.<field>``, ``task|model|meter.<field>`` or ``seed``."""
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        problems.append(f"--set {shown(override)}: write steps.<id>.<field>=value, task.<field>=value or seed=value")
        return
    before = len(problems)
    value: Any = _Reader(text, f"--set {shown(override)}", problems, numbered=False).read() if text else ""
    if len(problems) > before:
        return
    target: Any = tree
    if keys[0] == "steps" and len(keys) > 1:
        found = _step_fields(tree, path.removeprefix("steps."), override, problems)
        if found is None:
            return
        target, keys = found
    elif keys[0] in {"task", "model", "meter"} and len(keys) > 1:
        if not isinstance(tree.get(keys[0]), dict):
            fields = _Mapping(tree.lines.get(keys[0], 0))
            if isinstance(tree.get(keys[0]), str):
                fields["name"] = tree[keys[0]]
            tree[keys[0]] = fields
        target, keys = tree[keys[0]], keys[1:]
    for key in keys[:-1]:
        if not isinstance(target.get(key), dict):
            problems.append(f"--set {shown(override)}: {key!r} is not a mapping in this recipe")
            return
        target = target[key]
    target[keys[-1]] = value
    target.lines[keys[-1]] = 0


def _step_fields(tree: _Mapping, path: str, override: str, problems: list[str]) -> tuple[_Mapping, list[str]] | None:
    """The fields of the step that ``path`` (``<id>.<field>``) begins with, and the rest of it."""
    items = tree.get("steps")
    ids: dict[str, tuple[int, str]] = {}
    for index, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, str):
            ids[item] = index, item
        elif isinstance(item, dict) and len(item) == 1:
            name, fields = next(iter(item.items()))
            ids[str(fields.get("id", name)) if isinstance(fields, dict) else name] = index, name
    found = [step_id for step_id in ids if path.startswith(f"{step_id}.")]
    if not found:
        problems.append(
            f"--set {shown(override)}: write steps.<id>.<field>=value."
            f"{did_you_mean(path.split('.')[0], ids)} Ids here: {', '.join(ids)}"
        )
        return None
    step_id = max(found, key=len)  # an id may hold points
    index, name = ids[step_id]
    assert isinstance(items, _List)
    if not isinstance(items[index], dict) or not isinstance(items[index][name], dict):
        line = items.lines[index]
        item = _Mapping(line)
        item[name], item.lines[name] = _Mapping(line), line
        items[index] = item
    return items[index][name], path.removeprefix(f"{step_id}.").split(".")
