"""Scales and directions for a Lightning module of your own: a callback that puts them on, and folds them in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

from sparing.core.training.callbacks import network_of
from sparing.optimization.weight_norm import bake, weight_normalize


class Reparametrization(Callback):
    """Train a network on scales and directions, in anybody's Lightning script; it is plain again when ``fit`` ends.

    The module's ``configure_optimizers`` is called after it, and sees scales and directions::

        trainer = Trainer(callbacks=[Reparametrization()])                  # weight normalisation, any optimizer
        trainer = Trainer(callbacks=[Reparametrization(unit_direction)])    # it returns RPGD(self.model, lr=0.1)

    They are part of the network's state, so that a training that is resumed from a checkpoint goes on with them. To
    shrink scales for two phases give a function that does so, not ``g_shrink``, which would do it again on resuming::

        Reparametrization(lambda model: shrink_scales(unit_direction(model), 0.25))

    Args:
        make: puts the parametrisation on a network, in place: weight_normalize, unit_direction, or a function that
            calls one of them with settings.
        network: name of the Lightning module's attribute that holds the network.

    Raises:
        InvalidValue: no such network; what the parametrisation refuses.
        NoEffect: no layer is taken.
    """

    def __init__(self, make: Callable[[Any], Any] = weight_normalize, *, network: str = "model") -> None:
        self.make, self.network = make, network

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put them on, before optimizers are made and a checkpoint is loaded."""
        if stage != "fit":
            return
        self.make(network_of(pl_module, self.network))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fold them; the last checkpoint, which was written before, still has them apart."""
        bake(getattr(pl_module, self.network))
