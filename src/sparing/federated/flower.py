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
from dataclasses import asdict
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

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Environment of every process that runs Flower: nothing is reported to anybody."""

POLL_SECONDS = 0.02
PARTITION = "partition-id"
_FOLDER = "SPARING_FLEET"
"""Environment variable with the work folder of a simulation."""
_STATE = "state-"


class EngineFailed(SparingError):
    """Flower or Ray ended, or did not start; the message holds the last lines they wrote."""


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
        plan_of(context)  # read before the first round, not in it
        number = int(context.node_config[PARTITION])
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


def _note(what: Literal["begun", "late"], order: Order) -> Path | None:
    """The file by which a simulated client leaves word that it began an order, or was stopped by the time limit.

    None outside of a simulation.
    """
    folder = os.environ.get(_FOLDER)
    return None if folder is None else Path(folder) / f"{order.client}-{order.round}.{what}"


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


class OverGrid(Engine):
    """Orders as messages of a Flower grid; used inside a ServerApp.

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

    def __enter__(self) -> Self:
        """Wait until every client's node is there and has read the plan.

        Raises:
            EngineFailed: some are not there in time.
        """
        from flwr.app import RecordDict

        deadline = time.monotonic() + self.patience
        asked: set[int] = set()
        waiting: dict[str, int] = {}
        while len(self.nodes) < self.plan.clients:
            new = [node for node in self.grid.get_node_ids() if node not in asked]
            for node in new:
                asked.add(node)
                waiting |= self._push(RecordDict(), node, "query")
            for reply in self.grid.pull_messages(list(waiting)) if waiting else ():
                node = waiting.pop(reply.metadata.reply_to_message_id)
                if reply.has_error():
                    asked.discard(node)  # asked again: its worker may just have died
                else:
                    self.nodes[int(str(reply.content.config_records["who"]["client"]))] = node
            if time.monotonic() > deadline:
                missing = sorted(set(range(self.plan.clients)) - self.nodes.keys())
                raise EngineFailed(f"clients {missing} are not there after {self.patience:g} s")
            time.sleep(POLL_SECONDS)
        return self

    def _push(self, content: RecordDict, node: int, kind: str) -> dict[str, int]:
        """{message: node}; empty if the node is gone."""
        from flwr.app import Message

        message = Message(content, node, kind)
        return {sent: node for sent in self.grid.push_messages([message]) if sent}

    def ask(self, orders: Sequence[Order], weights: Weights) -> list[Reply]:
        """Send all orders, and wait for the replies until all are there or the time is over."""
        from flwr.app import ConfigRecord, RecordDict

        record = to_record(weights)
        waiting: dict[str, Order] = {}
        replies: dict[int, Reply] = {}
        down: dict[int, int] = {}
        start = time.monotonic()

        def send(order: Order) -> None:
            content = RecordDict({"order": ConfigRecord(asdict(order)), "weights": record})
            down[order.client] = size_of(content)
            sent = self._push(content, self.nodes[order.client], "train")
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
                else:
                    replies[order.client] = self._reply(message, order, down[order.client])
            time.sleep(10 * POLL_SECONDS if bounced else POLL_SECONDS)
            for order in bounced:
                send(order)
        for order in waiting.values():
            late = f"no answer after {time.monotonic() - start:.3g} s"
            replies[order.client] = Reply(order.client, None, True, "slow", late, down[order.client])
        return [replies[order.client] for order in orders]

    def _reply(self, message: Message, order: Order, bytes_down: int) -> Reply:
        if message.has_error():
            if _left("late", order):
                slow = f"was stopped after {self.plan.time_limit:g} s"
                return Reply(order.client, None, True, "slow", slow, bytes_down)
            told = (message.error.reason or "no reason given").strip().splitlines()[0]
            died = "its process ended" if _left("begun", order) else f"its node told: {told}"
            return Reply(order.client, None, True, "died", died, bytes_down)
        return from_content(message.content, order.client, bytes_down)


def _not_begun(message: Message, order: Order) -> bool:
    """Whether a simulation's worker was just being started anew and never saw the order."""
    return message.has_error() and os.environ.get(_FOLDER) is not None and not _left("begun", order)


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
            environment = {**os.environ, **QUIET, _FOLDER: str(self._work), "PYTHONPATH": os.pathsep.join(sys.path)}
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
