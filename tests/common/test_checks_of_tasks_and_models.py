"""The checks of tasks and models find the faults they are there for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import sparing
from sparing.core.predictor import build_model
from sparing.tasks.images.digits import Digits
from sparing.testing import ModelCase, TaskCase, check_model, check_task, tiny_task
from sparing.testing import models as of_models
from sparing.testing import tasks as of_tasks


def data(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 1, 8, 8, generator=draw), torch.arange(count) % 3)


def made(train=None, test=None, **changes):
    """A task whose parts can be replaced by faulty ones."""
    settings = {
        "model": lambda: build_model("convnet", num_classes=3, image_size=8, widths=[4]),
        "loss": cross_entropy,
        "labels": "abc",
    }
    return lambda: sparing.CustomTask("made", train or data(40, 1), test or data(20, 2), **settings | changes)


def test_a_sound_task_of_a_user_passes(tmp_path):
    check_task(TaskCase(tiny_task), tmp_path)


class Drifting(sparing.CustomTask):
    """Cuts its data anew each time."""

    def splits(self, root=None):
        whole = super().splits(root)
        return dataclasses.replace(whole, val=data(5, int(torch.randint(1 << 30, ()))))


class HalfEvaluated(sparing.CustomTask):
    """Forgets a metric it declares."""

    def evaluate(self, predictor, split):
        found = super().evaluate(predictor, split)
        return dataclasses.replace(found, metrics={"accuracy": found.metrics["accuracy"]})


class Misshapen(sparing.CustomTask):
    """Its example is not what its data are like."""

    def example_input(self, batch=2):
        return (torch.zeros(batch, 3, 8, 8),)


def faulty(kind, **changes):
    """The maker of a task of another class."""
    whole = {"model": lambda: build_model("convnet", num_classes=3, image_size=8, widths=[4]), "loss": cross_entropy}
    return lambda: kind("made", data(40, 1), data(20, 2), labels="abc", **whole | changes)


@pytest.mark.parametrize(
    ("check", "make", "message"),
    [
        (of_tasks.its_splits_are_apart_and_the_same_every_time, made(test=data(40, 1)), "is in test, too"),
        (
            of_tasks.its_splits_are_apart_and_the_same_every_time,
            faulty(Drifting),
            "global random|differs from one object",
        ),
        (of_tasks.its_loss_is_reduced_as_it_says, made(loss_reduction="sum"), "not close"),
        (of_tasks.its_evaluation_is_complete, faulty(HalfEvaluated), r"declares .*ece.*, returns \['accuracy'\]"),
        (of_tasks.its_example_fits_its_model, faulty(Misshapen), r"real inputs have shapes \[\(3, 1, 8, 8\)\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_of_a_task_is_found(check, make, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        check(TaskCase(make), tmp_path)


class Crowded(nn.Module):
    """Subtracts the batch's mean. Shapes: (N, 1, 8, 8) → (N, 10)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x):
        hidden = self.inner(x.flatten(1))
        return self.head(hidden - hidden.mean(0))


class Idle(nn.Module):
    """Has a layer that nothing reaches. Shapes: (N, 1, 8, 8) → (N, 10)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.head, self.spare = nn.Linear(64, 10), nn.Linear(width, width)

    def forward(self, x):
        return self.head(x.flatten(1))


class Rolling(nn.Module):
    """Random while it answers. Shapes: (N, 1, 8, 8) → (N, 10)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(x.flatten(1) + torch.randn(64))


@pytest.mark.parametrize(
    ("check", "model", "message"),
    [
        (of_models.answers_each_sample_alone, Crowded, "Not equal to tolerance"),
        (of_models.answers_each_sample_alone, Rolling, "draws random numbers in evaluation mode"),
        (of_models.learns_in_all_its_parts, Idle, r"no gradient reaches \['spare.weight', 'spare.bias'\]"),
        (of_models.refuses_wrong_fields, Rolling, "width = -3 was accepted"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_of_a_model_is_found(check, model, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        check(ModelCase(model, Digits), tmp_path)


class Sound(nn.Sequential):
    """One linear layer. Shapes: (N, 1, 8, 8) → (N, num_classes)."""

    def __init__(self, num_classes: int = 10) -> None:
        if num_classes < 1:
            raise sparing.InvalidValue(f"sound: num_classes = {num_classes}; at least 1 is needed")
        super().__init__(nn.Flatten(), nn.Linear(64, num_classes))


def test_a_sound_model_of_a_user_passes(tmp_path):
    check_model(ModelCase(Sound, Digits), tmp_path)
