"""Small graphs for tests of condensation."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch_geometric.data import Data

FEATURES = 4


def undirected(pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Both directions of each pair, (2, 2E)."""
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return torch.cat([edges, edges.flip(0)], dim=1)


def ring(nodes: int) -> torch.Tensor:
    return undirected([(i, (i + 1) % nodes) for i in range(nodes)])


def star(nodes: int) -> torch.Tensor:
    return undirected([(0, i) for i in range(1, nodes)])


def graphs(count: int = 24, seed: int = 0, small: int = 4, large: int = 7) -> list[Data]:
    """Rings (class 0) and stars (class 1), one-hot features that lean to the class."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        nodes = int(torch.randint(small, large + 1, (1,), generator=draw))
        label = number % 2
        kind = torch.randint(0, FEATURES, (nodes,), generator=draw)
        kind[: nodes // 2] = label
        x = torch.nn.functional.one_hot(kind, FEATURES).float()
        made.append(Data(x=x, edge_index=(ring, star)[label](nodes), y=torch.tensor([label])))
    return made


def citations(nodes: int = 40, classes: int = 3, features: int = 8, seed: int = 0) -> Data:
    """One graph whose edges mostly join nodes of a class, the last node alone."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(nodes) % classes
    x = torch.rand(nodes, features, generator=draw) * 0.5
    x[torch.arange(nodes), y] += 1
    pairs = torch.triu_indices(nodes - 1, nodes - 1, 1)
    chance = torch.where(y[pairs[0]] == y[pairs[1]], 0.3, 0.02)
    pairs = pairs[:, torch.rand(pairs.shape[1], generator=draw) < chance]
    train = torch.zeros(nodes, dtype=torch.bool)
    train[: nodes * 3 // 4] = True
    return Data(x=x, edge_index=torch.cat([pairs, pairs.flip(0)], 1), y=y, train_mask=train, test_mask=~train)


class Killed(Exception):
    pass


class Kept:
    """A keeper in memory that dies after some states."""

    def __init__(self, states: int | None = None) -> None:
        self.states, self.state = states, None

    def load(self) -> Any:
        return copy.deepcopy(self.state)

    def save(self, state: Any) -> None:
        self.state = copy.deepcopy(state)
        if self.states is not None:
            self.states -= 1
            if self.states == 0:
                self.states = None
                raise Killed


class Listener:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def on_data_ready(self, data: Any) -> Any:
        self.heard.append("data")
        return data

    def before_synthetic_update(self, iteration: int, outer: int) -> None:
        self.heard.append(("update", iteration, outer))

    def after_network_update(self, network: torch.nn.Module) -> None:
        self.heard.append("network")

    def on_iteration_end(self, iteration: int, loss: float) -> None:
        self.heard.append(("end", iteration))
