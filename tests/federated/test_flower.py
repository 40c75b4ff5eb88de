"""Flower: a simulation ends with the bits of one process, whatever fails, and leaves nothing behind; so do devices.

Both start many processes. They are one file, so that one worker runs them, one after the other.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from federated.fleets import plan, same, unclocked, weights
from sparing.core import files
from sparing.core.errors import IncompatibleStep, InvalidValue, MissingDependency, RecipeError
from sparing.core.job import TrainingPlan
from sparing.core.predictor import build_model
from sparing.core.randomness import isolated_rng
from sparing.core.store import Progress
from sparing.federated.app import _folder, claim_folder, fleet_of_recipe, write_app
from sparing.federated.clients import Update, Weights
from sparing.federated.flower import (
    ContextShelf,
    EngineFailed,
    OverGrid,
    Simulation,
    client_number,
    from_content,
    from_record,
    to_content,
    to_record,
)
from sparing.federated.rounds import FleetPlan, InProcess, Order, Reply, run_federated, serve
from sparing.federated.step import Federate, blocks_of
from sparing.tasks.continual import Continual

FAILURES = {0: {0: "die"}, 1: {1: "nan", 3: "raise"}, 2: {1: "shape", 2: "slow"}}


def workers() -> set[int]:
    """Processes of any simulation that this test has begun."""
    found = set()
    for process in psutil.process_iter():
        try:
            if process.environ().get("PYTEST_FLEET") == str(os.getpid()):
                found.add(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_FLEET", str(os.getpid()))


def nothing_left() -> bool:
    deadline = time.monotonic() + 30
    while (left := workers()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not left


def test_tensors_travel_as_numpy_arrays() -> None:
    pytest.importorskip("flwr")
    sent = {**weights(), "mask": torch.tensor([True, False]), "turned": torch.arange(6.0).reshape(2, 3).T}
    record = to_record(sent)
    assert same(from_record(record), sent)
    assert {array.stype for array in record.values()} == {"numpy.ndarray"}
    with pytest.raises(InvalidValue, match=r"half is torch\.bfloat16"):
        to_record({"half": torch.ones(2, dtype=torch.bfloat16)})


def test_a_client_remembers_in_its_context() -> None:
    app = pytest.importorskip("flwr.app")
    context = app.Context(1, 1, {}, app.RecordDict(), {})
    shelf = ContextShelf(context)
    for number, since in [(0, -1), (1, 0), (2, 1), (4, 2)]:
        shelf.keep(number, {"x": torch.tensor(number)}, since)
    assert ContextShelf(context).rounds() == [1, 2, 4]
    assert shelf.get(2)["x"].item() == 2


def reply_with(**parts: object) -> Reply:
    """What the server makes of a good reply with other parts; None: without that part."""
    app = pytest.importorskip("flwr.app")
    content = to_content(Reply(1, Update(weights(), 30, {"steps": 1.0})))
    for name, part in parts.items():
        del content[name]
        if part is not None:
            content[name] = app.ConfigRecord(part) if isinstance(part, dict) else part
    return from_content(content, 1, 10)


def test_a_reply_survives_and_only_its_known_facts_are_read() -> None:
    whole = reply_with()
    assert same(whole.update.weights, weights())
    assert (whole.update.examples, whole.update.metrics, whole.reason) == (30, {"steps": 1.0}, "")
    more = reply_with(facts={"shared": True, "reason": "", "detail": "", "examples": 30, "surprise": 1})
    assert same(more.update.weights, whole.update.weights)
    assert reply_with(facts={"shared": True, "reason": "raised", "detail": "why"}).reason == "raised"


@pytest.mark.parametrize(
    ("parts", "detail"),
    [
        ({"facts": None}, "KeyError: 'facts'"),
        ({"metrics": None}, "KeyError: 'metrics'"),
        ({"weights": None}, "KeyError: 'weights'"),
        ({"facts": {"shared": True, "detail": ""}}, "KeyError: 'reason'"),
        ({"facts": {"shared": True, "reason": "bored", "detail": ""}}, "InvalidValue: reason = 'bored'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_malformed_reply_is_of_the_wrong_shape(parts: dict[str, object], detail: str) -> None:
    found = reply_with(**parts)
    assert (found.update, found.reason) == (None, "wrong shape")
    assert found.detail.startswith(detail)
    assert found.bytes_down == 10
    assert found.bytes_up > 0


def test_bytes_that_are_no_array_are_of_the_wrong_shape() -> None:
    pytest.importorskip("flwr")
    record = to_record(weights())
    record["layer.bias"].data = b"no array"
    found = reply_with(weights=record)
    assert (found.update, found.reason) == (None, "wrong shape")
    assert "Error: " in found.detail


@pytest.fixture
def _server(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process were a server's, which may write messages."""
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(identity, name, 1)


class FakeGrid:
    """Nodes that answer at once; each is a function from a message to (content or error), or None where none comes."""

    def __init__(self, **nodes: Any) -> None:
        self.nodes = {int(name.removeprefix("node")): node for name, node in nodes.items()}
        self.asked: Counter[int] = Counter()
        """Node → how often it was asked who it is."""
        self.replies: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        from flwr.app import Message

        sent = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.nodes:
                sent.append("")
                continue
            message.metadata.__dict__["_message_id"] = found = f"message {len(self.replies)}"
            self.asked[node] += message.metadata.message_type == "query"
            answer = self.nodes[node](message)
            self.replies[found] = None if answer is None else Message(answer, reply_to=message)
            sent.append(found)
        return sent

    def pull_messages(self, waiting: Sequence[str]) -> list[Any]:
        return [self.replies[each] for each in waiting if self.replies[each] is not None]


def node(client: int, order: Callable[[Any], Any] | None = None) -> Callable[[Any], Any]:
    """A node that says that it is this client; ``order``: what it answers to an order, an update otherwise."""
    app = pytest.importorskip("flwr.app")

    def answer(message: Any) -> Any:
        if message.metadata.message_type == "query":
            return app.RecordDict({"who": app.ConfigRecord({"client": client})})
        return to_content(Reply(client, Update(weights(), 1, {}))) if order is None else order(message)

    return answer


def broken(reason: str) -> Callable[[Any], Any]:
    """What ends with this error."""
    app = pytest.importorskip("flwr.app")
    return lambda message: app.Error(0, reason)


def asked(engine: OverGrid) -> list[str]:
    """The reasons of all clients' replies; "" for an update."""
    orders = [Order("train", client, 0, 0, -1) for client in range(engine.plan.clients)]
    return [reply.reason for reply in engine.ask(orders, weights())]


@pytest.mark.usefixtures("_server")
def test_a_device_that_comes_back_as_another_node_takes_part_again() -> None:
    grid = FakeGrid(node1=node(0), node2=node(1), node3=node(2))
    with OverGrid(grid, plan(), 10.0) as engine:
        assert asked(engine) == ["", "", ""]
        del grid.nodes[2]
        assert asked(engine) == ["", "died", ""]
        grid.nodes[4] = node(1)
        assert asked(engine) == ["", "", ""]
        assert engine.nodes == {0: 1, 1: 4, 2: 3}
        assert set(grid.asked.values()) == {1}


@pytest.mark.usefixtures("_server")
def test_a_server_goes_on_without_a_device_that_does_not_come(caplog: pytest.LogCaptureFixture) -> None:
    grid = FakeGrid(node1=node(0), node2=broken("<class 'OSError'>:<'no recipe'>\nmore"), node3=node(2))
    with OverGrid(grid, plan(), 0.1) as engine:
        assert "clients [1] are not there after 0.1 s" in caplog.text
        assert "nodes that could not start: node 2: <class 'OSError'>:<'no recipe'>; the run goes on" in caplog.text
        reply = engine.ask([Order("train", 1, 0, 0, -1)], weights())[0]
        assert reply.reason == "died"
        assert reply.detail.startswith(
            "no node has come that is this client; nodes that could not start: node 2: <class"
        )
        grid.nodes[2] = node(1)
        engine._known[2].again = 0.0
        assert asked(engine) == ["", "", ""]


@pytest.mark.usefixtures("_server")
def test_a_server_to_which_no_device_comes_says_what_they_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparing.federated.flower.RETRY_SECONDS", (0.1, 1.0))
    grid = FakeGrid(node1=broken("no such file: fleet.yaml"))
    with pytest.raises(EngineFailed, match=r"clients \[0, 1, 2\] .* node 1: no such file: fleet.yaml"):
        OverGrid(grid, plan(), 0.5).__enter__()
    assert grid.asked[1] == 3  # at 0, 0.1 and 0.3 s


@pytest.mark.usefixtures("_server")
def test_a_number_outside_of_the_fleet_is_refused_on_the_device_and_on_the_server() -> None:
    assert client_number("2", 3) == 2
    for wrong in (3, -1, None, 1.0, "one", True):
        with pytest.raises(InvalidValue, match=r"partition-id = .*: one of 0 … 2 is needed, the fleet has 3 clients"):
            client_number(wrong, 3)
    grid = FakeGrid(node1=node(1), node2=node(2), node3=node(3))
    with OverGrid(grid, plan(), 0.1) as engine:
        assert sorted(engine.nodes) == [1, 2]
        assert "node 3: InvalidValue: partition-id = 3: one of 0 … 2" in engine._excuses()


@pytest.mark.usefixtures("_server")
def test_an_answer_that_is_none_to_who_are_you_ends_nothing() -> None:
    app = pytest.importorskip("flwr.app")
    grid = FakeGrid(node1=node(0), node2=lambda message: app.RecordDict())
    with OverGrid(grid, plan(clients=2), 0.1) as engine:
        assert asked(engine) == ["", "died"]


@pytest.mark.usefixtures("_server")
def test_a_node_whose_answer_was_lost_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparing.federated.flower.SILENCE_SECONDS", 0.1)
    answers = [None, None, *[node(0)] * 9]
    grid = FakeGrid(node1=lambda message: (found := answers.pop(0)) and found(message))
    with OverGrid(grid, plan(clients=1), 10.0) as engine:
        assert asked(engine) == [""]
    assert grid.asked[1] == 3


@pytest.mark.usefixtures("_server")
def test_no_weights_go_with_a_bare_order() -> None:
    sent = []

    def note(message: Any) -> Any:
        sent.append(len(message.content.array_records["weights"]))
        return to_content(Reply(0, Update(weights(), 1, {}), shared=False))

    with OverGrid(FakeGrid(node1=node(0, note)), plan(clients=1), 10.0) as engine:
        replies = [
            engine.ask([Order("train", 0, 0, number, -1, bare=bool(number))], weights())[0] for number in range(2)
        ]
    assert sent == [3, 0]
    assert replies[1].bytes_down < replies[0].bytes_down
    assert replies[1].bytes_up == replies[0].bytes_up > 0
    assert not replies[1].shared


@pytest.mark.usefixtures("_server")
def test_a_device_whose_process_ends_at_the_limit_is_slow_and_one_before_it_has_died() -> None:
    def at_the_limit(message: Any) -> Any:
        time.sleep(0.3)
        return broken("its task ended")(message)

    orders = [Order("train", client, 0, 0, -1) for client in range(3)]
    for limit, reason in ((0.2, "slow"), (30.0, "died"), (None, "died")):
        grid = FakeGrid(node1=node(0, at_the_limit), node2=node(1), node3=node(2))
        with OverGrid(grid, plan(time_limit=limit), 10.0) as engine:
            reply = engine.ask(orders, weights())[0]
        assert reply.reason == reason
        assert "its task ended" in reply.detail


def test_without_flower_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flwr" else find(name))
    with pytest.raises(MissingDependency, match=r"needs the package 'flwr': pip install 'sparing\[federated\]'"):
        run_federated(plan(), "flower")


def test_processes_of_a_simulation_see_no_gpu_and_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    seen: dict[str, str] = {}

    class Started(Exception):
        pass

    def start(*command: object, env: dict[str, str], **more: object) -> None:
        seen.update(env)
        raise Started

    monkeypatch.setattr("sparing.federated.flower.subprocess.Popen", start)
    with pytest.raises(Started):
        Simulation(plan()).__enter__()
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["FLWR_TELEMETRY_ENABLED"] == seen["RAY_USAGE_STATS_ENABLED"] == "0"


def digits() -> FleetPlan:
    """Two real clients on tiny shares of digits in two tasks."""
    task = Continual(of="digits", tasks=2)
    federate = Federate(
        clients=2, fraction=1.0, rounds_per_task=1, local_epochs=1, batch_size=20,
        samples_per_client=40, optimizer="SGD", lr=0.1, weight_decay=0.0,
    )  # fmt: skip
    with isolated_rng("model"):
        model = build_model("mlp", task, widths=[8])
    return federate.fleet(model, task.splits().train, blocks_of(task), TrainingPlan(), seed=0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kept", [True, False], ids=["folder", "context"])
def test_real_clients_end_with_the_same_bits_in_both_engines(tmp_path: Path, kept: bool) -> None:
    pytest.importorskip("ray")
    expected = run_federated(digits())
    found = run_federated(digits(), "flower", Progress(tmp_path / "progress") if kept else None)
    assert same(found.weights, expected.weights)
    assert expected.total("qp_steps") == found.total("qp_steps") > 0
    assert unclocked(found.end.metrics) == unclocked(expected.end.metrics)
    assert found.dropped == {}
    assert (tmp_path / "progress" / "clients").exists() == kept


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_simulation_with_failures_ends_with_the_bits_of_one_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    result = run_federated(plan(FAILURES, time_limit=2.0), "flower")
    raised = {client: dict.fromkeys(rounds, "raise") for client, rounds in FAILURES.items()}
    expected = run_federated(plan(raised))
    assert [[(each.client, each.reason) for each in report.dropped] for report in result.rounds] == [
        [(0, "died")], [(1, "not finite"), (2, "wrong shape")], [(2, "slow")], [(1, "raised")]
    ]  # fmt: skip
    assert same(result.weights, expected.weights)
    assert unclocked(result.end.metrics) == unclocked(expected.end.metrics)
    shared = sum(tensor.nbytes for tensor in weights().values())
    assert result.rounds[3].bytes_down > 3 * shared
    assert nothing_left()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_simulation_killed_within_a_round_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    signal_file = tmp_path / "go"
    faults = {1: {1: f"wait for {signal_file}"}}
    program = (
        "from federated.fleets import plan; from sparing.core.store import Progress\n"
        "from sparing.federated.rounds import run_federated; from pathlib import Path\n"
        f"run_federated(plan({faults!r}), 'flower', Progress(Path({str(tmp_path / 'progress')!r})))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-c", program], env=environment)
    try:
        deadline = time.monotonic() + 300
        while not signal_file.with_name("go.there").exists():  # one client is in the middle of its second round
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(child.pid).children(recursive=True):
                process.kill()
        child.kill()
        child.wait()
    assert nothing_left()
    assert Progress(tmp_path / "progress").load()["since"] == {0: 0, 1: 0, 2: 0}
    signal_file.touch()
    result = run_federated(plan(faults), "flower", Progress(tmp_path / "progress"))
    assert same(result.weights, run_federated(plan()).weights)
    assert len(result.rounds) == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_plan_that_cannot_be_read_there_is_an_error_with_what_was_written() -> None:
    pytest.importorskip("ray")
    broken = plan(make_client=_Unreadable())
    with pytest.raises(EngineFailed, match=r"(?s)ended; it wrote:.*no such plan"), Simulation(broken):
        pass
    assert nothing_left()


class _Unreadable:
    def __reduce__(self) -> tuple[object, ...]:
        return _refuse, ()

    def __call__(self, number: int) -> None:
        raise NotImplementedError


def _refuse() -> None:
    raise ArithmeticError("no such plan")


# ------------------------------------------------------------------- a SuperLink and SuperNodes on this machine

RECIPE = """\
task: {name: continual, of: digits, stream: classes, tasks: 2}
model: {name: mlp, widths: [16]}
steps:
  - federate: {method: fedknow, clients: 2, fraction: 1.0, rounds_per_task: 1, local_epochs: 1, samples_per_client: 60}
"""
BIN = Path(sys.executable).parent


class Stopped(Exception):
    """Of a server."""


class OneRound(InProcess):
    """Clients of a server that is stopped in its second round."""

    def ask(self, orders: Sequence[Order], weights: Weights) -> list[Reply]:
        if orders[0].round:
            raise Stopped
        return super().ask(orders, weights)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def end(process: subprocess.Popen[bytes]) -> None:
    """With everything it has started: SuperNodes leave children behind."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def test_a_recipe_without_a_fleet_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "plain.yaml"
    recipe.write_text("task: digits\nsteps:\n  - train: {epochs: 1}\n")
    with pytest.raises(RecipeError, match="'federate' is needed"):
        fleet_of_recipe(str(recipe), store=str(tmp_path / "store"))


def test_what_a_run_refuses_is_refused_on_devices(tmp_path: Path) -> None:
    recipe = tmp_path / "smooth.yaml"
    recipe.write_text(RECIPE.replace("steps:\n", "steps:\n  - smooth_labels\n"))
    with pytest.raises(IncompatibleStep, match="loss_terms"):
        fleet_of_recipe(str(recipe), store=str(tmp_path / "store"))


def test_steps_that_devices_do_not_run_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = tmp_path / "more.yaml"
    recipe.write_text(RECIPE + "  - quantize: {goal: bytes, max_loss: 1.0}\n")
    fleet_of_recipe(str(recipe), store=str(tmp_path / "store"))
    assert "more.yaml: a fleet on devices ends with its weights; not run: quantize" in caplog.text


def test_two_fleets_have_states_of_their_own_in_a_devices_folder(tmp_path: Path) -> None:
    recipe = tmp_path / "one.yaml"
    recipe.write_text(RECIPE)
    folders = []
    for seed in (0, 1, 0):
        context = SimpleNamespace(
            run_config={"recipe": str(recipe), "seed": seed, "store": str(tmp_path / "store")},
            node_config={"folder": str(tmp_path / "device")},
        )
        folders.append(_folder(context))
    assert folders[0] == folders[2] != folders[1]
    assert {folder.parent for folder in folders} == {tmp_path / "device"}
    assert _folder(SimpleNamespace(run_config={}, node_config={})) is None


def test_the_folder_of_another_fleet_is_refused(tmp_path: Path) -> None:
    recipe, other = tmp_path / "one.yaml", tmp_path / "other.yaml"
    recipe.write_text(RECIPE)
    other.write_text(RECIPE.replace("local_epochs: 1", "local_epochs: 2"))
    fleet = fleet_of_recipe(str(recipe), store=str(tmp_path / "store")).plan
    claim_folder(tmp_path / "out", fleet)
    claim_folder(tmp_path / "out", fleet)
    with pytest.raises(InvalidValue, match="holds the state of a fleet with another recipe, seed, data"):
        claim_folder(tmp_path / "out", fleet_of_recipe(str(other), store=str(tmp_path / "store")).plan)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_three_processes_go_on_from_a_stopped_server_to_the_weights_of_one(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    recipe, store, out = tmp_path / "fleet.yaml", tmp_path / "store", tmp_path / "out"
    recipe.write_text(RECIPE)
    torch.set_num_threads(1)
    found = fleet_of_recipe(str(recipe), store=str(store))
    fleet, measure = found.plan, found.federate.task_figures(found.job)
    expected = run_federated(fleet, on_task_end=measure)
    claim_folder(out, fleet)
    with pytest.raises(Stopped):
        serve(fleet, OneRound(fleet, tmp_path / "clients" / found.mark), Progress(out / "progress"), measure)
    write_app(tmp_path / "app")
    link, home = free_port(), tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    log = tmp_path / "log"

    def start(stack: ExitStack, *command: str) -> subprocess.Popen[bytes]:
        with log.open("ab") as written:
            process = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]], env=environment, stdout=written, stderr=subprocess.STDOUT
            )
        stack.callback(end, process)
        return process

    with ExitStack() as stack:
        started = start(
            stack, "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(link),
            "--disable-runtime-dependency-installation",
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", link), 1):
                break
            assert time.monotonic() < deadline, log.read_text()
            assert started.poll() is None, log.read_text()
            time.sleep(0.2)
        for number in range(2):
            start(
                stack, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--host", "127.0.0.1",
                "--port", str(free_port()), "--node-config",
                f'partition-id={number} num-partitions=2 folder="{tmp_path}/clients"',
            )  # fmt: skip
        told = f'recipe="{recipe}" store="{store}" out="{out}" patience=300'
        asked = start(stack, "flwr", "run", str(tmp_path / "app"), "here", "--run-config", told)
        assert asked.wait(120) == 0, log.read_text()
        ready = out / "rounds.json"
        while not ready.exists():
            assert time.monotonic() < deadline + 300, log.read_text()[-6000:]
            time.sleep(0.2)
    assert same(files.read_tensors(out / "weights.safetensors"), expected.weights)
    first, second = files.read_json(ready)[:-1]
    assert first["averaged"] == second["averaged"] == [0, 1]
    told = [{client: found["qp_steps"] for client, found in each["metrics"].items()} for each in (first, second)]
    assert set(told[0].values()) == {0.0}
    assert told[1] == {str(client): found["qp_steps"] for client, found in expected.rounds[1].metrics.items()}
    assert not any("state_lost" in metrics for metrics in second["metrics"].values())
    assert files.read_json(out / "figures.json") == found.figures(expected.figures)
    assert max(told[1].values()) > 0  # the clients knew what they had learnt before the server was stopped
    shutil.rmtree(home)
