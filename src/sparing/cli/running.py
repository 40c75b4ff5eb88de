"""``sparing run``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.cli import output
from sparing.core import text
from sparing.core.errors import SparingError
from sparing.core.ledger import FILE, MODEL_BYTES, P50, WALL, Ledger, Row

if TYPE_CHECKING:
    from sparing.core.pipeline import Plan
    from sparing.core.recipe import Recipe
    from sparing.core.store import Store

RUNS = Path("runs")
REPORT = "report.html"


def run_recipe(
    source: str,
    *,
    overrides: Sequence[str],
    seeds: int,
    data: Path | None,
    out: Path | None,
    until: str | None,
    dry_run: bool,
    store: Path | None,
    trust: Sequence[str],
    json: bool,
    quiet: bool,
) -> Any:
    """Plan or run a recipe and write its report; gives the JSON document."""
    from sparing.core.recipe import load_recipe
    from sparing.core.store import Store

    recipe = replace(load_recipe(source, overrides), trust=tuple(trust))
    kept = Store(store)
    if dry_run:
        from sparing.core.pipeline import plan

        planned = plan(recipe, data=data, store=kept, until=until)
        if not json:
            _print_plan(planned, quiet)
        return planned.describe()
    folder = out or RUNS / recipe.name
    try:
        ledger = _run(recipe, folder, seeds, data, until, kept, talk=not (json or quiet))
    except SparingError:
        _report_what_there_is(folder)
        raise
    report = _write_report(ledger, folder)
    model = folder / "model"
    if not json:
        if not quiet:
            from sparing.core.table import table

            print()
            output.console().print(table(ledger))
            output.say(f"Report: {report}", f"Model:  {model}" if model.is_dir() else "Model:  none was made")
        else:
            output.say(str(folder))
    return ledger.to_json() | {
        "folder": str(folder),
        "report": str(report),
        "model": str(model) if model.is_dir() else None,
    }


def _run(
    recipe: Recipe, folder: Path, seeds: int, data: Path | None, until: str | None, store: Store, talk: bool
) -> Ledger:
    from sparing.core.pipeline import run

    steps = [step.id for step in recipe.steps]
    with _spinner(talk, f"{steps[0] if steps else recipe.name} …") as update:

        def on_row(row: Row) -> None:
            if talk:
                print(row_line(row, several=seeds > 1), flush=True)
                following = steps[steps.index(row.id) + 1 :] if row.id in steps else steps
                update(f"{following[0] if following else 'saving'} …")

        return run(recipe, seeds=seeds, data=data, out=folder, until=until, store=store, on_row=on_row).ledger


def _spinner(talk: bool, first: str) -> AbstractContextManager[Callable[[str], None]]:
    """What is being done, on a terminal; nothing elsewhere."""
    if not (talk and sys.stdout.isatty() and sys.stderr.isatty()):
        return nullcontext(lambda shown: None)
    return _Spinner(first)


class _Spinner:
    def __init__(self, first: str) -> None:
        from rich.console import Console
        from rich.status import Status

        self._status = Status(output.literal(first), console=Console(stderr=True))

    def __enter__(self) -> Callable[[str], None]:
        self._status.start()
        return lambda shown: self._status.update(output.literal(shown))

    def __exit__(self, *error: object) -> None:
        self._status.stop()


def row_line(row: Row, several: bool) -> str:
    """A row in one line, as it is printed the moment it is there."""
    parts = [f"{row.id}{f' (seed {row.seed})' if several else ''}:"]
    for name in (row.headline, MODEL_BYTES, P50):
        figure = row.figures.get(name)
        if figure is not None and figure.value is not None:
            shown = text.number(figure.value, figure.unit)
            if name == row.headline:
                shown += text.plus_minus(figure)
            parts.append(f"{name} {shown},")
    wall = row.figures.get(WALL)
    if wall is not None and wall.value is not None:
        parts.append(f"made in {text.number(wall.value, wall.unit)}")
    line = " ".join(parts).rstrip(",")
    return f"{line} – {row.outcome}" if row.outcome else line


def _write_report(ledger: Ledger, folder: Path) -> Path:
    from sparing.report import write_report

    return write_report(ledger, folder / REPORT)


def _report_what_there_is(folder: Path) -> None:
    """A report of the rows made before a run failed, so that they can be looked at."""
    if (folder / FILE).is_file():
        ledger = Ledger.load(folder)
        if ledger.rows and ledger.stopped:
            _write_report(ledger, folder)


def _print_plan(planned: Plan, quiet: bool) -> None:
    if quiet:
        return
    plan = planned.describe()
    output.say(f"{plan['recipe']}: task {plan['task']}, seed {plan['seed']}; the plan is consistent")
    shown = output.table("step", "id", "stage", "place", "stored", "estimated s", right=("estimated s",))
    for step in plan["steps"]:
        seconds = step["estimated_seconds"]
        stored = f"{step['stored_results']} result{'s' if step['stored_results'] != 1 else ''}"
        shown.add_row(
            *map(
                output.literal,
                (
                    step["step"],
                    step["id"],
                    step["stage"],
                    step["place"],
                    stored if step["stored_results"] else "nothing",
                    "unknown" if seconds is None else text.number(seconds),
                ),
            )
        )
    output.console().print(shown)
    output.say(*plan["remarks"])
    code = plan["user_code"]
    output.say(f"code of others that would be imported: {', '.join(code)}" if code else "no code of others is imported")
