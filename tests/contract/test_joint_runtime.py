"""Guest: three saved predictors under one memory limit: a runtime outside the pipeline, with its own bench."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness import METER, Points, go, survives_kills

from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue
from sparing.core.ledger import Figure, Ledger, Row
from sparing.core.meter import Meter
from sparing.core.predictor import Predictor, load
from sparing.core.statistics import units_interval
from sparing.core.store import ARRAYS, Store
from sparing.core.training import Train


class Shapes(Points):
    """Points with a name of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, spread=1.0)
        self.name = f"points{seed}"


class Joint:
    """Networks in folders, of which only as many are in memory as a limit allows; the longest unused makes room."""

    def __init__(self, folders: Mapping[str, Path], limit: int) -> None:
        self.folders, self.limit, self.swaps = folders, limit, 0
        self.sizes = {
            name: sum(part["bytes"] for part in files.read_json(folder / "sparing.json")["files"].values())
            for name, folder in folders.items()
        }
        for name, size in self.sizes.items():
            if size > limit:
                raise InvalidValue(f"{name} alone takes {size} bytes, more than the limit of {limit}")
        self.loaded: dict[str, Predictor] = {}

    def __call__(self, name: str, *inputs: Any) -> Any:
        predictor = self.loaded.pop(name, None)
        if predictor is None:
            self.swaps += 1
            predictor = load(self.folders[name], threads=1)
        while self.loaded and sum(self.sizes[one] for one in (*self.loaded, name)) > self.limit:
            self.loaded.pop(next(iter(self.loaded)))
        self.loaded[name] = predictor
        return predictor(*inputs)


def bench(joint: Joint, tasks: Mapping[str, Any], folder: Path) -> Any:
    """A row for each network, asked in turns through the joint runtime."""
    ledger = Ledger.begin("joint", "", Meter(**METER))
    store = Store(folder / "store").bind("joint bench", [*joint.folders.values()], joint.limit, seed=0)
    for name, task in tasks.items():

        def outcomes(name: str = name, task: Any = task) -> dict[str, np.ndarray]:
            evaluation = task.evaluate(lambda *inputs: joint(name, *inputs), task.splits(None).test)
            return {"headline": np.asarray(evaluation.per_unit)}

        found = store.child(name).once("outcomes", outcomes, ARRAYS)
        interval, note = units_interval(found["headline"])
        figures = {
            "accuracy": Figure(float(found["headline"].mean()), "", "measured", "higher", interval, note),
            "model bytes": Figure(joint.sizes[name], "B"),
        }
        row = Row(name, "joint", "inference", task.name, 0, "accuracy", "joint", "joint", figures)
        ledger.add(row, found["headline"])
        ledger.save(folder / "out")
    return SimpleNamespace(ledger=ledger, folder=folder / "out", job=SimpleNamespace(model=None))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tasks = {f"net{seed}": Shapes(seed) for seed in (1, 2, 3)}
    folders = {}
    for name, task in tasks.items():
        done = go(task, Train(epochs=2, batch_size=16, lr=0.02))(tmp_path_factory.mktemp(name))
        folders[name] = done.folder / "model"
    return tasks, folders


def test_three_networks_under_one_limit_and_its_bench_survives_kills(trained, tmp_path):
    tasks, folders = trained
    limit = 2 * (max(Joint(folders, 1 << 20).sizes.values()))
    joint = Joint(folders, limit)
    x = Points().example_input(3)[0].numpy()
    alone = {name: load(folder)(x) for name, folder in folders.items()}
    for name in ("net1", "net2", "net1", "net3", "net1", "net2"):
        np.testing.assert_array_equal(joint(name, x), alone[name])
        assert sum(joint.sizes[one] for one in joint.loaded) <= limit
    assert joint.swaps == 4  # net1, net2, net3 (in place of net2), net2 again
    done = survives_kills(lambda folder: bench(Joint(folders, limit), tasks, folder), tmp_path, deaths=3)
    again = Ledger.load(done.folder)
    assert again.canonical() == done.ledger.canonical()
    assert [line.to_first for line in again.summary()] == [None] * 3  # three tasks: nothing to compare


def test_a_network_that_does_not_fit_or_was_tampered_with_is_refused(trained, tmp_path):
    _, folders = trained
    with pytest.raises(InvalidValue, match=r"net1 alone takes .* bytes, more than the limit of 100"):
        Joint(folders, 100)
    graph = folders["net3"] / "model.onnx"
    content = graph.read_bytes()
    try:
        graph.write_bytes(content[:-1] + b"\0")
        with pytest.raises(CorruptFile, match=r"net3.*model\.onnx was changed"):
            Joint(folders, 1 << 20)("net3", Points().example_input()[0])
    finally:
        graph.write_bytes(content)
