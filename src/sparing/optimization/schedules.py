"""Learning-rate schedules that torch does not have: linear warm-up into a cosine that is not shifted by it.

J. Zhang et al., "Rethinking Mobile Block for Efficient Attention-based Models", ICCV 2023, train by this schedule.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from sparing.core.errors import InvalidValue
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from sparing.core.job import Job

SHARE = 1 / 15
"""Share of the training that is warm-up when nothing is said: 20 of 300 epochs."""


def cosine_unshifted(
    iteration: int, total: int, warmup: int, peak: float, warmup_start: float = 1e-6, floor: float = 1e-6
) -> float:
    """The learning rate of one iteration: a linear warm-up, then a cosine whose time began with the warm-up.

    With t = ``iteration``, T = ``total`` and W = ``warmup``::

        t < W:   warmup_start + (peak − warmup_start) · t / W
        t ≥ W:   floor + ½ (peak − floor) (1 + cos(π t / T))

    The cosine's time is not shifted by the warm-up, so the rate jumps down where the two meet: it has been falling
    since t = 0. The last iteration, T − 1, ends just above the floor, which every t ≥ T has.

    Args:
        iteration: t, the optimizer steps made before this one: 0 for the first.
        total: T, all optimizer steps of the training, those of the warm-up included. A setting of "E epochs of N
            iterations" has T = E · N.
        warmup: W, optimizer steps of the warm-up (W epochs · N); 0 for none.
        peak: the rate at which the cosine begins and to which the warm-up climbs.
        warmup_start: the rate of iteration 0, if there is a warm-up.
        floor: the rate at the end.

    Raises:
        InvalidValue: t < 0, T < 1, W outside 0…T, a rate below zero, or a start or floor above the peak.
    """
    if iteration < 0 or total < 1 or not 0 <= warmup <= total:
        raise InvalidValue(
            f"iteration = {iteration}, total = {total}, warmup = {warmup}; iteration ≥ 0, total ≥ 1 and "
            "0 ≤ warmup ≤ total are expected"
        )
    if not (0 <= warmup_start <= peak and 0 <= floor <= peak and math.isfinite(peak)):
        raise InvalidValue(
            f"warmup_start = {warmup_start:g} and floor = {floor:g} are expected between 0 and the peak, which is "
            f"{peak:g}"
        )
    if iteration < warmup:
        return warmup_start + (peak - warmup_start) * iteration / warmup
    return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * min(iteration / total, 1.0)))


@step("warmup_cosine")
class WarmupCosine(Step):
    """Warm the learning rate of the next training up from near zero, then let it fall along a cosine.

    The peak is the learning rate of the training's optimizer; a parameter group with a rate of its own climbs to that.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    slots: ClassVar[frozenset[str]] = frozenset({"scheduler"})
    source: ClassVar[str] = "Zhang et al. 2023, Rethinking Mobile Block, arXiv:2301.01146, training recipe"

    warmup_share: float | None = Field(default=None, ge=0, lt=1)
    """Share of the optimizer steps that is warm-up: 0.1 for 3 of 30 epochs. None: 1/15, unless steps are given."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Optimizer steps of warm-up, instead of a share."""
    start: float = Field(default=1e-6, ge=0)
    """Learning rate of the first step."""
    floor: float = Field(default=1e-6, ge=0)
    """Learning rate at the end."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_share is not None and self.warmup_steps is not None:
            raise InvalidValue(
                f"warmup_cosine: warmup_share = {self.warmup_share} and warmup_steps = {self.warmup_steps} say the "
                "same thing; give one of them"
            )

    def warmup(self, total: int) -> int:
        """Steps of warm-up in a training of ``total`` optimizer steps."""
        if self.warmup_steps is None:
            return round(total * (SHARE if self.warmup_share is None else self.warmup_share))
        if self.warmup_steps >= total:
            raise InvalidValue(
                f"warmup_cosine: warmup_steps = {self.warmup_steps}; the whole training has {total} optimizer steps"
            )
        return self.warmup_steps

    def scheduler(self, optimizer: Any, total: int) -> Any:
        """A ``LambdaLR`` for an optimizer that will make ``total`` steps; to be stepped after each of them."""
        from torch.optim.lr_scheduler import LambdaLR

        warmup = self.warmup(total)

        def factor(peak: float) -> Any:
            return lambda done: cosine_unshifted(done, total, warmup, peak, self.start, self.floor) / peak

        return LambdaLR(optimizer, [factor(float(group["lr"])) for group in optimizer.param_groups])

    def apply(self, job: Job) -> Job:
        """Set the training plan's schedule."""
        return job.replace(training=job.training.adding(scheduler=self.scheduler))
