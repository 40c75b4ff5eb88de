"""How a student of a graph network learns from its teacher: CPF, GraphAKD, GLNN and soft targets.

A framework is the loss L_KD + L_label that RELIANT (Dong et al. 2023, arXiv:2301.01150) adds its fairness to; each is a
frozen set of hyper-parameters whose :meth:`~Framework.loss` is a function of outputs. Losses that need no framework are
functions here.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    kl_div,
    log_softmax,
    normalize,
    relu,
    softmax,
)

from sparing.core.errors import InvalidValue
from sparing.distillation.logits import distillation_loss
from sparing.models.convnet import whole

if TYPE_CHECKING:
    from torch_geometric.data import Data


@dataclass(frozen=True)
class TeacherOutputs:
    """What a trained teacher says of all nodes; it is never asked again."""

    log_prob: Float[Tensor, "..."]
    """Log-probabilities (N, C)."""
    embedding: Float[Tensor, "..."] | None = None
    """(N, h); GraphAKD needs it, as wide as the student's."""
    parameters: int | None = None
    """Numbers the teacher holds, for the report."""
    latency_ms: float | None = None
    """Milliseconds it took to answer for the whole graph, for the report."""

    def __post_init__(self) -> None:
        if self.log_prob.ndim != 2:
            raise InvalidValue(f"log_prob of shape {tuple(self.log_prob.shape)}; (N, C) is expected")
        total = self.log_prob.detach().exp().sum(1)
        wrong = (~torch.isclose(total, torch.ones_like(total), atol=1e-3)).nonzero().flatten()
        if len(wrong):
            node = int(wrong[0])
            raise InvalidValue(
                f"the teacher's probabilities of node {node} sum to {float(total[node]):.4g}; 1 is expected: log_prob "
                "holds log-probabilities, log_softmax(logits)"
            )
        if self.embedding is not None and (self.embedding.ndim != 2 or len(self.embedding) != len(self.log_prob)):
            raise InvalidValue(
                f"an embedding of shape {tuple(self.embedding.shape)} for {len(self.log_prob)} nodes; (N, h) is "
                "expected"
            )

    @property
    def prob(self) -> Float[Tensor, "n c"]:
        """Probabilities (N, C)."""
        return self.log_prob.exp()

    @classmethod
    def of(cls, model: nn.Module, data: Data) -> TeacherOutputs:
        """The answers of a network ``(x, edge_index)`` → logits in evaluation mode; its embedding is what its method
        ``embed`` gives, None without such a method or where it refuses, as that of a network of one layer does."""
        training = model.training
        try:
            model.eval()
            with torch.no_grad():
                logits = model(data.x, data.edge_index)
                start = time.perf_counter()
                model(data.x, data.edge_index)
                seconds = time.perf_counter() - start
                embed: Any = getattr(model, "embed", None)
                try:
                    embedding = None if embed is None else embed(data.x, data.edge_index)
                except InvalidValue:  # no inner layer
                    embedding = None
        finally:
            model.train(training)
        count = sum(p.numel() for p in model.parameters())
        return cls(log_softmax(logits, 1), embedding, count, seconds * 1e3)


class StudentOutputs(NamedTuple):
    """What a student says of all nodes."""

    logits: Tensor
    """(N, C)."""
    embedding: Tensor | None = None
    """(N, h), of students that have one."""


@dataclass(frozen=True)
class Lesson:
    """All that a framework may look at besides the student's outputs: no label outside V_L is in it."""

    teacher: TeacherOutputs
    edge_index: Int[Tensor, "2 e"]
    """(2, E)."""
    train: Int[Tensor, " k"]
    """V_L: numbers of the nodes whose labels are known, (k,)."""
    labels: Int[Tensor, " k"]
    """Their labels, (k,)."""
    unlabelled: Int[Tensor, " u"]
    """V_U: all other nodes, (u,)."""


def frobenius_distance(
    student_prob: Float[Tensor, "n c"], teacher_prob: Float[Tensor, "n c"], index: Shaped[Tensor, " k"]
) -> Float[Tensor, ""]:
    """CPF's ‖p − t‖ over all nodes ``index``: the root of the sum of squares, no mean (N, C) → a scalar."""
    return (student_prob[index] - teacher_prob[index]).norm()


def glnn_loss(
    student_logits: Float[Tensor, "n c"],
    teacher_log_prob: Float[Tensor, "n c"],
    labels: Int[Tensor, " k"],
    train: Int[Tensor, " k"],
    lam: float = 0.0,
) -> Float[Tensor, ""]:
    """λ · CE + (1 − λ) · KL(teacher ‖ student) (Zhang et al. 2022, arXiv:2110.08727, equation 1).

    Args:
        student_logits: (N, C).
        teacher_log_prob: (N, C); no gradient flows into it.
        labels: of the nodes ``train``, (k,).
        train: numbers of the nodes whose labels count, (k,); the cross-entropy is their mean.
        lam: λ; the divergence is the mean over all N nodes.
    """
    soft = kl_div(log_softmax(student_logits, 1), teacher_log_prob.detach(), reduction="batchmean", log_target=True)
    return lam * cross_entropy(student_logits[train], labels) + (1 - lam) * soft


@dataclass(frozen=True)
class Framework:
    """A way to distil, with the settings it is trained by unless others are given.

    A framework of your own defines :meth:`loss`; one with networks of its own, as GraphAKD's discriminators, makes them
    in :meth:`helper` and trains them by :meth:`helper_loss` before the student's step of each epoch.
    """

    alpha: ClassVar[float] = 10.0
    """Weight of the fairness loss."""
    lr: ClassVar[float] = 0.01
    """Learning rate of Adam for the proxy, for what :meth:`helper` makes and, times :attr:`student_lr`, the student."""
    student_lr: ClassVar[float] = 1.0
    """The student's learning rate in units of ``lr``."""
    weight_decay: ClassVar[float] = 5e-4
    """Of the student, and of what :meth:`helper` makes."""
    epochs: ClassVar[int] = 200
    """Steps of full batches."""
    patience: ClassVar[int] = 500
    """Epochs without a better validation after which training ends."""
    select: ClassVar[Literal["accuracy", "loss"]] = "accuracy"
    """What the best epoch is found by, on the validation nodes."""
    needs_embedding: ClassVar[bool] = False
    """Whether the student must have methods ``embed`` and ``head``, as :class:`~sparing.models.gnn_students.SGCStudent`
    has."""

    def loss(self, student: StudentOutputs, lesson: Lesson, helper: nn.Module | None = None) -> Tensor:
        """L_KD + L_label, a scalar."""
        raise NotImplementedError

    def helper(self, lesson: Lesson) -> nn.Module | None:
        """A network that is trained beside the student and dropped after it, or None."""
        return None

    def helper_loss(self, helper: nn.Module, student: StudentOutputs, lesson: Lesson) -> Tensor:
        """What trains the helper; the student's outputs come detached."""
        raise NotImplementedError

    def check(self, student: StudentOutputs, lesson: Lesson) -> None:
        """Raise :class:`InvalidValue` for outputs that the loss cannot be taken of."""
        if student.logits.shape != lesson.teacher.log_prob.shape:
            raise InvalidValue(
                f"the student's outputs have shape {tuple(student.logits.shape)}, the teacher's "
                f"{tuple(lesson.teacher.log_prob.shape)}; they must be equal"
            )


@dataclass(frozen=True)
class CPF(Framework):
    """The probabilities' Frobenius distance over V_U, no label term (Yang, Liu and Shi 2021, arXiv:2103.02885).

    It is no mean, so the fairness weight must be large.
    """

    alpha: ClassVar[float] = 1e3
    weight_decay: ClassVar[float] = 0.01
    epochs: ClassVar[int] = 1000

    def loss(self, student: StudentOutputs, lesson: Lesson, helper: nn.Module | None = None) -> Tensor:
        """‖softmax(Y) − T‖ over V_U."""
        return frobenius_distance(softmax(student.logits, 1), lesson.teacher.prob, lesson.unlabelled)


@dataclass(frozen=True)
class GLNN(Framework):
    """λ · CE on V_L + (1 − λ) · KL over all nodes (Zhang et al. 2022, arXiv:2110.08727)."""

    lam: float = 0.0
    """λ."""

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise InvalidValue(f"lam = {self.lam}; 0 … 1 is expected")

    def loss(self, student: StudentOutputs, lesson: Lesson, helper: nn.Module | None = None) -> Tensor:
        """See :func:`glnn_loss`."""
        return glnn_loss(student.logits, lesson.teacher.log_prob, lesson.labels, lesson.train, self.lam)


@dataclass(frozen=True)
class SoftKD(Framework):
    """T² · KL over all nodes + label_weight · CE on V_L (Hinton et al. 2015, the labels' weight ours)."""

    temperature: float = 1.0
    """T."""
    label_weight: float = 0.5
    """Of the cross-entropy."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("temperature", self.temperature, "> 0"),
            ("label_weight", self.label_weight, "≥ 0"),
        ):
            if not (math.isfinite(value) and value >= 0) or (least == "> 0" and value == 0):
                raise InvalidValue(f"{name} = {value}; a finite number {least} is expected")

    def loss(self, student: StudentOutputs, lesson: Lesson, helper: nn.Module | None = None) -> Tensor:
        """The sum of both."""
        soft = distillation_loss(student.logits, lesson.teacher.log_prob, self.temperature)
        return soft + self.label_weight * cross_entropy(student.logits[lesson.train], lesson.labels)


# --- GraphAKD (He et al. 2022, "Compressing Deep Graph Neural Networks via Adversarial Knowledge Distillation")


class LogitDiscriminator(nn.Module):
    """D(z) = W₂ · ReLU(z + W₁ z + b₁): class logits, and last a score for "the teacher's" (arXiv:2205.11678, sec. 4.3).

    Shapes: (N, C) → (N, C + 1).
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        whole("LogitDiscriminator", num_classes=num_classes)
        self.lin = nn.Linear(num_classes, num_classes)
        self.lin2 = nn.Linear(num_classes, num_classes + 1, bias=False)

    def forward(self, z: Float[Tensor, "n c"]) -> Float[Tensor, "n c1"]:
        """Logits or log-probabilities (N, C) → (N, C + 1)."""
        return self.lin2(relu(z + self.lin(z)))


class LocalDiscriminator(nn.Module):
    """scale · Σ_j d_j ê_uj ê_vj for each edge (u, v), ê the rows of an embedding at length 1 (sec. 4.2).

    Shapes: (N, h), (2, E) → (E,).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.d, self.scale = _weights("LocalDiscriminator", hidden)

    def forward(self, embedding: Float[Tensor, "n h"], edge_index: Int[Tensor, "2 e"]) -> Float[Tensor, " e"]:
        """Scores of the edges."""
        e = normalize(embedding)
        return self.scale * ((e * self.d)[edge_index[0]] * e[edge_index[1]]).sum(1)


class GlobalDiscriminator(nn.Module):
    """scale · ê_uᵀ diag(d) g for each node u, g = σ(mean over nodes of an embedding that is not normalised) (sec. 4.2).

    Shapes: (N, h), (h,) → (N,).
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.d, self.scale = _weights("GlobalDiscriminator", hidden)

    @staticmethod
    def summary(embedding: Float[Tensor, "n h"]) -> Float[Tensor, " h"]:
        """g (h,) of an embedding (N, h)."""
        return torch.sigmoid(embedding.mean(0))

    def forward(self, embedding: Float[Tensor, "n h"], summary: Float[Tensor, " h"]) -> Float[Tensor, " n"]:
        """Scores of the nodes."""
        return self.scale * (normalize(embedding) * self.d) @ summary


def _weights(name: str, hidden: int) -> tuple[nn.Parameter, nn.Parameter]:
    whole(name, hidden=hidden)
    return nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.full((1,), 0.5))


class Discriminators(nn.Module):
    """The three of GraphAKD: of logits, of edges, of the graph; called ``logit``, ``local`` and ``graph``."""

    def __init__(self, num_classes: int, hidden: int) -> None:
        super().__init__()
        self.logit, self.local, self.graph = (
            LogitDiscriminator(num_classes),
            LocalDiscriminator(hidden),
            GlobalDiscriminator(hidden),
        )


def _told(scores: Tensor, real: bool) -> Tensor:
    """Mean binary cross-entropy of raw scores against "the teacher's" (1) or "the student's" (0)."""
    return binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(real)))


def discriminator_terms(
    nets: Discriminators, z_student: Tensor, e_student: Tensor, lesson: Lesson
) -> dict[str, Float[Tensor, ""]]:
    """What the discriminators are trained by: "logit" (half of two terms), "local", "global_teacher" and
    "global_student", by whose embedding is summarised.

    Args:
        nets: the three.
        z_student: the student's logits or log-probabilities (N, C).
        e_student: its embedding (N, h).
        lesson: teacher, edges, V_L and labels.
    """
    z_teacher, e_teacher = lesson.teacher.log_prob, _embedding_of(lesson)
    taught, learned = nets.logit(z_teacher), nets.logit(z_student)
    classes = sum(cross_entropy(made[lesson.train, :-1], lesson.labels) for made in (taught, learned))
    summaries = {"teacher": nets.graph.summary(e_teacher), "student": nets.graph.summary(e_student)}
    scores = {name: (nets.graph(e_teacher, g), nets.graph(e_student, g)) for name, g in summaries.items()}
    return {
        "logit": (_told(taught[:, -1], True) + _told(learned[:, -1], False) + classes) / 2,
        "local": _told(nets.local(e_teacher, lesson.edge_index), True)
        + _told(nets.local(e_student, lesson.edge_index), False),
        "global_teacher": _told(scores["teacher"][0], True) + _told(scores["teacher"][1], False),
        "global_student": _told(scores["student"][1], True) + _told(scores["student"][0], False),
    }


def adversarial_terms(
    nets: Discriminators, z_student: Tensor, e_student: Tensor, lesson: Lesson
) -> dict[str, Float[Tensor, ""]]:
    """What the student is trained by: "label" (cross-entropy on V_L), "logit" (half of two terms), "l1" (the distance
    of log-probabilities, summed over classes, the mean of nodes), "local", "global_teacher", and "global_student",
    which is the discriminators' own term.

    The arguments are those of :func:`discriminator_terms`.
    """
    z_teacher, e_teacher = lesson.teacher.log_prob, _embedding_of(lesson)
    learned = nets.logit(z_student)
    classes = cross_entropy(learned[lesson.train, :-1], lesson.labels)
    own = nets.graph.summary(e_student)
    return {
        "label": cross_entropy(z_student[lesson.train], lesson.labels),
        "logit": (classes + _told(learned[:, -1], True)) / 2,
        "l1": (z_student - z_teacher).abs().sum() / len(z_teacher),
        "local": _told(nets.local(e_student, lesson.edge_index), True),
        "global_teacher": _told(nets.graph(e_student, nets.graph.summary(e_teacher)), True),
        "global_student": _told(nets.graph(e_student, own), True) + _told(nets.graph(e_teacher, own), False),
    }


def _embedding_of(lesson: Lesson) -> Tensor:
    if lesson.teacher.embedding is None:
        raise InvalidValue("GraphAKD compares embeddings: give the teacher's, TeacherOutputs(log_prob, embedding)")
    return lesson.teacher.embedding


@dataclass(frozen=True)
class GraphAKD(Framework):
    """Three discriminators that the student learns to deceive (He et al. 2022, arXiv:2205.11678).

    The student gives logits and an embedding as wide as the teacher's.
    """

    alpha: ClassVar[float] = 10.0
    lr: ClassVar[float] = 1e-3
    student_lr: ClassVar[float] = 0.1
    epochs: ClassVar[int] = 600
    select: ClassVar[Literal["accuracy", "loss"]] = "loss"
    needs_embedding: ClassVar[bool] = True

    strict_reference: bool = False
    """Compare the student's raw logits with the teacher's log-probabilities, as the authors' code does; otherwise
    log-probabilities are compared with log-probabilities."""

    def helper(self, lesson: Lesson) -> Discriminators:
        """The three discriminators."""
        return Discriminators(lesson.teacher.log_prob.shape[1], _embedding_of(lesson).shape[1])

    def helper_loss(self, helper: nn.Module, student: StudentOutputs, lesson: Lesson) -> Tensor:
        """The sum of :func:`discriminator_terms`."""
        return self._sum(discriminator_terms, helper, student, lesson)

    def loss(self, student: StudentOutputs, lesson: Lesson, helper: nn.Module | None = None) -> Tensor:
        """The sum of :func:`adversarial_terms`."""
        return self._sum(adversarial_terms, helper, student, lesson)

    def _sum(self, terms: Any, helper: nn.Module | None, student: StudentOutputs, lesson: Lesson) -> Tensor:
        logits = student.logits if self.strict_reference else log_softmax(student.logits, 1)
        return torch.stack(list(terms(helper, logits, student.embedding, lesson).values())).sum()

    def check(self, student: StudentOutputs, lesson: Lesson) -> None:
        """Both have embeddings, of one width."""
        super().check(student, lesson)
        taught = _embedding_of(lesson)
        assert student.embedding is not None
        if student.embedding.shape != taught.shape:
            raise InvalidValue(
                f"the student's embedding has shape {tuple(student.embedding.shape)}, the teacher's "
                f"{tuple(taught.shape)}; they must be equal: choose the student's hidden units by the teacher's"
            )


FRAMEWORKS: dict[str, type[Framework]] = {"cpf": CPF, "graphakd": GraphAKD, "glnn": GLNN, "soft": SoftKD}
"""Names in recipes."""


def framework_settings(kind: type[Framework]) -> tuple[str, ...]:
    """The fields of a framework."""
    return tuple(item.name for item in fields(kind))
