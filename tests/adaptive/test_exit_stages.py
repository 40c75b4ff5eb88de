"""Stages of networks that read shapes and parameters on their way: whoever leaves, the others' answers stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparing.adaptive.confidence import ConfidenceRule
from sparing.adaptive.exit_predictor import EarlyExitPredictor, staged
from sparing.adaptive.exits import attach_exits
from sparing.adaptive.policies import EveryExitPolicy
from sparing.core.errors import IncompatibleStep
from sparing.testing import tiny_task


def layer(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())


class Ways(nn.Module):
    """Two layers; ``way`` says what the forward pass does between and behind them."""

    def __init__(self, way: str, channels: int, side: int, classes: int) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = layer(channels, 4), layer(4, 4)
        self.gain = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.head = nn.Linear(4 if way == "parameter" else 4 * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        samples, side = x.shape[0], x.size(2)
        if self.way == "baked" and samples > 1:
            x = 2 * x
        if self.way == "parameter":  # one parameter on both sides of the second exit
            return self.head((self.second(self.first(x) * self.gain) * self.gain).mean((2, 3)))
        if self.way == "turned":  # what the second layer's neighbour reads has its channels in front
            turned = self.first(x).transpose(0, 1)
            return self.head((self.second(turned.transpose(0, 1)) + turned.transpose(0, 1)).flatten(1))
        return self.head(self.second(self.first(x)).reshape(samples, -1) * (8 / side))


def attached(way: str):
    torch.manual_seed(0)
    task = tiny_task()
    image = task.example_input(2)[0]
    classes = int(task.default_model().eval()(image).shape[1])
    model = Ways(way, int(image.shape[1]), int(image.shape[2]), classes).eval()
    return task, model, attach_exits(model, example=(image,), codewords=8).eval()


@pytest.mark.parametrize("way", ["batch", "parameter"])
def test_samples_that_stay_are_answered_as_if_alone(way: str) -> None:
    task, model, multi = attached(way)
    x = torch.randn(7, *task.example_input(2)[0].shape[1:])
    with torch.no_grad():
        logits, plain = multi(x), model(x)
    torch.testing.assert_close(logits[:, -1], plain)
    stages, exits = staged(multi, task)
    sure = logits[:, 0].softmax(1).amax(1)
    some = ConfidenceRule.softmax(float(sure.median()) - 1e-6)
    predictor = EarlyExitPredictor(stages, exits, EveryExitPolicy(some), multi.costs(task.example_input(1)))
    answers, trace = predictor.trace(x.numpy())
    assert 0 < (trace.exit_index == 0).sum() < 7, "some leave at once, some go on"
    np.testing.assert_allclose(answers, logits.numpy()[np.arange(7), trace.exit_index], atol=2e-4)
    for i in range(7):
        alone, one = predictor.trace(x[i : i + 1].numpy())
        assert one.exit_index[0] == trace.exit_index[i]
        np.testing.assert_allclose(alone[0], answers[i], atol=2e-4)


def test_a_number_of_samples_that_decides_the_way_is_refused() -> None:
    with pytest.raises(IncompatibleStep, match="traced with 2 samples computes something else for 1"):
        attached("baked")


def test_values_whose_first_axis_is_not_samples_are_refused() -> None:
    task, _, multi = attached("turned")
    with pytest.raises(IncompatibleStep, match=r"\[\[2, 4, .*\[4, 2, .*for 2 samples"):
        staged(multi, task)
