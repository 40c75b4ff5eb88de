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
    "cora": ("steps.gcn.epochs=5", "steps.student.epochs=5"),
    "fashion_mnist": (
        "task.train_limit=600",
        "task.test_limit=200",
        "model.widths=[8]",
        "steps.baseline.epochs=2",
        "steps.student.epochs=2",
        "steps.student.model.widths=[4]",
        "steps.int8.max_loss=1",
    ),
    "emo": ("steps.train.max_steps=2", "steps.int8.max_loss=1", "steps.int8.samples=16"),
    "emo_small": (
        "model.widths=[8]",
        "steps.teacher.max_steps=2",
        "steps.student.max_steps=2",
        "steps.int8.max_loss=1",
        "steps.int8.samples=16",
    ),
    "leap": (
        "task.train_limit=600",
        "task.test_limit=200",
        "steps.bare.epochs=1",
        "steps.perturbed.epochs=1",
        "steps.hotter.epochs=1",
    ),
    "full/leap": (
        "task.train_limit=60",
        "task.test_limit=20",
        "steps.train.max_steps=1",
        "steps.train.batch_size=4",
        "steps.train.workers=0",
    ),
    "full/emo": (
        "steps.train.max_steps=1",
        "steps.train.batch_size=4",
        "steps.train.precision=32-true",
        "steps.train.devices=1",
        "steps.train.workers=0",
    ),
}

BRIEF_METER = ("meter.min_seconds=0", "meter.max_seconds=0.2", "meter.memory=false")
"""A meter whose clocks say little: tests of what a run does need no more."""


def overrides(recipe: str) -> list[str]:
    """The arguments that make ``recipe`` small."""
    return [argument for override in (*SMALL[recipe], *BRIEF_METER) for argument in ("--set", override)]
