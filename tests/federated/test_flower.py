"""Flower's simulation: the same bits as in one process, failures, kills, and nothing left behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from federated.fleets import plan, same, weights
from sparing.core.errors import InvalidValue, MissingDependency
from sparing.core.store import Progress
from sparing.federated.clients import Update
from sparing.federated.flower import (
    ContextShelf,
    EngineFailed,
    Simulation,
    from_content,
    from_record,
    to_content,
    to_record,
)
from sparing.federated.rounds import Reply, run_federated

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


def test_without_flower_the_error_tells_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flwr" else find(name))
    with pytest.raises(MissingDependency, match=r"needs the package 'flwr': pip install 'sparing\[federated\]'"):
        run_federated(plan(), "flower")


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
    assert result.end.metrics == expected.end.metrics
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
