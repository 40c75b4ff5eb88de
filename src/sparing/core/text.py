"""Figures as people read them; the terminal, the model card and the report say the same."""

from __future__ import annotations

import math

from sparing.core.ledger import Figure

MINUS = "\u2212"
THIN = "\u2009"
_BYTES = ("B", "kB", "MB", "GB", "TB")
_COUNTS = ("", "k", "M", "G", "T")
_SCALED = frozenset({"", "1/s", "inferences"})


def number(value: float | str | None, unit: str = "", signed: bool = False) -> str:
    """A value with its unit: about four significant digits, powers of 1000 for bytes and large counts.

    >>> number(84312, "B"), number(0.98333), number(None), number(-0.012, signed=True), number(1797)
    ('84.31 kB', '0.9833', 'n.a.', '−0.0120', '1\u2009797')
    """
    if value is None:
        return "n.a."
    if isinstance(value, str):
        return value
    value = float(value)
    sign = MINUS if value < 0 else "+" if signed and value > 0 else ""
    size = abs(value)
    if unit == "B" or (unit in _SCALED and size >= 1e6):
        prefixes, step = _BYTES if unit == "B" else _COUNTS, 0
        while size >= 999.95 and step < len(prefixes) - 1:
            size, step = size / 1000, step + 1
        shown = f"{sign}{_digits(size)} {prefixes[step]}"
        return shown if unit in ("", "B") else f"{shown} {unit}"
    if unit and 1e-4 <= size < 1:
        return f"{sign}{size:.3g} {unit}"
    return f"{sign}{_digits(size)}" + (f" {unit}" if unit else "")


def _digits(size: float) -> str:
    """A non-negative number: whole ones whole, four decimals below 1, else four significant digits."""
    rounded = float(f"{size:.4g}") if size < 1000 else size
    if rounded == int(rounded) and rounded < 1e6:
        return f"{int(rounded):,}".replace(",", THIN)
    if size >= 1000:
        return f"{size:,.0f}".replace(",", THIN)
    if size >= 1:
        return f"{size:#.4g}"
    return f"{size:.4f}" if size >= 1e-3 else f"{size:.3g}"


def plus_minus(figure: Figure) -> str:
    """`` ±0.012`` for an interval nearly symmetric about the value, `` [low, high]`` for another, or nothing."""
    if figure.interval is None or not isinstance(figure.value, int | float):
        return ""
    low, high = figure.interval
    below, above = figure.value - low, high - figure.value
    widest = max(below, above)
    if widest == 0:
        return " ±0"
    if abs(below - above) <= 0.25 * widest:
        rounded = float(f"{widest:.2g}")
        shown = f"{rounded:g}" if 1e-4 <= rounded < 1 else number(rounded, "B" if figure.unit == "B" else "")
        return f" ±{shown}"
    signed = min(low, high, figure.value) < 0
    unit = "B" if figure.unit == "B" else ""
    return f" [{number(low, unit, signed)}, {number(high, unit, signed)}]"


def ratio(value: float) -> str:
    """``0.25×``: what is left, or how many times as much it became.

    >>> ratio(0.2512), ratio(12.34), ratio(1)
    ('0.25×', '12.3×', '1.00×')
    """
    if not math.isfinite(value):
        return ""
    return f"{value:.3g}×" if value >= 10 else f"{value:.2f}×" if value >= 0.095 else f"{value:.2g}×"
