"""A ledger, or several side by side, as one self-contained HTML file.

Everything the page needs is in it, Plotly once; its content security policy forbids the browser any network call and
runs no script but ours, whatever stands in names and recipes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.core.errors import InvalidValue
from sparing.core.files import write_atomic
from sparing.core.ledger import ordered
from sparing.report import view

if TYPE_CHECKING:
    from sparing.core.ledger import Ledger


def write_report(ledger: Ledger, target: Path | str) -> Path:
    """Write the report of one run to ``target`` and return its path; an empty ledger raises :class:`InvalidValue`."""
    write_atomic(Path(target), report_html(ledger).encode())
    return Path(target)


def write_comparison(ledgers: Mapping[str, Ledger], target: Path | str) -> Path:
    """Write a page that shows several runs, by name, side by side; the first is what the others are compared with."""
    write_atomic(Path(target), comparison_html(ledgers).encode())
    return Path(target)


def report_html(ledger: Ledger) -> str:
    """The page :func:`write_report` writes."""
    rows = list(ledger.rows)
    if not rows:
        why = f": {ledger.stopped}" if ledger.stopped else ""
        raise InvalidValue(f"the ledger has no rows, so there is nothing to report{why}")
    lines = ledger.summary()
    parts: dict[str, Any] = {
        "cards": view.cards(lines),
        "cards_note": view.cards_note(lines),
        "ledger": view.ledger_table(lines),
        "pareto": view.pareto_panels({"": rows}),
        "figures": view.figure_table(lines),
        "by_seed": view.seed_tables(ledger),
        "curves": view.curve_panels(rows),
        "galleries": view.galleries(rows),
        "classes": view.class_tables(rows),
        "decisions": view.decisions(rows),
        "sub": view.sub_ledgers(rows),
        "configs": view.configs(rows),
        "recipe": ledger.recipe,
        "environment": view.environment_lines(ledger.environment),
        "meter": view.environment_lines(ledger.meter),
        "seeds": ledger.seeds,
    }
    sections = (
        ("ledger", "Ledger", True),
        ("pareto", "Quality against cost", parts["pareto"]),
        ("figures", "Every figure", True),
        ("curves", "Training curves", parts["curves"]),
        ("pictures", "Pictures", parts["galleries"]),
        ("classes", "Each class", parts["classes"]),
        ("decisions", "Decisions", parts["decisions"]),
        ("sub", "Sub-ledgers", parts["sub"]),
        ("recipe", "Recipe", True),
        ("environment", "Environment", True),
    )
    return _render(
        "report.html",
        title=ledger.name or " → ".join(dict.fromkeys(row.task for row in rows)),
        stopped=ledger.stopped,
        summary=view.summary_line(ledger),
        contents=[(id_, name) for id_, name, there in sections if there],
        plots={"pareto": parts["pareto"], "curves": parts["curves"]},
        **parts,
    )


def comparison_html(ledgers: Mapping[str, Ledger]) -> str:
    """The page :func:`write_comparison` writes."""
    if len(ledgers) < 2:
        raise InvalidValue(f"a comparison needs at least two runs; {len(ledgers)} given")
    for name, ledger in ledgers.items():
        if not ledger.rows:
            raise InvalidValue(f"the ledger of {name} has no rows, so there is nothing to compare")
    names = list(ledgers)
    environments = {name: dict(view.environment_lines(ledger.environment)) for name, ledger in ledgers.items()}
    entries = ordered(environments.values())
    side_by_side = {entry: [environments[name].get(entry, "–") for name in names] for entry in entries}
    differing = [(entry, values) for entry, values in side_by_side.items() if len(set(values)) > 1]
    pareto = view.pareto_panels({name: ledger.rows for name, ledger in ledgers.items()})
    contents = [("last", "Last rows"), *([("pareto", "Quality against cost")] if pareto else [])]
    return _render(
        "compare.html",
        title=" · ".join(names),
        summary=f"{len(names)} runs compared",
        contents=[*contents, ("runs", "Each run"), ("environment", "Environment"), ("recipe", "Recipes")],
        names=names,
        comparison=view.comparison(ledgers),
        pareto=pareto,
        runs=[
            {"name": name, "cards": view.cards(lines), "ledger": view.ledger_table(lines)}
            for name, lines in ((name, ledger.summary()) for name, ledger in ledgers.items())
        ],
        environment=differing,
        same=len(entries) - len(differing),
        recipes=[
            {
                "name": name,
                "same": ledgers[name].recipe == ledgers[names[0]].recipe,
                "lines": view.text_difference(ledgers[names[0]].recipe, ledgers[name].recipe),
            }
            for name in names[1:]
        ],
        plots={"pareto": pareto, "curves": []},
    )


@cache
def _resource(name: str) -> str:
    return (resources("sparing.report") / name).read_text(encoding="utf-8")


@cache
def _scripts() -> tuple[str, ...]:
    """Plotly, once, and our own script; neither may hold what would end a script element."""
    from plotly.offline import get_plotlyjs

    scripts = (get_plotlyjs().replace("</script", "<\\/script"), _resource("report.js"))
    return scripts


def _render(template: str, **values: Any) -> str:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    from sparing import __version__

    environment = Environment(
        loader=FunctionLoader(_resource), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in _scripts()]
    return environment.get_template(template).render(
        css=Markup(_resource("report.css")),
        scripts=[Markup(script) for script in _scripts()],
        hashes=Markup(" ".join(f"'sha256-{digest}'" for digest in digests)),
        version=__version__,
        **values,
    )
