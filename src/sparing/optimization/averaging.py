"""The exponential moving average of a network's weights, as a step; the callback is in :mod:`.averaging_lightning`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.core.errors import InvalidValue
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from sparing.core.job import Job

Use = Literal["ema", "raw", "best"]


def warmed_decay(decay: float, updates: int) -> float:
    """min(decay, (1 + t) / (10 + t)) after t = ``updates`` ≥ 0 updates: the decay with which the next one is made.

    A fixed decay d looks back some 1 / (1 − d) steps: 5,000 with 0.9998. In a training that is not much longer the
    average would still hold the first, random weights. The bound makes it look back a ninth of the steps made so far,
    until that exceeds what ``decay`` asks for (after 45,000 steps with 0.9998); from there on both rules are the same.
    """
    if updates < 0 or not 0 < decay < 1:
        raise InvalidValue(f"decay = {decay}, updates = {updates}; 0 < decay < 1 and updates ≥ 0 are expected")
    return min(decay, (1 + updates) / (10 + updates))


@step("ema")
class Ema(Step):
    """Keep a moving average of the weights through the next training, score it beside them, and hand it on.

    All parameters and all floating-point buffers are averaged, the running statistics of batch norm included; counters
    are taken as they are. Validations score both, as the curves ``val_<metric>`` and ``val_ema_<metric>``; early
    stopping and the best epoch go by what is handed on.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    slots: ClassVar[frozenset[str]] = frozenset({"average of weights"})
    source: ClassVar[str] = (
        "Polyak and Juditsky 1992; in this form Tarvainen and Valpola 2017, arXiv:1703.01780, section 2; decay of "
        "Zhang et al. 2023, arXiv:2301.01146"
    )

    decay: float = Field(default=0.9998, gt=0, lt=1)
    """Share of the old average in the new one, after each optimizer step."""
    warmup: bool = True
    """Begin with a smaller decay, min(decay, (1 + t) / (10 + t)) after t steps, without which a short training hands on
    an average of its first steps. Off: the decay as it is from the first step."""
    use: Use = "ema"
    """What is handed on: the average, the weights as they were trained ("raw": the average is only looked at), or
    whichever is better on the validation data."""

    def apply(self, job: Job) -> Job:
        """Add the callback to the training plan."""
        decay, warmup, use = self.decay, self.warmup, self.use

        def callback() -> Any:
            from sparing.optimization.averaging_lightning import WeightAverage

            return WeightAverage(decay, warmup=warmup, use=use)

        return job.replace(training=job.training.adding(callbacks=callback))
