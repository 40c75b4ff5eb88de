"""Distillation of logits (Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network", section 2).

One loss for whatever is predicted by logits over classes: the class of a sample, a masked word, or the place at which
an answer starts and ends.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from sparing.core.errors import IncompatibleStep, InvalidValue
from sparing.core.step import RowId, step
from sparing.core.task import IGNORED, Task
from sparing.core.training import Train

if TYPE_CHECKING:
    from sparing.core.job import Job, TrainingPlan
    from sparing.core.predictor import Predictor


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    *,
    dim: int = 1,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """T² · KL(softmax(v/T) ‖ softmax(z/T)), with student logits z and teacher logits v: a scalar.

    The soft targets are equation 1 of Hinton et al. 2015. Their cross-entropy, which the paper minimises, has the same
    gradient as this divergence; the factor T² is the paper's, and keeps that gradient's size when T changes.

    Args:
        student_logits: (N, C) or (N, C, …), classes along ``dim``.
        teacher_logits: the same shape; no gradient flows into it.
        temperature: T > 0; 1 leaves the teacher's probabilities as they are.
        dim: which dimension holds the classes.
        reduction: "mean" over all positions but the classes, or their "sum".

    Raises:
        InvalidValue: shapes that differ, or T ≤ 0.
    """
    from torch.nn.functional import kl_div, log_softmax

    if student_logits.shape != teacher_logits.shape:
        raise InvalidValue(
            f"the student's logits have shape {tuple(student_logits.shape)}, the teacher's "
            f"{tuple(teacher_logits.shape)}; they must be equal"
        )
    if not temperature > 0:
        raise InvalidValue(f"temperature = {temperature}; more than 0 is needed")
    total = kl_div(
        log_softmax(student_logits / temperature, dim=dim),
        log_softmax(teacher_logits.detach() / temperature, dim=dim),
        reduction="sum",
        log_target=True,
    )
    positions = student_logits.numel() // student_logits.shape[dim] if reduction == "mean" else 1
    return total * (temperature**2 / positions)


class DistillationLoss(nn.Module):
    """α_CE · CE(student, labels) + α_KD · T² · KL(softmax(teacher/T) ‖ softmax(student/T)), for a loop of your own.

    Both terms are means over the predictions that count: those whose label is not -100. Classes lie along the last
    dimension, so that one call serves

    - a classifier: logits (N, classes), labels (N,);
    - a masked language model: logits (N, places, words), labels (N, places) with -100 where nothing was masked;
    - extractive question answering: logits (N, 2, positions) of start and end, labels (N, 2); for a model that gives
      (N, positions, 2), its ``logits.transpose(1, 2)``. Start and end weigh the same.

    Args:
        alpha_ce: weight of the labels' cross-entropy, ≥ 0.
        alpha_kd: weight of the teacher, ≥ 0.
        temperature: T > 0.

    Raises:
        InvalidValue: arguments outside what is allowed; logits or labels whose shapes disagree.
    """

    def __init__(self, alpha_ce: float = 0.5, alpha_kd: float = 0.5, temperature: float = 2.0) -> None:
        super().__init__()
        for name, value in (("alpha_ce", alpha_ce), ("alpha_kd", alpha_kd)):
            if not value >= 0:
                raise InvalidValue(f"{name} = {value}; 0 or more is expected")
        if not temperature > 0:
            raise InvalidValue(f"temperature = {temperature}; more than 0 is needed")
        self.alpha_ce, self.alpha_kd, self.temperature = alpha_ce, alpha_kd, temperature

    def forward(
        self,
        student_logits: Float[Tensor, "*rows classes"],
        teacher_logits: Float[Tensor, "..."],
        labels: Int[Tensor, "..."],
    ) -> Float[Tensor, ""]:
        """(…, classes), (…, classes), (…) → a scalar; 0 when no label counts."""
        if labels.shape != student_logits.shape[:-1]:
            raise InvalidValue(
                f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(student_logits.shape)}; "
                f"{tuple(student_logits.shape[:-1])} is expected"
            )
        if student_logits.shape != teacher_logits.shape:
            raise InvalidValue(
                f"the student's logits have shape {tuple(student_logits.shape)}, the teacher's "
                f"{tuple(teacher_logits.shape)}; they must be equal"
            )
        counts = labels != IGNORED
        if not bool(counts.any()):
            return student_logits.sum() * 0
        student, teacher = student_logits[counts], teacher_logits[counts]
        hard = nn.functional.cross_entropy(student, labels[counts])
        return self.alpha_ce * hard + self.alpha_kd * distillation_loss(student, teacher, self.temperature)


class Teacher(nn.Module):
    """A copy of a model that answers and never learns: its parameters are buffers, so that no optimizer sees them.

    It stays in evaluation mode when what it is part of is put into training mode, and computes no gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    del module._parameters[name]
                    module.register_buffer(name, parameter.detach())
        self.eval()

    @property
    def __wrapped__(self) -> Any:
        """What :func:`inspect.signature` looks at: the model's own arguments are the teacher's."""
        return self.model.forward

    def train(self, mode: bool = True) -> Self:
        """Stay as it is."""
        return super().train(False)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the model answers."""
        with torch.no_grad():
            return self.model(*inputs, **named)


def distillation_term(
    teacher: Predictor, task: Task, temperature: float, weight: float
) -> Callable[[Tensor, Any, Any, nn.Module], Tensor]:
    """A loss term for a :class:`TrainingPlan`: (1 − weight) · loss so far + weight · :func:`distillation_loss`.

    Compared are the rows of the task's ``class_logits``. A module teacher runs on the student's device; any other is
    asked for arrays.
    """
    from sparing.core.predictor import ModulePredictor

    copies: dict[torch.device, Teacher] = {}  # the row's own model stays where it is

    def teach(batch: Any, device: torch.device) -> Tensor:
        if not isinstance(teacher, ModulePredictor):
            return torch.as_tensor(task.outputs(teacher, batch)).to(device)
        if device not in copies:
            copies[device] = Teacher(teacher.model).to(device)
        return task.outputs(copies[device], batch).to(device)

    def term(loss: Tensor, outputs: Any, batch: Any, model: nn.Module) -> Tensor:
        if not isinstance(outputs, torch.Tensor):
            raise IncompatibleStep(
                f"distillation of logits needs a model whose output is one tensor; it gives a {type(outputs).__name__}"
            )
        answers = teach(batch, outputs.device).to(outputs.dtype)
        if answers.shape != outputs.shape:
            raise InvalidValue(
                f"the student's outputs have shape {tuple(outputs.shape)}, the teacher's {tuple(answers.shape)}; they "
                "must be equal"
            )
        student, taught = task.class_logits(outputs, batch)[0], task.class_logits(answers, batch)[0]
        if not len(student):
            return loss  # a batch without a masked word: nothing is predicted
        soft = distillation_loss(student, taught, temperature, reduction=task.loss_reduction)
        return (1 - weight) * loss + weight * soft

    return term


def check_teacher(step_id: str, row: str | None, folder: Path | None) -> None:
    """Raise :class:`InvalidValue` unless a step names one teacher: an earlier row, or a saved model's folder."""
    if (row is None) == (folder is None):
        raise InvalidValue(f"{step_id}: give one of teacher (an earlier row) and teacher_folder (a saved model)")
    if folder is not None and not (folder / "sparing.json").is_file():
        raise InvalidValue(f"teacher_folder = {folder}: no saved model (it holds no sparing.json)")


def teacher_of(job: Job, row: str | None, folder: Path | None) -> Predictor:
    """The predictor that teaches: of an earlier row, or of a saved model's folder."""
    from sparing.core.predictor import load

    if row is not None:
        return job.row(row)
    assert folder is not None
    return load(folder, job.trust)


def _check_logits(task: Task) -> None:
    if "classification" not in task.capabilities and type(task).class_logits is Task.class_logits:
        task.class_logits(torch.zeros(1, 1), ())  # raises, saying what would be right


@step("distil")
class Distil(Train):
    """Train a student on the labels and on a teacher's softened outputs.

    The task's outputs are logits: of classes, of masked words, or of the starts and ends of answers. The fields of
    ``train`` hold for the student's training. With ``weight=0`` the teacher is not asked, and the result
    equals that of ``train`` on the same model, bit for bit: the control.
    """

    needs: ClassVar[frozenset[str]] = frozenset()  # of the task: see check
    source: ClassVar[str] = "Hinton, Vinyals and Dean 2015, Distilling the Knowledge in a Neural Network, section 2"

    teacher: RowId | None = None
    """The earlier row whose model teaches."""
    teacher_folder: Path | None = None
    """A saved model's folder, instead of an earlier row."""
    model: Any = None
    """The student: a registered model's name, {name: …, field: value}, a function without arguments that makes one, or
    a module, which begins with the weights it has. None: the job's model as it stands, with its weights."""
    temperature: float = Field(default=4.0, gt=0)
    """T: how far both sides' outputs are softened."""
    weight: float = Field(default=0.9, ge=0, le=1)
    """Share of the soft loss; the labels' loss has the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_teacher(self.id, self.teacher, self.teacher_folder)
        if isinstance(self.model, str | Mapping):
            self._named()
        elif self.model is not None and not callable(self.model):
            raise InvalidValue(
                f"{self.id}: model = {self.model!r}; a registered model's name, {{name: …, field: value}}, a function "
                "that makes a module, or a module is expected"
            )

    def check(self, task: Task) -> None:
        """The task predicts by logits, and the student can be built."""
        from sparing.core.predictor import build_model, outline

        super().check(task)
        _check_logits(task)
        if isinstance(self.model, str | Mapping):
            name, fields = self._named()
            outline(lambda: build_model(name, task, **fields))

    def _named(self) -> tuple[str, dict[str, Any]]:
        """(name, fields) of a student given by name."""
        from sparing.core.predictor import named_model

        return named_model(self.model, f"{self.id}: model")

    def student(self, job: Job) -> nn.Module:
        """The untrained student; one that is named or made here begins as the same model does when it is the job's."""
        from sparing.core.predictor import build_model
        from sparing.core.randomness import isolated_rng

        if self.model is None:
            return job.fresh_model()
        if hasattr(self.model, "state_dict") and not isinstance(self.model, type):
            return copy.deepcopy(self.model)
        if callable(self.model):
            with isolated_rng("model", job.seed):
                made = self.model()
            if not hasattr(made, "state_dict"):
                raise InvalidValue(f"{self.id}: model made a {type(made).__name__}; a torch.nn.Module is expected")
            return made
        name, fields = self._named()
        with isolated_rng("model", job.seed):
            return build_model(name, job.task, **fields)

    def prepare(self, job: Job) -> tuple[nn.Module, TrainingPlan]:
        """The student, and the plan with the distillation term after all others."""
        _check_logits(job.task)
        student = self.student(job)
        if self.weight == 0:
            return student, job.training

        def term() -> Callable[[Tensor, Any, Any, nn.Module], Tensor]:  # asked when there is training
            return distillation_term(self.find_teacher(job), job.task, self.temperature, self.weight)

        return student, job.training.adding(loss_terms=term)

    def find_teacher(self, job: Job) -> Predictor:
        """The predictor that teaches."""
        return teacher_of(job, self.teacher, self.teacher_folder)

    def apply(self, job: Job) -> Job:
        """The job with the trained student."""
        after = super().apply(job)
        taught = self.teacher or self.teacher_folder
        job.notes.remarks.append(
            f"taught by {str(taught)!r} at temperature {self.temperature:g}, weight {self.weight:g}"
        )
        return after
