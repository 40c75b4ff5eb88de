"""Scales and directions in recipes and in Lightning scripts: put on, trained, folded, and gone on with after a kill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sparing
from faults import DeadlyKeeper, Killed
from sparing.compression.pruning import BlockPrune
from sparing.core.errors import InvalidValue, RecipeError
from sparing.core.job import TrainingPlan
from sparing.core.pipeline import begin
from sparing.core.training import Train, fit
from sparing.optimization.rpgd import RPGD, Rpgd
from sparing.optimization.weight_norm import (
    WeightNormalization,
    parametrized_layers,
    shrink_scales,
    unit_direction,
)
from sparing.optimization.weight_norm_lightning import Reparametrization
from sparing.testing import tiny_task

TWO_PHASES = Rpgd(lr=0.05, momentum=0.9, g_shrink=0.5, freeze_g_steps=4)
PLAIN = Train(epochs=2, batch_size=16, checkpoint_every_batches=2)


def plan_of(step: Any) -> TrainingPlan:
    return step.apply(begin(tiny_task(), seed=3)).training


def fitted(step: Any, progress: Any = None) -> dict[str, Tensor]:
    task = tiny_task()
    splits = task.splits(None)
    torch.manual_seed(0)
    result = fit(task.default_model(), task, splits.train, splits.val, PLAIN, plan_of(step), 2, progress)
    assert not parametrized_layers(result.model)
    return result.model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [WeightNormalization(init="data"), TWO_PHASES], ids=["weight_norm", "rpgd"])
def test_a_killed_training_ends_as_one_that_was_not(step: Any) -> None:
    """Scales are shrunk, and set from data, once."""
    whole = fitted(step)
    keeper = DeadlyKeeper(2)
    with pytest.raises(Killed):
        fitted(step, keeper)
    assert same(fitted(step, keeper), whole)
    assert not same(fitted(WeightNormalization()), whole)


def test_phase_one_keeps_the_norms_of_all_units() -> None:
    after = fitted(Rpgd(lr=0.05, g_shrink=0.5, freeze_g_steps=1000))
    torch.manual_seed(0)
    before = tiny_task().default_model().state_dict()
    for name in ("stages.0.0.weight", "head.weight"):
        norms = after[name].flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, before[name].flatten(1).norm(dim=1) / 2)
        assert not torch.allclose(after[name], before[name] / 2)


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([Rpgd(), Train(lr=0.1)], "'train' sets the training plan's optimizer, which 'rpgd'"),
        ([Rpgd(), WeightNormalization(), Train()], "'weight_norm' sets the training plan's scales of weights"),
        ([BlockPrune(), WeightNormalization(), Train()], "pattern of zeros"),
        ([WeightNormalization()], "training"),
    ],
)
def test_what_does_not_go_together_is_refused_in_planning(steps: Sequence[Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        sparing.run(task=tiny_task(), steps=steps)


def test_fields_are_checked() -> None:
    with pytest.raises(InvalidValue, match="needs dim = 0; it is None"):
        WeightNormalization(init="data", dim=None)
    with pytest.raises(InvalidValue, match="g_shrink"):
        Rpgd(g_shrink=0)


class Module(pl.LightningModule):
    def __init__(self, directions: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        self.directions = directions

    def training_step(self, batch: Any, number: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        assert len(parametrized_layers(self.model)) == 2
        if self.directions:
            return RPGD(self.model, lr=0.1, freeze_g_steps=4)
        return torch.optim.SGD(self.model.parameters(), lr=0.1)


def trained(folder: Path, make: Any, directions: bool, epochs: int, checkpoint: Path | None = None) -> Any:
    draw = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(12, 4, generator=draw), torch.arange(12) % 2)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[Reparametrization(make)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = Module(directions)

    class Save(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(folder / "end.ckpt")

    trainer.callbacks.append(Save())
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=checkpoint, weights_only=True)
    return module.model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("directions", [False, True], ids=["weight_norm", "rpgd"])
def test_the_callback_serves_scripts_and_goes_on_from_checkpoints(tmp_path: Path, directions: bool) -> None:
    def make(model: nn.Module) -> None:
        shrink_scales(unit_direction(model), 0.5)

    given = make if directions else sparing.weight_normalize
    whole = trained(tmp_path, given, directions, 4)
    assert list(whole.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    trained(tmp_path, given, directions, 2)
    rest = trained(tmp_path, given, directions, 4, tmp_path / "end.ckpt")
    assert same(rest.state_dict(), whole.state_dict())


def test_the_callback_needs_to_know_the_network() -> None:
    callback = Reparametrization(network="net")
    with pytest.raises(InvalidValue, match="network = 'net': Module has no such module"):
        callback.setup(None, Module(False), "fit")
