"""``--set`` overrides that make a packaged recipe run in seconds. Every recipe has an entry."""

from __future__ import annotations

SMALL: dict[str, tuple[str, ...]] = {
    "quickstart": (
        "model.widths=[8]",
        "steps.baseline.epochs=2",
        "steps.student.epochs=2",
        "steps.student.model.widths=[4]",
        "steps.int8.max_loss=1",
    ),
    "fashion_mnist": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.widths=[8]",
        "steps.baseline.epochs=2",
        "steps.student.epochs=2",
        "steps.student.model.widths=[4]",
        "steps.int8.max_loss=1",
    ),
}

BRIEF_METER = ("meter.min_seconds=0", "meter.max_seconds=0.2", "meter.memory=false")
"""A meter whose clocks say little: tests of what a run does need no more."""


def overrides(recipe: str) -> list[str]:
    """The arguments that make ``recipe`` small."""
    return [argument for override in (*SMALL[recipe], *BRIEF_METER) for argument in ("--set", override)]
