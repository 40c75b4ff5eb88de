"""FTRL-proximal and group-lasso FTRL: optimizers that leave exact zeros (McMahan et al. 2013; Ni et al. 2019).

FTRL zeroes single weights, G-FTRL whole rows of a table; xDeepInt (Yan and Li 2020, arXiv:2301.01089) trains its
embeddings with the second and everything else with the first. Both take dense gradients and sparse ones. With sparse
gradients a step costs time for the rows a batch touches, however large the table is, and gives what the dense gradient
of the same batch gives. In a loop of your own::

    optimizer = combined_optimizer(model, alpha=0.1, lambda1=4, lambda2=1, lr=0.05, l1=0.1, l2=0.1)
    loss = binary_cross_entropy_with_logits(model(ids), clicked, reduction="sum")

The strengths of regularisation belong to the loss that is **summed** over the batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from sparing.core.errors import IncompatibleStep, InvalidValue, NoEffect, shown
from sparing.core.step import Stage, Step, step
from sparing.models.ctr import CTRModel, RemappedIds

if TYPE_CHECKING:
    from sparing.core.job import Job

MEAN_LOSS_LAMBDA = 0.1
"""λ1 above this zeroes nearly everything when the loss is a mean over the batch."""


def ftrl_update(
    w: Float[Tensor, "*shape"],
    z: Float[Tensor, "*shape"],
    n: Float[Tensor, "*shape"],
    g: Float[Tensor, "*shape"],
    lr: float,
    l1: float,
    l2: float,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """(w, z, n) after one step of FTRL-proximal with learning-rate power −½ (McMahan et al. 2013, algorithm 1).

        σ = (√(n + g²) − √n)/η,  z ← z + g − σ w,  n ← n + g²,
        w = 0 where abs(z) ≤ λ1, else (sign(z) λ1 − z) / (√n/η + 2 λ2)

    λ2 counts twice, as in TensorFlow. ``lr`` is η, ``l1`` λ1, ``l2`` λ2; nothing that is given is changed.
    """
    root, n = n.sqrt(), n + g * g
    after = n.sqrt()
    z = z + g - (after - root) / lr * w
    w = (z.clamp(-l1, l1) - z) / (after / lr + 2 * l2)
    return torch.where(z.abs() <= l1, 0.0, w), z, n


def group_ftrl_update(
    w: Float[Tensor, "rows dim"],
    z: Float[Tensor, "rows dim"],
    n: Float[Tensor, "rows dim"],
    g: Float[Tensor, "rows dim"],
    alpha: float,
    beta: float,
    lambda1: float,
    lambda2: float,
) -> tuple[Float[Tensor, "rows dim"], Float[Tensor, "rows dim"], Float[Tensor, "rows dim"]]:
    """(w, z, n) after one step of FTRL with a group lasso on each row (Ni et al. 2019, as xDeepInt uses it).

        σ = (√(n + g²) − √n)/α,  z ← z + g − σ w,  n ← n + g²,  r = ‖z_row‖₂,  t = λ1 √D,
        w_row = 0 if r ≤ t, else z (t/r − 1) / ((β + √n)/α + λ2)

    λ2 counts once here. Nothing that is given is changed.
    """
    root, n = n.sqrt(), n + g * g
    after = n.sqrt()
    z = z + g - (after - root) / alpha * w
    r = z.norm(dim=1, keepdim=True)
    threshold = lambda1 * math.sqrt(z.shape[1])
    w = z * (threshold / r - 1) / ((beta + after) / alpha + lambda2)
    return torch.where(r <= threshold, 0.0, w), z, n


class _Proximal(Optimizer):
    """What both have in common: two states for each number, and steps on the rows a gradient names.

    A row of a parameter that has never had a gradient other than 0 becomes zero at the first step, as it does under the
    formulas, where w follows from z = 0. With ``zero_untouched=False`` it keeps its initial value until it has one.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if not isinstance(defaults["zero_untouched"], bool):
            raise InvalidValue(f"zero_untouched = {defaults['zero_untouched']!r}; true or false is expected")
        super().__init__(params, defaults)

    def _updated(self, group: dict[str, Any], w: Tensor, z: Tensor, n: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _check(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Raise for a parameter or setting that cannot be."""

    def _accumulator(self, group: dict[str, Any]) -> float:
        return 0.0

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; raises :class:`InvalidValue` for settings or parameters that the method does not know."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for parameter in group["params"] or [torch.zeros(1, 1)]:
                self._check(group, parameter)
                if not parameter.is_floating_point():
                    raise InvalidValue(f"{type(self).__name__}: a parameter of type {parameter.dtype}")
        except InvalidValue:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what ``closure`` returned, which is called with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(group, parameter, parameter.grad)
        return loss

    def _step(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        first = not state
        if first:
            state["z"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            start = self._accumulator(group)
            state["n"] = torch.full_like(parameter, start, memory_format=torch.preserve_format)
        z, n = state["z"], state["n"]
        if not gradient.is_sparse:
            w, new_z, new_n = self._updated(group, parameter, z, n, gradient)
            if not group["zero_untouched"]:
                w = torch.where(_seen(new_n, self._accumulator(group)), w, parameter)
            parameter.copy_(w)
            z.copy_(new_z)
            n.copy_(new_n)
            return
        if gradient.sparse_dim() != 1:
            raise InvalidValue(
                f"{type(self).__name__}: a gradient with {gradient.sparse_dim()} sparse dimensions; one, the rows, is "
                "expected"
            )
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        before = parameter.index_select(0, rows)
        w, new_z, new_n = self._updated(group, before, z.index_select(0, rows), n.index_select(0, rows), values)
        if not group["zero_untouched"]:
            w = torch.where(_seen(new_n, self._accumulator(group)), w, before)
        elif first:
            parameter.zero_()
        parameter.index_copy_(0, rows, w)
        z.index_copy_(0, rows, new_z)
        n.index_copy_(0, rows, new_n)


def _seen(n: Tensor, start: float) -> Tensor:
    """Rows (of a vector: numbers) that have had a gradient, in a shape that broadcasts to ``n``."""
    moved = n != torch.tensor(start, dtype=n.dtype)
    return moved if n.ndim < 2 else moved.flatten(1).any(1).view(-1, *[1] * (n.ndim - 1))


class FTRL(_Proximal):
    """FTRL-proximal with L1 and L2 on single weights; see :func:`ftrl_update`.

    State for each parameter: "z" and "n", of its shape.

    Args:
        params: parameters or groups, as torch's optimizers take them.
        lr: η > 0.
        l1: λ1 ≥ 0 of the summed loss.
        l2: λ2 ≥ 0 of the summed loss; counts twice.
        initial_accumulator: n before the first step, more than 0.
        zero_untouched: whether rows without a gradient become zero at the first step.

    Raises:
        InvalidValue: arguments outside these bounds.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.05,
        l1: float = 0.1,
        l2: float = 0.1,
        initial_accumulator: float = 0.1,
        zero_untouched: bool = True,
    ) -> None:
        settings = {"lr": lr, "l1": l1, "l2": l2, "initial_accumulator": initial_accumulator}
        super().__init__(params, {**settings, "zero_untouched": zero_untouched})

    def _check(self, group: dict[str, Any], parameter: Tensor) -> None:
        _numbers("FTRL", group, positive=("lr", "initial_accumulator"), least_zero=("l1", "l2"))

    def _accumulator(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator"])

    def _updated(self, group: dict[str, Any], w: Tensor, z: Tensor, n: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return ftrl_update(w, z, n, g, _rate(group), group["l1"], group["l2"])


class GroupFTRL(_Proximal):
    """FTRL with a group lasso on each row of a table; see :func:`group_ftrl_update`.

    State for each parameter: "z" and "n", of its shape. α is the groups' "lr", where schedules look for it.

    Args:
        params: parameters (N, D) or groups, as torch's optimizers take them.
        alpha: α > 0.
        beta: β ≥ 0.
        lambda1: λ1 ≥ 0; a row stays zero while the norm of its z is at most λ1 √D.
        lambda2: λ2 ≥ 0.
        zero_untouched: whether rows without a gradient become zero at the first step, as published. A row's random
            initial value is then lost unless the first batch holds it.
        loss_reduction: how the loss is reduced over a batch. Nothing is computed from it: λ1 is meant for "sum", and
            with "mean" a λ1 above 0.1 is warned of.

    Raises:
        InvalidValue: arguments outside these bounds; a parameter that is no matrix.
    """

    def __init__(
        self,
        params: Any,
        alpha: float = 0.1,
        beta: float = 1.0,
        lambda1: float = 4.0,
        lambda2: float = 1.0,
        zero_untouched: bool = True,
        loss_reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        if loss_reduction not in ("sum", "mean"):
            raise InvalidValue(f'GroupFTRL: loss_reduction = {loss_reduction!r}; "sum" or "mean" is expected')
        settings = {"lr": alpha, "beta": beta, "lambda1": lambda1, "lambda2": lambda2}
        super().__init__(params, {**settings, "zero_untouched": zero_untouched})
        if loss_reduction == "mean" and max(group["lambda1"] for group in self.param_groups) > MEAN_LOSS_LAMBDA:
            warnings.warn(
                f"GroupFTRL: lambda1 = {lambda1} with a loss that is a mean over the batch zeroes nearly every row; "
                "sum the loss, or divide lambda1 by the batch size",
                stacklevel=2,
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may call its rate ``alpha`` too."""
        if "alpha" in param_group:
            param_group["lr"] = param_group.pop("alpha")
        super().add_param_group(param_group)

    def _check(self, group: dict[str, Any], parameter: Tensor) -> None:
        _numbers("GroupFTRL", group, positive=("lr",), least_zero=("beta", "lambda1", "lambda2"))
        if parameter.ndim != 2:
            raise InvalidValue(
                f"GroupFTRL: a parameter of shape {tuple(parameter.shape)}; tables (N, D) are expected, whose rows are "
                "the groups"
            )

    def _updated(self, group: dict[str, Any], w: Tensor, z: Tensor, n: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return group_ftrl_update(w, z, n, g, _rate(group), group["beta"], group["lambda1"], group["lambda2"])


def _rate(group: dict[str, Any]) -> float:
    if not group["lr"] > 0:
        raise InvalidValue(f"lr = {float(group['lr'])}: a schedule brought it to 0, by which FTRL divides")
    return float(group["lr"])


def _numbers(name: str, group: dict[str, Any], positive: Iterable[str], least_zero: Iterable[str]) -> None:
    for field in (*positive, *least_zero):
        value, strict = group[field], field in positive
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (strict and value == 0):
            # schedules call α the rate; the user does not
            called = "alpha" if name == "GroupFTRL" and field == "lr" else field
            bound = "more than 0" if strict else "at least 0"
            raise InvalidValue(f"{name}: {called} = {shown(value)}; a finite number of {bound} is expected")


class CombinedOptimizer(Optimizer):
    """Several optimizers as one: schedules, trainers and checkpoints see one optimizer of torch.

    ``param_groups`` are the parts' groups in order; each part makes its own steps.

    Args:
        parts: optimizers without a common parameter.

    Raises:
        InvalidValue: no part; parts that share a parameter; a state of other parts.
    """

    def __init__(self, *parts: Optimizer) -> None:
        parameters = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
        if not parts or len(set(parameters)) < len(parameters):
            problem = "no optimizer was given" if not parts else "a parameter belongs to two of the optimizers"
            raise InvalidValue(
                f"CombinedOptimizer: {problem}; at least one, each with parameters of its own, is needed"
            )
        self.parts = parts
        super().__init__([{"params": []}], {})
        self._join()

    def _join(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups belong to the parts: raises :class:`InvalidValue`, except while an optimizer is made."""
        if hasattr(self, "param_groups") and self.param_groups:
            raise InvalidValue("CombinedOptimizer: add the group to one of its parts")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of every part; returns what ``closure`` returned, which is called once, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """``parts``: the state of each."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken."""
        states = state_dict.get("parts")
        if not isinstance(states, list | tuple) or len(states) != len(self.parts):
            found = f"{len(states)} parts" if isinstance(states, list | tuple) else ", ".join(map(str, state_dict))
            raise InvalidValue(
                f"a state of {len(self.parts)} optimizers is expected; this one has {found or 'nothing'}"
            )
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._join()


def embedding_layers(model: nn.Module) -> list[nn.Embedding]:
    """The ``nn.Embedding`` layers of a model whose table is trained."""
    return [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight.requires_grad]


def combined_optimizer(
    model: nn.Module,
    alpha: float = 0.1,
    beta: float = 1.0,
    lambda1: float = 4.0,
    lambda2: float = 1.0,
    lr: float = 0.05,
    l1: float = 0.1,
    l2: float = 0.1,
    initial_accumulator: float = 0.1,
    sparse: bool = True,
    loss_reduction: Literal["sum", "mean"] = "sum",
) -> CombinedOptimizer:
    """xDeepInt's optimizer: :class:`GroupFTRL` for embedding tables, :class:`FTRL` for everything else.

    Args:
        model: any module; its tables are the weights of its ``nn.Embedding`` layers. Frozen parameters are left out.
        alpha: learning rate of the tables.
        beta: added to √n in their denominator, at least 0.
        lambda1: strength of their group lasso.
        lambda2: their L2.
        lr: learning rate of everything else.
        l1: its L1.
        l2: its L2, which counts twice.
        initial_accumulator: its n before the first step, more than 0.
        sparse: whether to set ``sparse=True`` on the embedding layers, so that their gradients are. The result is the
            same, and a step takes time for the rows of its batch.
        loss_reduction: of the loss that is trained on; "mean" warns of a ``lambda1`` that would zero nearly everything.

    Raises:
        InvalidValue: a model without a table to train; arguments outside the bounds of the two.
    """
    layers = embedding_layers(model)
    tables = list(dict.fromkeys(layer.weight for layer in layers))
    if not tables:
        raise InvalidValue(f"{type(model).__name__} has no embedding table (nn.Embedding) to train with GroupFTRL")
    ids = {id(table) for table in tables}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    parts: list[Optimizer] = [GroupFTRL(tables, alpha, beta, lambda1, lambda2, loss_reduction=loss_reduction)]
    if others:
        parts.append(FTRL(others, lr, l1, l2, initial_accumulator))
    for layer in layers:
        layer.sparse = sparse
    return CombinedOptimizer(*parts)


# --- the step --------------------------------------------------------------------------------------------------------


@step("group_ftrl")
class GroupFtrl(Step):
    """Train embedding tables with group-lasso FTRL, which zeroes whole rows, and everything else with FTRL.

    It is the optimizer of the next training, with learning rates of its own. The rows of zeros are as many bytes as
    before until a ``drop_zero_rows`` follows.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    fragile: ClassVar[frozenset[str]] = frozenset({"rows of zeros"})
    # an average of weights, or a step that is perturbed, has no exact zeros; and FTRL makes weights anew from all
    # gradients at the present rate, so that a schedule which falls to 0 would take the weights there with it
    slots: ClassVar[frozenset[str]] = frozenset(
        {"optimizer", "scheduler", "average of weights", "learning-rate perturbation"}
    )
    source: ClassVar[str] = (
        "Yan and Li 2020, xDeepInt, arXiv:2301.01089; group lasso: Ni et al. 2019, Feature Selection for Facebook Feed "
        "Ranking System via a Group-Sparsity-Regularized Training Algorithm, CIKM; FTRL: McMahan et al. 2013, alg. 1"
    )

    alpha: float = Field(default=0.1, gt=0)
    """Learning rate of embedding tables."""
    beta: float = Field(default=1.0, ge=0)
    """Added to √n in the tables' denominator."""
    lambda1: float = Field(default=4.0, ge=0)
    """Strength of the group lasso on each row, for a loss that is summed over the batch; 0: no row becomes zero."""
    lambda2: float = Field(default=1.0, ge=0)
    """L2 of the tables."""
    lr: float = Field(default=0.05, gt=0)
    """Learning rate of everything else."""
    l1: float = Field(default=0.1, ge=0)
    """L1 of everything else."""
    l2: float = Field(default=0.1, ge=0)
    """L2 of everything else, which counts twice."""
    initial_accumulator: float = Field(default=0.1, gt=0)
    """n of everything else before the first step."""
    sparse: bool = True
    """Take sparse gradients of tables, so that a step takes time for the rows of its batch; the result is the same."""

    @property
    def promises(self) -> frozenset[str]:  # type: ignore[override]  # no row becomes zero without a penalty
        """A training, and with ``lambda1`` rows of zeros, which a later step drops."""
        return frozenset({"training", *(["rows of zeros"] if self.lambda1 else [])})

    def apply(self, job: Job) -> Job:
        """The job, whose next training is made by a :class:`CombinedOptimizer`."""
        model = job.model if job.model is not None else job.fresh_model()  # which says why there is none
        layers = embedding_layers(model)
        if not layers:
            kinds = sorted({type(m).__name__ for m in model.modules() if [*m.parameters(recurse=False)]})
            raise NoEffect(
                f"{self.id!r}: {type(model).__name__} has no embedding table (nn.Embedding) that is trained; it has "
                f"{', '.join(kinds) or 'nothing that is'}"
            )
        if self.lambda1 and not isinstance(model, CTRModel | RemappedIds):
            raise IncompatibleStep(
                f"{self.id!r}: {type(model).__name__} does not take ids of fields, so its rows of zeros could not be "
                "dropped; with lambda1 = 0 none becomes zero"
            )
        rows = sum(layer.num_embeddings for layer in layers)
        job.notes.remarks.append(f"the next training takes G-FTRL for tables of {rows:,} rows, FTRL for all else")
        reduction = job.task.loss_reduction
        if reduction == "mean" and self.lambda1 > MEAN_LOSS_LAMBDA:
            job.notes.remarks.append(
                f"the loss of {job.task.name} is a mean over the batch, for which lambda1 = {self.lambda1:g} is much; "
                "nearly every row may become zero"
            )

        def wrap(model: nn.Module) -> tuple[nn.Module, Callable[[], nn.Module]]:
            flags = [(layer, layer.sparse) for layer in embedding_layers(model)]

            def undo() -> nn.Module:
                for layer, sparse in flags:  # a later optimizer may take no sparse gradients
                    layer.sparse = sparse
                return model

            return model, undo

        def optimizer(model: nn.Module) -> CombinedOptimizer:
            return combined_optimizer(
                model,
                self.alpha,
                self.beta,
                self.lambda1,
                self.lambda2,
                self.lr,
                self.l1,
                self.l2,
                self.initial_accumulator,
                self.sparse,
                reduction,
            )

        return job.replace(training=job.training.adding(model_wraps=wrap, optimizer=optimizer))
