"""Guests: a paced sampler, a layer wrap and an optimiser wrap that meet in one training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import Points, go, survives_kills
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparing.core.errors import IncompatibleStep, RecipeError
from sparing.core.job import Job, TrainingPlan
from sparing.core.step import Stage, Step, step
from sparing.core.training import Batches, Train


class EasyFirst(Batches):
    """Batches drawn from a share of the data that grows with the epochs, easiest samples first."""

    difficulty: np.ndarray
    pace: int

    def order(self, epoch: int) -> np.ndarray:
        known = np.argsort(self.difficulty, kind="stable")[: max(1, self.size * (epoch + 1) // self.pace)]
        return np.random.default_rng([self.seed, epoch]).choice(known, self.size)


@step("pace")
class Pace(Step):
    """Show easy samples first."""

    stage = Stage.DATA
    slots = frozenset({"batch_sampler"})
    promises = frozenset({"training"})

    epochs: int = Field(3, ge=1)

    def apply(self, job: Job) -> Job:
        def batches(dataset: Any, size: int, seed: int) -> Batches:
            made = EasyFirst(dataset, size, seed)
            made.difficulty = np.array([float(x.norm()) for x, _ in dataset])
            made.pace = self.epochs
            return made

        return job.replace(training=job.training.adding(batch_sampler=batches))


class LowRankUpdate(nn.Module):
    """weight → weight + a·b, with the weight itself frozen."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.b = nn.Parameter(torch.randn(rank, weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.a @ self.b


@step("low_rank")
class LowRank(Step):
    """Train a low-rank update of every linear layer instead of its weight."""

    stage = Stage.TRAINING
    promises = frozenset({"training"})

    rank: int = Field(2, ge=1)

    def apply(self, job: Job) -> Job:
        return job.replace(training=job.training.adding(model_wraps=self.wrap))

    def wrap(self, model: nn.Module) -> tuple[nn.Module, Callable[[], nn.Module]]:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        for layer in layers:
            layer.weight.requires_grad_(False)
            parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight, self.rank))

        def undo() -> nn.Module:
            for layer in layers:
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
                layer.weight.requires_grad_(True)
            return model

        return model, undo


class SlowWeights(torch.optim.Optimizer):
    """Lookahead (Zhang et al. 2019) around another optimiser; its slow weights are part of its state."""

    def __init__(self, inner: torch.optim.Optimizer, every: int) -> None:
        self.inner, self.every = inner, every
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        for parameter in self.parameters:
            self.state[parameter] = {"slow": parameter.detach().clone(), "steps": 0}

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        for parameter in self.parameters:
            mine = self.state[parameter]
            mine["steps"] += 1
            if mine["steps"] % self.every == 0:
                mine["slow"].lerp_(parameter, 0.5)
                parameter.copy_(mine["slow"])
        return loss

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        super().load_state_dict({name: value for name, value in state.items() if name != "inner"})
        self.param_groups = self.inner.param_groups


@step("lookahead")
class Lookahead(Step):
    """Pull the weights back half-way to where they were some steps ago."""

    stage = Stage.TRAINING
    promises = frozenset({"training"})

    every: int = Field(3, ge=1)

    def apply(self, job: Job) -> Job:
        return job.replace(training=job.training.adding(wrap_optimizer=lambda inner: SlowWeights(inner, self.every)))


TRAIN = Train(epochs=3, batch_size=20, lr=0.02, scheduler="cosine", checkpoint_every_batches=2)


def test_three_economies_in_one_training_resume_exactly(tmp_path):
    done = survives_kills(go(Points(), Pace(), LowRank(), Lookahead(), TRAIN), tmp_path, deaths=6)
    plain = go(Points(), TRAIN)(tmp_path / "plain")
    assert [row.id for row in done.ledger.rows] == ["pace", "low_rank", "lookahead", "train"]
    assert done.job.training == TrainingPlan()  # carried out, so nothing of it is left for the next training
    assert type(done.job.model.first) is nn.Linear
    assert not parametrize.is_parametrized(done.job.model)  # the wrap was undone
    assert set(done.job.model.state_dict()) == set(plain.job.model.state_dict())


def test_each_of_the_three_has_its_effect(tmp_path):
    weights = {}
    for name, steps in {"none": [], "pace": [Pace()], "low_rank": [LowRank()], "lookahead": [Lookahead()]}.items():
        weights[name] = go(Points(), *steps, TRAIN)(tmp_path / name).job.model.first.weight
    for name in ("pace", "low_rank", "lookahead"):
        assert not torch.equal(weights[name], weights["none"]), name
    start = Points().default_model
    torch.manual_seed(0)
    assert weights["low_rank"].shape == start().first.weight.shape


def test_a_plan_nobody_carries_out_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"steps\[1\]: 'pace' promises training.*add one of:.*train"):
        go(Points(), TRAIN, Pace())(tmp_path)


def test_a_slot_taken_twice_is_refused_before_and_while_running(tmp_path):
    with pytest.raises(RecipeError, match=r"'again' sets the training plan's batch_sampler, which 'pace' .* has set"):
        go(Points(), Pace(), Pace(id="again"), TRAIN)(tmp_path)
    go(Points(), Pace(), TRAIN, Pace(id="again"), TRAIN.__class__(id="more", epochs=1))(tmp_path / "between")
    with pytest.raises(IncompatibleStep, match="batch_sampler is already set"):
        TrainingPlan(batch_sampler=Batches).adding(batch_sampler=Batches)
