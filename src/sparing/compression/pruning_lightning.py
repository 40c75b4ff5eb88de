"""Block pruning for a Lightning module of your own: a callback that makes the masks, moves them, and folds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from sparing.compression.pruning import Block, BlockMagnitudePruner, CubicSchedule, Score, check_block, check_sparsity
from sparing.core.errors import IncompatibleStep
from sparing.core.training.callbacks import ResumedCallback, network_of, training_steps


class BlockPruning(ResumedCallback):
    """Prune a network while it is trained, as :class:`~sparing.compression.pruning.BlockMagnitudePruner` does.

    It runs in anybody's Lightning script, and the network is plain again when the training has ended::

        trainer = Trainer(callbacks=[BlockPruning(sparsity=0.8, block=(4, 1))])
        trainer.fit(module)                  # module.model then has its zeros

    Masks are part of the network's state and the steps made part of Lightning's checkpoints, so that a training that
    is resumed goes on with both.

    Args:
        sparsity: as are ``block``, ``exclude``, ``score`` and ``convolutions``, what ``BlockMagnitudePruner`` takes.
        schedule: a :class:`~sparing.compression.pruning.CubicSchedule`, or a function that makes one for a training of
            so many optimizer steps; by default ``CubicSchedule.over``.
        network: name of the Lightning module's attribute that holds the network.
        make: puts masks on a network and returns the pruner, in place of the settings above.

    Raises:
        InvalidValue: settings that are refused, at once; no such network, or a training that has no known length or is
            too short for the schedule, when it begins.
        IncompatibleStep: the training would hand on weights from before the pruning has ended.
    """

    def __init__(
        self,
        sparsity: float = 0.8,
        block: Block = (4, 1),
        schedule: CubicSchedule | Callable[[int], CubicSchedule] = CubicSchedule.over,
        exclude: Sequence[str] = (),
        score: Score = "mean",
        convolutions: bool = False,
        *,
        network: str = "model",
        make: Callable[[nn.Module], BlockMagnitudePruner] | None = None,
    ) -> None:
        check_block(block)
        check_sparsity(sparsity)
        first = schedule if isinstance(schedule, CubicSchedule) else CubicSchedule(0, 1)

        def default(model: nn.Module) -> BlockMagnitudePruner:
            return BlockMagnitudePruner(model, block, sparsity, first, exclude, score, convolutions)

        self.make, self.schedule, self.network = make or default, schedule, network
        self.pruner: BlockMagnitudePruner | None = None
        """There from the training's beginning on."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the masks on, before optimizers are made and a checkpoint is loaded."""
        if stage != "fit":
            return
        self.pruner = self.make(network_of(pl_module, self.network))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Know the length of the training."""
        assert self.pruner is not None
        settings = getattr(pl_module, "settings", None)
        for name in ("restore_best", "early_stopping"):
            if getattr(settings, name, None):
                raise IncompatibleStep(
                    f"{name} = {getattr(settings, name)!r} could hand on weights from before the pruning has ended; "
                    "train to the end when pruning, and again after it with the pattern locked"
                )
        state = self.taken_state()
        if callable(self.schedule):
            self.pruner.schedule = self.schedule(training_steps(trainer, pl_module))
            if state is None:
                self.pruner.prune(self.pruner.schedule.initial)
        if state is not None:
            self.pruner.t = state["t"]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the masks if this batch ended an optimizer step and it is time."""
        if not self.stepped(trainer) or self.pruner is None:
            return
        due = self.pruner.schedule.due(self.pruner.t)
        self.pruner.step()
        if due and callable(curve := getattr(pl_module, "curve", None)):
            curve({"sparsity": self.pruner.report().sparsity})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Fold the masks of a script; trainings of Sparing do so themselves."""
        assert self.pruner is not None
        if callable(tell := getattr(pl_module, "tell", None)):
            tell(str(self.pruner.report()))
        else:
            self.pruner.apply_()

    def state_dict(self) -> dict[str, Any]:
        """The steps made; masks are in the network's state."""
        return {} if self.pruner is None else {"t": self.pruner.t}
