"""Rounds of a fleet: who is asked, whose update counts, how updates become one model, and how a killed run goes on.

A round is the unit. The server draws clients, sends each the shared weights, and averages what comes back; an update
that does not come, comes late, is not finite or has other keys or shapes is left out with its reason, and the run goes
on. An order names the round after which the client's state is to be taken (``since``), so a round that was left out or
cut by a kill never happened for a client either: it starts again from the state before it.

This file knows no transport. :func:`run_federated` runs the clients one after another in this process or, with
``engine="flower"``, as a simulation of Flower; the real deployment is in :mod:`sparing.federated.app`.
"""

from __future__ import annotations

import json
import logging
import math
import struct
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue, shown
from sparing.core.probe import peak_mib
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.core.store import Progress
from sparing.federated.clients import ContinualClient, Update, Weights, check_weights

log = logging.getLogger("sparing")
ENGINES = ("inprocess", "flower")
WEIGHTINGS = ("examples", "equal")
REASONS = ("died", "raised", "slow", "not finite", "wrong shape")
"""Why a client is left out of a round's average."""

_MOST = 2**53
"""Examples from which a float64 counts them no more one by one."""
_LENGTH, _NUMBER = struct.Struct("<I"), struct.Struct("<d")


class NoUpdate(InvalidValue):
    """A round in which no client answered rightly, so there is nothing to average."""


@dataclass(frozen=True)
class FleetPlan:
    """Everything a run of a fleet depends on.

    ``make_client`` and ``data_of`` are called where the client runs (with Flower: in another process, which reads the
    plan once), so they must give the same for the same numbers, and hold the data rather than load it in every call.
    """

    clients: int
    """How many there are; they are numbered from 0."""
    blocks: tuple[range, ...]
    """Classes of each task, in ids of the whole head."""
    rounds_per_task: int
    seed: int
    weights: Weights
    """Initial shared state dict, buffers included."""
    make_client: Callable[[int], ContinualClient]
    """(client) → a new one."""
    data_of: Callable[[int, int], Any]
    """(client, task) → map-style data set of (x, y) the client trains that task on."""
    fraction: float = 1.0
    """Of the clients, asked in a round; rounded up."""
    weighting: Literal["examples", "equal"] = "examples"
    """What an update counts in the average."""
    orders: tuple[tuple[int, ...], ...] | None = None
    """For each client the tasks in the order it meets them; None: 0, 1, 2 … for all."""
    time_limit: float | None = None
    """Seconds a client may take for a round; None: no limit."""

    def __post_init__(self) -> None:
        for name in ("clients", "rounds_per_task"):
            if (value := getattr(self, name)) < 1:
                raise InvalidValue(f"{name} = {value}: a whole number ≥ 1 is needed")
        if not 0 < self.fraction <= 1:
            raise InvalidValue(f"fraction = {self.fraction}: a number in (0, 1] is needed")
        if self.weighting not in WEIGHTINGS:
            raise InvalidValue(f"weighting = {self.weighting!r}: one of {', '.join(WEIGHTINGS)}")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise InvalidValue(f"time_limit = {self.time_limit}: seconds > 0, or None")
        if not self.blocks:
            raise InvalidValue("blocks is empty: a fleet learns at least one task")
        if not self.weights:
            raise InvalidValue("weights is empty: a fleet shares at least one tensor")
        tasks = list(range(len(self.blocks)))
        if self.orders is not None and (
            len(self.orders) != self.clients or any(sorted(order) != tasks for order in self.orders)
        ):
            raise InvalidValue(f"orders must hold, for each of {self.clients} clients, the tasks {tasks} in some order")

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return len(self.blocks) * self.rounds_per_task

    def stream(self, client: int, position: int) -> tuple[Any, range]:
        """(data set, classes) of the task that a client meets at this position of the run."""
        return self.data_of(client, self._task(client, position)), self.classes(client, position)

    def classes(self, client: int, position: int) -> range:
        """Classes of the task that a client meets at this position of the run."""
        return self.blocks[self._task(client, position)]

    def _task(self, client: int, position: int) -> int:
        return position if self.orders is None else self.orders[client][position]


@dataclass(frozen=True)
class Dropped:
    """A client that was left out of a round."""

    client: int
    reason: str
    """One of :data:`REASONS`."""
    detail: str


@dataclass(frozen=True)
class RoundReport:
    """What happened in one round."""

    task: int
    """Position of the task in the run."""
    round: int
    """Counted over the whole run, from 0."""
    asked: tuple[int, ...]
    averaged: tuple[int, ...]
    dropped: tuple[Dropped, ...]
    bytes_down: int
    """Size of the serialised messages to clients."""
    bytes_up: int
    """Size of the serialised messages from clients; those that share nothing send weights for the figures alone."""
    seconds: float
    """From the first message to the new weights."""
    metrics: dict[int, dict[str, float]]
    """Client → what it reported."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Back from what :func:`dataclasses.asdict` made."""
        lists = {name: tuple(record[name]) for name in ("asked", "averaged")}
        return cls(**{**record, **lists, "dropped": tuple(Dropped(**each) for each in record["dropped"])})


@dataclass(frozen=True)
class FleetResult:
    """A finished run."""

    weights: Weights
    """The aggregated shared state dict."""
    rounds: tuple[RoundReport, ...]
    end: RoundReport
    """Of the last message, in which every client ends its last task; it moves no weights."""
    figures: tuple[Any, ...]
    """What ``on_task_end`` returned, task by task."""
    local: dict[int, Weights] = field(default_factory=dict)
    """Client → its own last weights, of clients that share nothing."""
    start_seconds: float = 0.0
    """Until the engine could send its first message."""

    @property
    def bytes_down(self) -> int:
        """Bytes sent to clients."""
        return sum(report.bytes_down for report in (*self.rounds, self.end))

    @property
    def bytes_up(self) -> int:
        """Bytes sent by clients."""
        return sum(report.bytes_up for report in (*self.rounds, self.end))

    @property
    def dropped(self) -> dict[str, int]:
        """Reason → how often a client was left out of a round for it, or did not answer the message at the end."""
        reports = (*self.rounds, self.end)
        return dict(sorted(Counter(each.reason for report in reports for each in report.dropped).items()))

    def total(self, metric: str) -> float:
        """Sum of a metric over rounds, the end, and clients."""
        return sum(found.get(metric, 0.0) for report in (*self.rounds, self.end) for found in report.metrics.values())


@dataclass(frozen=True)
class Order:
    """What the server asks of one client."""

    kind: Literal["train", "end"]
    client: int
    task: int
    round: int
    since: int
    """The round after which the client's state is taken; -1: it starts anew."""
    bare: bool = False
    """Whether no weights go with it: a client that shares nothing has its own."""


@dataclass(frozen=True)
class Reply:
    """What came back from one client: an update, or the reason why there is none."""

    client: int
    update: Update | None = None
    shared: bool = True
    """Whether the update is to enter the average."""
    reason: str = ""
    detail: str = ""
    bytes_down: int = 0
    bytes_up: int = 0


class Engine(ABC):
    """How orders reach clients. Entered before the first round and left after the last."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:  # noqa: B027 - an engine that starts nothing has nothing to stop
        """Stop everything that was started."""

    @abstractmethod
    def ask(self, orders: Sequence[Order], weights: Weights) -> list[Reply]:
        """One reply for each order, in their order; a client that failed is a reply with a reason.

        The weights go with each order that is not bare.
        """


def sampled(plan: FleetPlan, round: int) -> tuple[int, ...]:
    """The clients asked in a round, in ascending order: ⌈fraction·clients⌉ drawn from (seed, round)."""
    count = math.ceil(plan.fraction * plan.clients - 1e-9)  # 0.1·30 is a little more than 3
    generator = np.random.default_rng(derive_seed(plan.seed, "clients of a round", round))
    return tuple(sorted(generator.choice(plan.clients, count, replace=False).tolist()))


def answer(
    client: ContinualClient,
    streams: Callable[[int], tuple[Any, range]],
    earlier: Sequence[range],
    task: int,
    round: int,
    weights: Weights,
) -> Update:
    """A client's answer to a message: meet the task, train, send what was learned.

    A client that was in an earlier task ends that one first, from what it keeps of its last round there. It is told the
    classes of all earlier tasks, also of those in which it was never asked: others have learnt them.

    Args:
        client: as its state says, i.e. after ``load_state``.
        streams: position of a task in the run → (data set, classes).
        earlier: classes of each position before the message's.
        task: the message's.
        round: the message's, counted over the whole run.
        weights: the message's.
    """
    if client.task is not None and client.task != task:
        end(client, streams)
    for position, classes in enumerate(earlier):
        client.blocks.setdefault(position, classes)
    client.start_task(task, *streams(task))
    return client.train_round(weights, round)


def end(client: ContinualClient, streams: Callable[[int], tuple[Any, range]]) -> None:
    """End the task that a client is in, if there is one."""
    if (last := client.task) is not None:
        client.start_task(last, *streams(last))  # gives a client that was just read back its data
        client.end_task(last)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: sums then come out the same in every engine, and simulated clients share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Shelf(ABC):
    """Where one client keeps its states, by round."""

    @abstractmethod
    def rounds(self) -> list[int]:
        """Of the states kept."""

    @abstractmethod
    def get(self, round: int) -> dict[str, Tensor]:
        """The state after this round."""

    @abstractmethod
    def put(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state after this round, in the place of an older try."""

    @abstractmethod
    def drop(self, round: int) -> None:
        """Forget the state after this round."""

    def keep(self, round: int, state: Mapping[str, Tensor], since: int) -> None:
        """Put a state; besides it the one it came from stays, and the one before that.

        The server may go back to the first if the new round does not count, and to the second if besides its own last
        state is found damaged.
        """
        self.put(round, state)
        older = max((each for each in self.rounds() if each < since), default=None)
        for each in self.rounds():
            if each not in (round, since, older):
                self.drop(each)


class MemoryShelf(Shelf):
    """In this process."""

    def __init__(self) -> None:
        self._states: dict[int, dict[str, Tensor]] = {}

    def rounds(self) -> list[int]:
        """Of the states kept."""
        return sorted(self._states)

    def get(self, round: int) -> dict[str, Tensor]:
        """A copy of the state after this round."""
        return {name: tensor.clone() for name, tensor in self._states[round].items()}

    def put(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Keep a copy of the state after this round."""
        self._states[round] = {name: tensor.detach().clone() for name, tensor in state.items()}

    def drop(self, round: int) -> None:
        """Forget the state after this round."""
        del self._states[round]


class FolderShelf(Shelf):
    """In files ``<round>.safetensors`` of the client's folder, each written atomically."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, round: int) -> Path:
        return self.folder / f"{round:08d}.safetensors"

    def rounds(self) -> list[int]:
        """Of the states kept."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors") if path.stem.isdecimal())

    def get(self, round: int) -> dict[str, Tensor]:
        """The state after this round."""
        return files.read_tensors(self._path(round))

    def put(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Write the state after this round."""
        files.write_tensors(self._path(round), state)

    def drop(self, round: int) -> None:
        """Delete the state after this round."""
        files.remove(self._path(round))


def work(plan: FleetPlan, shelf: Shelf, order: Order, weights: Weights) -> Reply:
    """The client's side of an order. Whatever goes wrong in it is a reply with the reason.

    The client is built, takes the state that the order names, computes with one thread, and puts its new state on the
    shelf before it answers. A client whose state is lost or damaged goes on from an older one, or begins anew, and
    reports the metric ``state_lost``.
    """
    streams = partial(plan.stream, order.client)
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with one_thread(), isolated_rng(plan.seed, "client", order.client, "round", order.round):
            client, since = _client(plan, shelf, order)
            if order.kind == "train":
                earlier = [plan.classes(order.client, position) for position in range(order.task)]
                given = weights or plan.weights  # with a bare order, for a client that has lost its own
                update = answer(client, streams, earlier, order.task, order.round, given)
            else:
                end(client, streams)
                update = Update({}, 0, {})
            state = client.state()
            shelf.keep(order.round, state, order.since)
        metrics = {
            **update.metrics,
            "state_bytes": float(sum(tensor.nbytes for tensor in state.values())),
            "seconds": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu,
            "peak_bytes": peak_mib() * 2**20,
        }
        if since != order.since:
            metrics["state_lost"] = 1.0
        return Reply(order.client, replace(update, metrics=metrics), client.shared)
    except Exception as error:  # a client's fault must not end the others' run
        return Reply(order.client, reason="raised", detail=f"{type(error).__name__}: {error}")


def _client(plan: FleetPlan, shelf: Shelf, order: Order) -> tuple[ContinualClient, int]:
    """The client with the newest intact state that is no younger than the order's, and that state's round, or -1."""
    for since in [each for each in reversed(shelf.rounds()) if each <= order.since]:
        client = plan.make_client(order.client)
        try:
            client.load_state(shelf.get(since))
        except Exception as error:  # whatever a damaged state is refused with
            log.warning("client %d: its state after round %d cannot be read: %s", order.client, since, error)
        else:
            return client, since
    return plan.make_client(order.client), -1


def _plain(tensor: Tensor) -> Tensor:
    """A packed copy of its own: safetensors holds no shared storage."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def pack(facts: Mapping[str, Any], weights: Weights) -> bytes:
    """A message as bytes: length of the facts, the facts as JSON, the tensors as safetensors."""
    head = json.dumps(facts).encode()
    body = safetensors.torch.save({name: _plain(tensor) for name, tensor in weights.items()})
    return b"".join((_LENGTH.pack(len(head)), head, body))


def unpack(message: bytes) -> tuple[dict[str, Any], Weights]:
    """(facts, weights) of a packed message.

    Raises:
        CorruptFile: the bytes are no such message.
    """
    try:
        start = _LENGTH.size + _LENGTH.unpack_from(message)[0]
        facts = json.loads(message[_LENGTH.size : start])
        return facts, safetensors.torch.load(message[start:])
    except (struct.error, ValueError, SafetensorError) as error:
        raise CorruptFile(f"a message of {len(message)} bytes cannot be read: {error}") from error


def pack_reply(reply: Reply) -> bytes:
    """A client's reply as bytes; one whose update cannot be written is a reply of the wrong shape."""
    try:
        return _pack_reply(reply)
    except Exception as error:  # whatever a client has put into its update must not end the others' run
        return _pack_reply(malformed(reply.client, error))


def _pack_reply(reply: Reply) -> bytes:
    facts = {"client": reply.client, "shared": reply.shared, "reason": reply.reason, "detail": reply.detail}
    if reply.update is None:
        return pack(facts, {})
    # numbers at a fixed width: the size of a message then depends on no clock reading
    metrics = {name: _NUMBER.pack(value).hex() for name, value in reply.update.metrics.items()}
    return pack({**facts, "examples": reply.update.examples, "metrics": metrics}, reply.update.weights)


def unpack_reply(message: bytes, bytes_down: int, bytes_up: int) -> Reply:
    """Back from :func:`pack_reply`, with the sizes of the messages it took."""
    facts, weights = unpack(message)
    metrics = {name: _NUMBER.unpack(bytes.fromhex(value))[0] for name, value in facts.get("metrics", {}).items()}
    update = Update(weights, facts["examples"], metrics) if "examples" in facts else None
    told = (facts["client"], update, facts["shared"], facts["reason"], facts["detail"])
    return Reply(*told, bytes_down=bytes_down, bytes_up=bytes_up)


def malformed(client: int, error: Exception, bytes_down: int = 0, bytes_up: int = 0) -> Reply:
    """In the place of a reply that cannot be sent, or read."""
    detail = f"{type(error).__name__}: {error}"
    return Reply(client, reason="wrong shape", detail=detail, bytes_down=bytes_down, bytes_up=bytes_up)


class InProcess(Engine):
    """Clients one after another in this process, each message through its serialised form."""

    def __init__(self, plan: FleetPlan, folder: Path | None = None) -> None:
        self.plan = plan
        self.shelves: list[Shelf] = [
            MemoryShelf() if folder is None else FolderShelf(folder / str(client)) for client in range(plan.clients)
        ]

    def ask(self, orders: Sequence[Order], weights: Weights) -> list[Reply]:
        """One reply for each order; one that took longer than the plan's limit counts as slow."""
        replies = []
        for order in orders:
            start = time.perf_counter()
            down = pack(asdict(order), {} if order.bare else weights)
            facts, received = unpack(down)
            up = pack_reply(work(self.plan, self.shelves[order.client], Order(**facts), received))
            reply = unpack_reply(up, len(down), len(up))
            seconds, limit = time.perf_counter() - start, self.plan.time_limit
            if limit is not None and seconds > limit:
                late = f"answered after {seconds:.3g} s, the limit is {limit:g} s"
                reply = Reply(order.client, None, reply.shared, "slow", late, len(down), len(up))
            replies.append(reply)
        return replies


def checked(update: Update, like: Weights) -> tuple[str, str] | None:
    """(reason, detail) why an update cannot enter an average, or None when it can.

    Args:
        update: a client's; of its fields only ``weights`` is known to be tensors by name.
        like: the shared state dict, whose keys, shapes and types it must have.
    """
    if missing := like.keys() - update.weights.keys():
        return "wrong shape", f"{sorted(missing)[0]} is missing"
    if surplus := update.weights.keys() - like.keys():
        return "wrong shape", f"{shown(sorted(surplus)[0])} is not in the shared model"
    for name, wanted in like.items():
        found = update.weights[name]
        if found.shape != wanted.shape:
            return "wrong shape", f"{name} has shape {list(found.shape)}, not {list(wanted.shape)}"
        if found.dtype != wanted.dtype:
            return "wrong shape", f"{name} is {found.dtype}, not {wanted.dtype}"
        if found.is_floating_point() and not bool(torch.isfinite(found).all()):
            return "not finite", f"{name} holds NaN or infinity"
    if isinstance(update.examples, bool) or not isinstance(update.examples, int) or not 1 <= update.examples < _MOST:
        return "wrong shape", f"it counts {shown(update.examples)} examples: a whole number ≥ 1 is needed"
    return _odd_metric(update.metrics)


def _odd_metric(metrics: Mapping[str, Any]) -> tuple[str, str] | None:
    """(reason, detail) of the first metric that is no finite number, or None."""
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "wrong shape", f"the metric {name} = {shown(value)}: a number is needed"
        if not math.isfinite(value):
            return "not finite", f"the metric {name} = {value}"
    return None


def average(updates: Sequence[Update], weighting: Literal["examples", "equal"] = "examples") -> Weights:
    """FedAvg: the weighted mean of each tensor, in float64, cast back; integers are rounded (McMahan et al., 2017).

    Args:
        updates: at least one, in an order that does not depend on who answered first.
        weighting: by the clients' numbers of examples, or all alike.

    Raises:
        NoUpdate: there is none.
    """
    if not updates:
        raise NoUpdate("there is no update to average")
    shares = [1 if weighting == "equal" else update.examples for update in updates]
    mean = {}
    for name, first in updates[0].weights.items():
        total = sum(
            (update.weights[name].double() * share for update, share in zip(updates, shares, strict=True)),
            torch.zeros(first.shape, dtype=torch.float64),
        ) / sum(shares)
        mean[name] = (total if first.is_floating_point() else total.round()).to(first.dtype)
    return mean


def run_federated(
    plan: FleetPlan,
    engine: Literal["inprocess", "flower"] | Engine = "inprocess",
    keeper: Progress | None = None,
    on_task_end: Callable[[int, Weights, dict[int, Weights]], Any] | None = None,
) -> FleetResult:
    """Train a fleet, task after task.

    Args:
        plan: what the run depends on.
        engine: ``"inprocess"``, ``"flower"`` (a simulation on all cores, in processes of its own), or one of your own.
        keeper: keeps the state after every finished round, and the clients' states in a folder beside it; a run that
            was killed goes on from there. None: nothing is kept.
        on_task_end: (position, shared weights, weights of clients that share nothing) → figures that a keeper can
            keep.

    Raises:
        NoUpdate: no client answered a round rightly.
        MissingDependency: Flower is wanted and not installed.
    """
    folder = None if keeper is None or keeper.folder is None else keeper.folder / "clients"
    start = time.perf_counter()
    with engine if isinstance(engine, Engine) else _engine(engine, plan, folder) as entered:
        ready = time.perf_counter() - start
        return serve(plan, entered, keeper, on_task_end, ready)


def _engine(name: str, plan: FleetPlan, folder: Path | None) -> AbstractContextManager[Engine]:
    if name == "inprocess":
        return InProcess(plan, folder)
    if name == "flower":
        from sparing.federated.flower import Simulation

        return Simulation(plan, folder)
    raise InvalidValue(f"engine = {shown(name)}: one of {', '.join(ENGINES)}")


def serve(
    plan: FleetPlan,
    engine: Engine,
    keeper: Progress | None = None,
    on_task_end: Callable[[int, Weights, dict[int, Weights]], Any] | None = None,
    start_seconds: float = 0.0,
) -> FleetResult:
    """The server's side of a run, over an engine that has been entered; see :func:`run_federated`."""
    state = _State(plan.weights) if keeper is None else _State.read(keeper, plan)
    while state.done < plan.rounds:
        task = state.done // plan.rounds_per_task
        _one_round(plan, engine, state, task)
        if state.done % plan.rounds_per_task == 0 and on_task_end is not None:
            state.figures.append(on_task_end(task, dict(state.weights), dict(state.local)))
        if keeper is not None:
            keeper.save(state.record())
    last = _end(plan, engine, state)
    rounds = tuple(state.reports)
    return FleetResult(state.weights, rounds, last, tuple(state.figures), state.local, start_seconds)


@dataclass
class _State:
    """The server's, after its finished rounds."""

    weights: Weights
    since: dict[int, int] = field(default_factory=dict)
    """Client → the last round in which its update counted."""
    local: dict[int, Weights] = field(default_factory=dict)
    reports: list[RoundReport] = field(default_factory=list)
    figures: list[Any] = field(default_factory=list)

    @property
    def done(self) -> int:
        return len(self.reports)

    def record(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "since": self.since,
            "local": self.local,
            "reports": [asdict(report) for report in self.reports],
            "figures": self.figures,
        }

    @classmethod
    def read(cls, keeper: Progress, plan: FleetPlan) -> Self:
        found = keeper.load()
        if found is None:
            return cls(plan.weights)
        check_weights(found["weights"], plan.weights)
        return cls(**{**found, "reports": [RoundReport.of(report) for report in found["reports"]]})


def _one_round(plan: FleetPlan, engine: Engine, state: _State, task: int) -> None:
    start = time.perf_counter()
    number = state.done
    asked = sampled(plan, number)
    orders = [
        Order("train", client, task, number, state.since.get(client, -1), bare=client in state.local)
        for client in asked
    ]
    replies = engine.ask(orders, state.weights)
    good, dropped = _sorted_out(replies, state.weights)
    if not good:
        told = "; ".join(f"client {each.client} {each.reason} ({each.detail})" for each in dropped[:5])
        raise NoUpdate(f"round {number} (task {task}): none of {len(asked)} clients answered rightly: {told}")
    if sharing := [update for _, update, shared in good if shared]:
        state.weights = average(sharing, plan.weighting)
    for client, update, shared in good:
        state.since[client] = number
        if not shared:
            state.local[client] = update.weights
    state.reports.append(
        RoundReport(
            task,
            number,
            asked,
            tuple(client for client, _, _ in good),
            tuple(dropped),
            sum(reply.bytes_down for reply in replies),
            sum(reply.bytes_up for reply in replies),
            time.perf_counter() - start,
            {client: update.metrics for client, update, _ in good},
        )
    )


def _sorted_out(replies: Sequence[Reply], like: Weights) -> tuple[list[tuple[int, Update, bool]], list[Dropped]]:
    good, dropped = [], []
    for reply in sorted(replies, key=lambda reply: reply.client):
        if reply.update is None:
            dropped.append(Dropped(reply.client, reply.reason, reply.detail))
        elif (fault := checked(reply.update, like)) is not None:
            dropped.append(Dropped(reply.client, *fault))
        else:
            good.append((reply.client, reply.update, reply.shared))
    return good, dropped


def _end(plan: FleetPlan, engine: Engine, state: _State) -> RoundReport:
    """Tell every client that took part that its last task is over."""
    start = time.perf_counter()
    task, asked = len(plan.blocks) - 1, tuple(sorted(state.since))
    orders = [Order("end", client, task, plan.rounds, state.since[client]) for client in asked]
    replies = engine.ask(orders, {})
    # nothing is averaged here, so nothing is asked of the examples
    good, dropped = _sorted_out([_counting(reply) for reply in replies], {})
    return RoundReport(
        task,
        plan.rounds,
        asked,
        (),
        tuple(dropped),
        sum(reply.bytes_down for reply in replies),
        sum(reply.bytes_up for reply in replies),
        time.perf_counter() - start,
        {client: update.metrics for client, update, _ in good},
    )


def _counting(reply: Reply) -> Reply:
    return reply if reply.update is None else replace(reply, update=replace(reply.update, examples=1))
