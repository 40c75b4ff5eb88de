"""A Lightning callback that averages weights, for trainings of Sparing and for anybody's own script."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.training.callbacks import ResumedCallback, network_of
from sparing.optimization.averaging import Use, warmed_decay


class WeightAverage(ResumedCallback):
    """Exponential moving average of all parameters and buffers, updated after each optimizer step.

    After step t: θ̄ ← d θ̄ + (1 − d) θ, beginning with θ̄ = θ after the first step; buffers that are no floating-point
    numbers (counters) are copied. It runs in anybody's Lightning script::

        trainer = Trainer(callbacks=[WeightAverage(0.999)])
        trainer.fit(module)                  # module.model then has the averaged weights, with use="ema"

    Its state is part of Lightning's checkpoints, so that a resumed training goes on with the same average.

    Args:
        decay: d, in (0, 1).
        warmup: use :func:`~sparing.optimization.averaging.warmed_decay` in its place.
        use: "ema": put the average into the network when the training ends; "raw": leave it, take the average from
            :attr:`averaged`; "best": the better of the two on the validation data, in trainings of Sparing only.
        network: name of the Lightning module's attribute that holds the network.

    Raises:
        InvalidValue: a decay outside (0, 1), another ``use``, or no such network.
        IncompatibleStep: a network that cannot be copied.
    """

    def __init__(self, decay: float = 0.9998, *, warmup: bool = True, use: Use = "ema", network: str = "model") -> None:
        warmed_decay(decay, 0)
        if use not in ("ema", "raw", "best"):
            raise InvalidValue(f"use = {use!r}; ema, raw or best is expected")
        self.decay, self.warmup, self.use, self.network = decay, warmup, use, network
        self.updates = 0
        """Optimizer steps that are in the average."""
        self._average: AveragedModel | None = None

    @property
    def averaged(self) -> nn.Module:
        """The network with the averaged weights; there is one from the training's beginning on."""
        if self._average is None:
            raise InvalidValue("there is no average yet: it is made when the training begins")
        return self._average.module

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Copy the network; in a training of Sparing, have the copy scored beside it."""
        found = network_of(pl_module, self.network)
        try:
            self._average = AveragedModel(found, multi_avg_fn=self._mix, use_buffers=True)
        except RuntimeError as error:
            raise IncompatibleStep(f"the network {type(found).__name__} cannot be copied: {error}") from error
        self._average.requires_grad_(False)
        if (state := self.taken_state()) is not None:
            self._average.module.load_state_dict(state["weights"])
            self._average.n_averaged.fill_(state["updates"])
            self.updates = state["updates"]
        if isinstance(beside := getattr(pl_module, "beside", None), dict):
            beside["ema"] = self._average.module
            pl_module.candidates = {"ema": ("ema",), "raw": ("",), "best": ("", "ema")}[self.use]
        elif self.use == "best":
            raise InvalidValue('use = "best" needs a training of Sparing, which scores both; take "ema" or "raw" here')

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the average if this batch ended an optimizer step."""
        if not self.stepped(trainer) or self._average is None:
            return
        with torch.no_grad():
            self._average.update_parameters(getattr(pl_module, self.network))
        self.updates += 1

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the average into the network of a script; trainings of Sparing do so themselves."""
        if self.use == "ema" and not isinstance(getattr(pl_module, "beside", None), dict):
            getattr(pl_module, self.network).load_state_dict(self.averaged.state_dict())

    def _mix(self, average: Any, current: Any, _: Any) -> None:
        """One update of tensors of one type and device, in place."""
        if not (average[0].is_floating_point() or average[0].is_complex()):
            torch._foreach_copy_(average, current)
            return
        decay = warmed_decay(self.decay, self.updates) if self.warmup else self.decay
        torch._foreach_lerp_(average, current, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """The average and what it has seen."""
        if self._average is None:
            return {}
        weights = {
            name: value for name, value in self._average.module.state_dict().items() if isinstance(value, Tensor)
        }
        return {"weights": weights, "updates": self.updates}
