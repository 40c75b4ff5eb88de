"""Pacing functions, counts of tokens, and the learning rate that follows them."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import InvalidValue
from sparing.data_efficiency.pacing import (
    CustomPacing,
    DiscretePacing,
    RootPacing,
    discrete,
    linear,
    pacing_from_config,
    root,
)
from sparing.data_efficiency.postprocessing import reshape_batch
from sparing.data_efficiency.tokens import (
    TokenCounter,
    TokenLR,
    effective_length,
    layer_tokens,
    peak_lr,
    planned_tokens,
    token_lr,
)


@given(
    low=st.integers(1, 50), more=st.integers(0, 100), total=st.integers(1, 60), step=st.integers(1, 9),
    degree=st.sampled_from([1, 2, 3.5]),
)  # fmt: skip
def test_difficulty_grows_between_its_ends_in_multiples_of_the_step(low, more, total, step, degree):
    pacing = RootPacing(low, low + more, total, step, degree)
    path = [pacing(t) for t in range(2 * total)]
    assert all(a <= b for a, b in itertools.pairwise(path))
    assert path[0] == low
    if more:  # what rounding down holds back comes after T
        assert pacing(math.ceil(total * (1 + step / more) ** degree) + 1) == low + more
    assert all(value % step == 0 or value in (low, low + more) for value in path)


def test_an_unclamped_start_warns_and_falls_below_the_minimum():
    with pytest.warns(UserWarning, match="starts at 8; clamp_min=True starts at 10"):
        pacing = linear(10, 100, 50, 8, clamp_min=False)
    assert pacing(0) == 8
    assert linear(10, 100, 50, 8)(0) == 10
    with pytest.warns(UserWarning, match="starts at 0"):
        assert linear(5, 100, 50, 8, clamp_min=False)(0) == 0


def test_real_difficulties_are_not_floored_to_whole_numbers():
    pacing = linear(0.5, 2.0, 6, 0.25)
    assert [pacing(t) for t in range(8)] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.0]


def test_once_the_greatest_difficulty_is_reached_it_stays():
    back = CustomPacing(1, 9, lambda t: 9 if t == 2 else 1)
    now, path = None, []
    for t in range(5):
        now = back.after(now, t)
        path.append(now)
    assert path == [1, 1, 9, 9, 9]
    assert back(3) == 1


def test_discrete_difficulties_change_after_their_last_step():
    assert [discrete([1, 5, 7], [2, 4])(t) for t in range(7)] == [1, 1, 1, 5, 5, 7, 7]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: linear(5, 4, 10), "min_difficulty = 5, max_difficulty = 4"),
        (lambda: linear(1, 4, 0), "total_steps = 0"),
        (lambda: linear(1, 4, 10, -1), "difficulty_step = -1"),
        (lambda: root(1, 4, 10, 1, 0), "degree = 0"),
        (lambda: linear(1, math.nan, 10), "max_difficulty = nan"),
        (lambda: linear(1, 4, "ten"), "total_steps = 'ten'"),
        (lambda: linear(1, 4, 10)(-1), "step = -1"),
        (lambda: discrete([1, 2], [3, 4]), "2 difficulties and 2 max_steps"),
        (lambda: discrete([], []), "difficulties is empty"),
        (lambda: discrete([1, 2, 3], [5, 4]), r"max_steps = \[5, 4\]"),
        (lambda: DiscretePacing(1, 3, (1, 4), (2,)), "difficulty 4 lies outside 1 … 3"),
        (lambda: CustomPacing(1, 3, lambda t: 7)(0), "gives 7 at step 0; 1 … 3"),
        (lambda: CustomPacing(1, 3, lambda t: None)(0), "value = None"),
    ],
)
def test_bad_pacing_is_named(make, named):
    with pytest.raises(InvalidValue, match=named):
        make()


CONFIG: dict[str, Any] = {
    "min_difficulty": 1,
    "max_difficulty": 9,
    "schedule_type": "fixed_root",
    "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 1, "root_degree": 2},
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schedule_type": "fixed_rot"}, "Did you mean 'fixed_root'"),
        ({"schedule_config": {"total_curriculum_step": 8, "difficulty_step": 1}}, "lacks 'root_degree'"),
        ({"schedule_config": {**CONFIG["schedule_config"], "extra": 1}}, "has no 'extra'"),
        ({"schedule_type": "fixed_discrete"}, "has no 'total_curriculum_step'"),
        ({"schedule_config": 3}, "schedule_config is 3; a mapping"),
    ],
)
def test_bad_configurations_are_named(change, named):
    assert pacing_from_config(CONFIG) == root(1, 9, 8)
    with pytest.raises(InvalidValue, match=named):
        pacing_from_config(CONFIG | change)


# --- counting


@given(
    length=st.integers(1, 300), kept=st.integers(1, 300), layers=st.integers(1, 30), share=st.floats(0, 1),
    rows=st.integers(1, 9),
)  # fmt: skip
def test_counts_lie_between_all_tokens_and_the_kept_ones(length, kept, layers, share, rows):
    dropping = int(share * layers)
    effective = effective_length(length, kept, layers, dropping)
    assert min(kept, length) <= effective <= length
    exact = layer_tokens(rows, length, kept, layers, dropping)
    assert rows * effective <= exact / layers < rows * (effective + 1)  # the same clock, but for the rounding
    assert effective_length(length, length, layers, dropping) == length


def test_a_counter_is_resumed_and_knows_its_budget():
    counter = TokenCounter(4, 2, budget=100)
    counter.add(2, 20, 10)
    assert (counter.tokens, counter.layer_tokens, counter.rows, counter.steps) == (30, 120, 2, 1)
    other = TokenCounter(4, 2, budget=100)
    other.load_state_dict(json.loads(json.dumps(counter.state_dict())))
    for each in (counter, other):
        assert not each.finished
        each.add(2, 40)
        assert each.finished
    assert vars(counter) == vars(other)
    with pytest.raises(InvalidValue, match=r"dropping = 2, this counter has 3"):
        TokenCounter(4, 3).load_state_dict(counter.state_dict())
    with pytest.raises(InvalidValue, match="dropping = 5 of layers = 4"):
        TokenCounter(4, 5)


def test_planned_tokens_are_those_of_a_training():
    curriculum, kept = linear(8, 64, 10, 8), linear(16, 64, 20, 4)
    counter = TokenCounter(6, 4)
    length = reserved = None
    for i in range(30):
        length, reserved = curriculum.after(length, i + 1), kept.after(reserved, i)
        counter.add(5, int(length), int(reserved))
    planned = planned_tokens(30, 5, 64, 6, 4, curriculum, kept)
    assert vars(planned) == vars(counter)
    assert planned_tokens(3, 5, 64).tokens == 3 * 5 * 64


# --- the rate


def test_padding_is_computed_but_not_consumed():
    counter = TokenCounter(4, 2)
    counter.add(3, 10, 5, real=12)
    assert (counter.tokens, counter.layer_tokens) == (12 * effective_length(10, 5, 4, 2) // 10, 3 * (2 * 5 + 2 * 10))
    whole, told = TokenCounter(4, 2), TokenCounter(4, 2)
    whole.add(3, 10, 5)
    told.add(3, 10, 5, real=30)
    assert whole.state_dict() == told.state_dict()
    with pytest.raises(InvalidValue, match="real = 31 tokens in 3 rows of 10; at most 30"):
        counter.add(3, 10, 5, real=31)


@pytest.mark.parametrize("shifted", [True, False], ids=["shifted", "apart"])
def test_reshaped_rows_are_foreseen(shifted):
    pace, width = linear(3, 16, 9), 16 + shifted
    counter = TokenCounter()
    for step in range(1, 12):
        rows = reshape_batch(torch.zeros(5, width), int(pace(step)), shifted=shifted)
        counter.add(len(rows), rows.shape[1] - shifted)
    planned = planned_tokens(11, 5, 16, curriculum=pace, reshaped=shifted)
    assert planned.state_dict() == counter.state_dict()


def test_the_rate_at_points_computed_by_hand():
    assert [token_lr(k, 1.0, 0.1, 10, 30, "linear") for k in (0, 5, 10, 20, 30, 31)] == pytest.approx(
        [0, 0.5, 1, 0.55, 0.1, 0.1]
    )
    assert token_lr(20, 1.0, 0.0, 10, 30) == pytest.approx(0.5)
    assert token_lr(15, 1.0, 0.0, 10, 30) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert token_lr(0, 0.7, 0.0, 0, 30) == 0.7
    assert peak_lr(2e-4, 0.5) == 4e-4


def optimizer(groups: int = 1) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(groups)], lr=1.0)


@pytest.mark.parametrize("warmup", [{"warmup_tokens": 30}, {"warmup_steps": 3}, {}])
@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_a_resumed_schedule_goes_on_with_the_same_rates(warmup, style):
    def made() -> TokenLR:
        return TokenLR(optimizer(2), [0.1, 0.4], 0.01, decay_tokens=150, style=style, **warmup)

    whole = made()
    for stop in range(18):
        other = made()
        other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert other.get_last_lr() == whole.get_last_lr()
        for schedule in (whole, other):
            schedule.step((stop + 1) * 10)
        assert other.get_last_lr() == whole.get_last_lr()
    assert whole.get_last_lr() == [0.01, 0.01]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"max_lr": [0.1, 0.2]}, "max_lr has 2 values; the optimizer has 1"),
        ({"min_lr": 0.2}, "min_lr = 0.2, max_lr = 0.1"),
        ({"style": "cosin"}, "Did you mean 'cosine'"),
        ({"warmup_tokens": 5, "warmup_steps": 5}, "give one of them"),
        ({"warmup_tokens": 100}, "warmup_tokens = 100, decay_tokens = 100"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
    ],
)
def test_bad_schedules_are_named(arguments, named):
    with pytest.raises(InvalidValue, match=named):
        TokenLR(optimizer(), **({"max_lr": 0.1, "decay_tokens": 100} | arguments))


def test_wrong_clocks_and_foreign_states_are_refused():
    schedule = TokenLR(optimizer(), 0.1, decay_tokens=100, warmup_steps=2)
    schedule.step(60)
    with pytest.raises(InvalidValue, match="tokens = 50 after 60"):
        schedule.step(50)
    with pytest.raises(InvalidValue, match="2 steps ends at 100 tokens"):
        schedule.step(100)
    with pytest.raises(InvalidValue, match="decay_tokens was 100, is 200"):
        TokenLR(optimizer(), 0.1, decay_tokens=200, warmup_steps=2).load_state_dict(schedule.state_dict())
    with pytest.raises(InvalidValue, match="share = 0"):
        peak_lr(0.1, 0)
