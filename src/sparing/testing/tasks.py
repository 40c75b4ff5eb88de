"""The checks of a task, each ``check(case, folder)``; the data are read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.fingerprint import fingerprint
from sparing.core.predictor import ModulePredictor
from sparing.core.predictor.tree import leaves, to_numpy
from sparing.core.task import Evaluation, Splits, Task
from sparing.testing.cases import flat, generators

ITEMS = 64
"""So many items of a split stand for it where the whole would take long."""


@dataclass(frozen=True)
class TaskCase:
    """How to try a task."""

    make: Callable[[], Task]
    """A new object of the same task each time."""
    root: Path | None = None
    """The data folder."""
    repeats: str = ""
    """Why equal items may be in two splits; "": they must not."""
    weight: Callable[[Any], float] = lambda batch: 1
    """How much a batch of one sample counts in a mean loss: where that is over tokens, their number."""

    @cached_property
    def task(self) -> Task:
        """One such object."""
        return self.make()

    @cached_property
    def splits(self) -> Splits:
        """Its data."""
        return self.task.splits(self.root)

    @cached_property
    def another(self) -> Task:
        """Another one, whose data are read anew."""
        return self.make()

    @cached_property
    def predictor(self) -> ModulePredictor:
        """Its default model, untrained."""
        return ModulePredictor(self.task.default_model(), self.task)


class Some:
    """The first items of a data set."""

    def __init__(self, dataset: Any, count: int = ITEMS) -> None:
        self.dataset, self.count = dataset, min(count, len(dataset))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.dataset[index]


def declares_itself(case: TaskCase, folder: Path) -> None:
    """Name, unit, metrics with a headline, capabilities, reduction of the loss."""
    task = case.task
    assert task.name
    assert task.unit
    assert task.metrics, "has no metric"
    assert task.headline is task.metrics[0]
    assert len({metric.name for metric in task.metrics}) == len(task.metrics)
    assert task.loss_reduction in ("mean", "sum")
    assert isinstance(task.capabilities, frozenset)
    assert "classification" not in task.capabilities or len(task.labels) >= 2, "a classification without labels"


def its_splits_are_apart_and_the_same_every_time(case: TaskCase, folder: Path) -> None:
    """Four map-style data sets, none empty; no item of one in another; another object reads the same, in any state."""
    parts = {name: getattr(case.splits, name) for name in ("train", "val", "calibration", "test")}
    before = generators()
    again = case.another.splits(case.root)
    assert generators() == before, "reading the data changes the global random generators"
    seen: dict[str, str] = {}
    for name, part in parts.items():
        assert len(part) > 0, f"{name} is empty"
        assert fingerprint([part[i] for i in range(min(4, len(part)))]) == fingerprint(
            [getattr(again, name)[i] for i in range(min(4, len(part)))]
        ), f"{name} differs from one object to the next"
        if case.repeats:
            continue
        inside = {fingerprint(part[i]) for i in range(len(Some(part)))}
        for digest in inside:
            assert seen.setdefault(digest, name) == name, f"an item of {seen[digest]} is in {name}, too"


def is_known_by_its_content(case: TaskCase, folder: Path) -> None:
    """Equal tasks have equal fingerprints, of definition and data."""
    again = case.another
    assert case.task.fingerprint() == again.fingerprint()
    assert fingerprint(case.splits) == fingerprint(again.splits(case.root))


def its_example_fits_its_model(case: TaskCase, folder: Path) -> None:
    """The example input has the batch asked for and the shape of real inputs; the default model takes it.

    Sizes in which examples differ beyond the batch (lengths of texts, nodes of graphs) are free.
    """
    batch = next(batches_of(Some(case.splits.train, 3), 3, case.task.collate))
    example, smaller = case.task.example_input(3), case.task.example_input(2)
    assert isinstance(example, tuple), "example_input gives the tuple of model inputs"
    real: list[Any] = []

    def recorder(*inputs: Any) -> Any:
        real.append(inputs)
        return case.predictor(*inputs)

    outputs = flat(case.task.outputs(recorder, batch))  # type: ignore[arg-type]
    shapes = [_fixed(tree, example, smaller) for tree in (real[0], example)]
    assert shapes[0] == shapes[1], f"real inputs have shapes {shapes[0]}, the example {shapes[1]}"
    types = [[str(leaf.dtype) for leaf in flat(inputs)] for inputs in (real[0], example)]
    assert types[0] == types[1], f"real inputs are {types[0]}, the example {types[1]}"
    answers = [case.predictor(*inputs) for inputs in (example, smaller)]
    assert _fixed(outputs, *answers) == _fixed(answers[0], *answers)
    for leaf in flat(example):
        if leaf.dtype.kind == "f":
            assert leaf.size < 2 or np.ptp(leaf) > 0, "the example is constant: no export could be checked on it"
    again = case.task.example_input(3)
    assert all(np.array_equal(a, b) for a, b in zip(flat(example), flat(again), strict=True)), "differs on every call"


def _fixed(tree: Any, of_three: Any, of_two: Any) -> list[tuple[int | None, ...]]:
    """Shapes of a tree's leaves; None for a size that examples of two and three differ in, unless it is their batch."""
    return [
        tuple(size if a == b or (a, b) == (3, 2) else None for size, a, b in zip(np.shape(leaf), *sizes, strict=True))
        for leaf, *sizes in zip(
            flat(tree), *([np.shape(leaf) for leaf in flat(other)] for other in (of_three, of_two)), strict=True
        )
    ]


def its_loss_is_reduced_as_it_says(case: TaskCase, folder: Path) -> None:
    """A finite scalar with a gradient; over two samples the mean by weight, or the sum, of theirs."""
    import torch

    model = case.task.default_model().eval()
    items = [case.splits.train[i] for i in range(2)]
    losses, weights = [], []
    for chosen in (items, items[:1], items[1:]):
        batch = next(batches_of(chosen, 2, case.task.collate))
        losses.append(case.task.loss(case.task.outputs(model, batch), batch))
        weights.append(case.weight(batch))
    assert losses[0].shape == ()
    assert losses[0].requires_grad
    assert bool(torch.isfinite(losses[0]))
    both = losses[1] + losses[2]
    if case.task.loss_reduction == "mean":
        both = (weights[1] * losses[1] + weights[2] * losses[2]) / (weights[1] + weights[2])
    torch.testing.assert_close(losses[0], both, rtol=1e-4, atol=1e-5)


def its_evaluation_is_complete(case: TaskCase, folder: Path) -> None:
    """All metrics, finite; outcomes whose mean is the headline; the same twice; no random number drawn."""
    split, predictor = Some(case.splits.test), case.predictor
    before = generators()
    found = case.task.evaluate(predictor, split)
    assert generators() == before, "evaluation draws random numbers"
    again = case.task.evaluate(predictor, split)
    names = [metric.name for metric in case.task.metrics]
    assert sorted(found.metrics) == sorted(names), f"declares {names}, returns {sorted(found.metrics)}"
    assert all(np.isfinite(value) for value in found.metrics.values()), found.metrics
    assert dict(found.metrics) == dict(again.metrics)
    _check_outcomes(case.task, found)


def _check_outcomes(task: Task, found: Evaluation) -> None:
    if found.per_unit is not None:
        assert found.per_unit.ndim == 1
        np.testing.assert_allclose(found.per_unit.mean(), found.metrics[task.headline.name], rtol=1e-5)


def its_preprocessing_is_what_it_trains_on(case: TaskCase, folder: Path) -> None:
    """A raw input becomes a model input of the right shape and type, and the operations can be written and read."""
    from sparing.core.predictor import Preprocessing

    preprocessing, raw = case.task.preprocessing, case.task.raw_example()
    if preprocessing is None:
        assert raw is None, "has a raw example, but nothing that turns it into a model input"
        return
    again = Preprocessing.from_config(preprocessing.to_config())
    assert again == preprocessing
    if raw is not None:
        assert len(raw) == 1
        made = again(raw)
        (wanted,) = flat(case.task.example_input(1))
        assert made.shape == wanted.shape
        assert made.dtype == wanted.dtype


def its_corruptions_are_the_same_every_time(case: TaskCase, folder: Path) -> None:
    """Each corrupted split has as many items of the same shapes and labels, and differs from the clean one.

    Where the task's examples say that sizes are free, as the lengths of texts are, only the numbers of sizes are equal.
    """
    three, two = case.task.example_input(3), case.task.example_input(2)
    free = any(None in shape for shape in _fixed(three, three, two))

    def look(leaf: Any) -> Any:
        return np.ndim(leaf) if free else np.shape(leaf)

    for name, worse in case.task.corruptions(case.splits.test).items():
        assert len(worse) == len(case.splits.test), name
        clean, first, again = case.splits.test[0], worse[0], case.task.corruptions(case.splits.test)[name][0]
        assert [look(leaf) for leaf in flat(first)] == [look(leaf) for leaf in flat(clean)], name
        assert fingerprint(first) == fingerprint(again), f"{name} is random"
        assert fingerprint(first) != fingerprint(clean), f"{name} changes nothing"
        assert fingerprint(first[1:]) == fingerprint(clean[1:]), f"{name} changes the labels"


def its_items_are_sound(case: TaskCase, folder: Path) -> None:
    """Finite numbers; an index beyond the end is an IndexError, as Python's iteration needs."""
    for name in ("train", "val", "calibration", "test"):
        part = getattr(case.splits, name)
        for index in range(len(Some(part, 8))):
            item = part[index]
            for path, leaf in leaves(item.to_dict() if hasattr(item, "to_dict") else item):
                numbers = np.asarray(to_numpy(leaf))
                if numbers.dtype.kind == "f":
                    assert np.isfinite(numbers).all(), f"{name}[{index}] {path} is not finite"
        try:
            part[len(part)]
        except IndexError:
            continue
        raise AssertionError(f"{name}[{len(part)}] exists, though it has {len(part)} items")


TASK_CHECKS: tuple[Callable[[TaskCase, Path], None], ...] = (
    declares_itself,
    its_splits_are_apart_and_the_same_every_time,
    is_known_by_its_content,
    its_items_are_sound,
    its_example_fits_its_model,
    its_loss_is_reduced_as_it_says,
    its_evaluation_is_complete,
    its_preprocessing_is_what_it_trains_on,
    its_corruptions_are_the_same_every_time,
)


def check_task(case: TaskCase, folder: Path) -> None:
    """Put a task through every check; ``folder`` is an empty one to work in. Raises the first AssertionError."""
    for check in TASK_CHECKS:
        check(case, folder / check.__name__)
