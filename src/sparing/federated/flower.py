"""Flower (Beutel et al., arXiv:2007.14390) as the engine of a fleet: its messages, its client app, its simulation.

The server's loop is :func:`sparing.federated.rounds.serve`, here as elsewhere; Flower carries the orders. A client gets
the shared weights as an ``ArrayRecord`` of NumPy arrays and answers with one; what it must remember is kept in files of
its folder or, where no folder is set, in its Flower context, again as arrays. No message holds a pickle.

A simulation runs in processes of its own, which end with it: one with Flower and Ray, and a worker for each core. They
read the plan once, from a file.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor

from sparing.core import files
from sparing.core.clock import usable_cores
from sparing.core.errors import InvalidValue, MissingDependency, SparingError, shown
from sparing.federated.clients import Update, Weights
from sparing.federated.rounds import (
    REASONS,
    Engine,
    FleetPlan,
    FolderShelf,
    Order,
    Reply,
    Shelf,
    malformed,
    pack,
    pack_reply,
    unpack,
    unpack_reply,
    work,
)

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid

log = logging.getLogger("sparing")
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of a simulation's processes: nothing is reported to anybody, and Ray leaves GPUs to ``NO_GPU``."""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of a simulation's processes: as many as there are cores, they would fill a GPU's memory."""

POLL_SECONDS = 0.02
RETRY_SECONDS = (1.0, 60.0)
"""Pause before a node that could not start is asked again: at first, and at most; it doubles."""
SILENCE_SECONDS = 180.0
"""After which a node that has not answered is asked again; it doubles."""
PARTITION = "partition-id"
_FOLDER = "SPARING_FLEET"
"""Environment variable with the work folder of a simulation."""
_STATE = "state-"


class EngineFailed(SparingError):
    """Flower or Ray ended or did not start, or no device came; the message holds what they wrote last."""


def require_flower(purpose: str, *packages: str) -> None:
    """Refuse to go on without Flower.

    Raises:
        MissingDependency: it is not installed, or not with its simulation.
    """
    for package in ("flwr", *packages):
        if importlib.util.find_spec(package) is None:
            raise MissingDependency(package, "federated", purpose)


def to_record(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as NumPy arrays of a Flower record.

    Raises:
        InvalidValue: a tensor has a type that NumPy does not have.
    """
    from flwr.app import Array, ArrayRecord

    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16 or tensor.is_quantized or tensor.layout != torch.strided:
            raise InvalidValue(f"{name} is {tensor.dtype}, {tensor.layout}: Flower carries NumPy's types only")
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def from_record(record: ArrayRecord) -> dict[str, Tensor]:
    """Back from :func:`to_record`."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


def size_of(content: RecordDict) -> int:
    """Bytes of a message's content as Flower serialises it."""
    from flwr.common.serde import recorddict_to_proto

    return recorddict_to_proto(content).ByteSize()


class ContextShelf(Shelf):
    """A client's states in its Flower context."""

    def __init__(self, context: Context) -> None:
        self._records = context.state

    def rounds(self) -> list[int]:
        """Of the states kept."""
        return sorted(int(name.removeprefix(_STATE)) for name in self._records if name.startswith(_STATE))

    def get(self, round: int) -> dict[str, Tensor]:
        """The state after this round."""
        return from_record(self._records.array_records[f"{_STATE}{round}"])

    def put(self, round: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state after this round."""
        self._records[f"{_STATE}{round}"] = to_record(state)

    def drop(self, round: int) -> None:
        """Forget the state after this round."""
        del self._records[f"{_STATE}{round}"]


def client_number(told: Any, clients: int) -> int:
    """The client that a node is, by what its config says.

    Raises:
        InvalidValue: it is none of the fleet's.
    """
    if not str(told).isdecimal() or int(str(told)) >= clients:
        raise InvalidValue(
            f"{PARTITION} = {shown(told)}: one of 0 … {clients - 1} is needed, the fleet has {clients} clients"
        )
    return int(str(told))


def make_client_app(plan_of: Callable[[Context], FleetPlan], folder_of: Callable[[Context], Path | None]) -> ClientApp:
    """The app that a node runs.

    Args:
        plan_of: context → the plan; called for every message, so it should remember.
        folder_of: context → where this node's client keeps its states, or None: in the context.
    """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def who(message: Message, context: Context) -> Message:
        plan = plan_of(context)  # read before the first round, not in it
        number = client_number(context.node_config.get(PARTITION), plan.clients)
        return Message(RecordDict({"who": ConfigRecord({"client": number})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        plan, folder = plan_of(context), folder_of(context)
        given: dict[str, Any] = dict(message.content.config_records["order"])
        order = Order(**given)
        shelf = ContextShelf(context) if folder is None else FolderShelf(folder / str(order.client))
        _leave("begun", order)
        watch = _limited(plan.time_limit, order)
        reply = work(plan, shelf, order, from_record(message.content.array_records["weights"]))
        watch.cancel()
        try:
            content = to_content(reply)
        except Exception as error:  # whatever a client has put into its update must not end the others' run
            content = to_content(malformed(order.client, error))
        return Message(content, reply_to=message)

    return app


def to_content(reply: Reply) -> RecordDict:
    """A client's reply as Flower carries it."""
    from flwr.app import ConfigRecord, MetricRecord, RecordDict

    facts: dict[str, Any] = {"shared": reply.shared, "reason": reply.reason, "detail": reply.detail}
    if (update := reply.update) is None:
        return RecordDict({"facts": ConfigRecord(facts)})
    return RecordDict(
        {
            "facts": ConfigRecord({**facts, "examples": update.examples}),
            "metrics": MetricRecord({**update.metrics}),
            "weights": to_record(update.weights),
        }
    )


def from_content(content: RecordDict, client: int, bytes_down: int) -> Reply:
    """Back from :func:`to_content`; content that another wrote may be anything, and is then of the wrong shape."""
    bytes_up = size_of(content)
    try:
        facts: dict[str, Any] = dict(content.config_records["facts"])
        if "examples" in facts:
            metrics: dict[str, Any] = dict(content.metric_records["metrics"])
            update = Update(from_record(content.array_records["weights"]), facts["examples"], metrics)
        elif facts["reason"] in REASONS:
            update = None
        else:
            raise InvalidValue(f"reason = {shown(facts['reason'])}: one of {', '.join(REASONS)}")
        told = (client, update, bool(facts["shared"]), "" if update else facts["reason"], str(facts["detail"]))
        return Reply(*told, bytes_down=bytes_down, bytes_up=bytes_up)
    except Exception as error:  # NumPy and Flower raise errors of any kind for bytes that are not theirs
        return malformed(client, error, bytes_down, bytes_up)


def _simulated() -> bool:
    return _FOLDER in os.environ


def _note(what: Literal["begun", "late"], order: Order) -> Path | None:
    """The file by which a simulated client leaves word that it began an order, or was stopped by the time limit.

    None outside of a simulation.
    """
    return Path(os.environ[_FOLDER]) / f"{order.client}-{order.round}.{what}" if _simulated() else None


def _leave(what: Literal["begun", "late"], order: Order) -> None:
    if (note := _note(what, order)) is not None:
        note.touch()


def _left(what: Literal["begun", "late"], order: Order) -> bool:
    return (note := _note(what, order)) is not None and note.exists()


def _limited(seconds: float | None, order: Order) -> threading.Timer:
    """A watch that ends this process when a client is not done in time: nothing gentler stops a running loop."""

    def stop() -> None:
        _leave("late", order)
        os._exit(1)

    watch = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, stop)
    watch.daemon = True
    if seconds is not None:
        watch.start()
    return watch


@dataclass
class _Node:
    """What the server knows of a node."""

    place: int
    """Among all nodes, by when they came."""
    again: float
    """When it is to be asked who it is; infinite where it has told."""
    asked: int = 0
    """How often it was asked."""
    tries: int = 0
    """That failed."""
    reason: str = ""
    """Why it could not tell; "" where it could."""


class OverGrid(Engine):
    """Orders as messages of a Flower grid; used inside a ServerApp.

    A device that comes late, or comes back as another node, is asked who it is when a round begins, and takes part from
    the round after its answer.

    Args:
        grid: of the ServerApp.
        plan: of the run.
        patience: seconds to wait for the nodes, and beyond the plan's time limit for a round's replies.
        at_once: clients that compute at the same time; the others wait for their turn.
    """

    def __init__(self, grid: Grid, plan: FleetPlan, patience: float, at_once: int | None = None) -> None:
        self.grid, self.plan, self.patience = grid, plan, patience
        self.at_once = at_once or plan.clients
        self.nodes: dict[int, int] = {}
        """Client → node."""
        self._known: dict[int, _Node] = {}
        self._asked: dict[str, int] = {}
        """Message → node that has not answered it yet."""

    def __enter__(self) -> Self:
        """Wait until every client's node is there and has read the plan, or the time is over and some are.

        Raises:
            EngineFailed: none is there in time.
        """
        deadline = time.monotonic() + self.patience
        while len(self.nodes) < self.plan.clients:
            self._meet()
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.plan.clients)) - self.nodes.keys())
                told = f"clients {missing} are not there after {self.patience:g} s{self._excuses()}"
                if not self.nodes:
                    raise EngineFailed(told)
                if missing:
                    log.warning("%s; the run goes on without them", told)
                break
            time.sleep(POLL_SECONDS)
        return self

    def _meet(self) -> None:
        """Ask nodes that are new, or failed before, which client they are, and take down answers; waits for none."""
        from flwr.app import RecordDict

        now = time.monotonic()
        for node in self.grid.get_node_ids():
            known = self._known.setdefault(node, _Node(len(self._known), now))
            if known.again <= now:
                known.again = now + SILENCE_SECONDS * 2**known.asked  # its process may have died without a word
                known.asked += 1
                sent = self._push(RecordDict(), node, "query")
                self._asked |= sent
                if not sent:
                    self._put_off(known, "it was there no more when it was asked")
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node = self._asked.pop(reply.metadata.reply_to_message_id)
            known = self._known[node]
            if reply.has_error():
                self._put_off(known, _told(reply))
                continue
            try:
                client = client_number(reply.content.config_records["who"]["client"], self.plan.clients)
            except (KeyError, InvalidValue) as error:
                self._put_off(known, f"{type(error).__name__}: {error}")
                continue
            known.reason, known.again = "", math.inf
            if client not in self.nodes or known.place > self._known[self.nodes[client]].place:
                self.nodes[client] = node  # a device that was started again may be a new node, the last one counts

    def _put_off(self, node: _Node, reason: str) -> None:
        first, most = RETRY_SECONDS
        node.reason, node.again = reason, time.monotonic() + min(first * 2**node.tries, most)
        node.tries += 1

    def _excuses(self) -> str:
        """What nodes said that could not tell who they are, as the end of a sentence."""
        said = [f"node {node}: {known.reason}" for node, known in self._known.items() if known.reason]
        return f"; nodes that could not start: {'; '.join(said)}" if said else ""

    def _push(self, content: RecordDict, node: int, kind: str) -> dict[str, int]:
        """{message: node}; empty if the node is gone."""
        from flwr.app import Message

        message = Message(content, node, kind)
        return {sent: node for sent in self.grid.push_messages([message]) if sent}

    def ask(self, orders: Sequence[Order], weights: Weights) -> list[Reply]:
        """Send all orders, and wait for the replies until all are there or the time is over."""
        from flwr.app import ConfigRecord, RecordDict

        self._meet()
        full, empty = to_record(weights), to_record({})
        waiting: dict[str, Order] = {}
        replies: dict[int, Reply] = {}
        down: dict[int, int] = {}
        since: dict[int, float] = {}
        start = time.monotonic()

        def send(order: Order) -> None:
            if (node := self.nodes.get(order.client)) is None:
                absent = f"no node has come that is this client{self._excuses()}"
                replies[order.client] = Reply(order.client, None, True, "died", absent)
                return
            sent_weights = empty if order.bare else full
            content = RecordDict({"order": ConfigRecord(asdict(order)), "weights": sent_weights})
            down[order.client], since[order.client] = size_of(content), time.monotonic()
            sent = self._push(content, node, "train")
            waiting.update(dict.fromkeys(sent, order))
            if not sent:
                gone = "its node is not there any more"
                replies[order.client] = Reply(order.client, None, True, "died", gone, down[order.client])

        for order in orders:
            send(order)
        turns = -(-len(orders) // self.at_once)
        limit = None if self.plan.time_limit is None else turns * self.plan.time_limit + self.patience
        while waiting and (limit is None or time.monotonic() - start < limit):
            bounced = []
            for message in self.grid.pull_messages(list(waiting)):
                order = waiting.pop(message.metadata.reply_to_message_id)
                if _not_begun(message, order) and time.monotonic() - start < self.patience:
                    bounced.append(order)
                elif message.has_error():
                    seconds = time.monotonic() - since[order.client]
                    replies[order.client] = self._failure(message, order, down[order.client], seconds)
                else:
                    replies[order.client] = from_content(message.content, order.client, down[order.client])
            time.sleep(10 * POLL_SECONDS if bounced else POLL_SECONDS)
            for order in bounced:
                send(order)
        for order in waiting.values():
            late = f"no answer after {time.monotonic() - start:.3g} s"
            replies[order.client] = Reply(order.client, None, True, "slow", late, down[order.client])
        return [replies[order.client] for order in orders]

    def _failure(self, message: Message, order: Order, bytes_down: int, seconds: float) -> Reply:
        """A reply for an error that came ``seconds`` after the order was sent."""
        limit, told = self.plan.time_limit, f"its node told: {_told(message)}"
        if _left("late", order):
            reason, detail = "slow", f"was stopped after {limit:g} s"
        elif _left("begun", order):
            reason, detail = "died", "its process ended"
        elif not _simulated() and limit is not None and seconds >= limit:
            # a device leaves no word: its process ends itself at the limit
            reason, detail = "slow", f"ended after {seconds:.3g} s, the limit is {limit:g} s; {told}"
        else:
            reason, detail = "died", told
        return Reply(order.client, None, True, reason, detail, bytes_down)


def _told(message: Message) -> str:
    """The reason of an error, in one line."""
    return (message.error.reason or "no reason given").strip().splitlines()[0]


def _not_begun(message: Message, order: Order) -> bool:
    """Whether a simulation's worker was just being started anew and never saw the order."""
    return message.has_error() and _simulated() and not _left("begun", order)


@cache
def _plan_of(folder: str) -> tuple[FleetPlan, Path | None]:
    """The plan in a simulation's work folder, read once by each process.

    It is unpickled like the arguments of any process of one's own: :class:`Simulation` made the folder, for this user
    alone, a moment before.
    """
    import cloudpickle

    return cloudpickle.loads((Path(folder) / "plan").read_bytes())


def _simulated_plan(context: Context) -> FleetPlan:
    return _plan_of(os.environ[_FOLDER])[0]


def _simulated_folder(context: Context) -> Path | None:
    return _plan_of(os.environ[_FOLDER])[1]


class Simulation(Engine):
    """Clients of this machine under ``flwr.simulation``: one worker for each core, each with one thread.

    Args:
        plan: of the run; it is written once with cloudpickle, for processes of this user only.
        folder: for the clients' states; None: they live in Flower's contexts and end with the simulation.
        patience: seconds for Flower and Ray to start.
    """

    def __init__(self, plan: FleetPlan, folder: Path | None = None, patience: float = 300.0) -> None:
        require_flower("the engine 'flower'", "ray")
        self.plan, self.folder, self.patience = plan, folder, patience

    def __enter__(self) -> Self:
        """Start, and wait until every worker has read the plan."""
        import cloudpickle

        self._work = Path(tempfile.mkdtemp(prefix="fleet"))  # a short name: Ray puts sockets below it
        try:
            (self._work / "plan").write_bytes(cloudpickle.dumps((self.plan, self.folder)))
            self._pipe, theirs = Pipe()
            code = f"from sparing.federated.flower import simulate; simulate({theirs.fileno()})"
            environment = {
                **os.environ,
                **QUIET,
                **NO_GPU,
                _FOLDER: str(self._work),
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            with (self._work / "log").open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", code],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for this process, which then ends the other
                )
            theirs.close()
            try:
                self._receive(self.patience)
            except BaseException:
                self.__exit__()
                raise
        except BaseException:
            shutil.rmtree(self._work, ignore_errors=True)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End all processes of the simulation."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            self._pipe.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            self._process.kill()
            for process in psutil.wait_procs(family, 2)[1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        shutil.rmtree(self._work, ignore_errors=True)

    def ask(self, orders: Sequence[Order], weights: Weights) -> list[Reply]:
        """One reply for each order.

        Raises:
            EngineFailed: the simulation has ended.
        """
        self._send(pack({"orders": [asdict(order) for order in orders]}, weights))
        replies = []
        for _ in orders:
            sizes = json.loads(self._receive(None))
            replies.append(unpack_reply(self._receive(None), **sizes))
        return replies

    def _send(self, message: bytes) -> None:
        try:
            self._pipe.send_bytes(message)
        except OSError as error:
            raise self._failed() from error

    def _receive(self, timeout: float | None) -> bytes:
        try:
            if not self._pipe.poll(timeout):
                raise self._failed(f"is not ready after {timeout:g} s")
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as error:  # its process is gone
            raise self._failed() from error

    def _failed(self, how: str = "ended") -> EngineFailed:
        said = files.read_bytes(self._work / "log").decode("utf-8", "replace").strip().splitlines()
        return EngineFailed("\n".join([f"the simulation of the fleet {how}; it wrote:", *said[-15:]]))


def simulate(descriptor: int) -> None:
    """The process of a simulation: hands orders from the pipe to Flower, and replies back. Never returns."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    work_folder = Path(os.environ[_FOLDER])
    plan, _ = _plan_of(str(work_folder))
    pipe = Connection(descriptor)
    workers = min(len(usable_cores()), plan.clients)
    failed = 1

    def main(grid: Grid, context: Context) -> None:
        nonlocal failed
        with OverGrid(grid, plan, 300.0, workers) as engine:
            pipe.send_bytes(b"ready")
            with suppress(EOFError):  # the other end is closed when the run is over, or killed
                while True:
                    facts, weights = unpack(pipe.recv_bytes())
                    for reply in engine.ask([Order(**order) for order in facts["orders"]], weights):
                        pipe.send_bytes(
                            json.dumps({"bytes_down": reply.bytes_down, "bytes_up": reply.bytes_up}).encode()
                        )
                        pipe.send_bytes(pack_reply(reply))
        failed = 0

    server = ServerApp()
    server.main()(main)
    try:
        run_simulation(
            server,
            make_client_app(_simulated_plan, _simulated_folder),
            plan.clients,
            backend_config={
                # a worker that died is started anew; one core for each, as many workers as there are cores
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1},
                "init_args": {"num_cpus": workers, "_temp_dir": str(work_folder / "ray"), "log_to_driver": False},
            },
        )
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        _end_children()
        if not failed:  # a process that was killed cannot clear away behind itself; the log of a failure is still read
            shutil.rmtree(work_folder, ignore_errors=True)
        os._exit(failed)  # a server's thread that waits for a dead engine must not hold the process


def _end_children() -> None:
    import psutil

    children: Iterable[psutil.Process] = psutil.Process().children(recursive=True)
    for process in children:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
    for process in psutil.wait_procs(children, 5)[1]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
