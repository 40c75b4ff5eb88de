"""Gradients that harm no earlier task: restoring them, choosing among them, and the programme that joins them.

FedKNOW (Luopan et al. 2023, arXiv:2212.01738) turns the update of the current task so that neither earlier tasks nor
the aggregated model lose by it, after GEM (Lopez-Paz and Ranzato 2017, arXiv:1706.08840). In a loop of your own::

    memories = torch.stack([restore_gradient(model, knowledge, x) for knowledge in earlier], 1)      # (p, k)
    gradient, info = integrate_gradients(gradient, memories)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue

if TYPE_CHECKING:
    from sparing.federated.knowledge import TaskKnowledge

Metric = Literal["wasserstein", "cosine", "euclidean"]
MARGIN, EPS, CLIP, TEMPERATURE = 0.5, 1e-3, 50.0, 2.0
"""The published constants."""
ROWS = 2**20
"""Rows of a matrix that are turned to float64 at a time."""


def distillation_loss(
    student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "..."], temperature: float = TEMPERATURE
) -> Float[Tensor, ""]:
    """−Σ softmax(teacher/T) · log softmax(student/T) over classes, averaged over the batch; without a factor T².

    Args:
        student: logits (B, C).
        teacher: logits (B, C); no gradient flows into them.
        temperature: T > 0.
    """
    if not temperature > 0:
        raise InvalidValue(f"temperature = {temperature!r}; more than 0 is expected")
    target = (teacher.detach() / temperature).softmax(-1)
    return nn.functional.cross_entropy(student / temperature, target)


def block_logits(logits: Float[Tensor, "batch classes"], classes: Sequence[int]) -> Float[Tensor, "batch block"]:
    """The logits of some classes (ids; a range for a block): what is outside a task has no part in its soft-max."""
    if not len(classes) or min(classes) < 0 or max(classes) >= logits.shape[1]:
        raise InvalidValue(f"classes {classes} are not among the {logits.shape[1]} of the head")
    if isinstance(classes, range) and classes.step == 1:
        return logits[:, classes.start : classes.stop]
    return logits[:, list(classes)]


def block_loss(logits: Float[Tensor, "batch classes"], y: Tensor, block: range, where: str = "") -> Float[Tensor, ""]:
    """Cross-entropy on a task's block of the head.

    Args:
        logits: of the whole head (B, C).
        y: class ids of the whole head (B,), or probabilities over it (B, C).
        block: the task's classes.
        where: begins the message about labels that do not fit.
    """
    asked = block_logits(logits, block)
    if y.ndim == 2:
        if y.shape != logits.shape:
            raise InvalidValue(
                f"{where}probabilities of shape {tuple(y.shape)}; {tuple(logits.shape)}, of all classes of the head, "
                "are expected"
            )
        return nn.functional.cross_entropy(asked, y[:, block.start : block.stop])
    outside = (y < block.start) | (y >= block.stop)
    if outside.any():
        raise InvalidValue(f"{where}class {int(y[outside][0])} in the data of a task of {block!r}")
    return nn.functional.cross_entropy(asked, y - block.start)


def flat_gradient(loss: Tensor, parameters: list[nn.Parameter], retain_graph: bool = False) -> Float[Tensor, "p"]:
    """The gradient of a scalar by all of ``parameters`` as one vector (p,), zeros where the loss does not reach."""
    slopes = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(parameter).flatten() if slope is None else slope.flatten()
            for slope, parameter in zip(slopes, parameters, strict=True)
        ]
    )


def restore_gradient(
    model: nn.Module,
    knowledge: TaskKnowledge,
    x: Tensor,
    temperature: float = TEMPERATURE,
    parameters: list[nn.Parameter] | None = None,
) -> Float[Tensor, "p"]:
    """The gradient of an earlier task at the model as it is, without a sample of that task.

    Its knowledge labels the current samples softly, and the model is asked to answer as it does.

    Args:
        model: the current one, in the mode it is in.
        knowledge: of the earlier task.
        x: inputs of the current task (B, …).
        temperature: of both soft-maxes.
        parameters: those to derive by; None: all that are trained.

    Returns:
        (p,), in the order of the parameters.
    """
    with torch.no_grad():
        taught = knowledge.materialize(model)(x)
    block = knowledge.classes
    loss = distillation_loss(block_logits(model(x), block), block_logits(taught, block), temperature)
    trained = [each for each in model.parameters() if each.requires_grad] if parameters is None else parameters
    return flat_gradient(loss, trained)


@dataclass(frozen=True)
class Integration:
    """What became of a gradient."""

    violated: bool
    """Whether it would have harmed an earlier task."""
    solved: bool
    """Whether the quadratic programme was solved and its answer taken."""
    fallen_back: bool
    """Whether it could not be solved, so that the gradient stayed as it was."""
    v: np.ndarray | None
    """The dual variables v* (k,); None where nothing was solved."""
    dots_before: np.ndarray
    """Mᵀg (k,)."""
    dots_after: np.ndarray
    """Mᵀg' (k,)."""
    norm_before: float
    """‖g‖."""
    norm_after: float
    """‖g'‖, before any clipping."""
    norm_clipped: float
    """‖g'‖ after the clip of all gradients together; as before where none was clipped."""


def _products(
    gradient: Float[Tensor, "p"], memories: Float[Tensor, "p k"]
) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k"]]:
    """(MᵀM, Mᵀg) in float64, a few rows at a time."""
    count = memories.shape[1]
    gram = torch.zeros(count, count, dtype=torch.float64, device=memories.device)
    dots = torch.zeros(count, dtype=torch.float64, device=memories.device)
    for start in range(0, len(memories), ROWS):
        rows, part = memories[start : start + ROWS].double(), gradient[start : start + ROWS].double()
        gram += rows.T @ rows
        dots += rows.T @ part
    return gram.cpu(), dots.cpu()


def _check(gradient: Tensor, memories: Tensor, margin: float, eps: float) -> None:
    if gradient.ndim != 1 or memories.ndim != 2 or len(memories) != len(gradient) or not memories.shape[1]:
        raise InvalidValue(
            f"a gradient of shape {tuple(gradient.shape)} and memories of {tuple(memories.shape)}; (p,) and (p, k) "
            "with k ≥ 1 are expected"
        )
    if not margin >= 0:
        raise InvalidValue(f"margin = {margin!r}; 0 or more is expected")
    if not eps >= 0:
        raise InvalidValue(f"eps = {eps!r}; 0 or more is expected")


def _dual(
    gram: Float[Tensor, "k k"], dots: Float[Tensor, "k"], margin: float, eps: float, eps_relative: bool
) -> np.ndarray | None:
    """v*, or None where the programme cannot be solved."""
    from scipy.linalg import solve_triangular
    from scipy.optimize import nnls

    p, q = gram.numpy(), dots.numpy()
    if not (np.isfinite(p).all() and np.isfinite(q).all()):
        return None
    p = p + eps * (np.trace(p) / len(p) if eps_relative else 1.0) * np.eye(len(p))
    try:
        lower = np.linalg.cholesky(p)
        target = solve_triangular(lower, -(q + margin * p.sum(1)), lower=True)
        u, _ = nnls(lower.T, target)
    except (np.linalg.LinAlgError, RuntimeError, ValueError):
        return None
    return margin + u if np.isfinite(u).all() else None


def project_gradient(
    gradient: Float[Tensor, "p"],
    memories: Float[Tensor, "..."],
    margin: float = MARGIN,
    eps: float = EPS,
    eps_relative: bool = False,
) -> tuple[Float[Tensor, "p"], Float[Tensor, "k"]]:
    """g + M v* with v* = argmin ½ vᵀ(MᵀM + εI)v + (Mᵀg)ᵀv over v ≥ margin; always solved.

    With w = Mᵀg' + εv*: w ≥ 0, and w_j = 0 wherever v*_j > margin. So M_jᵀg' ≥ −εv*_j: products slightly below 0 are
    right. A margin adds at least that share of every column, also of those that are not harmed, and can make g' longer
    than g.

    Args:
        gradient: g (p,).
        memories: M (p, k), a column for each gradient that is not to be harmed.
        margin: lower bound of the dual variables, ≥ 0 (GEM's memory strength).
        eps: ε ≥ 0. Where columns are much shorter than √ε it decides alone.
        eps_relative: take ε times the mean of the columns' squared lengths instead.

    Returns:
        (g' (p,) in the gradient's type, v* (k,) in float64). Worked out in float64.

    Raises:
        InvalidValue: shapes or constants outside these; a programme that has no solution in floating-point numbers.
    """
    _check(gradient, memories, margin, eps)
    v = _dual(*_products(gradient, memories), margin, eps, eps_relative)
    if v is None:
        raise InvalidValue(
            "the quadratic programme could not be solved: a value is not finite, or MᵀM + εI is not positive definite "
            "in float64"
        )
    return _moved(gradient, memories, v), torch.from_numpy(v)


def _moved(gradient: Tensor, memories: Tensor, v: np.ndarray) -> Tensor:
    weights = torch.from_numpy(v).to(memories.device)
    moved = torch.empty_like(gradient)
    for start in range(0, len(gradient), ROWS):
        rows = slice(start, start + ROWS)
        moved[rows] = (gradient[rows].double() + memories[rows].double() @ weights).to(gradient.dtype)
    return moved


def integrate_gradients(
    gradient: Float[Tensor, "p"],
    memories: Float[Tensor, "..."],
    margin: float = MARGIN,
    eps: float = EPS,
    eps_relative: bool = False,
) -> tuple[Float[Tensor, "p"], Integration]:
    """The gradient as it is if it harms no column of ``memories`` (Mᵀg ≥ 0), else :func:`project_gradient`'s.

    Where the programme cannot be solved it stays as it is as well, and the second value says so. Clipping is left to
    the caller, since it looks at all gradients.
    """
    _check(gradient, memories, margin, eps)
    gram, dots = _products(gradient, memories)
    violated = bool((dots < 0).any())
    whole = bool(dots.isfinite().all())
    before = float(gradient.norm())
    v = _dual(gram, dots, margin, eps, eps_relative) if violated or not whole else None
    if v is None:
        lost = violated or not whole
        told = dots.numpy()
        return gradient, Integration(violated, False, lost, None, told, told, before, before, before)
    moved = _moved(gradient, memories, v)
    dots_after, after = dots.numpy() + gram.numpy() @ v, float(moved.norm())
    return moved, Integration(violated, True, False, v, dots.numpy(), dots_after, before, after, after)


def _wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(np.sort(one) - np.sort(other)).mean())


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    norm = float(np.linalg.norm(one) * np.linalg.norm(other))
    return 1.0 if norm == 0 else 1.0 - float(one @ other) / norm


def _euclidean(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other))


DISTANCES: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "wasserstein": _wasserstein,
    "cosine": _cosine,
    "euclidean": _euclidean,
}


def gradient_distances(
    gradient: Float[Tensor, "p"], past: Float[Tensor, "..."], metric: Metric = "wasserstein"
) -> Float[Tensor, "n"]:
    """How far each of ``past`` (n, p) is from ``gradient`` (p,), float64.

    "wasserstein": the Wasserstein-1 distance between the entries of both as samples of equal weight; "cosine": 1 − the
    cosine of their angle; "euclidean": ‖a − b‖.
    """
    if metric not in DISTANCES:
        raise InvalidValue(f"metric = {metric!r}; one of {', '.join(DISTANCES)} is expected")
    current = gradient.detach().double().cpu().numpy()
    apart = [DISTANCES[metric](current, each.detach().double().cpu().numpy()) for each in past]
    return torch.tensor(apart, dtype=torch.float64)


def select_signature_tasks(
    gradient: Float[Tensor, "p"], past: Float[Tensor, "..."], k: int, metric: Metric = "wasserstein"
) -> list[int]:
    """Positions of the k earlier tasks whose gradients are farthest from the current one, the farthest first.

    Args:
        gradient: of the current task (p,).
        past: gradients of earlier tasks (n, p), the earliest first; of equals the earlier is taken.
        k: how many, ≥ 1; all where there are no more.
        metric: see :func:`gradient_distances`.
    """
    if k < 1:
        raise InvalidValue(f"k = {k!r}; 1 or more is expected")
    apart = gradient_distances(gradient, past, metric)
    return torch.sort(apart, descending=True, stable=True).indices[:k].tolist()
