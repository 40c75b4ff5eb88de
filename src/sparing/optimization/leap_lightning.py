"""LEAP for a Lightning module of your own: a callback that puts it around the trainer's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sparing.core.randomness import derive_seed
from sparing.optimization.leap import LEAP, check_settings


class LEAPCallback(Callback):
    """Put :class:`~sparing.optimization.leap.LEAP` around every optimizer that the module configures.

    Schedules stay attached to the inner optimizer, whose groups are shared. The random state is part of the optimizer's
    state in Lightning's checkpoints, so a training that is resumed from one goes on with the same noise.

    Args:
        rho: as are the other arguments, what :class:`~sparing.optimization.leap.LEAP` takes.
        seed: the first optimizer's; each further one gets a seed derived from it. All processes must have the same.

    Raises:
        InvalidValue: as LEAP does: for its arguments at once, for an optimizer it cannot wrap when the fit starts.
    """

    def __init__(
        self,
        rho: float | Callable[[int], float] = 0.1,
        mode: str = "relative",
        sigma: float | None = None,
        granularity: str = "per_parameter",
        seed: int = 0,
        clip: float | None = None,
        start_step: int = 0,
        end_step: int | None = None,
        exclude: Callable[[Tensor], bool] | None = None,
    ) -> None:
        check_settings(rho, mode, sigma, granularity, clip, start_step, end_step)
        self.seed = seed
        self.settings: dict[str, Any] = {
            "rho": rho,
            "mode": mode,
            "sigma": sigma,
            "granularity": granularity,
            "clip": clip,
            "start_step": start_step,
            "end_step": end_step,
            "exclude": exclude,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap; a checkpoint's optimizer states are loaded after this."""
        trainer.strategy.optimizers = [
            LEAP(optimizer, generator=derive_seed(self.seed, "leap", number) if number else self.seed, **self.settings)
            for number, optimizer in enumerate(trainer.strategy.optimizers)
        ]
