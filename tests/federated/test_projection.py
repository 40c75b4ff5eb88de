"""The quadratic programme against its conditions of optimality; restored gradients; choice of signature tasks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparing import InvalidValue
from sparing.federated.knowledge import KnowledgeExtractor, TaskKnowledge
from sparing.federated.projection import (
    block_logits,
    distillation_loss,
    flat_gradient,
    gradient_distances,
    integrate_gradients,
    project_gradient,
    restore_gradient,
    select_signature_tasks,
)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    st.sampled_from([1e-3, 1e-1]),
    st.booleans(),
    st.integers(0, 2**31 - 1),
)
def test_the_answer_meets_the_conditions_of_optimality(p, k, margin, eps, relative, seed):
    draw = torch.Generator().manual_seed(seed)
    gradient = torch.randn(p, generator=draw, dtype=torch.float64)
    memories = torch.randn(p, k, generator=draw, dtype=torch.float64)
    projected, v = project_gradient(gradient, memories, margin, eps, relative)
    gram = memories.T @ memories
    ridge = eps * (float(gram.trace()) / k if relative else 1.0)
    torch.testing.assert_close(projected, gradient + memories @ v)
    assert (v >= margin).all()
    w = memories.T @ projected + ridge * v
    scale = float(gram.abs().max() + (memories.T @ gradient).abs().max() + 1)
    assert (w >= -1e-8 * scale).all(), "no direction of v is downhill"
    assert (w[v > margin + 1e-9].abs() <= 1e-7 * scale).all(), "a free variable has no slope"


def test_a_harmless_gradient_stays_as_it_is_and_a_harmful_one_does_not():
    memories = torch.eye(3)[:, :2]
    kept, info = integrate_gradients(torch.tensor([1.0, 0.0, 2.0]), memories)
    assert kept.tolist() == [1, 0, 2]
    assert not (info.violated)
    assert not (info.solved)
    assert not (info.fallen_back)
    assert info.v is None
    turned, info = integrate_gradients(torch.tensor([1.0, -1.0, 2.0]), memories, margin=0.0)
    assert info.violated
    assert info.solved
    assert info.v is not None
    np.testing.assert_allclose(info.dots_before, [1, -1])
    np.testing.assert_allclose(turned, [1, 0, 2], atol=2e-3)
    assert info.dots_after.min() >= -1e-3 * info.v.max() - 1e-9, "slightly below 0 is right, by ε v"
    assert info.norm_after < info.norm_before


def test_only_one_harmed_column_moves_all_by_the_margin():
    memories = torch.eye(4)[:, :3]
    turned, info = integrate_gradients(torch.tensor([-1.0, 1.0, 1.0, 0.0]), memories, margin=0.5)
    assert info.v is not None
    np.testing.assert_allclose(info.v[1:], 0.5)
    assert turned[1] == pytest.approx(1.5), "also columns that are not harmed"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_programme_without_an_answer_leaves_the_gradient_and_says_so(broken: float):
    memories = torch.tensor([[1.0, broken], [0.0, 1.0]])
    gradient = torch.tensor([-1.0, 1.0])
    kept, info = integrate_gradients(gradient, memories)
    assert kept is gradient
    assert info.fallen_back
    assert not info.solved
    with pytest.raises(InvalidValue, match="not finite"):
        project_gradient(gradient, memories)
    kept, info = integrate_gradients(torch.tensor([broken, 1.0]), torch.eye(2))
    assert info.fallen_back


def test_dependent_columns_without_a_ridge_fall_back_instead_of_failing():
    memories = torch.ones(3, 2)
    _, info = integrate_gradients(torch.tensor([-1.0, 0.0, 0.0]), memories, eps=0.0)
    assert info.fallen_back != info.solved


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"margin": -0.1}, "margin = -0.1"),
        ({"eps": -1.0}, "eps = -1.0"),
        ({"memories": torch.ones(2, 1)}, r"memories of \(2, 1\)"),
        ({"memories": torch.ones(3, 0)}, r"memories of \(3, 0\)"),
    ],
)
def test_wrong_arguments_are_told(arguments, told):
    given = {"gradient": torch.ones(3), "memories": torch.ones(3, 1)} | arguments
    for function in (project_gradient, integrate_gradients):
        with pytest.raises(InvalidValue, match=told):
            function(**given)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6))


def whole(model: nn.Module, classes: range) -> TaskKnowledge:
    return KnowledgeExtractor(1.0, finetune_epochs=0).extract(model, [], classes)


def test_a_restored_gradient_is_that_of_the_distillation_loss_on_the_block():
    model, x = net().eval(), torch.randn(4, 5)
    other = net()
    with torch.no_grad():
        other[0].weight.add_(1)
    knowledge = whole(other, range(2, 4))
    found = restore_gradient(model, knowledge, x, temperature=3.0)
    with torch.no_grad():
        taught = other.eval()(x)[:, 2:4]
    distillation_loss(model(x)[:, 2:4], taught, 3.0).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    torch.testing.assert_close(found, expected)
    head = expected[-54:-6].view(6, 8)
    assert not head[[0, 1, 4, 5]].any(), "rows of other classes have none"
    assert head[2:4].any()


def test_at_its_own_weights_a_restored_gradient_is_nothing():
    model = net().eval()
    assert restore_gradient(model, whole(model, range(6)), torch.randn(4, 5)).abs().max() < 1e-6


def test_what_a_loss_does_not_reach_is_zero():
    model = net()
    parameters = [*model.parameters(), nn.Parameter(torch.ones(3))]
    found = flat_gradient(model(torch.randn(2, 5)).sum(), parameters)
    assert len(found) == sum(p.numel() for p in parameters)
    assert not found[-3:].any()


def test_blocks_outside_the_head_are_refused():
    logits = torch.zeros(2, 6)
    assert block_logits(logits, [0, 5]).shape == (2, 2)
    for classes in (range(4, 7), range(0), [6], [-1]):
        with pytest.raises(InvalidValue, match="6 of the head"):
            block_logits(logits, classes)
    with pytest.raises(InvalidValue, match="temperature"):
        distillation_loss(logits, logits, 0.0)


def test_of_equals_the_earlier_task_is_chosen_and_all_where_there_are_no_more():
    current = torch.tensor([1.0, 0.0])
    past = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert select_signature_tasks(current, past, 2, "cosine") == [3, 0]
    assert select_signature_tasks(current, past, 3, "euclidean") == [3, 0, 2]
    assert select_signature_tasks(current, past, 9, "wasserstein") == [3, 0, 1, 2]
    assert gradient_distances(current, torch.zeros(1, 2), "cosine").tolist() == [1.0], "no angle: as if at right angles"
    with pytest.raises(InvalidValue, match="k = 0"):
        select_signature_tasks(current, past, 0)
    with pytest.raises(InvalidValue, match="metric = 'manhattan'"):
        select_signature_tasks(current, past, 1, "manhattan")  # type: ignore[arg-type]
