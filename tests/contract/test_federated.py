"""Guest: rounds of federated averaging; a round is what is kept, clients go through joblib."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import Points, go, survives_kills
from joblib import Parallel, delayed, parallel_config
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset

from sparing.core.errors import InvalidValue, RecipeError
from sparing.core.job import Job
from sparing.core.predictor import ModulePredictor
from sparing.core.randomness import isolated_rng
from sparing.core.step import Stage, Step, step
from sparing.core.store import JSON, TENSORS, All


def visit(model: nn.Module, data: Any, seed: int, number: int, client: int) -> dict[str, Tensor]:
    """A client's weights after one pass over its data."""
    with isolated_rng(seed, "visit", number, client):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for start in torch.randperm(len(data)).split(8):
            x, y = (torch.stack([torch.as_tensor(data[i][part]) for i in start.tolist()]) for part in (0, 1))
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


@step("federated_averaging")
class FederatedAveraging(Step):
    """Average the weights of clients that each train on data of their own (McMahan et al. 2017, algorithm 1)."""

    stage = Stage.FLEET
    needs = frozenset({"module"})
    gives = frozenset({"trained"})

    rounds: int = Field(4, ge=1)
    clients: int = Field(3, ge=1)
    jobs: int = 1

    def apply(self, job: Job) -> Job:
        if self.clients > len(job.train):
            raise InvalidValue(f"clients = {self.clients}, but there are only {len(job.train)} training samples")
        found = job.store.once("model", lambda: self.run(job), All({"weights": TENSORS, "curve": JSON}))
        model = job.fresh_model()
        model.load_state_dict(found["weights"])
        size = sum(value.numel() * value.element_size() for value in found["weights"].values())
        job.record("sent over the wire", 2 * size * self.clients * self.rounds, "B")
        job.notes.curves["spread of clients"] = [(float(x), float(y)) for x, y in found["curve"]]
        return job.replace(model=model, predictor=ModulePredictor(model, job.task))

    def run(self, job: Job) -> dict[str, Any]:
        progress = job.store.progress("model")
        state = progress.load() or {"round": 0, "weights": dict(job.model.state_dict()), "curve": []}
        own = [Subset(job.train, list(range(client, len(job.train), self.clients))) for client in range(self.clients)]
        for number in range(state["round"], self.rounds):
            model = job.fresh_model()
            model.load_state_dict(state["weights"])
            copies = [copy.deepcopy(model) for _ in own]
            calls = (delayed(visit)(copies[i], data, job.seed, number, i) for i, data in enumerate(own))
            made = Parallel(n_jobs=self.jobs)(calls)
            weights = {name: torch.stack([client[name] for client in made]).mean(0) for name in made[0]}
            spread = sum(float((client[name] - weights[name]).square().sum()) for client in made for name in weights)
            state = {"round": number + 1, "weights": weights, "curve": [*state["curve"], [number + 1, spread]]}
            progress.save(state)
        return {"weights": state["weights"], "curve": state["curve"]}


def test_rounds_are_kept_and_survive_kills(tmp_path):
    done = survives_kills(go(Points(), FederatedAveraging()), tmp_path, deaths=4)
    (row,) = done.ledger.rows
    assert len(row.curves["spread of clients"]) == 4
    parameters = 6 * 16 + 16 + 16 * 3 + 3
    assert row.figures["sent over the wire"].value == 2 * 4 * parameters * 3 * 4
    assert row.figures["accuracy"].value > 0.5


def test_processes_change_nothing(tmp_path):
    with parallel_config(backend="multiprocessing"):
        many = go(Points(), FederatedAveraging(jobs=2, rounds=2))(tmp_path / "many").job.model.state_dict()
    one = go(Points(), FederatedAveraging(rounds=2))(tmp_path / "one").job.model.state_dict()
    assert all(torch.equal(many[name], one[name]) for name in one)


def test_refused_with_more_clients_than_samples_and_without_a_module(tmp_path):
    with pytest.raises(InvalidValue, match="clients = 97, but there are only 96"):
        go(Points(), FederatedAveraging(clients=97))(tmp_path / "few")
    folder = go(Points(), FederatedAveraging(rounds=1))(tmp_path / "first").folder
    with pytest.raises(RecipeError, match="'federated_averaging' needs 'module'"):  # what was saved is an ONNX graph
        go(Points(), FederatedAveraging(), model=folder / "model")(tmp_path / "onnx")
