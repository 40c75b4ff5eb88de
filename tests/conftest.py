"""What every test stands on: options, real data, a store of its own, one thread, no network."""

from __future__ import annotations

import gc
import ipaddress
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = (
        "1"  # sums must not depend on the number of cores; read when torch and NumPy are first loaded
    )

os.environ.pop("COLUMNS", None)  # the command line lays out for a pipe, whoever starts the tests

IN_CI = os.environ.get("CI", "").lower() not in {"", "0", "false"}
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=200, print_blob=True)
settings.register_profile("dev", deadline=None, max_examples=50)
settings.load_profile("ci" if IN_CI else "dev")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Bytes by their number: what is in them may hold the time of day, and all processes must name tests alike."""
    return f"{len(val)} bytes" if isinstance(val, bytes) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--oracles",
        type=Path,
        default=Path(__file__).parent / "oracles",
        help="folder of <system>/*.npz with outputs of reference implementations (default: tests/oracles)",
    )
    parser.addoption(
        "--shapes", action="store_true", help="check the shapes that sparing's functions name, at run time"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--shapes"):
        import shapes

        shapes.install()


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Any:
    """Connections may reach this machine and nothing else."""

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                raise RuntimeError(f"a test tried to reach {address}; tests run without a network")
            return method(self, address)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session", autouse=True)
def _quick_process() -> Any:
    """Costs of a long life that tests need not pay again and again.

    Files need not outlast a power cut: kills end processes, not machines. The modules loaded so far are left out of
    every collection of garbage, and each clock asks for one.
    """
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _session_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The store of fixtures that outlive one test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_STORE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(autouse=True)
def store_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's runs keep finished work; empty at the start."""
    folder = tmp_path / "store"
    monkeypatch.setenv("SPARING_STORE", str(folder))
    return folder


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets, ``$SPARING_DATA``; without it the test is skipped, and in CI it fails."""
    value = os.environ.get("SPARING_DATA", "")
    root = Path(value).absolute()
    if value and root.is_dir():
        return root
    reason = f"SPARING_DATA names no folder: {value!r}" if value else "SPARING_DATA is not set: no real data here"
    if IN_CI:
        pytest.fail(f"{reason}; CI runs with real data")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def oracles(request: pytest.FixtureRequest) -> Callable[[str], list[Path]]:
    """System → its reference files under ``--oracles``; a system without any is an error, not a skip."""
    folder: Path = request.config.getoption("--oracles")

    def files(system: str) -> list[Path]:
        found = sorted((folder / system).glob("*.npz"))
        assert found, f"no *.npz under {folder / system}"
        return found

    return files
