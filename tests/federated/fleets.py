"""Small fleets whose clients do arithmetic instead of training, and fail when told to."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparing.federated.clients import ContinualClient, Update, Weights
from sparing.federated.rounds import FleetPlan

ODD: dict[str, dict[str, Any]] = {
    "numpy examples": {"examples": np.int64(30)},
    "nan examples": {"examples": math.nan},
    "list of weights": {"weights": [torch.zeros(2)]},
    "sparse": {"weights": {"layer.weight": torch.zeros(4, 3).to_sparse()}},
    "no metric": {"metrics": {"steps": None}},
    "nan metric": {"metrics": {"steps": math.nan}},
}
"""Updates that are none: fault → fields."""
END = -2
"""As a round of faults: whenever a task ends."""
ENDING = 0.05
"""Seconds that the end of a task takes."""
BLOCKS = (range(0, 2), range(2, 4))


def weights() -> Weights:
    """A shared state dict with a matrix, a bias and a counter."""
    return {"layer.weight": torch.zeros(4, 3), "layer.bias": torch.zeros(4), "seen": torch.tensor(0)}


class Walker(ContinualClient):
    """Adds random numbers to the weights, and keeps what it added; ``faults`` tell in which rounds it fails and how."""

    def __init__(self, number: int, faults: dict[int, str]) -> None:
        self.number, self.faults = number, faults
        self.task: int | None = None
        self.blocks: dict[int, range] = {}
        self.path, self.ended = torch.zeros(4, 3), torch.zeros(8, dtype=torch.int32)

    @property
    def shared(self) -> bool:
        return self.faults.get(-1) != "local"

    def start_task(self, t: int, data: Any, classes: range) -> None:
        self.task, self.data, self.blocks[t] = t, data, classes

    def train_round(self, weights: Weights, round: int) -> Update:
        met = {"blocks": float(sum(len(block) for block in self.blocks.values()))}
        found = self._fail(self.faults.get(round, ""), weights)
        step = torch.rand(4, 3) + self.path.mean() + self.data.mean()
        self.path = self.path + step
        found["layer.weight"] = found["layer.weight"] + step
        found["seen"] = found["seen"] + self.number + 1
        update = Update(found, 10 * (self.number + 1), {"steps": 1.0, "ended": float(self.ended.sum()), **met})
        return replace(update, **ODD.get(self.faults.get(round, ""), {}))

    def _fail(self, fault: str, weights: Weights) -> Weights:
        found = {name: tensor.clone() for name, tensor in weights.items()}
        if fault == "raise":
            raise ArithmeticError("no more battery")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "slow":
            time.sleep(3)
        if fault == "nan":
            found["layer.bias"][1] = math.nan
        if fault == "shape":
            found["layer.bias"] = torch.zeros(5)
        if fault == "key":
            found["other"] = found.pop("layer.bias")
        if fault == "dtype":
            found["layer.bias"] = found["layer.bias"].double()
        if fault.startswith("wait for "):
            os.close(os.open(fault[9:] + ".there", os.O_CREAT))
            while not os.path.exists(fault[9:]):
                time.sleep(0.02)
        return found

    def _keep(self, t: int) -> None:
        raise NotImplementedError("end_task does all here")

    def end_task(self, t: int) -> None:
        self._fail(self.faults.get(END, ""), {})
        time.sleep(ENDING)
        self.ended = self.ended.clone()
        self.ended[t] += 1
        self.path = self.path + self.data.sum()
        self.task = None

    def state(self) -> dict[str, Tensor]:
        task = torch.tensor(-1 if self.task is None else self.task)
        return {"task": task, "path": self.path, "ended": self.ended}

    def load_state(self, state: dict[str, Tensor]) -> None:
        task = int(state["task"])
        self.task = None if task < 0 else task
        self.path, self.ended = state["path"], state["ended"]


def make(faults: dict[int, dict[int, str]], number: int) -> ContinualClient:
    return Walker(number, faults.get(number, {}))


def data(client: int, task: int) -> Tensor:
    return torch.full((3,), client + 10.0 * task)


def plan(faults: dict[int, dict[int, str]] | None = None, **settings: Any) -> FleetPlan:
    """Three clients, two tasks of two rounds; ``faults``: client → round → what goes wrong."""
    given: dict[str, Any] = {"clients": 3, "blocks": BLOCKS, "rounds_per_task": 2, "seed": 5, "weights": weights()}
    return FleetPlan(**{**given, "make_client": partial(make, faults or {}), "data_of": data, **settings})


CLOCKS = ("seconds", "cpu_s", "peak_bytes")


def unclocked(metrics: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """Client → its metrics without those that no two runs share."""
    return {who: {name: v for name, v in found.items() if name not in CLOCKS} for who, found in metrics.items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
