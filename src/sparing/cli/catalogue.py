"""``sparing list`` and ``sparing show``: what parts and recipes there are, and what their fields mean."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import textwrap
import types
import typing
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sparing.cli import output
from sparing.core.errors import UnknownName, did_you_mean

KINDS = ("tasks", "steps", "models", "recipes")


def _recipes() -> dict[str, Path]:
    from sparing.core.recipe import packaged

    return packaged()


def _first_comment(recipe: Path) -> str:
    """The first line of the comment a recipe opens with."""
    first = recipe.read_text(encoding="utf-8").split("\n", 1)[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def _known(kind: str) -> dict[str, str]:
    """Name → one line, for one of :data:`KINDS`."""
    if kind == "recipes":
        return {name: _first_comment(path) for name, path in _recipes().items()}
    from sparing.core.registry import parts

    return {name: part.summary for name, part in sorted(parts(kind).items())}


def list_parts(kind: str | None, pattern: str, *, json: bool) -> Any:
    """Names and summaries of one kind or of all that match a pattern; a document."""
    chosen = (kind,) if kind else KINDS
    found = {one: {name: line for name, line in _known(one).items() if fnmatchcase(name, pattern)} for one in chosen}
    if not json:
        for one, lines in found.items():
            if not lines and len(chosen) > 1:
                continue
            shown = output.table("name", "what it is", title=one if len(chosen) > 1 else None)
            for name, line in lines.items():
                shown.add_row(output.literal(name), output.literal(line))
            output.console().print(shown)
        if not any(found.values()):
            output.say(f"nothing matches {pattern!r}")
    return [{"kind": one, "name": name, "summary": lines[name]} for one, lines in found.items() for name in lines]


def show_part(wanted: str, *, json: bool) -> Any:
    """A recipe's text, or a part's docstring and fields; a document."""
    kind, _, name = wanted.rpartition("/")
    kinds = [kind] if kind in KINDS else list(KINDS) if not kind else []
    found = [(one, name) for one in kinds if name in _known(one)]
    if not found:
        everything = [other for one in KINDS for other in _known(one)]
        raise UnknownName(
            f"no task, step, model or recipe {wanted!r}.{did_you_mean(name, everything)} See: sparing list"
        )
    documents = [_show_recipe(name) if one == "recipes" else _describe(one, name) for one, name in found]
    if not json:
        for document in documents:
            _print_part(document)
    return documents


def _show_recipe(name: str) -> dict[str, Any]:
    path = _recipes()[name]
    return {"kind": "recipes", "name": name, "path": str(path), "text": path.read_text(encoding="utf-8")}


def _describe(kind: str, name: str) -> dict[str, Any]:
    from sparing.core.registry import parts, resolve

    target = resolve(kind, name)
    described = {
        "kind": kind,
        "name": name,
        "target": parts(kind)[name].target,
        "doc": inspect.cleandoc(target.__doc__ or ""),
        "fields": fields_of(target),
    }
    if kind == "steps":
        from sparing.core.step import declared

        for attribute in ("needs", "gives", "removes", "promises", "realises", "fragile"):
            described[attribute] = sorted(declared(target, attribute))
        described["stage"], described["source"] = str(target.stage), target.source
    if kind == "tasks":
        capabilities = getattr(target, "capabilities", ())
        described["capabilities"] = sorted(capabilities) if isinstance(capabilities, frozenset) else []
    return described


def fields_of(target: Any) -> list[dict[str, Any]]:
    """Name, type, default, range and meaning of what a part is built with, in order."""
    pydantic_fields = getattr(target, "__pydantic_fields__", None)
    if pydantic_fields is not None:
        meanings = attribute_docs(target)
        return [
            {
                "name": name,
                "type": _type(info.annotation),
                "required": info.is_required(),
                "default": None if info.is_required() else _default(info.get_default(call_default_factory=True)),
                "range": _range(info.metadata),
                "meaning": info.description or meanings.get(name, ""),
            }
            for name, info in pydantic_fields.items()
        ]
    classes = reversed(inspect.getmro(target)) if inspect.isclass(target) else [target]
    meanings = {
        name: line for one in classes for name, line in argument_docs(inspect.cleandoc(one.__doc__ or "")).items()
    }
    signature = inspect.signature(target)
    return [
        {
            "name": name,
            "type": _type(parameter.annotation) if parameter.annotation is not parameter.empty else "",
            "required": parameter.default is parameter.empty,
            "default": None if parameter.default is parameter.empty else _default(parameter.default),
            "range": "",
            "meaning": meanings.get(name, ""),
        }
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def bare(annotation: Any) -> Any:
    """A type without the metadata that validation hangs on its parts."""
    if typing.get_origin(annotation) is typing.Annotated:
        return bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(bare, typing.get_args(annotation)))
    return annotation


def _type(annotation: Any) -> str:
    shown = annotation if isinstance(annotation, str) else inspect.formatannotation(bare(annotation))
    return re.sub(r"\b(typing|collections\.abc|sparing(\.\w+)+)\.", "", shown).replace("NoneType", "None")


def _default(value: Any) -> Any:
    from sparing.core.step import Step

    if isinstance(value, Step):
        return {value.name: value.config()}
    if isinstance(value, tuple | list):
        return [_default(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _default(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


_BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"), ("multiple_of", "a multiple of"))


def _range(metadata: list[Any]) -> str:
    """Constraints in words: "≥ 1, ≤ 8"."""
    parts = []
    for item in metadata:
        for name, sign in _BOUNDS:
            if getattr(item, name, None) is not None:
                parts.append(f"{sign} {getattr(item, name)}")
        if getattr(item, "min_length", None) is not None:
            parts.append(f"length ≥ {item.min_length}")
        if getattr(item, "max_length", None) is not None:
            parts.append(f"length ≤ {item.max_length}")
        if getattr(item, "pattern", None) is not None:
            parts.append(f"matching {item.pattern}")
    return ", ".join(parts)


def attribute_docs(cls: type) -> dict[str, str]:
    """Field name → the string that stands below it in the class body, base classes included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):
            continue
        if not isinstance(body, ast.ClassDef):
            continue
        for statement, following in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                found[statement.target.id] = " ".join(following.value.value.split())
    return found


def argument_docs(doc: str) -> dict[str, str]:
    """Argument name → its meaning, from the ``Args:`` section of a docstring."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return {}
    items = re.findall(r"^(\w+): (.*(?:\n[ ]+.*)*)", textwrap.dedent(section[1]), re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in items}


def without_arguments(doc: str) -> str:
    """A docstring without its ``Args:`` section."""
    return re.sub(r"\n*^Args:\n((?:[ ]+.*\n?|\n)*)", "\n\n", doc, flags=re.MULTILINE).strip()


def _print_part(document: Mapping[str, Any]) -> None:
    if document["kind"] == "recipes":
        output.say(document["text"].rstrip())
        return
    title = f"{document['kind'][:-1]} {document['name']}  ({document['target']})"
    output.say(title, "", without_arguments(document["doc"]), "")
    for name in ("needs", "gives", "removes", "promises", "realises", "fragile", "capabilities"):
        if document.get(name):
            output.say(f"{name}: {', '.join(document[name])}")
    if document.get("source"):
        output.say(f"source: {document['source']}")
    if not document["fields"]:
        output.say("no fields")
        return
    shown = output.table("field", "type", "default", "range", "meaning")
    for field in document["fields"]:
        default = "required" if field["required"] else "none" if field["default"] is None else str(field["default"])
        if default == "":
            default = '""'
        shown.add_row(*map(output.literal, (field["name"], field["type"], default, field["range"], field["meaning"])))
    output.console().print(shown)
