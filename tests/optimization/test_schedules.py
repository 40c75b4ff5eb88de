"""Schedules: the formula, its limits, and the step that puts it into a training."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import sparing
from sparing.core.errors import IncompatibleStep, InvalidValue, RecipeError
from sparing.core.job import TrainingPlan
from sparing.core.training import Train, fit
from sparing.optimization.schedules import WarmupCosine, cosine_unshifted
from sparing.testing import QUICK, tiny_task


def test_the_formula_at_points_computed_by_hand():
    def rate(t):
        return cosine_unshifted(t, total=100, warmup=10, peak=1.0, warmup_start=0.0, floor=0.0)

    assert [rate(t) for t in (0, 1, 5, 9)] == pytest.approx([0, 0.1, 0.5, 0.9])
    assert rate(10) == pytest.approx(0.5 * (1 + math.cos(0.1 * math.pi)))  # 0.9755: not back at the peak
    assert rate(50) == pytest.approx(0.5)
    assert rate(99) == pytest.approx(0.5 * (1 - math.cos(0.01 * math.pi)))
    assert rate(100) == rate(1000) == pytest.approx(0, abs=1e-15)


def test_the_jump_where_warm_up_and_cosine_meet_stays():
    """The published setting: 300 epochs of 10 iterations, 20 of warm-up, 6e-3: "from 6.0e-3 to 5.93e-3"."""
    rates = [cosine_unshifted(t, 3000, 200, 6e-3) for t in range(3000)]
    assert rates[0] == 1e-6
    assert rates[199] == pytest.approx(5.97e-3, rel=1e-5)
    assert rates[200] == pytest.approx(5.9345e-3, rel=1e-4)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[200:]))
    assert 1e-6 < rates[-1] < 1.01e-6


def test_no_warm_up_begins_at_the_peak():
    assert cosine_unshifted(0, 10, 0, 0.5) == 0.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((-1, 10, 0, 1.0), "iteration = -1"),
        ((0, 0, 0, 1.0), "total = 0"),
        ((0, 10, 11, 1.0), "warmup = 11"),
        ((0, 10, 1, 1e-7), "the peak, which is 1e-07"),
        ((0, 10, 1, 1.0, -0.1), "warmup_start = -0.1"),
        ((0, 10, 1, 1.0, 0.0, 2.0), "floor = 2"),
        ((0, 10, 1, math.nan), "the peak, which is nan"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(InvalidValue) as caught:
        cosine_unshifted(*arguments)
    assert named in str(caught.value)


def test_lengths_of_the_warm_up():
    assert WarmupCosine().warmup(3000) == 200  # 20 of 300 epochs
    assert WarmupCosine(warmup_share=0.1).warmup(690) == 69
    assert WarmupCosine(warmup_steps=7).warmup(690) == 7
    assert WarmupCosine(warmup_steps=0).warmup(690) == 0
    with pytest.raises(InvalidValue, match=r"warmup_share = 0\.1 and warmup_steps = 5"):
        WarmupCosine(warmup_share=0.1, warmup_steps=5)
    with pytest.raises(InvalidValue, match="warmup_steps = 10; the whole training has 10"):
        WarmupCosine(warmup_steps=10).warmup(10)


def test_each_parameter_group_climbs_to_its_own_peak_and_the_state_can_be_kept():
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.4}], lr=1.0)
    step = WarmupCosine(warmup_steps=4, start=0.0, floor=0.0)
    schedule = step.scheduler(optimizer, 12)
    for done in range(12):
        got = [group["lr"] for group in optimizer.param_groups]
        assert got == pytest.approx([cosine_unshifted(done, 12, 4, peak, 0.0, 0.0) for peak in (0.1, 0.4)])
        if done == 6:
            other = torch.optim.SGD(
                [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.4}], lr=1.0
            )
            again = step.scheduler(other, 12)
            again.load_state_dict(schedule.state_dict())
            assert again.get_last_lr() == schedule.get_last_lr()
        optimizer.step()
        schedule.step()


def test_a_training_follows_it():
    task = tiny_task()
    splits = task.splits(None)
    plan = TrainingPlan().adding(scheduler=WarmupCosine(warmup_steps=3).scheduler)
    settings = Train(epochs=4, batch_size=16, lr=0.02)
    result = fit(task.default_model(), task, splits.train, None, settings, plan)
    # the curve has the rate after each step: that of the next one
    expected = [cosine_unshifted(t, 12, 3, 0.02) for t in range(1, 13)]
    assert [rate for _, rate in result.curves["lr"]] == pytest.approx(expected)


def test_two_schedules_and_a_schedule_without_training_are_refused():
    with pytest.raises(RecipeError, match="scheduler, which 'warmup_cosine'"):
        sparing.run(
            task=tiny_task(), steps=[WarmupCosine(), WarmupCosine(id="b"), Train(epochs=1)], meter=QUICK, store=None
        )
    with pytest.raises(RecipeError, match="promises training"):
        sparing.run(task=tiny_task(), steps=[WarmupCosine()], meter=QUICK, store=None)
    with pytest.raises(RecipeError, match="'train' sets the training plan's scheduler, which 'warmup_cosine'"):
        sparing.run(
            task=tiny_task(), steps=[WarmupCosine(), Train(epochs=1, scheduler="cosine")], meter=QUICK, store=None
        )
    plan = TrainingPlan().adding(scheduler=WarmupCosine().scheduler)
    with pytest.raises(IncompatibleStep, match="scheduler is already set"):
        plan.adding(scheduler=WarmupCosine().scheduler)
    task = tiny_task()
    with pytest.raises(IncompatibleStep, match="warmup_steps = 3 would have no effect"):
        fit(task.default_model(), task, task.splits(None).train, None, Train(epochs=1, warmup_steps=3), plan)


def test_a_schedule_of_the_training_before_does_not_stand_in_the_way():
    steps = [Train(epochs=1, scheduler="cosine"), WarmupCosine(), Train(id="more", epochs=1)]
    assert len(sparing.plan(sparing.core.recipe.Recipe(tiny_task(), steps)).recipe.steps) == 3


def test_a_peak_below_the_start_is_refused_with_its_value():
    task = tiny_task()
    plan = TrainingPlan().adding(scheduler=WarmupCosine(start=0.01).scheduler)
    with pytest.raises(InvalidValue, match=r"warmup_start = 0.01 .* which is 0.001"):
        fit(task.default_model(), task, task.splits(None).train, None, Train(epochs=1, lr=0.001), plan)
