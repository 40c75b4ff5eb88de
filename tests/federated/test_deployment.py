"""The same fleet on a real SuperLink with two SuperNodes on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
import torch

from federated.fleets import same
from sparing.core import files
from sparing.core.errors import RecipeError
from sparing.federated.app import plan_of_recipe, write_app
from sparing.federated.rounds import run_federated

RECIPE = """\
task: digits
model: {name: mlp, widths: [16]}
steps:
  - federate: {method: fedavg, clients: 2, fraction: 1.0, rounds_per_task: 1, local_epochs: 1, samples_per_client: 60}
"""
BIN = Path(sys.executable).parent


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
        plan_of_recipe(str(recipe), store=str(tmp_path / "store"))


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_three_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    recipe, store = tmp_path / "fleet.yaml", tmp_path / "store"
    recipe.write_text(RECIPE)
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
                f'partition-id={number} num-partitions=2 folder="{tmp_path}/node{number}"',
            )  # fmt: skip
        told = f'recipe="{recipe}" store="{store}" out="{tmp_path}/out" patience=300'
        asked = start(stack, "flwr", "run", str(tmp_path / "app"), "here", "--run-config", told)
        assert asked.wait(120) == 0, log.read_text()
        ready = tmp_path / "out" / "rounds.json"
        while not ready.exists():
            assert time.monotonic() < deadline + 300, log.read_text()[-6000:]
            time.sleep(0.2)
    torch.set_num_threads(1)
    expected = run_federated(plan_of_recipe(str(recipe), store=str(store)))
    assert same(files.read_tensors(tmp_path / "out" / "weights.safetensors"), expected.weights)
    reports = files.read_json(ready)
    assert [report["averaged"] for report in reports[:-1]] == [[0, 1]]
    assert all(list((tmp_path / f"node{number}").rglob("*.safetensors")) for number in range(2))
    shutil.rmtree(home)
