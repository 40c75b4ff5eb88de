"""The step ``federate``: a fleet of clients trains the job's model, each on data that stay where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from sparing.core.devices import AUTO, device_named
from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, shown
from sparing.core.randomness import derive_seed
from sparing.core.step import Stage, Step, step

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from sparing.core.job import Job, TrainingPlan
    from sparing.core.task import Task
    from sparing.federated.clients import ContinualClient
    from sparing.federated.rounds import FleetPlan, FleetResult

Method = Literal["fedknow", "fedavg", "fedprox", "ewc", "gem", "lwf", "local"]
HONOURED = ("optimizer", "wrap_optimizer", "batch_transforms")
"""What clients take of the job's training plan."""
_OWN_FIELDS = {"rho": ("fedknow",), "k": ("fedknow",), "margin": ("fedknow", "gem")}
_SHOWN = 20
"""So many dropped updates are told one by one."""


def class_labels(dataset: Any) -> np.ndarray:
    """The class of each item (input, class) of a map-style dataset, int64 (n,).

    Raises:
        DataError: an item without a whole number as its class.
    """
    labels = getattr(dataset, "labels", None)
    if labels is None:
        labels = []
        for index in range(len(dataset)):
            try:
                label = np.asarray(dataset[index][1])
            except (TypeError, IndexError, KeyError):
                label = np.asarray(None)
            if label.ndim or label.dtype.kind not in "iu":
                raise DataError(
                    f"sample {index} has no class: items (input, class number) are needed to share them among clients"
                )
            labels.append(int(label))
    return np.asarray(labels, dtype=np.int64)


@step("federate")
class Federate(Step):
    """Let a fleet train the model: clients learn on their own data, task after task, and a server averages weights."""

    stage: ClassVar[Stage] = Stage.FLEET
    needs: ClassVar[frozenset[str]] = frozenset({"module", "classification"})
    gives: ClassVar[frozenset[str]] = frozenset({"trained"})
    realises: ClassVar[frozenset[str]] = frozenset({"training"})
    source: ClassVar[str] = (
        "Luopan et al. 2023, FedKNOW: Federated Continual Learning with Signature Task Knowledge Integration at Edge, "
        "ICDE, arXiv:2212.01738"
    )

    method: Method = "fedknow"
    """How a client learns; "local": without a server."""
    clients: int = Field(default=20, ge=1)
    """How many devices there are."""
    fraction: float = Field(default=0.4, gt=0, le=1)
    """Share of the clients that are asked in a round, drawn anew for each."""
    rounds_per_task: int = Field(default=15, ge=1)
    """Rounds before all go on to their next task."""
    local_epochs: int | tuple[int, ...] = 8
    """Passes of a client over its data in a round; several numbers are dealt to the clients in turn."""
    batch_size: int = Field(default=40, ge=1)
    """Samples per batch of a client."""
    optimizer: str = "Adam"
    """A class of ``torch.optim``, in any case; each client makes a new one in each round."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Weight decay, in the optimizer's own sense."""
    partition: Literal["shards", "dirichlet", "iid"] = "shards"
    """Who has which samples of a task: some classes each, all classes in uneven shares, or all alike."""
    classes_per_client: int | None = Field(default=None, ge=1)
    """Of "shards": classes of a task that a client has; None: half of them."""
    alpha: float = Field(default=0.5, gt=0)
    """Of "dirichlet": concentration; small is uneven."""
    samples_per_client: int | None = Field(default=240, ge=1)
    """The most samples that a client has of a task; None: all that fall to it."""
    order: Literal["shared", "own"] = "shared"
    """Whether all clients learn the tasks in the same order, or each in one of its own."""
    weighting: Literal["examples", "equal"] = "examples"
    """What a client's weights count for in the average: its number of samples, or as much as any other's."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds that a client may take for a round before it is left out of it; None: no limit."""
    rho: float = Field(default=0.1, gt=0, le=1)
    """Of FedKNOW: share of the weights that are kept of a task."""
    k: int = Field(default=10, ge=1)
    """Of FedKNOW: earlier tasks whose gradients are restored, the most dissimilar ones."""
    margin: float = Field(default=0.5, ge=0)
    """Of FedKNOW and GEM: smallest share of each earlier task's gradient in the update."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the method's settings, e.g. {reference: none} or {mu: 0.01}."""
    engine: Literal["flower", "inprocess"] = "flower"
    """"flower": clients run in processes of Flower's simulation; "inprocess": one after the other, the same bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        several = (self.local_epochs,) if isinstance(self.local_epochs, int) else self.local_epochs
        if not several or min(several) < 1:
            raise InvalidValue(f"{self.id}: local_epochs = {self.local_epochs}; numbers of at least 1 are expected")
        for name, owners in _OWN_FIELDS.items():
            if self.method not in owners and getattr(self, name) != _default(name):
                raise InvalidValue(
                    f"{self.id}: {name} = {getattr(self, name)} is a field of {', '.join(owners)}; the method is "
                    f"{self.method}"
                )
        for name, owner in (("classes_per_client", "shards"), ("alpha", "dirichlet")):
            if self.partition != owner and getattr(self, name) != _default(name):
                raise InvalidValue(
                    f"{self.id}: {name} = {getattr(self, name)} is for partition = {owner}; it is {self.partition}"
                )
        if self.optimizer not in {"Adam", "AdamW", "SGD"}:  # the usual ones need no torch to be checked
            import torch

            from sparing.core.training.optimization import make_optimizer

            make_optimizer(self.optimizer, [torch.nn.Parameter(torch.zeros(1))], self.lr, self.weight_decay)
        if self.settings:
            for client in range(len(several)):
                self.method_settings(client)

    @property
    def slots(self) -> frozenset[str]:  # type: ignore[override]  # filled for this very training
        """The optimizer, where another than the default is asked for here."""
        asked = any(getattr(self, name) != _default(name) for name in ("optimizer", "lr", "weight_decay"))
        return frozenset({"optimizer"}) if asked else frozenset()

    def method_settings(self, client: int) -> Any:
        """The settings of one client's method; raises :class:`InvalidValue` for a field that it does not have."""
        from sparing.federated.clients import method_settings

        own = {name: getattr(self, name) for name, owners in _OWN_FIELDS.items() if self.method in owners}
        several = (self.local_epochs,) if isinstance(self.local_epochs, int) else self.local_epochs
        if taken := {"local_epochs", "batch_size", *_OWN_FIELDS} & self.settings.keys():
            raise InvalidValue(f"{self.id}: settings has {sorted(taken)[0]}, which is a field of the step")
        told = {"local_epochs": several[client % len(several)], "batch_size": self.batch_size}
        try:
            return method_settings(self.method, **told, **own, **self.settings)
        except (InvalidValue, TypeError) as error:  # a text where a number belongs is a TypeError
            raise InvalidValue(f"{self.id}: settings = {shown(self.settings)}: {error}") from error

    def check(self, task: Task) -> None:
        """The task's items can be shared among clients: each is a tensor and a class."""
        super().check(task)
        if task.collate is not None:
            raise IncompatibleStep(
                f"{self.id!r}: {task.name!r} puts its batches together by a function of its own; clients take items "
                "(input, class) whose inputs have one shape"
            )

    # --- who has what

    def shares(self, labels: np.ndarray, blocks: Sequence[range], seed: int) -> list[list[np.ndarray]]:
        """Sample numbers of each task for each client: ``shares[t][c]``, sorted, no sample twice.

        Raises :class:`InvalidValue` when a client would be without a sample of a task.
        """
        from sparing.data.partition import dirichlet_partition, iid_partition, label_shard_partition, limit_samples

        found = []
        for task, block in enumerate(blocks):
            rows = np.flatnonzero((labels >= block.start) & (labels < block.stop))
            own, drawn = labels[rows], derive_seed(seed, "partition", task)
            try:
                if self.partition == "shards":
                    each = self.classes_per_client or max(1, -(-len(block) // 2))
                    parts = label_shard_partition(own, self.clients, each, drawn)
                elif self.partition == "dirichlet":
                    parts = dirichlet_partition(own, self.clients, self.alpha, drawn)
                else:
                    parts = iid_partition(own, self.clients, drawn)
                if self.samples_per_client is not None:
                    by_class = self.partition == "shards"
                    parts = limit_samples(own, parts, self.samples_per_client, drawn, by_class=by_class)
            except InvalidValue as error:
                raise InvalidValue(f"{self.id}: task {task + 1} of {len(blocks)}: {error}") from error
            found.append([rows[part] for part in parts])
        return found

    def orders(self, tasks: int, seed: int) -> tuple[tuple[int, ...], ...] | None:
        """For each client the tasks in the order it learns them; None where that is the same for all."""
        if self.order == "shared":
            return None
        draws = (np.random.RandomState(derive_seed(seed, "order", client)) for client in range(self.clients))
        return tuple(tuple(draw.permutation(tasks).tolist()) for draw in draws)

    # --- the run

    def apply(self, job: Job) -> Job:
        """The job with the aggregated model, its predictor, and an emptied training plan."""
        from sparing.core.job import TrainingPlan
        from sparing.core.predictor import ModulePredictor
        from sparing.core.store import JSON, TENSORS, All
        from sparing.core.training.step import load_weights

        self.check_job(job)

        def compute() -> dict[str, Any]:
            result = self.run(job)
            job.store.once("timings", lambda: _clocks(result), JSON)
            own = result.local[min(result.local)] if result.local else result.weights
            return {"weights": dict(own), "record": _record(result)}

        stored = job.store.once("fleet", compute, All({"weights": TENSORS, "record": JSON}))
        trained = job.fresh_model()
        load_weights(trained, stored["weights"])
        self.report(job, stored["record"], job.store.once("timings", dict, JSON))
        return job.replace(model=trained, predictor=ModulePredictor(trained, job.task), training=TrainingPlan())

    def check_job(self, job: Job) -> None:
        """Raise :class:`IncompatibleStep` for a task or a training plan that clients cannot honour."""
        self.check(job.task)
        _check_plan(job.training, self.id)

    def run(self, job: Job) -> FleetResult:
        """Train the fleet; its figures are those of :meth:`task_figures`."""
        from sparing.federated.rounds import run_federated

        return run_federated(self.fleet_of(job), self.engine, job.store.progress("fleet"), self.task_figures(job))

    def fleet_of(self, job: Job) -> FleetPlan:
        """What a run of the fleet on a job depends on."""
        return self.fleet(job.fresh_model(), job.train, blocks_of(job.task), job.training, job.seed)

    def task_figures(self, job: Job) -> Callable[[int, Mapping[str, Any], Mapping[int, Any]], list[float]]:
        """What is done after each task: measure its accuracies on the validation data of all tasks.

        A client's are in the order in which it learns the tasks; where clients share nothing, they are means over the
        clients' own weights.
        """
        from sparing.core.predictor import ModulePredictor

        model, blocks = job.fresh_model(), blocks_of(job.task)
        order_of = self.orders(len(blocks), job.seed) or (tuple(range(len(blocks))),) * self.clients

        def accuracies(weights: Mapping[str, Any]) -> list[float]:
            model.load_state_dict(weights)
            found = job.task.evaluate(ModulePredictor(model, job.task), job.val).metrics
            return [found[name] for name in _accuracy_names(job.task, len(blocks))]

        def on_task_end(position: int, weights: Mapping[str, Any], local: Mapping[int, Any]) -> list[float]:
            shared = {} if local else dict.fromkeys(range(self.clients), accuracies(weights))
            own = shared or {client: accuracies(each) for client, each in local.items()}
            rows = [[row[task] for task in order_of[client]] for client, row in sorted(own.items())]
            return np.mean(rows, axis=0).tolist()

        return on_task_end

    def fleet(
        self,
        model: nn.Module,
        data: Any,
        blocks: Sequence[range],
        training: TrainingPlan,
        seed: int,
        shares: Sequence[Sequence[np.ndarray]] | None = None,
    ) -> FleetPlan:
        """What a run of the fleet depends on, for :func:`~sparing.federated.rounds.run_federated`.

        Args:
            model: the first weights, and what each client trains; it stays as it is.
            data: all training samples (input, class), map-style.
            blocks: classes of each task.
            training: of it, optimizer, wraps of the optimizer and batch transforms are taken.
            seed: decides who has what, who is asked, and every client's random numbers.
            shares: sample numbers of each task for each client; None: as :meth:`shares` deals them.

        Raises:
            InvalidValue: a client would be without a sample of a task, or the settings say another number of tasks.
        """
        from sparing.federated.rounds import FleetPlan

        if (number := self.settings.get("tasks")) not in (None, len(blocks)):
            raise InvalidValue(f"{self.id}: settings has tasks = {number}, but there are {len(blocks)}; leave it out")
        start = copy.deepcopy(model).cpu()
        return FleetPlan(
            clients=self.clients,
            blocks=tuple(blocks),
            rounds_per_task=self.rounds_per_task,
            seed=derive_seed(seed, "federate"),
            weights={name: tensor.detach().clone() for name, tensor in start.state_dict().items()},
            make_client=partial(make_client, self, len(blocks), start, training, derive_seed(seed, "client")),
            data_of=Shares(data, self.shares(class_labels(data), blocks, seed) if shares is None else shares),
            fraction=self.fraction,
            weighting=self.weighting,
            orders=self.orders(len(blocks), seed),
            time_limit=self.time_limit,
        )

    def report(self, job: Job, record: Mapping[str, Any], clocks: Mapping[str, Any]) -> None:
        """Tell the ledger what the fleet learnt and forgot, sent, and lost."""
        from sparing.federated.metrics import ContinualMetrics

        tasks = len(record["accuracy"])
        if tasks == 1:
            headline = job.task.headline
            job.record(f"validation {headline.name}", record["accuracy"][0][0], headline.unit, better=headline.better)
        else:
            found = ContinualMetrics(record["accuracy"])
            job.record("validation average accuracy", float(found.average_accuracy[-1]), "", better="higher")
            job.record("validation forgetting", float(found.forgetting[-1]), "")
            job.record("validation forgetting rate", float(found.forgetting_rate[-1]), "")
            job.record("validation backward transfer", found.backward_transfer, "", better="higher")
        job.record("rounds", len(record["rounds"]), "")
        for name, (value, unit) in {**record["totals"], **clocks}.items():
            job.record(name, value, unit)
        for reason, count in record["dropped"].items():
            job.record(f"updates dropped: {reason}", count, "")
        rounds = [each["round"] + 1 for each in record["rounds"]]
        ends = [(number + 1) * self.rounds_per_task for number in range(tasks)]
        for task in range(tasks):
            points = [(float(x), row[task]) for x, row in zip(ends, record["accuracy"], strict=True)]
            scored = f"accuracy of task {task + 1}" if tasks > 1 else job.task.headline.name
            job.notes.curves[f"validation {scored}"] = points[task:]
        sent = np.cumsum([each["bytes"] for each in record["rounds"]]).tolist()
        job.notes.curves["bytes sent"] = [(float(x), float(y)) for x, y in zip(rounds, sent, strict=True)]
        job.notes.curves["bytes of a task"] = [
            (float(end), float(sum(each["bytes"] for each in record["rounds"][end - self.rounds_per_task : end])))
            for end in ends
        ]
        job.notes.curves["train_loss"] = [(float(each["round"] + 1), each["loss"]) for each in record["rounds"]]
        job.notes.remarks.append(
            f"{self.method} on {self.clients} clients, {len(rounds)} rounds over {tasks} task{'s' * (tasks > 1)}"
        )
        job.notes.remarks.extend(record["lost"])
        if record["alone"] is not None:
            job.notes.remarks.append(
                f"without a server there is no common model: the row is that of client {record['alone'] + 1}"
            )


@dataclass(frozen=True)
class Shares:
    """(client, task) → the samples of that client for that task."""

    data: Any
    rows: Sequence[Sequence[np.ndarray]]
    """Of each task for each client."""

    def __call__(self, client: int, task: int) -> Any:
        """A map-style data set, a view of the whole."""
        from torch.utils.data import Subset

        return Subset(self.data, self.rows[task][client].tolist())


def make_client(
    settings: Federate, tasks: int, model: nn.Module, plan: TrainingPlan, seed: int, number: int
) -> ContinualClient:
    """One client with a model of its own, on the GPU if its process sees one, and what it takes of the plan."""
    from sparing.federated.clients import METHODS

    own = settings.method_settings(number)
    if getattr(own, "extractor", "") == "packnet":  # whose last task takes all weights that are free
        own = replace(own, tasks=tasks)
    return METHODS[settings.method][0](
        copy.deepcopy(model).to(device_named(AUTO)),
        own,
        seed,
        number,
        partial(client_optimizer, settings, plan),
        plan.batch_transforms,
    )


def client_optimizer(settings: Federate, plan: TrainingPlan, model: nn.Module) -> Optimizer:
    """A client's new optimizer for a round: the plan's, or the step's by name, in the plan's wraps.

    A wrap with random numbers of its own is given a seed that is the client's and the round's.
    """
    import torch

    from sparing.core.training.optimization import make_optimizer

    if plan.optimizer is not None:
        made = plan.optimizer(model)
    else:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        made = make_optimizer(settings.optimizer, trained, settings.lr, settings.weight_decay)
    for number, wrap in enumerate(plan.wrap_optimizer):
        made = wrap(made)
        if hasattr(made, "reseed"):
            made.reseed(derive_seed(torch.initial_seed(), "optimizer", number))
    return made


def blocks_of(task: Task) -> tuple[range, ...]:
    """The classes of each task of a stream; one block of all classes for a task that is no stream."""
    blocks = getattr(task, "class_blocks", None)
    return (range(len(task.labels)),) if blocks is None else tuple(blocks)


def _accuracy_names(task: Task, blocks: int) -> list[str]:
    """The metrics that are the accuracies of the stream's tasks."""
    return [task.headline.name] if blocks == 1 else [f"accuracy of task {number + 1}" for number in range(blocks)]


def _check_plan(plan: TrainingPlan, step_id: str) -> None:
    """Refuse what clients would not do."""
    asked = [item.name for item in fields(plan) if getattr(plan, item.name) not in (None, ())]
    if refused := [name for name in asked if name not in HONOURED]:
        raise IncompatibleStep(
            f"{step_id!r}: an earlier step has put {', '.join(refused)} into the training plan. A client makes its own "
            "loss from the tasks it has learnt, and a new optimizer in each round, so of a plan only "
            f"{', '.join(HONOURED)} can be honoured"
        )


def _default(name: str) -> Any:
    known: Any = Federate.__pydantic_fields__  # type: ignore[attr-defined]  # pydantic's decorator adds it
    return known[name].get_default(call_default_factory=True)


def _record(result: FleetResult) -> dict[str, Any]:
    """What the ledger is told, as plain JSON."""
    told = [figures for report in (*result.rounds, result.end) for figures in report.metrics.values()]
    last = [found for _, found in sorted({c: f for r in result.rounds for c, f in r.metrics.items()}.items())]
    kept = list(result.end.metrics.values())
    totals = {
        "bytes to clients": (result.bytes_down, "B"),
        "bytes from clients": (result.bytes_up, "B"),
        "updates averaged": (sum(len(report.averaged) for report in result.rounds), ""),
        "updates dropped": (sum(result.dropped.values()), ""),
        "state of a client": (max((found.get("state_bytes", 0.0) for found in kept), default=0.0), "B"),
    }
    if any("qp_steps" in found for found in told):
        totals["QP activations"] = (result.total("qp_steps"), "")
        totals["QP fall-backs"] = (result.total("qp_fallen_back"), "")
    if knowledge := [found["knowledge_bytes"] for found in last if "knowledge_bytes" in found]:
        totals["knowledge of a client"] = (max(knowledge), "B")
    rounds = [
        {
            "round": report.round,
            "bytes": report.bytes_down + report.bytes_up,
            "loss": float(np.mean([found["train_loss"] for found in report.metrics.values()])),
        }
        for report in result.rounds
    ]
    lost = [
        f"{when}: client {each.client + 1} was left out: {each.reason} ({each.detail})"
        for when, report in [*((f"round {each.round + 1}", each) for each in result.rounds), ("at the end", result.end)]
        for each in report.dropped
    ]
    if forgot := int(result.total("state_lost")):
        lost.insert(
            0,
            f"times that a client's state was lost or damaged, so that it went on from an older one or anew: {forgot}",
        )
    return {
        "accuracy": list(result.figures),
        "alone": min(result.local, default=None),
        "totals": totals,
        "dropped": result.dropped,
        "rounds": rounds,
        "lost": [*lost[:_SHOWN], *([f"… and {len(lost) - _SHOWN} more"] if len(lost) > _SHOWN else [])],
    }


def _clocks(result: FleetResult) -> dict[str, Any]:
    """What was read from clocks and from the system, as plain JSON: figure → (value, unit)."""
    told = [found for report in (*result.rounds, result.end) for found in report.metrics.values()]
    clocks = {
        "start of the engine": (result.start_seconds, "s"),
        "seconds of rounds": (sum(report.seconds for report in result.rounds), "s"),
        "seconds of the longest round": (max(report.seconds for report in result.rounds), "s"),
        "seconds of clients": (result.total("seconds"), "s"),
        "CPU seconds of clients": (result.total("cpu_s"), "s"),
    }
    if peaks := [found["peak_bytes"] for found in told if "peak_bytes" in found]:
        # of the process, with all that it did before; an engine's process is used by one client after the other
        clocks["peak memory of a process with clients"] = (max(peaks) / 2**20, "MiB")
    return clocks
