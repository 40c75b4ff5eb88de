"""Directives that write what would go stale if it were typed: steps, parts, measured claims, errors, command help.

They give reStructuredText, as the docstrings do; in a Markdown page they stand in an ``{eval-rst}`` block.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from textwrap import indent
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from ledger_table import KEPT, origin, transposed
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import stringify_annotation

from sparing.cli.catalogue import bare, fields_of, without_arguments
from sparing.core import errors
from sparing.core.ledger import FILE, Ledger
from sparing.core.registry import parts, resolve

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A reStructuredText list-table; a cell may hold several lines."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [head, *rows]:
        for i, cell in enumerate(row):
            first, *rest = cell.splitlines() or [""]
            lines.append(f"   {'* -' if i == 0 else '  -'} {first}".rstrip())
            lines += [f"       {line}".rstrip() for line in rest]
    return "\n".join([*lines, ""])


def number(value: Any) -> str:
    """Four significant digits, thousands in groups; other values as they are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def attribute_docs(cls: type) -> dict[str, str]:
    """Attribute name → the string below it in the source, over the class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("builtins"):
            continue
        for (owner, name), lines in ModuleAnalyzer.for_module(base.__module__).find_attr_docs().items():
            if owner == base.__qualname__:
                found[name] = " ".join(lines).strip()
    return found


SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "a multiple of"}


def bounds(info: FieldInfo | None) -> str:
    """The limits pydantic holds a field to, e.g. ``> 0, ≤ 1``."""
    metadata = info.metadata if info else []
    limits = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    limits += [f"at least {m.min_length} long" for m in metadata if getattr(m, "min_length", None)]
    return ", ".join(limits)


def default(item: Field, info: FieldInfo | None) -> str:
    """A field's default as Python would write it, or "required"."""
    if info:
        return "required" if info.is_required() else literal(info.get_default(call_default_factory=True))
    if item.default_factory is not MISSING:
        return literal(item.default_factory())
    return "required" if item.default is MISSING else literal(item.default)


def docstring(cls: type, directive: SphinxDirective, cut: Callable[[str], str] = str) -> str:
    """A class's docstring, or what ``cut`` leaves of it, as reStructuredText."""
    return str(GoogleDocstring(cut(inspect.cleandoc(cls.__doc__ or "")), directive.config, what="class"))


def literal(value: Any) -> str:
    return f"``{value!r}``"


def field_table(cls: type) -> str:
    """Every field of a dataclass: type, limits, default, and the sentence below it in the source."""
    documented = attribute_docs(cls)
    described = getattr(cls, "__pydantic_fields__", {})
    rows = []
    for item in fields(cls):  # type: ignore[arg-type]
        info = described.get(item.name)
        annotation = info.annotation if info else item.type
        kind = annotation if isinstance(annotation, str) else stringify_annotation(bare(annotation), "smart")
        kind = re.sub(r"~?(?:[a-z_]\w*\.)+([A-Z]\w*)", r"\1", kind.replace("~", ""))
        text = documented.get(item.name) or (info.description if info and info.description else "")
        rows.append([f"``{item.name}``", f"``{kind}``", bounds(info), default(item, info), text])
    head = ["field", "type", "allowed", "default", "meaning"]
    if not any(row[2] for row in rows):
        head, rows = [h for h in head if h != "allowed"], [[*row[:2], *row[3:]] for row in rows]
    return table(head, rows)


class Rendered(SphinxDirective):
    """A directive whose content is reStructuredText made by :meth:`text`."""

    required_arguments = 1
    final_argument_whitespace = True

    def text(self, argument: str) -> str:
        raise NotImplementedError

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(self.text(self.arguments[0]), allow_section_headings=False)


class StepReference(Rendered):
    """``.. step:: NAME``: docstring, conditions, fields and source of a registered step."""

    def text(self, argument: str) -> str:
        cls = resolve("steps", argument)
        names = ("needs", "gives", "removes", "slots", "promises", "realises", "fragile")
        sets = [(name, declared(getattr(cls, name))) for name in names]
        facts = [("stage", cls.stage.value), *((name, value) for name, value in sets if value)]
        facts += [("class", f":class:`{cls.__module__}.{cls.__qualname__}`"), ("source", cls.source)]
        listed = "\n".join(f":{name}: {value}" for name, value in facts)
        return f"{docstring(cls, self)}\n\n{listed}\n\n.. rubric:: Fields\n\n{field_table(cls)}"


class Fields(Rendered):
    """``.. fields:: module:Class``: the field table of any dataclass."""

    def text(self, argument: str) -> str:
        module, _, name = argument.partition(":")
        cls = getattr(import_module(module), name)
        if not is_dataclass(cls):
            raise self.error(f"{argument} is not a dataclass")
        return f"{docstring(cls, self)}\n\n{field_table(cls)}"


class Json(Rendered):
    """``.. json:: module:function``: what a function without arguments returns, as JSON."""

    def text(self, argument: str) -> str:
        module, _, name = argument.partition(":")
        shown = json.dumps(getattr(import_module(module), name)(), indent=2, ensure_ascii=False)
        return ".. code-block:: json\n\n" + indent(shown, "   ")


class Parts(Rendered):
    """``.. parts:: KIND``: every registered part of a kind with its one-line summary."""

    def text(self, argument: str) -> str:
        link = "/steps/{0}" if argument == "steps" else None
        rows = []
        for name, part in sorted(parts(argument).items()):
            shown = f":doc:`{name} <{link.format(name)}>`" if link else f"``{name}``"
            rows.append([shown, part.summary])
        return table([argument[:-1], "what it is"], rows) if rows else f"This release registers no {argument}."


class Errors(Rendered):
    """``.. errors:: all``: every error class, what it means, and what else it can be caught as."""

    def text(self, argument: str) -> str:
        classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.SparingError)]
        rows = []
        for cls in sorted(classes, key=lambda c: (len(c.__mro__), c.__name__)):
            bases = ", ".join(f"``{base.__name__}``" for base in cls.__bases__)
            rows.append([f":class:`~sparing.core.errors.{cls.__name__}`", bases, inspect.cleandoc(cls.__doc__ or "")])
        return table(["error", "is also a", "raised when"], rows)


class Claims(Rendered):
    """``.. claims:: SYSTEM``: what ``benchmarks/SYSTEM.py`` measured; ``:only:`` keeps the claims of these ids."""

    option_spec = {"only": directives.unchanged}  # noqa: RUF012

    def text(self, argument: str) -> str:
        file = RESULTS / f"{argument}.json"
        self.env.note_dependency(str(file))
        if not file.is_file():
            return f"Nothing is measured yet: ``benchmarks/results/{argument}.json`` does not exist."
        result = json.loads(file.read_text())
        wanted = self.options.get("only", "").split()
        claims = [claim for claim in result["claims"] if not wanted or claim["id"] in wanted]
        if missing := set(wanted) - {claim["id"] for claim in claims}:
            raise self.error(f"{file.name} holds no claim {', '.join(sorted(missing))}")
        rows = [claim_row(claim) for claim in claims]
        head = ["claim", "figure", "95 % interval", "runs", "beside", "reach", "holds", "further conditions"]
        return f"{table(head, rows)}\n{footnote(result)}"


def claim_row(claim: dict[str, Any]) -> list[str]:
    unit = f" {claim['unit']}" if claim.get("unit") else ""
    interval, seeds = claim.get("interval95"), claim.get("seeds")
    return [
        f"**{claim['id']}**: {claim['statement']}",
        f"{number(claim['figure'])}{unit}",
        f"{number(interval[0])} … {number(interval[1])}" if interval else "",
        str(len(seeds) if isinstance(seeds, list) else seeds or ""),
        "; ".join(f"{base['name']}: {number(base['figure'])}" for base in claim.get("baselines", [])),
        number(claim["threshold"]) + ("" if claim["gate"] else " (open question)"),
        "yes" if claim["holds"] else "**no**",
        "; ".join(f"{name}: {number(value)} ({sign} {number(limit)})" for name, value, sign, limit in claim["also"]),
    ]


def footnote(result: dict[str, Any]) -> str:
    """Where and with what a result was measured."""

    def flat(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{name} {flat(item)}" for name, item in value.items())
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)

    parts_ = [flat(result["machine"]), flat(result["versions"]), f"revision {result['revision']}"]
    return f"Measured in {number(round(result['wall_s']))} s: {'; '.join(parts_)}."


def declared(words: Any) -> str:
    """A step's declaration: its words, or what its property says where it depends on the fields."""
    if isinstance(words, property):
        return (words.__doc__ or "").strip()
    return ", ".join(f"``{word}``" for word in sorted(words))


class MeasuredLedger(Rendered):
    """``.. ledger:: quickstart``: every figure of the ledger kept in ``benchmarks/results/quickstart/``."""

    def text(self, argument: str) -> str:
        folder = KEPT.parent / argument
        self.env.note_dependency(str(folder / FILE))
        ledger = Ledger.load(folder)
        return f"{table(*transposed(ledger))}\n{origin(ledger)}"


class PartReference(Rendered):
    """``.. part:: KIND NAME``: docstring, arguments and class of a registered task, model or other part."""

    def text(self, argument: str) -> str:
        kind, name = argument.split()
        cls = resolve(kind, name)
        facts = [("class", f":class:`{cls.__module__}.{cls.__qualname__}`")]
        if isinstance(capabilities := getattr(cls, "capabilities", None), frozenset):
            facts.append(("capabilities", ", ".join(f"``{x}``" for x in sorted(capabilities))))
        if isinstance(metrics := getattr(cls, "metrics", None), tuple):
            named = [f"``{metric.name}`` ({metric.better} is better)" for metric in metrics]
            facts.append(("metrics", ", ".join(named) + "; the first is the headline"))
        described = fields_of(cls)
        head = ["field", "type", "default", "meaning"]
        rows = [
            [
                f"``{field['name']}``",
                f"``{field['type']}``",
                "required" if field["required"] else literal(field["default"]),
                field["meaning"],
            ]
            for field in described
        ]
        shown = [docstring(cls, self, without_arguments), "\n".join(f":{name}: {value}" for name, value in facts)]
        return "\n\n".join([*shown, table(head, rows)] if rows else shown)


class Command(Rendered):
    """``.. command:: sparing run --help``: what the command prints, run when the docs are built."""

    def text(self, argument: str) -> str:
        program, *rest = argument.split()
        if program != "sparing":
            raise self.error(f"only sparing's own commands are run here, not {program!r}")
        done = subprocess.run(
            [sys.executable, "-m", "sparing.cli", *rest],
            env=os.environ | {"COLUMNS": "100"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise self.error(f"{argument} ended with {done.returncode}: {done.stderr.strip()}")
        return ".. code-block:: text\n\n" + indent(f"$ {argument}\n{done.stdout}", "   ")


def setup(app: Sphinx) -> dict[str, Any]:
    for name, directive in {
        "step": StepReference,
        "fields": Fields,
        "json": Json,
        "parts": Parts,
        "errors": Errors,
        "claims": Claims,
        "ledger": MeasuredLedger,
        "part": PartReference,
        "command": Command,
    }.items():
        app.add_directive(name, directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
