"""A ledger as a table for the terminal, where key columns come first and what does not fit is named, and in Markdown.

Losses are printed like gains, each with its uncertainty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparing.core import text
from sparing.core.ledger import (
    ENERGY,
    MACS,
    METERED,
    MODEL_BYTES,
    P50,
    Figure,
    Ledger,
    Summary,
    cross_difference,
    ordered,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from sparing.core.statistics import Difference

KEY = (MODEL_BYTES, P50, MACS, ENERGY)
"""Figures that follow the headline and its differences; the others come after in the order they were measured."""
Verdict = Literal["gain", "loss", ""]
_STYLES = {"gain": "green", "loss": "red", "": ""}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and whether it shows a gain or a loss beyond its uncertainty."""

    text: str
    verdict: Verdict = ""


@dataclass(frozen=True)
class Table:
    """Lines over columns, most important column first. Rich prints as many columns as the terminal is wide."""

    columns: tuple[str, ...]
    lines: tuple[Mapping[str, Cell], ...]
    """Column → cell; a column that is missing is empty."""
    fixed: int = 2
    """How many of the first columns are printed on any terminal."""
    remarks: tuple[str, ...] = ()

    def fitting(self, width: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(columns printed on a terminal of ``width`` characters, columns that do not fit)."""
        shown: list[str] = []
        used = 0
        for column in self.columns:
            needed = self._needed(column, folded=True)
            if len(shown) >= self.fixed and used + needed > width:
                break
            shown.append(column)
            used += needed
        return tuple(shown), self.columns[len(shown) :]

    def _needed(self, column: str, folded: bool) -> int:
        """Characters that a column takes; ``folded``: with ratios on lines of their own."""
        from rich.cells import cell_len

        cells = [column, *(line[column].text for line in self.lines if column in line)]
        return 3 + max(cell_len(part) for cell in cells for part in (_fold(cell) if folded else cell).splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table as wide as it fits, with a line that names the columns left out."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table as RichTable
        from rich.text import Text

        shown, hidden = self.fitting(options.max_width)
        tight = sum(self._needed(column, folded=False) for column in shown) > options.max_width
        table = RichTable(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, collapse_padding=False)
        for index, column in enumerate(shown):
            table.add_column(escape(column), justify="left" if index < self.fixed else "right", overflow="fold")
        for line in self.lines:
            cells = [line.get(column, Cell("")) for column in shown]
            texts = [_fold(cell.text) if tight else cell.text for cell in cells]
            styles = (_STYLES[cell.verdict] for cell in cells)
            table.add_row(*(Text(content, style=style) for content, style in zip(texts, styles, strict=True)))
        yield table
        for remark in self.remarks:
            yield Text(remark)
        if hidden:
            yield Text(f"Not shown here: {', '.join(hidden)}. A wider terminal, --json or the report has them.")


def _fold(cell: str) -> str:
    """A cell with its ratio on a second line."""
    return cell.replace(" (", "\n(")


def table(ledger: Ledger) -> Table:
    """One line for each step, seeds taken together."""
    lines = ledger.summary()
    remarks = _remarks(lines)
    if ledger.stopped:
        remarks.append(f"Stopped early: {ledger.stopped}")
    return _table([("", line, None) for line in lines], "", remarks)


def compare(ledgers: Mapping[str, Ledger]) -> Table:
    """The rows of several runs under their names, and how each run's last measured row differs from the first run's.

    The latter only where both ledgers hold the same task with the same data.
    """
    entries: list[tuple[str, Summary, Difference | None]] = []
    reference = next(iter(ledgers), "")
    for name, ledger in ledgers.items():
        lines = ledger.summary()
        final, base = _last(lines), _last(ledgers[reference].summary())
        for line in lines:
            versus = None
            if name != reference and line is final and base is not None:
                versus = cross_difference((ledgers[reference], base.id), (ledger, line.id))
            entries.append((name, line, versus))
    return _table(entries, reference, _remarks([line for _, line, _ in entries]))


def markdown(ledger: Ledger) -> str:
    """The key columns as a Markdown table."""
    whole = table(ledger)
    headlines = {line.headline for line in ledger.summary()}
    known = headlines | {"step", "Δ first", "Δ previous", *KEY, "outcome", "runtime"}
    columns = [column for column in whole.columns if column in known]
    rows = [columns, ["---"] * len(columns)]
    rows += [[line[column].text if column in line else "" for column in columns] for line in whole.lines]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n\n".join([body, *whole.remarks])


def _last(lines: Sequence[Summary]) -> Summary | None:
    return next((line for line in reversed(lines) if line.headline in line.figures), None)


def _table(entries: Sequence[tuple[str, Summary, Difference | None]], reference: str, remarks: Sequence[str]) -> Table:
    lines = [line for _, line, _ in entries]
    headlines = list(dict.fromkeys(line.headline for line in lines if line.headline in line.figures))
    names = ordered(line.figures for line in lines)
    rest = [name for name in names if name not in headlines and name not in KEY]
    versus = f"Δ {reference}"
    columns = ["run"] if reference else []
    columns += ["step", *headlines, "Δ first", *(name for name in KEY if name in names), "Δ previous", versus]
    columns += ["outcome", "runtime", *rest]
    made = [_line(run, line, versus, difference) for run, line, difference in entries]
    used = {column for line in made for column in line if line[column].text}
    kept = tuple(column for column in dict.fromkeys(columns) if column in used)
    return Table(kept, tuple(made), 2 if reference else 1, tuple(remarks))


def _line(run: str, line: Summary, versus: str, difference: Difference | None) -> dict[str, Cell]:
    headline = line.figures.get(line.headline)
    changed = bool(line.first_runtime and line.runtime and line.first_runtime != line.runtime)
    cells = {
        "run": Cell(run),
        "step": Cell(line.id),
        "runtime": Cell(f"{line.first_runtime} → {line.runtime}" if changed else line.runtime),
        "outcome": Cell(line.outcome),
        "Δ first": _difference(line.to_first, headline),
        "Δ previous": _difference(line.to_previous, headline) if line.previous != line.first else Cell(""),
        versus: _difference(difference, headline),
    }
    for name, figure in line.figures.items():
        cells[name] = _figure(name, figure, line)
    return cells


def _difference(found: Difference | None, headline: Figure | None) -> Cell:
    if found is None or headline is None:
        return Cell("")
    verdict: Verdict = ""
    if found.shown and headline.better:
        verdict = "gain" if (found.value > 0) == (headline.better == "higher") else "loss"
    shown = text.number(found.value, signed=True) + text.plus_minus(Figure(found.value, interval=found.interval))
    return Cell(shown + (f" n={found.n}" if found.method.startswith("Student") else ""), verdict)


def _figure(name: str, figure: Figure, line: Summary) -> Cell:
    if figure.value is None:
        return Cell("n.a.")
    shown = text.number(figure.value, figure.unit)
    if name == line.headline or len(line.seeds) > 1:
        shown += text.plus_minus(figure)
    if figure.how == "est":
        shown += " est."
    if "noisy" in figure.note:
        shown += " noisy"
    ratio = line.ratios.get(name)
    if ratio is None or line.id == line.first:
        return Cell(shown)
    verdict: Verdict = ""
    low, high = ratio.interval or (ratio.value, ratio.value)
    if figure.better and not low <= 1 <= high:
        verdict = "gain" if (ratio.value < 1) == (figure.better == "lower") else "loss"
    return Cell(f"{shown} ({text.ratio(ratio.value)})", verdict)


def _remarks(lines: Sequence[Summary]) -> list[str]:
    """What rows without a measured model recorded, and what a reader must know to read the differences."""
    remarks = []
    for line in lines:
        if line.headline not in line.figures:
            own = {name: figure for name, figure in line.figures.items() if name not in METERED}
            if own:
                shown = (f"{name} {_figure(name, figure, line).text}" for name, figure in own.items())
                remarks.append(f"{line.id}: {'; '.join(shown)}.")
    methods = {line.to_first.method.split(",")[0] for line in lines if line.to_first is not None}
    if any(line.to_first is not None for line in lines):
        seeds = max(len(line.seeds) for line in lines)
        how = f"over {seeds} seeds, Student-t" if seeds > 1 else "paired over the test units"
        unpaired = any("no outcomes" in method for method in methods)
        unknown = "; none where no outcomes are stored" if unpaired else ""
        remarks.append(f"Δ: difference of the headline, 95 % interval {how}{unknown}. (×): ratio to the first row.")
    if any(line.runtime and line.first_runtime != line.runtime for line in lines):
        remarks.append("No ratios where the runtime changed.")
    if any("noisy" in figure.note for line in lines for figure in line.figures.values()):
        remarks.append("noisy: the machine was too busy or too unsteady for the asked precision.")
    return remarks
