"""Clients of a fleet: how one device learns its tasks one after the other. Plain torch; nothing here knows a network.

FedKNOW (Luopan et al. 2023, arXiv:2212.01738) and what it is compared with, all in one protocol: ``start_task`` gives a
client its data, ``train_round`` the shared weights of a round, ``end_task`` lets it take what it wants to keep of the
task. What lives from round to round is in ``state``, tensors by name; nothing else does. In a loop of your own::

    client = FedKNOWClient(model, FedKNOWSettings(local_epochs=8), seed=0, client=3)
    client.start_task(0, dataset, range(10))
    update = client.train_round(weights, round=0)
    client.end_task(0)
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import default_collate

from sparing.core.collation import batches_of, items_of
from sparing.core.errors import InvalidValue, did_you_mean
from sparing.core.randomness import isolated_rng
from sparing.federated.knowledge import (
    KnowledgeExtractor,
    MakeOptimizer,
    PackNet,
    TaskKnowledge,
    check_share,
    check_types,
    device_of,
    packed,
    unpacked,
)
from sparing.federated.projection import (
    CLIP,
    EPS,
    MARGIN,
    TEMPERATURE,
    Integration,
    Metric,
    block_logits,
    block_loss,
    distillation_loss,
    flat_gradient,
    integrate_gradients,
    select_signature_tasks,
)

Weights = dict[str, Tensor]
"""A state dict on the CPU, buffers included."""
BatchTransform = Callable[[], Callable[[Any], Any]]
EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Update:
    """What a client sends back."""

    weights: Weights
    """After local training."""
    examples: int
    """Its weight in the average: samples trained on."""
    metrics: dict[str, float]
    """Numbers about the round: train_loss, steps, and what the method counts."""


def _at_least(settings: Any, **lowest: float) -> None:
    """Fields of a settings object that must not be smaller than these."""
    for name, least in lowest.items():
        if not getattr(settings, name) >= least:
            raise InvalidValue(f"{name} = {getattr(settings, name)!r}; {least} or more is expected")


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """What every client has."""

    local_epochs: int = 8
    """Passes over the task's samples in a round."""
    batch_size: int = 40
    """Samples per step."""

    def __post_init__(self) -> None:
        check_types(self)
        _at_least(self, local_epochs=1, batch_size=1)


class ContinualClient(ABC):
    """One device. Its random numbers come from (seed, client, round) alone.

    Batches follow the model to where its parameters are; what is sent back and what is kept is on the CPU.

    Args:
        model: trained in place; its parameters and buffers are what is shared.
        settings: the method's.
        seed: decides order, dropout and whatever else is drawn.
        client: its number.
        optimizer: model → a new optimizer, made in each round; None: SGD with a rate of 0.01.
        batch_transforms: () → (batch → batch), as a training plan holds them.
    """

    shared: ClassVar[bool] = True
    """Whether its update enters the average, and the average enters it."""
    task: int | None
    """The task it is in; None before the first and once one has ended."""
    blocks: dict[int, range]
    """Task → its classes, of the tasks met so far and of those that only others have met."""

    def __init__(
        self,
        model: nn.Module,
        settings: Any,
        seed: int = 0,
        client: int = 0,
        optimizer: MakeOptimizer | None = None,
        batch_transforms: Sequence[BatchTransform] = (),
    ) -> None:
        self.model, self.settings, self.seed, self.client = model, settings, seed, client
        self.optimizer: MakeOptimizer = optimizer or (lambda net: SGD(net.parameters(), lr=0.01))
        self.batch_transforms = tuple(batch_transforms)
        self.task, self.blocks = None, {}
        self._data: Any = None

    # ------------------------------------------------------------------------------------------------------ protocol

    def start_task(self, t: int, data: Any, classes: range) -> None:
        """Meet a task, or, where the client is in it already, give it its data again.

        Args:
            t: its number.
            data: map-style dataset of (input, class id of the whole head).
            classes: its block of the head.
        """
        if not len(data):
            raise InvalidValue(f"client {self.client} has no samples of task {t}")
        if not len(classes) or classes.step != 1 or classes.start < 0:
            raise InvalidValue(f"classes = {classes!r} of task {t}; a block of class ids is expected")
        if self.task is not None and self.task != t:
            raise InvalidValue(f"client {self.client} is in task {self.task}; end_task({self.task}) comes before {t}")
        self.task, self._data = t, data
        self.blocks[t] = classes

    def train_round(self, weights: Mapping[str, Tensor], round: int) -> Update:
        """Train on the current task from the weights given; see :class:`Update`.

        Raises :class:`InvalidValue` for weights of another model.
        """
        self._in_task()
        check_weights(weights, self.model.state_dict())
        with isolated_rng(self.seed, "client", self.client, "round", round):
            losses, counts = self._train(weights)
        metrics = {"train_loss": sum(losses) / max(1, len(losses)), "steps": float(len(losses)), **counts}
        return Update(_copied(self.model.state_dict()), len(self._data), metrics)

    def end_task(self, t: int) -> None:
        """Take what is to be kept of the task; :meth:`start_task` must have given its data."""
        if self.task != t:
            raise InvalidValue(f"client {self.client} is in task {self.task}, not in {t}")
        with isolated_rng(self.seed, "client", self.client, "end", t):
            self._keep(t)
        self.task, self._data = None, None

    def evaluate(self, t: int, data: Any, weights: Mapping[str, Tensor]) -> tuple[int, int]:
        """(right answers, samples) on data of a task the client has met, only its classes being asked about."""
        if t not in self.blocks:
            raise InvalidValue(f"client {self.client} has not met task {t}")
        check_weights(weights, self.model.state_dict())
        model = copy.deepcopy(self.model).eval()
        model.load_state_dict(dict(weights))
        block, right = self.blocks[t], 0
        with torch.no_grad():
            for x, y in batches_of(data, EVALUATION_BATCH):
                answers = block_logits(model(x.to(self.device)), block).argmax(1) + block.start
                right += int((answers == y.to(self.device)).sum())
        return right, len(data)

    def state(self) -> dict[str, Tensor]:
        """All that lives from round to round, tensors by name."""
        task = -1 if self.task is None else self.task
        rows = [[t, block.start, block.stop] for t, block in sorted(self.blocks.items())]
        return {"task": torch.tensor(task), "blocks": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Become the client whose :meth:`state` this was."""
        if not {"task", "blocks"} <= state.keys():
            raise InvalidValue("this is no state of a client: 'task' and 'blocks' are missing")
        task = int(state["task"])
        self.task = None if task < 0 else task
        self.blocks = {t: range(start, stop) for t, start, stop in state["blocks"].tolist()}

    # ------------------------------------------------------------------------------------------------------- methods

    def _train(self, weights: Mapping[str, Tensor]) -> tuple[list[float], dict[str, float]]:
        """Train in place: (losses of the steps, what the method counts)."""
        self.model.load_state_dict(dict(weights))
        self.model.train()
        self._begin(weights)
        optimizer = self.optimizer(self.model)
        losses = []
        for epoch in range(self.settings.local_epochs):
            for number, (x, y) in enumerate(self.batches()):
                losses.append(self._step(optimizer, x, y, epoch, number))
        return losses, self._counts()

    def _begin(self, weights: Mapping[str, Tensor]) -> None:  # noqa: B027  # most methods have nothing to prepare
        """Prepare a round; the model has the weights already."""

    def _step(self, optimizer: Optimizer, x: Tensor, y: Tensor, epoch: int, number: int) -> float:
        """One optimizer step on a batch, the ``number``-th of a pass; returns the task's loss."""
        loss = self._loss(logits := self.model(x), y)
        total = loss + extra if (extra := self._penalty(x, logits)) is not None else loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return float(loss.detach())

    def _penalty(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """What is added to the task's loss, if anything."""
        return None

    def _counts(self) -> dict[str, float]:
        """Figures of the round."""
        return {}

    @abstractmethod
    def _keep(self, t: int) -> None:
        """Take what is to be kept of a task that ends."""

    # ------------------------------------------------------------------------------------------------------- helpers

    @property
    def classes(self) -> range:
        """The current task's block."""
        return self.blocks[self._in_task()]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.model)

    @property
    def earlier(self) -> list[int]:
        """Classes of the other tasks that are known, in ascending order."""
        return sorted(c for t, block in self.blocks.items() if t != self.task for c in block)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the current task's samples, in an order drawn from torch's global generator."""
        order = torch.randperm(len(self._data)).tolist()
        transforms = [make() for make in self.batch_transforms]
        for start in range(0, len(order), self.settings.batch_size):
            batch = tuple(default_collate(items_of(self._data, order[start : start + self.settings.batch_size])))
            for transform in transforms:
                batch = transform(batch)
            yield batch[0].to(self.device), batch[1].to(self.device)

    def _loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """That of the current task, from the logits of the whole head."""
        return block_loss(logits, y, self.classes, f"client {self.client}, task {self.task}: ")

    def _in_task(self) -> int:
        if self.task is None or self._data is None:
            raise InvalidValue(f"client {self.client} is in no task: start_task comes first")
        return self.task


def check_weights(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a state dict with other names or shapes than the model's own."""
    if weights.keys() != own.keys():
        odd = sorted(weights.keys() ^ own.keys())
        raise InvalidValue(f"these weights are of another model: {', '.join(odd[:5])} on one side only")
    for name, tensor in own.items():
        if weights[name].shape != tensor.shape:
            raise InvalidValue(
                f"these weights are of another model: {name} is {tuple(weights[name].shape)}, and "
                f"{tuple(tensor.shape)} here"
            )


def _copied(state: Mapping[str, Tensor]) -> Weights:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = f"{prefix}/"
    return {name.removeprefix(found): tensor for name, tensor in state.items() if name.startswith(found)}


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter that learns."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def head_names(model: nn.Module) -> set[str]:
    """Names of the parameters of the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InvalidValue(f"{type(model).__name__} has no linear layer, so no head can be told from its features")
    last = f"{linear[-1]}." if linear[-1] else ""
    return {name for name, _ in model.named_parameters() if name.startswith(last)}


def integrated_step(
    optimizer: Optimizer,
    loss: Tensor,
    columns: Tensor | None,
    parameters: Sequence[nn.Parameter],
    projected: Sequence[nn.Parameter],
    margin: float = MARGIN,
    eps: float = EPS,
    eps_relative: bool = False,
    clip: float = CLIP,
) -> Integration | None:
    """One optimizer step with a gradient that harms no column.

    Args:
        optimizer: of the parameters.
        loss: the task's, a scalar whose graph is still there.
        columns: gradients of what is not to be harmed (p, k), by ``projected``; None: a plain step.
        parameters: all that learn.
        projected: those of them whose gradient is turned; the others take that of the loss.
        margin: see :func:`~sparing.federated.projection.project_gradient`.
        eps: likewise.
        eps_relative: likewise.
        clip: largest norm of all gradients together where the programme was solved.

    Returns:
        What became of the gradient; None without columns.
    """
    slopes = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    for parameter, slope in zip(parameters, slopes, strict=True):
        parameter.grad = slope
    info = None
    if columns is not None:
        # None and zero differ to an optimizer: only what the programme changed is written back
        own = [torch.zeros_like(each) if each.grad is None else each.grad for each in projected]
        gradient, info = integrate_gradients(
            torch.cat([each.flatten() for each in own]), columns, margin, eps, eps_relative
        )
        if info.solved:
            start = 0
            for parameter in projected:
                parameter.grad = gradient[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
            nn.utils.clip_grad_norm_(list(parameters), clip)
            turned = [each.grad for each in projected if each.grad is not None]
            info = replace(info, norm_clipped=float(nn.utils.get_total_norm(turned)))
    optimizer.step()
    optimizer.zero_grad()
    return info


@dataclass(frozen=True, kw_only=True)
class IntegratorSettings(ClientSettings):
    """Those of every :class:`IntegratorClient`."""

    margin: float = MARGIN
    """Lower bound of the dual variables."""
    eps: float = EPS
    """ε of the quadratic programme."""
    eps_relative: bool = False
    """ε as a share of the mean squared length of the columns."""
    clip: float = CLIP
    """Largest norm of a gradient that the programme changed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, margin=0, eps=0, clip=0)


class IntegratorClient(ContinualClient):
    """One whose steps harm no column, and which counts what became of them."""

    last: Integration | None = None
    """What became of the last step's gradient; None without an earlier task."""

    def _begin(self, weights: Mapping[str, Tensor]) -> None:
        self._solved = self._fallen = 0

    def _integrate(
        self,
        optimizer: Optimizer,
        loss: Tensor,
        columns: Tensor | None,
        parameters: Sequence[nn.Parameter],
        projected: Sequence[nn.Parameter],
    ) -> None:
        """:func:`integrated_step` with the settings' constants."""
        chosen = self.settings
        constants = chosen.margin, chosen.eps, chosen.eps_relative, chosen.clip
        self.last = integrated_step(optimizer, loss, columns, parameters, projected, *constants)
        if self.last is not None:
            self._solved += self.last.solved
            self._fallen += self.last.fallen_back

    def _counts(self) -> dict[str, float]:
        return {"qp_steps": float(self._solved), "qp_fallen_back": float(self._fallen)}


# ------------------------------------------------------------------------------------------------------ the baselines


class FedAvgClient(ContinualClient):
    """Trains on the current task and keeps nothing (McMahan et al. 2017, arXiv:1602.05629)."""

    def _keep(self, t: int) -> None:
        return


class LocalOnlyClient(FedAvgClient):
    """Learns alone: takes the first weights it is given, and its own from then on."""

    shared: ClassVar[bool] = False
    weights: Weights | None = None
    """Its own, after the last round."""

    def train_round(self, weights: Mapping[str, Tensor], round: int) -> Update:
        """Train from its own weights, or from those given in the first round."""
        update = super().train_round(weights if self.weights is None else self.weights, round)
        self.weights = update.weights
        return update

    def state(self) -> dict[str, Tensor]:
        """With its own weights."""
        return super().state() | _prefixed("local", self.weights or {})

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """With its own weights."""
        super().load_state(state)
        self.weights = _under("local", state) or None


@dataclass(frozen=True, kw_only=True)
class FedProxSettings(ClientSettings):
    """Those of :class:`FedProxClient`."""

    mu: float = 0.01
    """Strength of the pull towards the weights received."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, mu=0)


class FedProxClient(FedAvgClient):
    """Adds μ/2 ‖w − w_received‖² to the loss (Li et al. 2020, arXiv:1812.06127)."""

    def _begin(self, weights: Mapping[str, Tensor]) -> None:
        self._received = {name: each.detach().clone() for name, each in trained_parameters(self.model).items()}

    def _penalty(self, x: Tensor, logits: Tensor) -> Tensor:
        now = trained_parameters(self.model)
        return self.settings.mu / 2 * sum((now[name] - was).square().sum() for name, was in self._received.items())


@dataclass(frozen=True, kw_only=True)
class EWCSettings(ClientSettings):
    """Those of :class:`EWCClient`."""

    penalty: float = 1000.0
    """λ, strength of the pull towards the weights at the end of earlier tasks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, penalty=0)


class EWCClient(ContinualClient):
    """Adds λ/2 Σ_i F_i (w − w_i)² over earlier tasks (Kirkpatrick et al. 2017, arXiv:1612.00796).

    F_i is the mean square of the gradients of the log-likelihood of single samples, at the weights w_i that the client
    had at the end of task i. Σ F_i and Σ F_i w_i are kept, whatever the number of tasks.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.fisher: Weights = {}
        self.pull: Weights = {}
        self.local: Weights = {}

    def _begin(self, weights: Mapping[str, Tensor]) -> None:
        self._known = {name: (f.to(self.device), self.pull[name].to(self.device)) for name, f in self.fisher.items()}

    def _penalty(self, x: Tensor, logits: Tensor) -> Tensor | None:
        if not self._known:
            return None
        now = trained_parameters(self.model)
        # up to a constant that no gradient sees
        parts = [(f * now[name].square() - 2 * pull * now[name]).sum() for name, (f, pull) in self._known.items()]
        return self.settings.penalty / 2 * torch.stack(parts).sum()

    def train_round(self, weights: Mapping[str, Tensor], round: int) -> Update:
        """Train, and remember where it led."""
        update = super().train_round(weights, round)
        self.local = update.weights
        return update

    def _keep(self, t: int) -> None:
        if not self.local:  # never asked in this task
            return
        self.model.load_state_dict(self.local)
        self.model.eval()
        names, parameters = zip(*trained_parameters(self.model).items(), strict=True)
        squares = [torch.zeros_like(each) for each in parameters]
        for index in range(len(self._data)):
            x, y = default_collate(items_of(self._data, [index]))
            loss = self._loss(self.model(x.to(self.device)), y.to(self.device))
            for square, slope in zip(squares, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if slope is not None:
                    square += slope.square()
        for name, parameter, square in zip(names, parameters, squares, strict=True):
            fisher = (square / len(self._data)).cpu()
            pull = fisher * parameter.detach().cpu()
            self.fisher[name] = self.fisher[name] + fisher if name in self.fisher else fisher
            self.pull[name] = self.pull[name] + pull if name in self.pull else pull
        self.local = {}

    def state(self) -> dict[str, Tensor]:
        """With what is known of earlier tasks."""
        kept = {"fisher": self.fisher, "pull": self.pull, "local": self.local}
        return super().state() | {k: v for prefix, each in kept.items() for k, v in _prefixed(prefix, each).items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """With what is known of earlier tasks."""
        super().load_state(state)
        self.fisher, self.pull, self.local = (_under(prefix, state) for prefix in ("fisher", "pull", "local"))


@dataclass(frozen=True, kw_only=True)
class GEMSettings(IntegratorSettings):
    """Those of :class:`GEMClient`."""

    memory: int = 20
    """Kept of each task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, memory=1)


class GEMClient(IntegratorClient):
    """Keeps a few samples of each task, whose gradients no step may harm (Lopez-Paz and Ranzato 2017)."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def _step(self, optimizer: Optimizer, x: Tensor, y: Tensor, epoch: int, number: int) -> float:
        parameters = list(trained_parameters(self.model).values())
        columns = []
        for t, (old_x, old_y) in sorted(self.memory.items()):
            old = block_loss(self.model(old_x.to(self.device)), old_y.to(self.device), self.blocks[t])
            columns.append(flat_gradient(old, parameters))
        loss = self._loss(self.model(x), y)
        self._integrate(optimizer, loss, torch.stack(columns, 1) if columns else None, parameters, parameters)
        return float(loss.detach())

    def _keep(self, t: int) -> None:
        chosen = torch.randperm(len(self._data))[: self.settings.memory].tolist()
        x, y = default_collate(items_of(self._data, chosen))
        self.memory[t] = x, y

    def state(self) -> dict[str, Tensor]:
        """With the samples kept."""
        return super().state() | {
            f"memory/{t}/{name}": tensor
            for t, pair in self.memory.items()
            for name, tensor in zip("xy", pair, strict=True)
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """With the samples kept."""
        super().load_state(state)
        kept = _under("memory", state)
        self.memory = {t: (kept[f"{t}/x"], kept[f"{t}/y"]) for t in sorted({int(name.split("/")[0]) for name in kept})}


@dataclass(frozen=True, kw_only=True)
class LwFSettings(ClientSettings):
    """Those of :class:`LwFClient`."""

    weight: float = 1.0
    """Of the distillation loss."""
    temperature: float = TEMPERATURE
    """Of its soft-maxes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, weight=0)
        if not self.temperature > 0:
            raise InvalidValue(f"temperature = {self.temperature!r}; more than 0 is expected")


class LwFClient(FedAvgClient):
    """Asks the model to answer on earlier classes as the weights received do (Li and Hoiem 2016, arXiv:1606.09282)."""

    def _begin(self, weights: Mapping[str, Tensor]) -> None:
        self._received = copy.deepcopy(self.model).requires_grad_(False).eval() if self.earlier else None

    def _penalty(self, x: Tensor, logits: Tensor) -> Tensor | None:
        if self._received is None:
            return None
        taught = block_logits(self._received(x), self.earlier)
        known = block_logits(logits, self.earlier)
        return self.settings.weight * distillation_loss(known, taught, self.settings.temperature)


# ------------------------------------------------------------------------------------------------------------ FedKNOW


@dataclass(frozen=True, kw_only=True)
class FedKNOWSettings(IntegratorSettings):
    """Those of :class:`FedKNOWClient`."""

    rho: float = 0.1
    """Share of the weights that is kept of a task; with "packnet" of those that are free."""
    k: int = 10
    """Earlier tasks whose gradients no step may harm: the most dissimilar ones."""
    temperature: float = TEMPERATURE
    """Of the soft labels."""
    metric: Metric = "wasserstein"
    """How dissimilar two gradients are."""
    reference: Literal["last_aggregate", "task_start", "none"] = "last_aggregate"
    """The frozen model of the aggregation gradient: the weights received in this round, those received in the task's
    first (as the published code has it), or none."""
    project: Literal["all", "features"] = "all"
    """Whose gradient is turned: of all parameters, or of all but the last linear layer's."""
    head_epochs: int = 0
    """Passes of a round that train the last linear layer alone, before the others train all below it."""
    extractor: Literal["magnitude", "packnet"] = "magnitude"
    """The largest weights of the local model, or weights of a second network."""
    finetune_epochs: int = 2
    """Passes with the weights kept."""
    numbers: Literal["float32", "float16", "int8"] = "float32"
    """In which numbers "magnitude" keeps them."""
    tasks: int | None = None
    """With "packnet": how many tasks there will be; the last takes all that is free. None: not known."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("rho", self.rho)
        _at_least(self, k=1, head_epochs=0, finetune_epochs=0)
        if not self.temperature > 0:
            raise InvalidValue(f"temperature = {self.temperature!r}; more than 0 is expected")
        if self.head_epochs and self.head_epochs >= self.local_epochs:
            raise InvalidValue(
                f"head_epochs = {self.head_epochs}, local_epochs = {self.local_epochs}; fewer of the first are expected"
            )
        if self.extractor == "packnet" and self.numbers != "float32":
            raise InvalidValue(f'numbers = {self.numbers!r} is for extractor = "magnitude"')
        if self.tasks is not None:
            _at_least(self, tasks=1)
            if self.extractor != "packnet":
                raise InvalidValue(f'tasks = {self.tasks} is for extractor = "packnet"')


class FedKNOWClient(IntegratorClient):
    """Turns every update so that neither earlier tasks nor the aggregated model lose by it (Luopan et al. 2023).

    Earlier tasks are known by a few of their weights (:mod:`sparing.federated.knowledge`), which label the current
    samples softly; no sample of theirs is kept. The knowledge of a task is taken when the next one begins, from the
    weights of the client's last round in it. With "packnet" a second network, which begins as the model the client was
    made with, trains beside the first in every round; it is pruned and trained on when the next task begins, since a
    client does not know which of its rounds is the last, and these passes come on top of the local epochs.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.knowledge: dict[int, TaskKnowledge] = {}
        self.local: Weights = {}
        """After the last round of the current task."""
        self.start: Weights = {}
        """Received in the current task's first round; kept for reference = "task_start" alone."""
        self.packnet = (
            PackNet(copy.deepcopy(self.model), self.settings.rho) if self.settings.extractor == "packnet" else None
        )
        self._head = (
            head_names(self.model) if self.settings.project == "features" or self.settings.head_epochs else set()
        )

    def _begin(self, weights: Mapping[str, Tensor]) -> None:
        super()._begin(weights)
        chosen = self.settings
        if chosen.reference == "task_start" and not self.start:
            self.start = _copied(weights)
        # materialized once a round: [aggregation, then the tasks in order]
        self._reference = None
        if self.earlier and chosen.reference != "none":
            self._reference = copy.deepcopy(self.model).requires_grad_(False).eval()
            if chosen.reference == "task_start":
                self._reference.load_state_dict(self.start)
        self._teachers = {t: each.materialize(self.model) for t, each in sorted(self.knowledge.items())}
        self._signature = list(self._teachers)

    def _train(self, weights: Mapping[str, Tensor]) -> tuple[list[float], dict[str, float]]:
        found = super()._train(weights)
        self.local = _copied(self.model.state_dict())
        if self.packnet is not None:
            self.packnet.model.to(self.device)
            self.packnet.train(_Passes(self.batches), self.classes, self.settings.local_epochs, self.optimizer)
        self._teachers, self._reference = {}, None
        return found

    def _step(self, optimizer: Optimizer, x: Tensor, y: Tensor, epoch: int, number: int) -> float:
        chosen, everything = self.settings, trained_parameters(self.model)
        if epoch < chosen.head_epochs:
            return self._head_step(optimizer, x, y)
        below = {name: each for name, each in everything.items() if name not in self._head}
        learning = below if chosen.head_epochs else everything
        projected = below if chosen.project == "features" or chosen.head_epochs else everything
        logits = self.model(x)
        loss = self._loss(logits, y)
        columns = self._columns(x, logits, loss, list(projected.values()), choose=number == 0)
        self._integrate(optimizer, loss, columns, list(learning.values()), list(projected.values()))
        return float(loss.detach())

    def _columns(
        self, x: Tensor, logits: Tensor, loss: Tensor, projected: list[nn.Parameter], choose: bool
    ) -> Tensor | None:
        """Gradients that are not to be harmed (p, k), from one forward pass; ``choose``: signature tasks anew."""

        def restored(teacher: nn.Module, classes: Sequence[int]) -> Tensor:
            with torch.no_grad():
                taught = block_logits(teacher(x), classes)
            apart = distillation_loss(block_logits(logits, classes), taught, self.settings.temperature)
            return flat_gradient(apart, projected, retain_graph=True)

        columns = [] if self._reference is None else [restored(self._reference, self.earlier)]
        among = list(self._teachers) if choose else self._signature
        past = [restored(self._teachers[t], self.blocks[t]) for t in among]
        if choose and len(past) > self.settings.k:
            current = flat_gradient(loss, projected, retain_graph=True)
            best = select_signature_tasks(current, torch.stack(past), self.settings.k, self.settings.metric)
            self._signature = [among[i] for i in sorted(best)]
            past = [past[i] for i in sorted(best)]
        columns += past
        return torch.stack(columns, 1) if columns else None

    def _head_step(self, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
        """Train the last linear layer alone: a step of distillation at T = 1 on earlier classes, one on the task."""
        head = [each for name, each in trained_parameters(self.model).items() if name in self._head]
        if self._reference is not None:
            with torch.no_grad():
                taught = block_logits(self._reference(x), self.earlier)
            integrated_step(
                optimizer, distillation_loss(block_logits(self.model(x), self.earlier), taught, 1.0), None, head, head
            )
        loss = self._loss(self.model(x), y)
        integrated_step(optimizer, loss, None, head, head)
        return float(loss.detach())

    def _counts(self) -> dict[str, float]:
        return super()._counts() | {"knowledge_bytes": float(self.knowledge_bytes)}

    @property
    def knowledge_bytes(self) -> int:
        """What is kept of all tasks: their knowledge, or the second network with its masks, a bit for each weight and
        task."""
        return sum(each.nbytes for each in self.knowledge.values()) if self.packnet is None else self.packnet.nbytes

    def _keep(self, t: int) -> None:
        chosen, passes = self.settings, self.settings.finetune_epochs
        if not self.local:
            return
        if self.packnet is None:
            model = copy.deepcopy(self.model)
            model.load_state_dict(self.local)
            extractor = KnowledgeExtractor(chosen.rho, passes, chosen.numbers)
            self.knowledge[t] = extractor.extract(model, _Passes(self.batches), self.classes, t, self.optimizer)
        else:
            self.packnet.prune(last=t + 1 == chosen.tasks)
            self.packnet.finetune(_Passes(self.batches), self.classes, passes, self.optimizer)
            self._from_packnet([*self.knowledge, t])
        self.local, self.start = {}, {}

    def _from_packnet(self, tasks: Sequence[int]) -> None:
        """The knowledge of each task from the second network as it is now."""
        assert self.packnet is not None
        self.knowledge = {t: replace(self.packnet.knowledge(i, self.blocks[t]), task=t) for i, t in enumerate(tasks)}

    def state(self) -> dict[str, Tensor]:
        """With the knowledge of earlier tasks, sparse."""
        found = super().state() | _prefixed("local", self.local) | _prefixed("start", self.start)
        if self.packnet is not None:
            found |= _prefixed("packnet/weights", _copied(self.packnet.model.state_dict()))
            found["packnet/tasks"] = torch.tensor(list(self.knowledge), dtype=torch.int64)
            for number, masks in enumerate(self.packnet.masks):
                found |= {f"packnet/masks/{number}/{name}": packed(mask) for name, mask in masks.items()}
            return found
        for t, each in self.knowledge.items():
            found |= _prefixed(f"knowledge/{t}", each.to_records())
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """With the knowledge of earlier tasks."""
        super().load_state(state)
        self.local, self.start = _under("local", state), _under("start", state)
        self.knowledge = {}
        if self.packnet is not None:
            self.packnet.model.load_state_dict(_under("packnet/weights", state))
            tasks = state["packnet/tasks"].tolist()
            shapes = {name: each.shape for name, each in self.packnet.owned.items()}
            self.packnet.masks = [
                {name: unpacked(state[f"packnet/masks/{number}/{name}"], shape) for name, shape in shapes.items()}
                for number in range(len(tasks))
            ]
            self._from_packnet(tasks)
            return
        kept = _under("knowledge", state)
        for t in sorted({int(name.split("/")[0]) for name in kept}):
            self.knowledge[t] = TaskKnowledge.from_records(_under(str(t), kept))


class _Passes:
    """Goes through a task's samples anew each time it is iterated over."""

    def __init__(self, batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches()


METHODS: dict[str, tuple[type[ContinualClient], type[ClientSettings]]] = {
    "fedknow": (FedKNOWClient, FedKNOWSettings),
    "fedavg": (FedAvgClient, ClientSettings),
    "fedprox": (FedProxClient, FedProxSettings),
    "ewc": (EWCClient, EWCSettings),
    "gem": (GEMClient, GEMSettings),
    "lwf": (LwFClient, LwFSettings),
    "local": (LocalOnlyClient, ClientSettings),
}
"""Name → (client, its settings)."""


def method_settings(method: str, **values: Any) -> ClientSettings:
    """The settings of a method by name; raises :class:`InvalidValue` for a field it does not have."""
    kind = METHODS[method][1]
    known = [item.name for item in fields(kind)]
    for name in values:
        if name not in known:
            raise InvalidValue(
                f"{method} has no setting {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}"
            )
    return kind(**values)
