"""FTRL and G-FTRL as optimizers: sparse is dense, rows stay alone, states resume, two become one."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparing.core.errors import InvalidValue
from sparing.optimization.ftrl import (
    FTRL,
    CombinedOptimizer,
    GroupFTRL,
    combined_optimizer,
    ftrl_update,
    group_ftrl_update,
)

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "ftrl": lambda p, **more: FTRL(p, lr=0.1, l1=0.3, l2=0.2, **more),
    "group": lambda p, **more: GroupFTRL(p, alpha=0.1, lambda1=0.3, lambda2=0.2, **more),
}


def sparse(rows: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.sparse_coo_tensor(rows[None], values, (size, *values.shape[1:]), check_invariants=True)


# --- the formulas


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.01, 5), st.floats(-3, 3), st.floats(0, 2), st.floats(0, 2))
def test_ftrl_minimises_its_regularised_sum(w: float, z: float, n: float, g: float, l1: float, l2: float) -> None:
    """The new weight is the minimum of z w + λ1 |w| + (√n/η + 2 λ2) w²/2, which the closed form claims to be."""
    given_ = [torch.tensor([value], dtype=torch.float64) for value in (w, z, n, g)]
    found, new_z, new_n = ftrl_update(*given_, 0.5, l1, l2)

    def objective(point: Tensor) -> Tensor:
        return new_z * point + l1 * point.abs() + (new_n.sqrt() / 0.5 + 2 * l2) / 2 * point**2

    nearby = found + torch.tensor([-1e-3, 1e-3, -0.5, 0.5], dtype=torch.float64)
    assert (objective(nearby) >= objective(found) - 1e-12).all()
    assert new_n == n + g * g


@given(seed=st.integers(0, 99), lambda1=st.floats(0, 2), lambda2=st.floats(0, 2))
def test_a_row_is_zero_within_the_threshold_and_opposes_z_beyond(seed: int, lambda1: float, lambda2: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    w, z, g = torch.randn(3, 6, 4, generator=draw, dtype=torch.float64)
    w, new_z, new_n = group_ftrl_update(
        w, z, torch.rand(6, 4, generator=draw, dtype=torch.float64), g, 0.1, 1, lambda1, lambda2
    )
    norm = new_z.norm(dim=1)
    zero = norm <= lambda1 * 2
    assert ((w == 0).all(1) == zero).all()
    assert (w[~zero] * new_z[~zero] < 0).all()
    expected = -new_z * (1 - 2 * lambda1 / norm[:, None]) / ((1 + new_n.sqrt()) / 0.1 + lambda2)
    torch.testing.assert_close(w[~zero], expected[~zero])


def test_lambda2_counts_twice_in_one_and_once_in_the_other() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    w, *_ = ftrl_update(0 * one, -one, one, 0 * one, 1.0, 0.0, 3.0)
    assert float(w) == 1 / (1 + 2 * 3)
    w, *_ = group_ftrl_update(0 * one, -one, one, 0 * one, 1.0, 2.0, 0.0, 3.0)
    assert float(w) == 1 / (2 + 1 + 3)


# --- sparse and dense


@settings(max_examples=20)
@given(kind=st.sampled_from(sorted(MAKERS)), seed=st.integers(0, 99), untouched=st.booleans())
def test_a_sparse_gradient_does_what_the_dense_one_does(kind: str, seed: int, untouched: bool) -> None:
    """Over several steps, with rows named twice in a batch, rows never named, and rows named with a gradient of 0."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randn(9, 3, generator=draw, dtype=torch.float64)
    one, other = (start.clone().requires_grad_() for _ in range(2))
    first, second = (MAKERS[kind]([p], zero_untouched=untouched) for p in (one, other))
    for _ in range(5):
        rows = torch.randint(0, 7, (4,), generator=draw)  # 7 and 8 never
        values = torch.randn(4, 3, generator=draw, dtype=torch.float64)
        values[rows == 0] = 0.0
        one.grad = sparse(rows, values, 9)
        other.grad = one.grad.to_dense()
        first.step()
        second.step()
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert ((one[7:] == 0) if untouched else (one[7:] == start[7:])).all()
    for name in ("z", "n"):
        torch.testing.assert_close(first.state[one][name], second.state[other][name], rtol=1e-12, atol=1e-14)


class Largest(TorchDispatchMode):
    """The most numbers that any operation took or made, but for a look-up in a table or a write into one."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        seen = (
            [*args, result]
            if not any(word in name for word in ("index_select", "index_copy", "sparse", "size"))
            else []
        )
        for value in seen:
            if isinstance(value, Tensor) and not value.is_sparse and "indices" not in name and "values" not in name:
                self.numbers = max(self.numbers, value.numel())
        return result


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_a_later_step_touches_the_rows_of_its_batch_only(kind: str) -> None:
    table = torch.randn(5000, 2).requires_grad_()
    optimizer = MAKERS[kind]([table])
    rows, values = torch.tensor([3, 70, 3]), torch.randn(3, 2)
    table.grad = sparse(rows, values, 5000)
    optimizer.step()
    table.grad = sparse(rows, values, 5000)
    with Largest() as largest:
        optimizer.step()
    assert 4 <= largest.numbers <= 8
    table.grad = table.grad.to_dense()
    with Largest() as largest:
        optimizer.step()
    assert largest.numbers == 10_000


def test_parameters_without_a_gradient_stay() -> None:
    table, other = torch.ones(2, 2).requires_grad_(), torch.ones(2, 2).requires_grad_()
    optimizer = GroupFTRL([table, other])
    table.grad = torch.ones(2, 2)
    optimizer.step()
    assert other.tolist() == [[1, 1], [1, 1]]
    assert set(optimizer.state) == {table}


def test_ftrl_takes_tensors_of_any_rank() -> None:
    for shape in ((), (4,), (2, 3, 4)):
        weights = torch.ones(shape, dtype=torch.float64).requires_grad_()
        optimizer = FTRL([weights], zero_untouched=False)
        (weights.sum() * 5).backward()
        optimizer.step()
        assert weights.shape == shape
        assert (weights < 1).all()


# --- as an optimizer of torch


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(12, 4), nn.Flatten(), nn.Linear(8, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    ids = torch.randint(0, 12, (6, 2), generator=torch.Generator().manual_seed(step))
    return ((model(ids)[:, 0] - ids.sum(1) % 3) ** 2).sum()


def go(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


@pytest.mark.parametrize("as_sparse", [True, False])
def test_a_combined_optimizer_resumes_where_it_was(as_sparse: bool) -> None:
    whole = network()
    go(whole, combined_optimizer(whole, lambda1=0.2, sparse=as_sparse), 0, 6)
    begun = network()
    optimizer = combined_optimizer(begun, lambda1=0.2, sparse=as_sparse)
    go(begun, optimizer, 0, 3)
    resumed = network()
    resumed.load_state_dict(begun.state_dict())
    again = combined_optimizer(resumed, lambda1=0.2, sparse=as_sparse)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(resumed, again, 3, 6)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_tables_go_to_one_and_everything_else_to_the_other() -> None:
    model = network()
    optimizer = combined_optimizer(model, alpha=0.3, lr=0.2)
    group, rest = optimizer.parts
    assert isinstance(group, GroupFTRL)
    assert isinstance(rest, FTRL)
    assert [p is model[0].weight for p in group.param_groups[0]["params"]] == [True]
    assert len(rest.param_groups[0]["params"]) == 2
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.2]
    assert model[0].sparse
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    go(model, optimizer, 0, 1)
    scheduler.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == [0.15, 0.1]
    before = loss_of(network(), 0)
    go(model, optimizer, 1, 30)
    assert loss_of(model, 0) < before


def test_a_closure_is_called_once_with_gradients() -> None:
    model, calls = network(), []
    optimizer = combined_optimizer(model)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [True]
    weights = torch.ones(2, requires_grad=True)
    single = FTRL([weights])
    assert float(single.step(lambda: (weights.sum().backward(), weights.sum())[1])) == 2
    assert weights.grad is not None


def test_a_mean_loss_with_a_strong_penalty_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"lambda1 = 4 with a loss that is a mean over the batch"):
        GroupFTRL([torch.zeros(2, 2)], lambda1=4, loss_reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GroupFTRL([torch.zeros(2, 2)], lambda1=0.1, loss_reduction="mean")
        GroupFTRL([torch.zeros(2, 2)], lambda1=4)


def test_groups_have_settings_of_their_own() -> None:
    optimizer = GroupFTRL(
        [{"params": [torch.zeros(2, 2)], "alpha": 0.5}, {"params": [torch.zeros(3, 1)], "lambda1": 0.0}]
    )
    assert [(g["lr"], g["lambda1"]) for g in optimizer.param_groups] == [(0.5, 4.0), (0.1, 0.0)]


# --- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: GroupFTRL([p[0]]), r"a parameter of shape \(3,\); tables \(N, D\)"),
        (lambda p: GroupFTRL([p.view(1, 1, 3)]), r"shape \(1, 1, 3\)"),
        (lambda p: GroupFTRL([p], alpha=0), "alpha = 0; a finite number of more than 0"),
        (lambda p: GroupFTRL([p], beta=-1), "beta = -1; a finite number of at least 0"),
        (lambda p: GroupFTRL([p], lambda1=math.nan), "lambda1 = nan"),
        (lambda p: GroupFTRL([p], lambda2="1"), "lambda2 = '1'"),
        (lambda p: GroupFTRL([p], loss_reduction="none"), "loss_reduction = 'none'"),
        (lambda p: GroupFTRL([p], zero_untouched=1), "zero_untouched = 1"),
        (lambda p: GroupFTRL([{"params": [p], "lambda1": -2}]), "lambda1 = -2"),
        (lambda p: FTRL([p], lr=-1), "lr = -1"),
        (lambda p: FTRL([p], l1=math.inf), "l1 = inf"),
        (lambda p: FTRL([p], initial_accumulator=0), "initial_accumulator = 0"),
        (lambda p: CombinedOptimizer(), "no optimizer was given"),
        (lambda p: CombinedOptimizer(FTRL([p]), FTRL([p])), "belongs to two"),
        (lambda p: CombinedOptimizer(FTRL([p])).load_state_dict({"state": {}}), "this one has state"),
        (lambda p: CombinedOptimizer(FTRL([p])).load_state_dict({"parts": []}), "this one has 0 parts"),
        (lambda p: CombinedOptimizer(FTRL([p])).add_param_group({"params": [p]}), "one of its parts"),
        (lambda p: combined_optimizer(nn.Linear(2, 2)), "Linear has no embedding table"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make(torch.zeros(1, 3))


def test_a_rate_of_zero_is_refused_when_it_comes() -> None:
    weights = torch.ones(2, requires_grad=True)
    optimizer = FTRL([weights])
    weights.grad = torch.ones(2)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(InvalidValue, match="a schedule brought it to 0"):
        optimizer.step()


def test_a_gradient_that_is_sparse_in_its_columns_too_is_refused() -> None:
    table = torch.ones(2, 2, requires_grad=True)
    table.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(InvalidValue, match="2 sparse dimensions; one, the rows"):
        GroupFTRL([table]).step()
