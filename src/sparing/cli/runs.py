"""``sparing explain``, ``compare`` and ``report``: what finished runs tell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparing.cli import output
from sparing.core.errors import InvalidValue, did_you_mean
from sparing.core.ledger import FILE, Ledger, ordered
from sparing.report.view import figure_text, plain_value

REPORT = "report.html"


def folder_of(run: Path) -> Path:
    """The folder of a run given by its folder or its ledger file."""
    folder = run.parent if run.name == FILE else run
    if not (folder / FILE).is_file():
        there = folder.is_dir()
        raise InvalidValue(
            f"{run} {'holds no ' + FILE if there else 'is missing'}; a folder that 'sparing run' wrote is expected"
        )
    return folder


def explain_step(run: Path, step_id: str, *, json: bool) -> Any:
    """Why a step was refused, kept or declined: its outcome, candidates, remarks and fields; a document."""
    ledger = Ledger.load(folder_of(run))
    rows = [row for row in ledger.rows if row.id == step_id]
    stopped = ledger.stopped if not rows or f"{step_id!r}" in ledger.stopped else ""
    if not rows and not _in_recipe(ledger.recipe, step_id):
        known = f"Rows: {', '.join(ledger.ids) or 'none'}"
        raise InvalidValue(f"{run}: no row {step_id!r}.{did_you_mean(step_id, ledger.ids)} {known}")
    document = {
        "id": step_id,
        "stopped": stopped,
        "rows": [
            {
                "seed": row.seed,
                "step": row.step,
                "outcome": row.outcome,
                "candidates": row.candidates,
                "remarks": row.remarks,
                "config": dict(row.config),
            }
            for row in rows
        ],
    }
    if json:
        return document
    if not rows:
        reason = ledger.stopped or "It did not say why."
        output.say(f"{step_id} has no row: the run stopped before it was done.", reason)
    for row in rows:
        output.say(f"{row.id} ({row.step}), seed {row.seed}: {row.outcome or 'done; it had nothing to choose'}")
        if row.candidates:
            names = [name for name in ordered(row.candidates) if name != "name"]
            shown = output.table("candidate", *names, right=names)
            for candidate in row.candidates:
                cells = (str(candidate.get("name", "")), *(plain_value(candidate.get(name)) for name in names))
                shown.add_row(*map(output.literal, cells))
            output.console().print(shown)
        output.say(*(f"- {remark}" for remark in row.remarks))
        missing = {name: figure for name, figure in row.figures.items() if figure.value is None}
        output.say(*(f"- {name}: {figure_text(figure)}" for name, figure in missing.items()))
        if row.config:
            output.say("fields: " + ", ".join(f"{name}={plain_value(value)}" for name, value in row.config.items()))
    if rows and stopped:
        output.say(stopped)
    return document


def _in_recipe(text: str, step_id: str) -> bool:
    """Whether a recipe's text has a step of this id; a recipe that no longer parses has none."""
    from sparing.core.errors import RecipeError
    from sparing.core.recipe import parse_recipe

    try:
        return any(step.id == step_id for step in parse_recipe(text).steps)
    except RecipeError:
        return False


def compare_runs(runs: Sequence[Path], out: Path | None, *, json: bool) -> Any:
    """The rows of several runs in one table, and as a page when ``out`` names one; a document."""
    from sparing.core.table import compare
    from sparing.report import view, write_comparison

    if len(runs) < 2:
        raise InvalidValue(f"compare needs at least two runs; {len(runs)} given")
    ledgers = {str(folder): Ledger.load(folder) for folder in map(folder_of, runs)}
    if len(ledgers) < len(runs):
        raise InvalidValue("a run is named twice; compare needs different ones")
    page = write_comparison(ledgers, out) if out is not None else None
    remarks = view.comparison(ledgers)["remarks"]
    if not json:
        output.console().print(compare(ledgers))
        output.say(*remarks, *([f"Page: {page}"] if page else []))
    return {
        "runs": {name: ledger.to_json() for name, ledger in ledgers.items()},
        "remarks": remarks,
        "page": str(page) if page else None,
    }


def report_run(run: Path, out: Path | None, *, json: bool) -> Any:
    """Print a run's ledger and write its report; a document."""
    from sparing.core.table import table
    from sparing.report import write_report

    folder = folder_of(run)
    ledger = Ledger.load(folder)
    page = write_report(ledger, out or folder / REPORT)
    if not json:
        output.console().print(table(ledger))
        output.say(f"Report: {page}")
    return ledger.to_json() | {"report": str(page)}
