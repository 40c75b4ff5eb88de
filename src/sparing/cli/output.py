"""What commands print: text for people, or one JSON document for machines."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 160
"""Columns to lay tables out for when no terminal (and no $COLUMNS) says how wide it is. Longer cells are folded."""


@dataclass(frozen=True)
class Finished:
    """A command's JSON document, and its exit code."""

    document: Any
    code: int = 0


@contextmanager
def json_only(wanted: bool) -> Iterator[Callable[[Any], None] | None]:
    """Keep standard output for one JSON document: whatever anybody prints meanwhile goes to standard error.

    Gives the function that prints the document; None when none is wanted.
    """
    if not wanted:
        yield None
        return
    import json

    sys.stdout.flush()
    kept, before = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def emit(document: Any) -> None:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as stdout:
            stdout.write(text)

    try:
        yield emit
    finally:
        sys.stderr.flush()
        sys.stdout = before
        os.dup2(kept, 1)
        os.close(kept)


def print_error(
    message: str,
    *,
    notes: Sequence[str] = (),
    hint: str = "",
    emit: Callable[[Any], None] | None = None,
    error: Exception | None = None,
) -> None:
    """Say on standard error what went wrong; with ``emit`` also as the JSON document."""
    lines = [*message.splitlines(), *notes] or [""]
    if hint:
        lines.append(f"see: {hint}")
    print(f"sparing: {lines[0]}", *(f"  {line}" for line in lines[1:]), sep="\n", file=sys.stderr)
    if emit is not None:
        kind = type(error).__name__ if error is not None else "Usage"
        problems = list(getattr(error, "problems", ())) or [message]
        emit({"error": {"type": kind, "message": message, "problems": problems, "notes": list(notes)}})


def console() -> Console:
    """Standard output; colours and the terminal's width only when it is one."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False)
    width = None if os.environ.get("COLUMNS", "").isdigit() else PIPED_WIDTH
    return Console(highlight=False, width=width, color_system=None, force_terminal=False)


def table(*columns: str, right: Sequence[str] = (), title: str | None = None) -> Table:
    """An empty table with these headings; those in ``right`` are set flush right."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(literal(column), justify="right" if column in right else "left", overflow="fold")
    return made


def literal(text: str) -> Any:
    """Text as it is: names from users hold brackets that must not be read as markup."""
    from rich.text import Text

    return Text(text)


def say(*lines: str) -> None:
    """Print lines as they are; nothing for none."""
    for line in lines:
        print(line)
