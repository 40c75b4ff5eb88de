"""The same fleet on a real SuperLink with two SuperNodes on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from federated.fleets import same
from sparing.core import files
from sparing.core.errors import IncompatibleStep, InvalidValue, RecipeError
from sparing.core.store import Progress
from sparing.federated.app import _folder, claim_folder, fleet_of_recipe, write_app
from sparing.federated.clients import Weights
from sparing.federated.rounds import InProcess, Order, Reply, run_federated, serve

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
