"""Label smoothing: torch's own loss is the equation, and the term leaves other terms their weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

import sparing
from sparing.core.errors import IncompatibleStep, InvalidValue, RecipeError
from sparing.core.job import TrainingPlan
from sparing.core.training import Train, fit
from sparing.optimization.label_smoothing import SmoothLabels, smoothing_term, uniform_cross_entropy
from sparing.tasks.custom import CustomTask
from sparing.testing import QUICK, tiny_task

LOGITS = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 2, 2])


class Sums:
    """A task whose loss is the sum of the batch's cross-entropies."""

    loss_reduction = "sum"

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(outputs, batch[1], reduction="sum")


class Means(Sums):
    loss_reduction = "mean"

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(outputs, batch[1])


def smoothed(task: Any, logits: torch.Tensor, labels: torch.Tensor, epsilon: float = 0.1, extra: float = 0.0) -> Any:
    batch = (None, labels)
    return smoothing_term(task, epsilon)(task.loss(logits, batch) + extra, logits, batch, None)


def test_the_equation_by_hand():
    """0.9 · NLL + 0.1 · mean over all classes of −log p, which is torch's definition, too."""
    log_p = log_softmax(LOGITS.double(), 1)
    by_hand = (0.9 * -log_p[torch.arange(5), LABELS] + 0.1 * -log_p.mean(1)).mean().float()
    torch.testing.assert_close(cross_entropy(LOGITS, LABELS, label_smoothing=0.1), by_hand)
    torch.testing.assert_close(smoothed(Means(), LOGITS, LABELS), by_hand)
    assert uniform_cross_entropy(torch.zeros(2, 8)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 0.7])
def test_it_is_torchs_loss_gradient_included(epsilon):
    for task, reduction in ((Means(), "mean"), (Sums(), "sum")):
        one, other = LOGITS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
        smoothed(task, one, LABELS, epsilon).backward()
        cross_entropy(other, LABELS, label_smoothing=epsilon, reduction=reduction).backward()
        torch.testing.assert_close(one.grad, other.grad)


def test_maps_of_logits_and_labels_that_are_probabilities():
    maps, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    torch.testing.assert_close(smoothed(Means(), maps, labels), cross_entropy(maps, labels, label_smoothing=0.1))
    torch.testing.assert_close(
        smoothed(Sums(), maps, labels), cross_entropy(maps, labels, label_smoothing=0.1, reduction="sum")
    )
    mixed = torch.softmax(torch.randn(5, 4), 1)
    torch.testing.assert_close(smoothed(Means(), LOGITS, mixed), cross_entropy(LOGITS, mixed, label_smoothing=0.1))


def test_other_terms_keep_their_weight_wherever_they_stand():
    expected = cross_entropy(LOGITS, LABELS, label_smoothing=0.1) + 3.0
    torch.testing.assert_close(smoothed(Means(), LOGITS, LABELS, extra=3.0), expected)
    task, term = tiny_task(), SmoothLabels()

    def other() -> Any:
        return lambda loss, outputs, batch, model: loss + 0.1 * outputs.square().mean()

    def weights(*order: str) -> dict[str, torch.Tensor]:
        plan = TrainingPlan()
        for which in order:
            made = other if which == "other" else (lambda: smoothing_term(task, term.epsilon))
            plan = plan.adding(loss_terms=made)
        settings = Train(epochs=1, batch_size=16, optimizer="SGD", lr=0.1)
        torch.manual_seed(0)
        return fit(task.default_model(), task, task.splits(None).train, None, settings, plan).model.state_dict()

    one, two = weights("other", "smooth"), weights("smooth", "other")
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_the_step_trains_by_torchs_loss():
    task = tiny_task()
    splits = task.splits(None)
    parts = {name: getattr(splits, name) for name in ("val", "calibration")}

    def smooth(outputs: Any, labels: Any) -> torch.Tensor:
        return cross_entropy(outputs, labels, label_smoothing=0.2)

    other = CustomTask(
        "smooth", splits.train, splits.test, **parts, model=task.default_model, loss=smooth, labels="abc"
    )
    train = Train(epochs=2, batch_size=16, optimizer="SGD", lr=0.1)
    by_step = sparing.run(task=task, steps=[SmoothLabels(epsilon=0.2), train], meter=QUICK, store=None)
    by_task = sparing.run(task=other, steps=[train], meter=QUICK, store=None)
    plain = sparing.run(task=task, steps=[train], meter=QUICK, store=None)
    for name, value in by_task.job.model.state_dict().items():
        torch.testing.assert_close(by_step.job.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(
        by_step.job.model.state_dict()["head.weight"], plain.job.model.state_dict()["head.weight"]
    )


def test_what_cannot_be_smoothed_is_named():
    with pytest.raises(IncompatibleStep, match=r"one tensor \(N, classes, …\), not <class 'dict'>"):
        smoothing_term(Means(), 0.1)(torch.zeros(()), {"a": LOGITS}, (None, LABELS), None)
    with pytest.raises(IncompatibleStep, match=r"not one of shape \(5,\)"):
        smoothing_term(Means(), 0.1)(torch.zeros(()), LOGITS[:, 0], (None, LABELS), None)
    with pytest.raises(InvalidValue, match=r"logits of shape \(0, 4\)"):
        uniform_cross_entropy(LOGITS[:0])
    with pytest.raises(InvalidValue, match="epsilon = 0"):
        SmoothLabels(epsilon=0)


def test_needs_classes():
    data = torch.utils.data.TensorDataset(torch.zeros(30, 2), torch.zeros(30))
    regression = CustomTask(
        "numbers", data, data, model=lambda: torch.nn.Linear(2, 1), loss=torch.nn.functional.mse_loss,
        metrics={"error": lambda outputs, targets: (outputs[:, 0] - targets) ** 2}, better="lower",
    )  # fmt: skip
    with pytest.raises(RecipeError, match="'smooth_labels' needs 'classification'"):
        sparing.run(task=regression, steps=[SmoothLabels(), Train(epochs=1)], meter=QUICK, store=None)
