"""Training the exits of a network, all at once (predictive_exit sheet, section 2, and the losses of the baselines)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sparing.adaptive.exits import MultiExitModel
from sparing.core.errors import InvalidValue
from sparing.core.predictor import ModulePredictor
from sparing.core.task import Evaluation, Splits, Task
from sparing.core.training import FitResult, Train, fit

if TYPE_CHECKING:
    from sparing.core.job import TrainingPlan
    from sparing.core.predictor import Predictor
    from sparing.core.training.fit import Keeper

Weights = Literal["equal", "patience", "sdn"]
SDN_FIRST = 0.01
"""What an exit's loss counts at the beginning of SDN's training."""


class ExitTask(Task):
    """A task as a :class:`MultiExitModel` sees it: outputs (N, heads, classes), a weighted sum of the task's losses.

    ``weights``: "equal" (Li et al. 2023; BranchyNet), "patience" (exit i counts i / Σ i, Zhou et al. 2020) or "sdn"
    (Kaya et al. 2019): each exit's weight rises from 0.01 to its ``shares`` of the network's cost while training goes
    on, the final head's is 1. :attr:`progress` says how far training is, 0…1.
    """

    def __init__(self, task: Task, weights: Weights = "equal", shares: tuple[float, ...] = ()) -> None:
        if weights not in ("equal", "patience", "sdn"):
            raise InvalidValue(f"weights = {weights!r}; equal, patience or sdn is expected")
        if weights == "sdn" and not shares:
            raise InvalidValue("weights = 'sdn' needs shares: of the network's cost, up to each exit")
        self.task, self.weights, self.shares = task, weights, shares
        self.progress = 0.0
        self.name, self.metrics, self.capabilities = task.name, task.metrics, task.capabilities
        self.labels, self.preprocessing, self.collate = task.labels, task.preprocessing, task.collate
        self.loss_reduction = task.loss_reduction  # type: ignore[misc]

    def splits(self, root: Any) -> Splits:
        """The task's."""
        return self.task.splits(root)

    def head_weights(self, heads: int) -> list[float]:
        """The weight of each head's loss, the final head's last."""
        if self.weights == "patience":
            total = heads * (heads + 1) / 2
            return [i / total for i in range(1, heads + 1)]
        if self.weights == "sdn":
            return [SDN_FIRST + (share - SDN_FIRST) * self.progress for share in self.shares] + [1.0]
        return [1.0] * heads

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Σ_i w_i · the task's loss of head i."""
        weights = self.head_weights(outputs.shape[1])
        losses = [weight * self.task.loss(outputs[:, i], batch) for i, weight in enumerate(weights)]
        return torch.stack(losses).sum()

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """Means over all heads."""
        assert isinstance(predictor, ModulePredictor)
        heads = len(predictor.model.exits) + 1  # type: ignore[arg-type]
        scores = [
            self.task.evaluate(ModulePredictor(_Head(predictor.model, i), self.task), split).metrics
            for i in range(heads)
        ]
        return Evaluation({name: sum(s[name] for s in scores) / heads for name in scores[0]})

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """The task's."""
        return self.task.example_input(batch)

    def default_model(self) -> nn.Module:
        """The task's, without exits."""
        return self.task.default_model()

    def model_fields(self) -> Mapping[str, Any]:
        """The task's."""
        return self.task.model_fields()


class _Head(nn.Module):
    """One head of a model with exits."""

    def __init__(self, model: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, self.index]


def train_exits(
    model: MultiExitModel,
    task: Task,
    train: Any,
    val: Any = None,
    settings: Train | None = None,
    *,
    freeze_backbone: bool = True,
    weights: Weights = "equal",
    plan: TrainingPlan | None = None,
    seed: int = 0,
    progress: Keeper | None = None,
) -> FitResult:
    """Train all exits of ``model``, in place.

    Args:
        model: from :func:`~sparing.adaptive.exits.attach_exits`.
        task: whose loss each head is given.
        train: data set to train on.
        val: for early stopping and the best epoch, by the mean of all heads; None for neither.
        settings: hyper-parameters; None: Adam at 1e-3, batches of 128, 100 epochs.
        freeze_backbone: train the exits alone; the final head's answers stay what they were, to the bit.
        weights: of the heads' losses, see :class:`ExitTask`.
        plan: what other economies ask of the training.
        seed: decides order, augmentation and whatever else draws random numbers.
        progress: where unfinished work is kept.

    Raises what :func:`~sparing.core.training.fit` raises.
    """
    from lightning import Callback

    shares: tuple[float, ...] = ()
    if weights == "sdn":
        cost = model.costs(task.example_input(1))
        reached = [sum(cost.layer_macs[: i + 1]) / cost.full for i in range(cost.exits)]
        shares = tuple(reached)
    about = ExitTask(task, weights, shares)

    class Clock(Callback):
        """Tells the loss how far training is."""

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            about.progress = min(1.0, trainer.global_step / max(1, int(trainer.estimated_stepping_batches) - 1))

    model.freeze_backbone(freeze_backbone)
    fields: dict[str, Any] = {"optimizer": "Adam", "lr": 1e-3, "batch_size": 128, "epochs": 100}
    chosen = settings or Train(**fields)
    callbacks = [Clock()] if weights == "sdn" else []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")  # the frozen network is
        return fit(model, about, train, val, chosen, plan, seed, progress, callbacks=callbacks)
