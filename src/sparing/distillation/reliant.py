"""RELIANT: a student that does not inherit its teacher's bias (Dong et al., SDM 2023, arXiv:2301.01150).

The student sees each node's features and, behind them, a proxy of bias. The proxy is trained to carry as much bias as
it can, one row for each node; the student is trained to distil and to be fair while all nodes have the same row, the
proxy's mean, so that no bias in the proxy can tell them apart. In a loop of your own::

    proxy = BiasProxy(num_nodes)
    for epoch in range(epochs):
        alternating_step(answer, proxy, distillation, fairness, alpha, student_optimizer, proxy_optimizer)

and :class:`FairDistiller` is such a loop, with validation, a state it goes on from, and a choice of frameworks.
"""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, softmax

from sparing.core.bar import Bar
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.fairness import delta_eo, delta_sp, group_masks
from sparing.core.metrics import macro_f1, roc_auc
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.distillation.fairness import StepKind, members, parity_gap, soft_step
from sparing.distillation.frameworks import CPF, Framework, Lesson, StudentOutputs, TeacherOutputs
from sparing.models.convnet import whole
from sparing.models.gnn_students import CPFStudent, with_columns

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch_geometric.data import Data

    from sparing.core.training.fit import Keeper

FairNodes = Literal["train", "unlabelled", "all"]
"""The nodes that the fairness loss is taken over: V_L, all others, or both."""


class BiasProxy(nn.Module):
    """q numbers for each of N nodes that are trained to carry bias (section 4.2); they begin uniform in 0…1.

    Args:
        num_nodes: N.
        dim: q.
        generator: what they are drawn from; None: torch's own.
    """

    def __init__(self, num_nodes: int, dim: int = 2, generator: torch.Generator | None = None) -> None:
        super().__init__()
        whole("BiasProxy", num_nodes=num_nodes, dim=dim)
        self.columns = nn.Parameter(torch.rand(num_nodes, dim, generator=generator))

    def full(self) -> Float[Tensor, "n q"]:
        """P: each node's own row, (N, q)."""
        return self.columns

    def mean(self) -> Float[Tensor, " q"]:
        """P̄: the mean of the rows, (q,); the one row of all nodes, and all that a trained student needs."""
        return self.columns.mean(0)


class Losses(NamedTuple):
    """Of one epoch, each before the update it leads to."""

    distillation: float
    """L_KD + L_label."""
    student_fairness: float
    """Fairness loss with the mean proxy, unweighted; NaN where none was computed."""
    proxy_fairness: float
    """Fairness loss with each node's own proxy, after the student's update; NaN without a proxy."""


def alternating_step(
    answer: Callable[[Tensor | None], StudentOutputs],
    proxy: BiasProxy | None,
    distillation: Callable[[StudentOutputs], Tensor],
    fairness: Callable[[Tensor], Tensor] | None,
    alpha: float,
    student_optimizer: Optimizer,
    proxy_optimizer: Optimizer | None,
) -> Losses:
    """One epoch: the student's step, then the proxy's (section 4.3).

    The student descends L_KD + α L_fair at [X, 1·P̄], P̄ held fixed; the proxy then ascends α L_fair at [X, P], θ held
    fixed. No gradient of either step is left in the other's parameters.

    Args:
        answer: columns behind the features, (q,) or (N, q), or None without a proxy → the student's outputs.
        proxy: None: no proxy columns, the student's step alone.
        distillation: outputs → L_KD + L_label, a scalar.
        fairness: probabilities (N, C) → L_fair, a scalar; None: not asked for.
        alpha: α ≥ 0; with 0 fairness changes nothing and is not computed.
        student_optimizer: of θ.
        proxy_optimizer: of the proxy.

    Raises:
        InvalidValue: another ``alpha``.
    """
    if not 0 <= alpha < math.inf:
        raise InvalidValue(f"alpha = {alpha}; a finite number ≥ 0 is expected")
    asked = fairness if alpha > 0 else None
    student_optimizer.zero_grad()
    outputs = answer(None if proxy is None else proxy.mean().detach())
    taught = distillation(outputs)
    first = None if asked is None else asked(softmax(outputs.logits, 1))
    (taught if first is None else taught + alpha * first).backward()
    student_optimizer.step()
    second = None
    if asked is not None and proxy is not None:
        assert proxy_optimizer is not None
        second = asked(softmax(answer(proxy.full()).logits, 1))
        (slope,) = torch.autograd.grad(-alpha * second, [proxy.columns])
        proxy.columns.grad = slope
        proxy_optimizer.step()
        proxy_optimizer.zero_grad()
    found = (float("nan") if loss is None else float(loss.detach()) for loss in (taught, first, second))
    return Losses(*found)


def outputs_of(student: nn.Module, x: Tensor, edge_index: Tensor, embedding: bool) -> StudentOutputs:
    """What a student says of a graph: logits, and with ``embedding`` what its ``embed`` gives and ``head`` takes."""
    if not embedding:
        return StudentOutputs(student(x, edge_index))
    check_embedding(student)
    inner: Any = student
    embedded = inner.embed(x, edge_index)
    return StudentOutputs(inner.head(embedded, edge_index), embedded)


def check_embedding(student: nn.Module) -> None:
    """Raise :class:`InvalidValue` for a student that gives no embedding to compare."""
    for method in ("embed", "head"):
        if not callable(getattr(student, method, None)):
            raise InvalidValue(
                f"{type(student).__name__} has no method {method!r}: this framework compares embeddings, and needs a "
                "student with embed(x, edge_index) and head(embedding, edge_index), as SGCStudent"
            )


def quality(
    log_prob: Float[np.ndarray, "n c"],
    labels: Int[np.ndarray, " n"],
    sens: Int[np.ndarray, " n"],
    *,
    positive: int = 1,
    groups: Sequence[Any] | None = None,
) -> dict[str, float]:
    """ "accuracy", "f1" (binary: of the positive class, else macro), "auc" (of the positive class against all others),
    "delta_sp" and "delta_eo" of answers (N, C) about nodes with labels (N,) and a sensitive attribute (N,)."""
    predicted = log_prob.argmax(1)
    inside = predicted == positive
    actual = labels == positive
    if log_prob.shape[1] == 2:
        f1 = float(2 * (inside & actual).sum() / max(int(inside.sum() + actual.sum()), 1))
    else:
        f1 = macro_f1(predicted, labels, log_prob.shape[1])
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": f1,
        "auc": roc_auc(log_prob[:, positive], actual),
        "delta_sp": delta_sp(predicted, sens, positive=positive, groups=groups),
        "delta_eo": delta_eo(predicted, labels, sens, positive=positive, groups=groups),
    }


def check_fair_nodes(student: nn.Module, fair_nodes: FairNodes | None, alpha: float) -> None:
    """Raise :class:`InvalidValue` where no weight of the student moves what fairness is asked for."""
    if alpha > 0 and fair_nodes == "train" and isinstance(student, CPFStudent):
        raise InvalidValue(
            "fair_nodes = 'train'; a CPFStudent answers training nodes with their labels, so that their fairness loss "
            "is a constant: 'unlabelled', which None stands for, or 'all' is expected"
        )


class FairDistiller:
    """Distils a graph network into a student, with RELIANT's fairness or without.

    Args:
        student: a network ``(x, edge_index)`` → logits of all nodes, trained in place. With a proxy it takes the
            features and, behind them, ``proxy_dim`` columns.
        teacher: what the teacher says of all nodes.
        framework: how it is distilled; None: :class:`~sparing.distillation.frameworks.CPF`.
        alpha: weight of the fairness loss, ≥ 0; 0: plain distillation. None: the framework's.
        metric: "sp", statistical parity, or "eo", equal opportunity. The latter takes true labels on training nodes
            and the teacher's predictions on all others.
        proxy: False: no proxy columns, so that with ``alpha`` the fairness loss is all there is. Or a
            :class:`BiasProxy` to begin with.
        fair_nodes: what fairness is asked for: "train", "unlabelled" or "all" nodes. None: "unlabelled" for a
            :class:`~sparing.models.gnn_students.CPFStudent`, which answers training nodes with their labels whatever
            it learns, and "train" for any other student.
        step: the soft decision, see :func:`~sparing.distillation.fairness.soft_step`.
        groups: the two values of the sensitive attribute that are compared; nodes with others count for distillation
            alone. None: 0 and 1, and there are no others.
        positive: the class that stands for a positive decision.
        proxy_dim: q.
        epochs: steps of full batches; None, as for the following: the framework's.
        patience: epochs without a better validation after which training ends.
        lr: learning rate of Adam.
        weight_decay: of the student.
        proxy_weight_decay: of the proxy; the reference has the student's, which shrinks the proxy.
        validate_every: epochs between two looks at the validation nodes.
        seed: of dropout, the proxy's beginning and a framework's own networks.

    Raises:
        InvalidValue: an argument outside what is allowed; see also :meth:`fit`.
    """

    history_: list[Losses]
    """Losses of each epoch."""
    validation_: list[tuple[int, float]]
    """(epoch, accuracy or negative loss on the validation nodes) for each look."""
    best_epoch_: int
    """Whose weights the student has, from 1; the later of equals."""
    proxy_: Tensor | None
    """P̄ (q,) of that epoch, or None."""
    full_proxy_: Tensor | None
    """P (N, q) of that epoch, to go on from, or None."""

    def __init__(
        self,
        student: nn.Module,
        teacher: TeacherOutputs,
        framework: Framework | None = None,
        alpha: float | None = None,
        metric: Literal["sp", "eo"] = "sp",
        proxy: bool | BiasProxy = True,
        fair_nodes: FairNodes | None = None,
        step: StepKind = "reference",
        *,
        groups: Sequence[Any] | None = None,
        positive: int = 1,
        proxy_dim: int = 2,
        epochs: int | None = None,
        patience: int | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        proxy_weight_decay: float = 0.0,
        validate_every: int = 1,
        seed: int = 0,
    ) -> None:
        framework = framework or CPF()
        self.student, self.teacher, self.framework = student, teacher, framework
        self.alpha = framework.alpha if alpha is None else alpha
        self.lr = framework.lr if lr is None else lr
        self.weight_decay = framework.weight_decay if weight_decay is None else weight_decay
        self.epochs = framework.epochs if epochs is None else epochs
        self.patience = framework.patience if patience is None else patience
        for name, value in (
            ("alpha", self.alpha),
            ("weight_decay", self.weight_decay),
            ("proxy_weight_decay", proxy_weight_decay),
        ):
            if not 0 <= value < math.inf:
                raise InvalidValue(f"{name} = {value}; a finite number ≥ 0 is expected")
        if not 0 < self.lr < math.inf:
            raise InvalidValue(f"lr = {self.lr}; a finite number > 0 is expected")
        whole("FairDistiller", epochs=self.epochs, patience=self.patience, validate_every=validate_every)
        whole("FairDistiller", proxy_dim=proxy_dim)
        whole("FairDistiller", at_least=0, positive=positive)
        for name, word, known in (
            ("metric", metric, ("sp", "eo")),
            ("fair_nodes", fair_nodes, (None, "train", "unlabelled", "all")),
        ):
            if word not in known:
                raise InvalidValue(f"{name} = {word!r}; one of {', '.join(map(str, known))} is expected")
        soft_step(torch.zeros(1), step)
        self.metric, self.proxy, self.step = metric, proxy, step
        self.fair_nodes = fair_nodes or ("unlabelled" if isinstance(student, CPFStudent) else "train")
        self.groups, self.positive, self.proxy_dim = groups, positive, proxy_dim
        self.proxy_weight_decay, self.validate_every, self.seed = proxy_weight_decay, validate_every, seed

    def fit(self, data: Data, keeper: Keeper | None = None, keep_every: int = 20) -> Self:
        """Train the student on a graph: ``x`` (N, F), ``edge_index`` (2, E), ``y`` (N,), ``sens`` (N,) and masks.

        Labels are read at ``train_mask``, and at ``val_mask`` to choose the epoch; ``sens`` only with an ``alpha``
        above 0. The caller's random states are as before afterwards.

        Args:
            data: PyG's.
            keeper: where the state of an unfinished training is kept; one that was killed goes on from there and ends
                with the same bits.
            keep_every: epochs between two states.

        Raises:
            InvalidValue: another number of nodes than the teacher's, the proxy's, the labels' or the masks'; nodes that
                both train and validate; a label, or ``positive``, that is none of the teacher's classes; a sensitive
                attribute that is not binary without ``groups``; a group without a node, or without a positive one for
                "eo", among the nodes that fairness is asked for; fairness of nodes that the student answers with their
                labels; outputs that do not fit the framework.
            TrainingDiverged: a loss that is not finite.
        """
        whole("FairDistiller.fit", keep_every=keep_every)
        lesson, val, val_labels = self._lesson(data)
        proxy = self._begin_proxy(len(data.x))
        student, training = self.student, self.student.training
        if isinstance(student, CPFStudent):
            student.set_labels(lesson.train, lesson.labels)
        with isolated_rng("helper", self.seed):
            helper = self.framework.helper(lesson)
        student_lr = self.lr * self.framework.student_lr
        optimizers: dict[str, Optimizer] = {
            "student": torch.optim.Adam(student.parameters(), student_lr, weight_decay=self.weight_decay)
        }
        parts: dict[str, nn.Module] = {"student": student}
        if proxy is not None:
            parts["proxy"] = proxy
            optimizers["proxy"] = torch.optim.Adam(proxy.parameters(), self.lr, weight_decay=self.proxy_weight_decay)
        if helper is not None:
            parts["helper"] = helper
            optimizers["helper"] = torch.optim.Adam(helper.parameters(), self.lr, weight_decay=self.weight_decay)
        fairness = self._fairness(data, lesson)

        def answer(columns: Tensor | None) -> StudentOutputs:
            x = data.x if columns is None else with_columns(data.x, columns)
            return outputs_of(student, x, data.edge_index, self.framework.needs_embedding)

        kept = _Kept(parts, optimizers, keeper, keep_every)
        bar = Bar()
        try:
            student.train()
            with isolated_rng("look", self.seed), torch.no_grad():
                self.framework.check(answer(None if proxy is None else proxy.mean()), lesson)
            for epoch in range(kept.epochs, self.epochs):
                if kept.validation and epoch - kept.best_epoch >= self.patience:
                    break  # here, so that a training that goes on after its end does not learn further
                with isolated_rng(derive_seed("epoch", self.seed, epoch)):
                    student.train()
                    if helper is not None:
                        self._teach_helper(helper, optimizers["helper"], answer, proxy, lesson)
                    losses = alternating_step(
                        answer,
                        proxy,
                        lambda outputs: self.framework.loss(outputs, lesson, helper),
                        fairness,
                        self.alpha,
                        optimizers["student"],
                        optimizers.get("proxy"),
                    )
                if not math.isfinite(losses.distillation):
                    raise TrainingDiverged(
                        f"the loss of epoch {epoch + 1} is {losses.distillation}; a smaller lr than {self.lr:g} may "
                        "help"
                    )
                kept.history.append(losses)
                if (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.epochs:
                    student.eval()
                    with torch.no_grad():
                        logits = answer(None if proxy is None else proxy.mean()).logits[val]
                    kept.look(epoch + 1, self._score(logits, val_labels))
                kept.keep()
                if bar.due and sys.stderr.isatty():
                    bar.draw(epoch + 1, self.epochs, f"distilling, loss {losses.distillation:.4g}")
        finally:
            bar.stop()
            student.train(training)
        kept.restore_best()
        self.history_, self.validation_, self.best_epoch_ = kept.history, kept.validation, kept.best_epoch
        self.proxy_ = None if proxy is None else proxy.mean().detach()
        self.full_proxy_ = None if proxy is None else proxy.full().detach()
        return self

    def log_prob(self, data: Data) -> Float[Tensor, "n c"]:
        """The fitted student's log-probabilities (N, C) of a graph's nodes; it may be another graph.

        Raises:
            InvalidValue: before :meth:`fit`.
        """
        if not hasattr(self, "proxy_"):
            raise InvalidValue("this FairDistiller is not fitted yet: call fit(data) first")
        training = self.student.training
        try:
            self.student.eval()
            with torch.no_grad():
                x = data.x if self.proxy_ is None else with_columns(data.x, self.proxy_)
                return log_softmax(self.student(x, data.edge_index), 1)
        finally:
            self.student.train(training)

    def predict(self, data: Data) -> Int[Tensor, " n"]:
        """Classes (N,) of a graph's nodes, by the proxy's mean."""
        return self.log_prob(data).argmax(1)

    def report(self, data: Data) -> dict[str, dict[str, float | None]]:
        """ "teacher" and "student" → :func:`quality` on the test nodes, parameters, and milliseconds for the graph.

        A student's milliseconds are the median of five answers; its parameters include the proxy's mean.
        """
        test = data.test_mask
        outside = {"labels": data.y[test].cpu().numpy(), "sens": data.sens[test].cpu().numpy()}
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            learned = self.log_prob(data)
            seconds.append(time.perf_counter() - start)
        size = sum(p.numel() for p in self.student.parameters()) + (0 if self.proxy_ is None else len(self.proxy_))
        costs: Mapping[str, tuple[Tensor, int | None, float | None]] = {
            "teacher": (self.teacher.log_prob, self.teacher.parameters, self.teacher.latency_ms),
            "student": (learned, size, statistics.median(seconds) * 1e3),
        }
        return {
            name: {
                **quality(made[test].cpu().numpy(), **outside, positive=self.positive, groups=self.groups),
                "parameters": count,
                "latency_ms": latency,
            }
            for name, (made, count, latency) in costs.items()
        }

    # --- inside

    def _lesson(self, data: Data) -> tuple[Lesson, Tensor, Tensor]:
        """What training may know, and the validation nodes with their labels."""
        nodes, classes = self.teacher.log_prob.shape
        if len(data.x) != nodes:
            raise InvalidValue(f"the teacher answered for {nodes} nodes; the graph has {len(data.x)}")
        if self.positive >= classes:
            raise InvalidValue(f"positive = {self.positive}; the teacher knows the classes 0 … {classes - 1}")
        for name in ("y", "train_mask", "val_mask", "sens"):
            found = getattr(data, name, None)
            if found is not None and found.shape != (nodes,):
                raise InvalidValue(f"{name} has shape {tuple(found.shape)}; ({nodes},) is expected, one for each node")
        both = (data.train_mask & data.val_mask).nonzero().flatten()
        if len(both):
            raise InvalidValue(
                f"{len(both)} nodes, the first of them {int(both[0])}, are in train_mask and in val_mask; an epoch is "
                "chosen by nodes that nothing was learned from"
            )
        train, val = (mask.nonzero().flatten() for mask in (data.train_mask, data.val_mask))
        for name, found in (("train_mask", train), ("val_mask", val)):
            if not len(found):
                raise InvalidValue(f"{name} holds no node; at least one is expected")
            for node in found[(data.y[found] < 0) | (data.y[found] >= classes)][:1].tolist():
                raise InvalidValue(
                    f"node {node} of {name} has the label {int(data.y[node])}; the teacher knows the classes 0 … "
                    f"{classes - 1}"
                )
        rest = (~data.train_mask).nonzero().flatten()
        return Lesson(self.teacher, data.edge_index, train, data.y[train], rest), val, data.y[val]

    def _begin_proxy(self, nodes: int) -> BiasProxy | None:
        if self.proxy is False:
            return None
        if self.proxy is True:
            generator = torch.Generator().manual_seed(derive_seed("proxy", self.seed))
            return BiasProxy(nodes, self.proxy_dim, generator)
        if len(self.proxy.columns) != nodes:
            raise InvalidValue(f"the proxy has rows for {len(self.proxy.columns)} nodes; the graph has {nodes}")
        return copy.deepcopy(self.proxy)

    def _fairness(self, data: Data, lesson: Lesson) -> Callable[[Tensor], Tensor] | None:
        """Probabilities (N, C) → L_fair."""
        if self.alpha == 0:
            return None
        check_fair_nodes(self.student, self.fair_nodes, self.alpha)
        if getattr(data, "sens", None) is None:
            raise InvalidValue("the graph has no sensitive attribute: data.sens (N,) is expected, or alpha = 0")
        group_masks(data.sens.cpu().numpy(), self.groups)
        index = {"train": lesson.train, "unlabelled": lesson.unlabelled, "all": None}[self.fair_nodes]
        among = None
        if self.metric == "eo":
            known = self.teacher.log_prob.argmax(1)
            known[lesson.train] = lesson.labels
            among = known == self.positive
        first, second = members(data.sens, index, among=among, groups=self.groups)
        return lambda prob: parity_gap(prob, first, second, self.step)

    def _teach_helper(
        self,
        helper: nn.Module,
        optimizer: Optimizer,
        answer: Callable[[Tensor | None], StudentOutputs],
        proxy: BiasProxy | None,
        lesson: Lesson,
    ) -> None:
        with torch.no_grad():
            outputs = answer(None if proxy is None else proxy.mean())
        optimizer.zero_grad()
        self.framework.helper_loss(helper, outputs, lesson).backward()
        optimizer.step()
        optimizer.zero_grad()

    def _score(self, logits: Tensor, labels: Tensor) -> float:
        """Higher is better."""
        if self.framework.select == "loss":
            return -float(cross_entropy(logits, labels))
        return float((logits.argmax(1) == labels).float().mean())


class _Kept:
    """Where a training is: what a killed one goes on from, and the best epoch so far, its proxy included."""

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        keeper: Keeper | None,
        every: int,
    ) -> None:
        self.parts, self.optimizers, self.keeper, self.every = parts, optimizers, keeper, every
        self.history: list[Losses] = []
        self.validation: list[tuple[int, float]] = []
        self.best_epoch, self.best_score, self.best = 0, -math.inf, self._weights()
        state = keeper.load() if keeper is not None else None
        if state is not None:
            self.best = state["best"]
            self.best_epoch, self.best_score = state["best_epoch"], state["best_score"]
            self.history = [Losses(*row) for row in state["history"]]
            self.validation = [(epoch, score) for epoch, score in state["validation"]]
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            for name, optimizer in optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])

    @property
    def epochs(self) -> int:
        """Epochs that are done."""
        return len(self.history)

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        return {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items() if name != "helper"}

    def look(self, epoch: int, score: float) -> None:
        """A validation; the later of equals is the best."""
        self.validation.append((epoch, score))
        if score >= self.best_score:
            self.best_epoch, self.best_score, self.best = epoch, score, self._weights()

    def keep(self) -> None:
        """Every so many epochs a state is kept."""
        if self.keeper is not None and self.epochs % self.every == 0:
            self.keeper.save(
                {
                    "parts": {name: dict(part.state_dict()) for name, part in self.parts.items()},
                    "optimizers": {name: made.state_dict() for name, made in self.optimizers.items()},
                    "best": self.best,
                    "best_epoch": self.best_epoch,
                    "best_score": self.best_score,
                    "history": [list(row) for row in self.history],
                    "validation": [list(row) for row in self.validation],
                }
            )

    def restore_best(self) -> None:
        """The weights of the best epoch."""
        for name, weights in self.best.items():
            self.parts[name].load_state_dict(weights)
