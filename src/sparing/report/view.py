"""From a ledger to what a page shows: plain dictionaries, strings already formatted, nothing escaped yet.

Templates decide how it looks; nothing here knows HTML.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparing.core import ledger as columns
from sparing.core import text
from sparing.core.ledger import Figure, Ledger, Ratio, Row, Summary, cross_difference, ordered, ratios

if TYPE_CHECKING:
    from sparing.core.statistics import Difference

MARKS = {"measured": "measured", "est": "est.", "derived": "derived", "n.a.": "n.a."}
"""How a figure was come by, as it is printed."""
AXES = (
    (columns.MODEL_BYTES, "Bytes"),
    (columns.P50, "Latency"),
    (columns.MACS, "MACs"),
    (columns.ENERGY, "Energy"),
)
"""The four costs that quality is plotted against."""
SHORT = (columns.MODEL_BYTES, columns.P50, columns.MACS, columns.ENERGY, columns.WALL)
"""Figures of the short table besides the headline and its differences."""


def figure_text(figure: Figure) -> str:
    """A figure on one line: value, unit, interval, and its mark unless it was measured."""
    if figure.value is None:
        return "n.a." + (f" ({figure.note})" if figure.note else "")
    mark = "" if figure.how == "measured" else f" {MARKS[figure.how]}"
    return text.number(figure.value, figure.unit) + text.plus_minus(figure) + mark


def cell(figure: Figure | None, ratio: Ratio | None = None, notes: bool = True, noisy: bool = False) -> dict[str, Any]:
    """What a table shows of one figure, with its ratio to the first row's.

    Without ``notes`` only that a figure is noisy is said in the cell; the whole note shows on hovering.
    """
    if figure is None:
        return {"text": "–", "mark": "", "interval": "", "note": "", "change": None, "title": "no figure of this row"}
    shown = figure.value is not None
    return {
        "text": text.number(figure.value, figure.unit),
        "mark": MARKS[figure.how] if shown else "",
        "interval": text.plus_minus(figure).strip(),
        "note": figure.note if notes else "noisy" if "noisy" in figure.note else "",
        "change": ratio_cell(ratio, figure.better, noisy) if ratio else None,
        "title": "; ".join(filter(None, (f"{figure.value} {figure.unit}".strip() if shown else "n.a.", figure.note))),
    }


def _cells(lines: Sequence[Summary], name: str, notes: bool = True) -> list[dict[str, Any]]:
    """One figure in every line; ratios are to the line's first row, without a verdict where either is noisy."""
    by_id = {line.id: line for line in lines}
    found = []
    for line in lines:
        figure, ratio = line.figures.get(name), _ratio(line, name)
        base = by_id[line.first].figures.get(name) if line.first in by_id else None
        noisy = any("noisy" in one.note for one in (figure, base) if one is not None)
        shown = cell(figure, ratio, notes, noisy)
        if notes and figure is not None and line.id != line.first and shown["change"] is None:
            if name == line.headline:
                shown["change"] = _headline_change(line.to_first, figure)
            elif base is not None and name not in columns.RATIOS:
                shown["change"] = _plain_change(base, figure)
        found.append(shown)
    return found


def _headline_change(difference: Difference | None, figure: Figure) -> dict[str, str] | None:
    if difference is None:
        return None
    shown = difference_cell(difference, figure.better, figure.unit)
    verdict = shown["change"]["verdict"]
    return {"text": f"{shown['text']} {shown['interval']}", "verdict": verdict}


def _plain_change(before: Figure, after: Figure) -> dict[str, str] | None:
    """The difference of a figure that is no ratio's; a verdict only where the two intervals do not overlap."""
    if before.number is None or after.number is None or not after.better or after.volatile:
        return None
    if (before.unit, before.how) != (after.unit, after.how):
        return None
    moved = after.number - before.number
    apart = (
        before.interval is not None
        and after.interval is not None
        and (before.interval[1] < after.interval[0] or after.interval[1] < before.interval[0])
    )
    verdict = ("better" if (moved > 0) == (after.better == "higher") else "worse") if apart else ""
    return {"text": text.number(moved, after.unit, signed=True), "verdict": verdict}


def _ratio(line: Summary, name: str) -> Ratio | None:
    return None if line.id == line.first else line.ratios.get(name)


def ratio_cell(ratio: Ratio, better: str, noisy: bool = False) -> dict[str, str]:
    """``0.24× better``; the verdict only where nothing was noisy and the interval, if there is one, excludes 1."""
    low, high = ratio.interval or (ratio.value, ratio.value)
    undecided = noisy or ratio.value == 1 or not better or low <= 1 <= high
    verdict = "" if undecided else "better" if (ratio.value < 1) == (better == "lower") else "worse"
    return {"text": text.ratio(ratio.value), "verdict": verdict}


def difference_cell(difference: Difference | None, better: str, unit: str) -> dict[str, Any]:
    """A paired difference with its interval; "better" or "worse" only where the interval excludes zero."""
    if difference is None:
        return {"text": "–", "mark": "", "interval": "", "note": "", "change": None, "title": "nothing to compare with"}
    shown = Figure(difference.value, unit, "derived", "", difference.interval)
    verdict = "better" if (difference.value > 0) == (better == "higher") else "worse"
    if difference.interval is None:
        change = {"text": "no interval", "verdict": ""}
    elif difference.shown and better:
        change = {"text": "", "verdict": verdict}
    else:
        change = {"text": "no clear difference", "verdict": ""}
    test = f", p = {difference.p:.2g}" if difference.p is not None else ""
    return {
        "text": text.number(difference.value, unit, signed=True),
        "mark": "",
        "interval": text.plus_minus(shown).strip(),
        "note": "",
        "change": change,
        "title": f"{difference.method}, n = {difference.n}{test}",
    }


def ledger_table(lines: Sequence[Summary]) -> dict[str, Any]:
    """Steps down, the key figures across; differences and ratios are to the first row of the same task."""
    there = ordered(line.figures for line in lines)
    costs = [name for name in there if name in SHORT]
    headlines = list(dict.fromkeys(line.headline for line in lines))
    of_costs = [_cells(lines, name, notes=False) for name in costs]
    found = []
    for index, line in enumerate(lines):
        quality = line.figures.get(line.headline)
        better, unit = (quality.better, quality.unit) if quality else ("", "")
        found.append(
            {
                "label": line.id,
                "step": line.step,
                "runtime": line.runtime,
                "kind": line.kind,
                "outcome": line.outcome,
                "cells": [cell(quality, notes=False)]
                + [difference_cell(one, better, unit) for one in (line.to_first, line.to_previous)]
                + [cells[index] for cells in of_costs],
            }
        )
    return {"names": [" / ".join(headlines), "against first", "against previous", *costs], "lines": found}


def figure_table(lines: Sequence[Summary]) -> dict[str, Any]:
    """Every figure down, steps across."""
    return {
        "labels": [line.id for line in lines],
        "runtimes": [f"{line.kind} in {line.runtime}" if line.kind else "no new predictor" for line in lines],
        "lines": [_figure_line(name, _cells(lines, name)) for name in ordered(line.figures for line in lines)],
    }


def _figure_line(name: str, cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A line of a figure table; a note that all its figures share is said once, under the name."""
    notes = {shown["note"] for shown in cells if shown["text"] != "–"}
    shared = notes.pop() if len(notes) == 1 and len(cells) > 1 else ""
    return {"name": name, "note": shared, "cells": [shown | {"note": ""} if shared else shown for shown in cells]}


def seed_tables(ledger: Ledger) -> list[dict[str, Any]]:
    """The figures of each seed on its own; empty for a single seed."""
    if len(ledger.seeds) < 2:
        return []
    return [{"seed": seed, "table": figure_table(ledger.only(seed).summary())} for seed in ledger.seeds]


def cards(lines: Sequence[Summary]) -> list[dict[str, Any]]:
    """What the last measured step is against the first of its task: quality first, then the costs."""
    measured = [line for line in lines if line.headline in line.figures]
    if not measured:
        return []
    last = measured[-1]
    quality = last.figures[last.headline]
    alone = "the first row itself" if last.first == last.id else "no first row to compare with"
    found = [_card(last.headline, quality, alone, "")]
    if last.to_first is not None:
        change = difference_cell(last.to_first, quality.better, quality.unit)
        shown = f"{change['text']} {change['interval']}".strip()
        verdict = change["change"]["verdict"]
        found = [_card(last.headline, quality, f"{shown}, {verdict or change['change']['text']}", verdict)]
    for name, label in AXES:
        figure = last.figures.get(name)
        if figure is None or figure.number is None:
            continue
        ratio = _ratio(last, name)
        if last.to_first is None:
            found.append(_card(label, figure, alone, ""))
        elif ratio is None and last.runtime == last.first_runtime:
            found.append(_card(label, figure, "the first row has no such figure", ""))
        elif ratio is None:
            found.append(_card(label, figure, f"not comparable: {last.runtime} after {last.first_runtime}", ""))
        else:
            change = next(one for line, one in zip(lines, _cells(lines, name), strict=True) if line is last)["change"]
            verdict = change["verdict"]
            found.append(
                _card(label, figure, f"{change['text']} of the first{', ' if verdict else ''}{verdict}", verdict)
            )
    return found


def _card(label: str, figure: Figure, change: str, verdict: str) -> dict[str, Any]:
    return {
        "label": label,
        "big": text.number(figure.value, figure.unit),
        "mark": MARKS[figure.how],
        "change": change,
        "verdict": verdict,
    }


def cards_note(lines: Sequence[Summary]) -> str:
    """What the cards compare."""
    last = next((line for line in reversed(lines) if line.headline in line.figures), None)
    if last is None:
        return ""
    mean = f"; means over {len(last.seeds)} seeds" if len(last.seeds) > 1 else ""
    if last.first == last.id:
        return f"Row “{last.id}”{mean}."
    return (
        f"Row “{last.id}” against row “{last.first}”, both in {last.runtime}{mean}."
        if (last.runtime == last.first_runtime)
        else f"Row “{last.id}” in {last.runtime} against row “{last.first}” in {last.first_runtime}{mean}."
    )


def number_of(figure: Figure | None) -> float | None:
    """The value of a figure when it is a finite number."""
    return None if figure is None or figure.number is None else float(figure.number)


def pareto_panels(runs: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
    """One plot of quality against each cost for each task and headline; ``runs`` maps a run's name to its rows."""
    panels: list[dict[str, Any]] = []
    everything = [(run, row) for run, rows in runs.items() for row in rows]
    for task, headline in dict.fromkeys((row.task, row.headline) for _, row in everything):
        chosen = [(run, row) for run, row in everything if (row.task, row.headline) == (task, headline)]
        quality = next((row.figures[headline] for _, row in chosen if headline in row.figures), None)
        if quality is None:
            continue
        names = list(dict.fromkeys(_point_name(run, row, len(runs)) for run, row in chosen))
        axes = []
        for name, label in AXES:
            points = [point for run, row in chosen if (point := _point(run, row, name, len(runs), names))]
            if points:
                figure = next(row.figures[name] for _, row in chosen if number_of(row.figures.get(name)) is not None)
                axes.append(
                    {
                        "short": label,
                        "label": f"{name} ({figure.unit})" if figure.unit else name,
                        "better": figure.better,
                        "points": points,
                    }
                )
        if axes:
            label = f"{headline} ({quality.unit})" if quality.unit else headline
            panels.append({"task": task, "label": label, "better": quality.better, "rows": names, "axes": axes})
    return panels


def _point_name(run: str, row: Row, runs: int) -> str:
    return f"{run}: {row.id}" if runs > 1 else row.id


def _point(run: str, row: Row, cost_name: str, runs: int, names: Sequence[str]) -> dict[str, Any] | None:
    quality, cost = row.figures.get(row.headline), row.figures.get(cost_name)
    x, y = number_of(cost), number_of(quality)
    if quality is None or cost is None or x is None or y is None:
        return None
    low, high = quality.interval or (None, None)
    name = _point_name(run, row, runs)
    return {
        "row": names.index(name),
        "seed": row.seed,
        "x": x,
        "y": y,
        "low": low,
        "high": high,
        "text": [
            f"{name} (seed {row.seed})",
            f"{row.headline}: {figure_text(quality)}",
            f"{cost_name}: {figure_text(cost)}",
            f"{row.kind} in {row.runtime}",
        ],
    }


def curve_panels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One plot for each name of a training curve, one line for each row and seed that has it."""
    ids = list(dict.fromkeys(row.id for row in rows))
    several = len({row.seed for row in rows}) > 1
    panels = []
    for name in ordered(row.curves for row in rows):
        lines = []
        for row in rows:
            points = [(x, y) for x, y in row.curves.get(name, ()) if math.isfinite(x) and math.isfinite(y)]
            if points:
                lines.append(
                    {
                        "name": f"{row.id} · seed {row.seed}" if several else row.id,
                        "row": ids.index(row.id),
                        "seed": row.seed,
                        "x": [x for x, _ in points],
                        "y": [y for _, y in points],
                    }
                )
        if lines:
            panels.append({"name": name, "series": lines})
    return panels


def galleries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The pictures of each row that has some."""
    several = len({row.seed for row in rows}) > 1
    return [
        {
            "label": f"{row.id} · seed {row.seed}" if several else row.id,
            "pictures": [
                {"name": name, "png": picture.png, "caption": picture.caption} for name, picture in row.pictures.items()
            ],
        }
        for row in rows
        if row.pictures
    ]


def class_tables(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each task and headline: classes down, rows across, means over seeds; each row's worst class is marked."""
    tables = []
    for task, headline in dict.fromkeys((row.task, row.headline) for row in rows if row.by_class):
        chosen = [row for row in rows if row.by_class and (row.task, row.headline) == (task, headline)]
        ids = list(dict.fromkeys(row.id for row in chosen))
        better = next((row.figures[headline].better for row in chosen if headline in row.figures), "higher")
        classes = ordered(row.by_class for row in chosen)
        columns_ = [_class_means([row for row in chosen if row.id == row_id], classes) for row_id in ids]
        worst = [
            (max if better == "lower" else min)([value for value in column.values() if value is not None], default=None)
            for column in columns_
        ]
        lines = []
        for name in classes:
            cells = []
            for column, lowest in zip(columns_, worst, strict=True):
                value, base = column[name], columns_[0][name]
                moved = value - base if value is not None and base is not None else 0.0
                cells.append(
                    {
                        "text": text.number(value),
                        "worst": value is not None and value == lowest,
                        "change": text.number(moved, signed=True) if moved else "",
                        "verdict": ("better" if (moved > 0) == (better != "lower") else "worse") if moved else "",
                    }
                )
            lines.append({"name": name, "cells": cells})
        seeds = len({row.seed for row in chosen})
        tables.append({"task": task, "headline": headline, "ids": ids, "lines": lines, "seeds": seeds})
    return tables


def _class_means(rows: Sequence[Row], classes: Sequence[str]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in classes:
        scores = [row.by_class[name] for row in rows if name in row.by_class]
        means[name] = math.fsum(scores) / len(scores) if scores else None
    return means


def decisions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each step chose or declined, the candidates with their figures, and its remarks."""
    several = len({row.seed for row in rows}) > 1
    found = []
    for row in rows:
        if row.outcome or row.candidates or row.remarks:
            names = [name for name in ordered(row.candidates) if name != "name"]
            found.append(
                {
                    "label": f"{row.id} · seed {row.seed}" if several else row.id,
                    "step": row.step,
                    "outcome": row.outcome,
                    "names": names,
                    "candidates": [
                        {"name": str(c.get("name", "")), "cells": [plain_value(c.get(name)) for name in names]}
                        for c in row.candidates
                    ],
                    "remarks": list(row.remarks),
                }
            )
    return found


def plain_value(value: Any) -> str:
    """A value of a candidate, a step's field or the environment as text."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return text.number(value) if math.isfinite(value) else str(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def environment_lines(environment: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """The environment flattened to name and value, nested names joined with a dot."""
    lines: list[tuple[str, str]] = []
    for name, value in environment.items():
        if isinstance(value, Mapping):
            lines += environment_lines(value, f"{prefix}{name}.")
        else:
            lines.append((f"{prefix}{name}", plain_value(value)))
    return lines


def sub_ledgers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The ledgers of inner pipelines, at any depth."""
    several = len({row.seed for row in rows}) > 1
    found = []
    for row in rows:
        label = f"{row.id} · seed {row.seed}" if several else row.id
        for reason, inner in row.sub.items():
            table = figure_table(Ledger(rows=list(inner)).summary())
            found.append({"label": label, "reason": reason, "table": table, "sub": sub_ledgers(inner)})
    return found


def configs(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each step's fields as they were, once for each row id."""
    unique = {row.id: row for row in reversed(rows)}
    return [
        {"id": row_id, "step": unique[row_id].step, "fields": environment_lines(unique[row_id].config)}
        for row_id in dict.fromkeys(row.id for row in rows)
        if unique[row_id].config
    ]


def summary_line(ledger: Ledger) -> str:
    """One line under the title."""
    ids, seeds = ledger.ids, ledger.seeds
    tasks = " → ".join(dict.fromkeys(row.task for row in ledger.rows))
    steps = f"{len(ids)} row{'s' if len(ids) != 1 else ''}: {' → '.join(ids)}"
    return f"{tasks} · {steps} · {len(seeds)} seed{'s' if len(seeds) != 1 else ''} · {ledger.created}"


def last_measured(ledger: Ledger) -> Summary | None:
    """The last step that has a headline."""
    return next((line for line in reversed(ledger.summary()) if line.headline in line.figures), None)


def comparison(ledgers: Mapping[str, Ledger]) -> dict[str, Any]:
    """The last measured row of each run: figures down, runs across; ratios and differences are to the first run's.

    ``remarks`` says where a comparison is not allowed and why.
    """
    lasts = {name: line for name, ledger in ledgers.items() if (line := last_measured(ledger)) is not None}
    remarks = [f"{name} has no measured row." for name in ledgers if name not in lasts]
    if not lasts:
        return {"table": {"labels": [], "runtimes": [], "lines": []}, "remarks": remarks}
    base_name, base = next(iter(lasts.items()))
    compared: dict[str, Mapping[str, Ratio]] = {base_name: {}}
    differences: dict[str, Difference | None] = {base_name: None}
    for name, line in list(lasts.items())[1:]:
        compared[name] = {}
        differences[name] = None
        if line.task != base.task:
            remarks.append(f"{name} is about the task {line.task}, {base_name} about {base.task}: no differences.")
            continue
        differences[name] = cross_difference((ledgers[base_name], base.id), (ledgers[name], line.id))
        if differences[name] is None:
            remarks.append(
                f"{name}: its data are not known to be those of {base_name}: no difference of {line.headline}."
            )
        if line.runtime != base.runtime:
            remarks.append(f"{name} ran in {line.runtime}, {base_name} in {base.runtime}: no ratios.")
        else:
            compared[name] = ratios(base.figures, line.figures)
    machines = {str(dict(ledger.environment).get("cpu")) for ledger in ledgers.values()}
    if len(machines) > 1:
        remarks.append("The runs were measured on different processors: ratios of time and energy say little.")
    quality = base.figures[base.headline]
    lines = [
        {
            "name": f"{base.headline} against {base_name}",
            "note": "",
            "cells": [difference_cell(differences[name], quality.better, quality.unit) for name in lasts],
        }
    ]
    for name in ordered(line.figures for line in lasts.values()):
        cells = [cell(line.figures.get(name), compared[run].get(name)) for run, line in lasts.items()]
        lines.append(_figure_line(name, cells))
    table = {
        "labels": [f"{name}: {line.id}" for name, line in lasts.items()],
        "runtimes": [f"{line.kind} in {line.runtime}" for line in lasts.values()],
        "lines": lines,
    }
    return {"table": table, "remarks": remarks}


def text_difference(before: str, after: str) -> list[dict[str, str]]:
    """A line-by-line difference: kind is "same", "gone" or "new"."""
    kinds = {" ": "same", "-": "gone", "+": "new"}
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [{"kind": kinds[line[0]], "text": line[2:]} for line in lines if line[0] in kinds]
