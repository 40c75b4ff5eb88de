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
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sparing.core.errors import InvalidValue, RecipeError, UnknownName, did_you_mean
from sparing.core.registry import resolve
from sparing.core.step import Step

if TYPE_CHECKING:
    from torch import nn

    from sparing.core.task import Task

VERSION = 1
MAX_BYTES = 1 << 20
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


class _Marked(dict[str, Any]):
    """A mapping that knows the line of each of its keys."""

    lines: dict[str, int]
    line: int


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a file, or by the name of a packaged one, and apply ``--set`` overrides.

    Everything wrong is reported at once in a :class:`RecipeError`, each problem with file and line.
    """
    path = Path(source)
    if not path.exists() and path.suffix not in {".yaml", ".yml"}:
        known = packaged()
        if str(source) not in known:
            raise UnknownName(
                f"no recipe file or packaged recipe {str(source)!r}.{did_you_mean(str(source), known)} "
                f"Packaged recipes: {', '.join(sorted(known)) or 'none'}"
            )
        path = known[str(source)]
    if not path.is_file():
        raise RecipeError([f"{path}: {'a folder' if path.is_dir() else 'no such file'}; a recipe is a YAML file"])
    if path.stat().st_size > MAX_BYTES:
        raise RecipeError([f"{path}: larger than {MAX_BYTES} bytes, which no recipe needs"])
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot be read as UTF-8 text: {error}"]) from None
    return parse_recipe(text, name=path.stem, file=str(path), overrides=overrides)


def packaged() -> dict[str, Path]:
    """The recipes that come with Sparing, by name."""
    folder = Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def parse_recipe(text: str, name: str = "recipe", file: str = "<text>", overrides: Sequence[str] = ()) -> Recipe:
    """Parse and validate the text of a recipe; raises :class:`RecipeError` with every problem found."""
    if len(text) > MAX_BYTES:
        raise RecipeError([f"{file}: larger than {MAX_BYTES} bytes, which no recipe needs"])
    problems: list[str] = []
    tree = _parse_yaml(text, file, problems)
    if problems:
        raise RecipeError(problems)
    for override in overrides:
        _apply_override(tree, override, problems)
    for key in tree:
        if key not in KEYS:
            problems.append(
                f"{_at(file, tree, key)}: unknown key {key!r}.{did_you_mean(key, KEYS)} Keys: {', '.join(KEYS)}"
            )
    if (version := tree.get("version", VERSION)) != VERSION:
        problems.append(f"{_at(file, tree, 'version')}: recipe version {version!r}; this release reads {VERSION}")
    seed = tree.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        problems.append(f"{_at(file, tree, 'seed')}: seed = {seed!r}: a whole number in 0 … 2³¹−1 is needed")
    meter = tree.get("meter") or {}
    if not isinstance(meter, dict):
        problems.append(f"{_at(file, tree, 'meter')}: meter must be a mapping of fields, not {meter!r}")
        meter = {}
    task = _part(tree, "task", "tasks", file, problems)
    if task is None and "task" not in tree:
        problems.append(f"{file}: the key 'task' is missing; for example 'task: digits'")
    model: PartRef | Path | None
    if isinstance(tree.get("model"), dict) and "path" in tree["model"]:
        model = _model_path(tree["model"], file, problems)
    else:
        model = _part(tree, "model", "models", file, problems)
    steps, places = _steps(tree, file, problems)
    if problems:
        raise RecipeError(problems)
    assert task is not None
    return Recipe(task, tuple(steps), model, isinstance(model, Path), seed, meter, name, text, tuple(places))


def _parse_yaml(text: str, file: str, problems: list[str]) -> _Marked:
    empty = _Marked()
    empty.lines, empty.line = {}, 1
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                problems.append(
                    f"{file}:{event.start_mark.line + 1}: anchors and aliases (*{event.anchor}) are not read"
                )
                return empty
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            tree = _construct(loader, node, file, problems) if node is not None else empty
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = 1 if mark is None else mark.line + 1
        problems.append(f"{file}:{line}: not valid YAML: {error.problem}")
        return empty
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        problems.append(f"{file}: not valid YAML: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return empty
    if not isinstance(tree, _Marked):
        problems.append(f"{file}:1: a recipe is a mapping with the keys {', '.join(KEYS)}")
        return empty
    return tree


def _construct(loader: yaml.SafeLoader, node: yaml.Node, file: str, problems: list[str]) -> Any:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        mapping = _Marked()
        mapping.lines, mapping.line = {}, line
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                problems.append(f"{file}:{key_line}: keys are text, not {key_node.value!r}")
                continue
            if key in mapping:
                problems.append(
                    f"{file}:{key_line}: the key {key!r} appears twice (first at line {mapping.lines[key]})"
                )
            mapping[key] = _construct(loader, value_node, file, problems)
            mapping.lines[key] = key_line
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, file, problems) for item in node.value]
    value = loader.construct_object(node)
    if value is not None and not isinstance(value, bool | int | float | str):
        problems.append(f"{file}:{line}: {node.value!r} reads as a {type(value).__name__}; quote it to make it text")
    return value


def _at(file: str, mapping: Any, key: str | None = None) -> str:
    if not isinstance(mapping, _Marked):
        return file
    line = mapping.lines.get(key, mapping.line) if key else mapping.line
    return f"{file}:{line}" if line else "--set"


def _part(tree: _Marked, key: str, kind: str, file: str, problems: list[str]) -> PartRef | None:
    value = tree.get(key)
    if value is None:
        return None
    place = _at(file, tree, key)
    fields: Mapping[str, Any] = {}
    if isinstance(value, dict):
        name, fields = value.get("name"), {k: v for k, v in value.items() if k != "name"}
    else:
        name = value
    if not isinstance(name, str):
        problems.append(f"{place}: {key} is a name, or a mapping with the key 'name'; got {value!r}")
        return None
    try:
        resolve(kind, name)
    except UnknownName as error:
        problems.append(f"{place}: {error}")
        return None
    return PartRef(name, fields, place)


def _model_path(value: _Marked, file: str, problems: list[str]) -> Path | None:
    if not isinstance(value["path"], str) or len(value) > 1:
        problems.append(
            f"{_at(file, value, 'path')}: a saved model is named by 'path: folder' alone, got {dict(value)!r}"
        )
        return None
    return Path(value["path"])


def _steps(tree: _Marked, file: str, problems: list[str]) -> tuple[list[Step], list[str]]:
    items = tree.get("steps")
    if not isinstance(items, list) or not items:
        problems.append(f"{_at(file, tree, 'steps')}: 'steps' is a list with at least one step; got {items!r}")
        return [], []
    steps, places = [], []
    for index, item in enumerate(items):
        made = _step(item, f"{_at(file, tree, 'steps')} (steps[{index}])", file, problems)
        if made is not None:
            steps.append(made[0])
            places.append(made[1])
    return steps, places


def _step(item: Any, outer: str, file: str, problems: list[str]) -> tuple[Step, str] | None:
    """One step from ``name``, ``{name: {field: value}}`` or ``{name: null}``."""
    if isinstance(item, str):
        item_fields: Any = {}
        name, place = item, outer
    elif isinstance(item, dict) and len(item) == 1:
        name, item_fields = next(iter(item.items()))
        place = _at(file, item, name) if isinstance(item, _Marked) else outer
    else:
        place = _at(file, item) if isinstance(item, _Marked) else outer
        problems.append(f"{place}: a step is 'name' or 'name: {{field: value}}', one a list item; got {item!r}")
        return None
    if item_fields is None:
        item_fields = {}
    if not isinstance(item_fields, dict):
        problems.append(f"{place}: the fields of {name!r} are a mapping, not {item_fields!r}")
        return None
    try:
        cls = resolve("steps", name)
    except UnknownName as error:
        problems.append(f"{place}: {error}")
        return None
    before = len(problems)
    values = {key: _field_value(cls, key, value, place, file, problems) for key, value in item_fields.items()}
    if len(problems) > before:
        return None
    try:
        return cls(**values), place
    except InvalidValue as error:
        for line in str(error).splitlines():
            named = next((key for key in item_fields if f" {key} =" in line or f"field '{key}" in line), None)
            problems.append(f"{_at(file, item_fields, named) if named else place}: {line}")
        return None


def _field_value(cls: type[Step], key: str, value: Any, place: str, file: str, problems: list[str]) -> Any:
    """``value`` as it is, or with steps built in it where the field holds steps."""
    if key not in {field_.name for field_ in dataclasses.fields(cls)} or not _holds_steps(cls, key):
        return value
    if isinstance(value, list):
        made = [_step(item, place, file, problems) for item in value]
        return tuple(item[0] for item in made if item is not None)
    single = _step(value, place, file, problems)
    return single[0] if single is not None else None


def _holds_steps(cls: type[Step], key: str) -> bool:
    def mentions(annotation: Any) -> bool:
        if isinstance(annotation, type) and issubclass(annotation, Step):
            return True
        return any(mentions(argument) for argument in typing.get_args(annotation))

    return mentions(typing.get_type_hints(cls).get(key))


def _apply_override(tree: _Marked, override: str, problems: list[str]) -> None:
    """Apply one ``path=value``; a path is ``steps.<id>.<field>``, ``task|model|meter.<field>`` or ``seed``."""
    path, separator, text = override.partition("=")
    keys = path.split(".")
    if not separator or not all(keys):
        problems.append(f"--set {override}: write steps.<id>.<field>=value, task.<field>=value or seed=value")
        return
    scratch: list[str] = []
    value: Any = text
    if text:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            value = _construct(loader, node, "--set", scratch) if node is not None else None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            scratch.append(str(error).splitlines()[0])
        finally:
            loader.dispose()
    if scratch:
        problems.append(f"--set {override}: {'; '.join(scratch)}")
        return
    target: Any
    if keys[0] == "steps":
        target = _step_fields(tree, keys, override, problems)
        keys = keys[2:]
        if target is None:
            return
    elif keys[0] in {"task", "model", "meter"} and len(keys) > 1:
        if not isinstance(tree.get(keys[0]), dict):
            marked = _Marked()
            marked.lines, marked.line = {}, tree.lines.get(keys[0], 0)
            if isinstance(tree.get(keys[0]), str):
                marked["name"] = tree[keys[0]]
            tree[keys[0]] = marked
        target, keys = tree[keys[0]], keys[1:]
    else:
        target = tree
    for key in keys[:-1]:
        if not isinstance(target.get(key), dict):
            problems.append(f"--set {override}: {key!r} is not a mapping in this recipe")
            return
        target = target[key]
    target[keys[-1]] = value
    if isinstance(target, _Marked):
        target.lines[keys[-1]] = 0  # shown as "--set"


def _step_fields(tree: _Marked, keys: list[str], override: str, problems: list[str]) -> Any:
    items = tree.get("steps")
    ids: dict[str, tuple[Any, int, str]] = {}
    for index, item in enumerate(items if isinstance(items, list) else []):
        if isinstance(item, str):
            ids[item] = (items, index, item)
        elif isinstance(item, dict) and len(item) == 1:
            name, fields = next(iter(item.items()))
            ids[str(fields.get("id", name)) if isinstance(fields, dict) else name] = (items, index, name)
    if len(keys) < 3 or keys[1] not in ids:
        wanted = keys[1] if len(keys) > 1 else ""
        problems.append(
            f"--set {override}: write steps.<id>.<field>=value.{did_you_mean(wanted, ids)} Ids here: {', '.join(ids)}"
        )
        return None
    steps, index, name = ids[keys[1]]
    if not isinstance(steps[index], dict) or not isinstance(steps[index][name], dict):
        marked, fields = _Marked(), _Marked()
        marked.lines, marked.line, fields.lines, fields.line = {}, 0, {}, 0
        if isinstance(steps[index], _Marked):
            marked.lines, marked.line = steps[index].lines, steps[index].line
        marked[name] = fields
        steps[index] = marked
    return steps[index][name]
