"""The loop that every condenser of images goes through: losses, seconds, states that are kept, a bar on a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from sparing.condensation.callbacks import Callbacks
from sparing.core.bar import Bar
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.probe import peak_mib
from sparing.core.store import cpu_seconds

if TYPE_CHECKING:
    from sparing.core.training.fit import Keeper


class Run:
    """One condensing, from its beginning or from a state that was kept.

    Args:
        learned: name → leaf tensor; overwritten by a kept state.
        optimizer: of these tensors.
        callbacks: see :class:`~sparing.condensation.callbacks.Callbacks`.
        settings: plain JSON; a kept state must be of the same.
        iterations: how many there are in all.
        keeper: where states are kept; None: nowhere.
        every: iterations between two states.

    Raises:
        InvalidValue: a state of other settings or callbacks.
    """

    def __init__(
        self,
        learned: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        callbacks: Callbacks,
        settings: Mapping[str, Any],
        iterations: int,
        keeper: Keeper | None,
        every: int,
    ) -> None:
        self.learned, self.optimizer, self.callbacks, self.settings = learned, optimizer, callbacks, settings
        self.iterations, self.keeper, self.every = iterations, keeper, every
        self.losses: list[float] = []
        spent = (0.0, 0.0)
        state = keeper.load() if keeper is not None else None
        if state is not None:
            if state["settings"] != settings:
                raise InvalidValue(f"the kept state is of {state['settings']}; this condensing is {settings}")
            with torch.no_grad():
                for name, tensor in learned.items():
                    tensor.copy_(state["learned"][name])
            optimizer.load_state_dict(state["optimizer"])
            callbacks.load(state["callbacks"])
            self.losses, spent = list(state["losses"]), tuple(state["spent"])
        self._since = (time.perf_counter() - spent[0], cpu_seconds() - spent[1])
        self._bar = Bar()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def left(self) -> Iterator[int]:
        """The numbers of the iterations that are still to be done."""
        yield from range(len(self.losses), self.iterations)

    def end(self, iteration: int, loss: float) -> None:
        """An iteration is over: its loss is noted, callbacks hear of it, and a state may be kept.

        Raises:
            TrainingDiverged: a loss that is not finite.
        """
        if not math.isfinite(loss):
            raise TrainingDiverged(f"the loss of iteration {iteration} is {loss}; a smaller learning rate may help")
        self.losses.append(loss)
        self.callbacks.iteration_end(iteration, loss)
        if self.keeper is not None and (iteration + 1) % self.every == 0:
            self.keeper.save(
                {
                    "settings": dict(self.settings),
                    "learned": {name: tensor.detach() for name, tensor in self.learned.items()},
                    "optimizer": self.optimizer.state_dict(),
                    "callbacks": self.callbacks.state(),
                    "losses": self.losses,
                    "spent": list(self.spent()),
                }
            )
        if self._bar.due and sys.stderr.isatty():
            self._bar.draw(len(self.losses), self.iterations, f"condensing, loss {loss:.4g}")

    def spent(self) -> tuple[float, float]:
        """(wall, CPU) seconds of this attempt, and of those before it up to their last state."""
        return time.perf_counter() - self._since[0], cpu_seconds() - self._since[1]

    def cost(self, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> dict[str, float]:
        """Seconds, the highest memory of the process so far, and bytes of the data before and after."""
        wall, cpu = self.spent()
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_bytes": peak_mib() * 2**20,
            "bytes_before": float(sum(tensor.nbytes for tensor in before)),
            "bytes_after": float(sum(tensor.nbytes for tensor in after)),
        }
