"""What Lightning callbacks share that serve trainings of Sparing as well as scripts of your own."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from sparing.core.errors import InvalidValue


class ResumedCallback(Callback):
    """A callback whose state is taken up once what it belongs to is made."""

    _state: dict[str, Any] | None = None
    _seen = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the training begins."""
        self._state = state_dict or None

    def taken_state(self) -> dict[str, Any] | None:
        """What :meth:`load_state_dict` was given, once."""
        state, self._state = self._state, None
        return state

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Know the optimizer steps made: a checkpoint's, if it goes on from one."""
        self._seen = trainer.global_step

    def stepped(self, trainer: Any) -> bool:
        """Whether the batch that has ended ended an optimizer step; to be asked once after each batch."""
        before, self._seen = self._seen, trainer.global_step
        return before != self._seen

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End as at the end: Lightning calls no teardown then."""
        self.teardown(trainer, pl_module, "fit")


def network_of(module: Any, name: str) -> nn.Module:
    """The network in a Lightning module; :class:`InvalidValue` when there is none of this name."""
    found = getattr(module, name, None)
    if not isinstance(found, nn.Module):
        raise InvalidValue(
            f"network = {name!r}: {type(module).__name__} has no such module; name the attribute that holds the network"
        )
    return found


def training_steps(trainer: Any, module: Any) -> int:
    """Optimizer steps of a training; :class:`InvalidValue` when nobody knows them."""
    steps = getattr(module, "total_steps", None) or trainer.estimated_stepping_batches
    if not isinstance(steps, int):
        raise InvalidValue("the training has no known length; give max_steps, or a schedule in steps")
    return steps
