"""Label smoothing (Szegedy et al. 2016): a network that is never asked for certainty.

torch has the loss: ``cross_entropy(logits, labels, label_smoothing=ε)`` is (1 − ε) NLL + ε · mean over the classes of
−log p, which is also EMO's. What is here brings it into a training whose loss is the task's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.job import Job
    from sparing.core.task import Task


def uniform_cross_entropy(logits: Tensor, *, dim: int = 1, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Cross-entropy of the uniform distribution over K classes and softmax(logits), in nats: −(1/K) Σₖ log pₖ.

    Args:
        logits: (N, K) or (N, K, …), classes along ``dim``.
        dim: which dimension holds the classes.
        reduction: "mean" over all positions but the classes, or their "sum".
    """
    from torch.nn.functional import log_softmax

    if logits.numel() == 0:
        raise InvalidValue(f"logits of shape {tuple(logits.shape)}; at least one position and one class are needed")
    mean = -log_softmax(logits, dim=dim).mean()
    return mean * (logits.numel() // logits.shape[dim]) if reduction == "sum" else mean


def smoothing_term(task: Task, epsilon: float) -> Callable[[Tensor, Any, Any, nn.Module], Tensor]:
    """A loss term for a :class:`TrainingPlan`: ε · (uniform cross-entropy − the task's loss), added to the loss so far.

    With nothing else in the plan that is (1 − ε) · the task's loss + ε · :func:`uniform_cross_entropy`. Only the task's
    own loss is smoothed: terms of other steps keep their weight, whether they come before or after.
    """
    import torch

    def term(loss: Tensor, outputs: Any, batch: Any, model: nn.Module) -> Tensor:
        if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2:
            found = f"one of shape {tuple(outputs.shape)}" if isinstance(outputs, torch.Tensor) else f"{type(outputs)}"
            raise IncompatibleStep(
                f"smooth_labels needs a model whose output is one tensor (N, classes, …), not {found}"
            )
        uniform = uniform_cross_entropy(outputs, reduction=task.loss_reduction)
        return loss + epsilon * (uniform - task.loss(outputs, batch))

    return term


@step("smooth_labels")
class SmoothLabels(Step):
    """Train towards labels that are a little unsure: each gives a share of its weight to all classes alike.

    The task's loss is taken to be the cross-entropy of one tensor of logits.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"classification"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    source: ClassVar[str] = "Szegedy et al. 2016, Rethinking the Inception Architecture, arXiv:1512.00567, section 7"

    epsilon: float = Field(default=0.1, gt=0, lt=1)
    """Share of each label's weight that is spread evenly over all classes."""

    def apply(self, job: Job) -> Job:
        """Add the term to the training plan."""
        task, epsilon = job.task, self.epsilon
        return job.replace(training=job.training.adding(loss_terms=lambda: smoothing_term(task, epsilon)))
