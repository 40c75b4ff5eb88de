"""What each method does to the weights, beside the same steps written out by hand on a small linear network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sparing.core.randomness import isolated_rng
from sparing.federated.clients import METHODS, FedKNOWClient, method_settings
from sparing.federated.knowledge import TaskKnowledge
from sparing.federated.projection import project_gradient, select_signature_tasks

BLOCKS = [range(2 * t, 2 * t + 2) for t in range(4)]
NOW, EARLIER, RATE = BLOCKS[3], 6, 0.3
"""The current task is the fourth; the head's first six rows are those of earlier ones."""
DRAWS = torch.Generator().manual_seed(5)
X, Y = torch.randn(12, 4, generator=DRAWS), torch.randint(6, 8, (12,), generator=DRAWS)


def net(seed: int, drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(drop), nn.Linear(5, 8))


def client(method: str, drop: float = 0.0, **fields: Any) -> Any:
    """In the fourth task, having met the others without a round of them."""
    settings = method_settings(method, **{"local_epochs": 2, "batch_size": 12} | fields)
    made = METHODS[method][0](net(0, drop), settings, optimizer=lambda model: torch.optim.SGD(model.parameters(), RATE))
    for t, block in enumerate(BLOCKS):
        made.start_task(t, TensorDataset(X, Y), block)
        if t < 3:
            made.end_task(t)
    return made


def batches(epochs: int, size: int, round: int = 0) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(pass, batch, x, y) as the client draws them, and whatever the body draws with them."""
    with isolated_rng(0, "client", 0, "round", round):
        for epoch in range(epochs):
            for number, at in enumerate(torch.randperm(12).split(size)):
                yield epoch, number, X[at], Y[at]


def flat(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    slopes = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if s is None else s.flatten() for s, p in zip(slopes, parameters, strict=True)]
    )


def descend(parameters: list[nn.Parameter], slope: Tensor) -> None:
    with torch.no_grad():
        for parameter, part in zip(parameters, slope.split([p.numel() for p in parameters]), strict=True):
            parameter -= RATE * part.view_as(parameter)


def entropy(logits: Tensor, y: Tensor, block: range = NOW) -> Tensor:
    return -logits[:, block].log_softmax(1)[torch.arange(len(y)), y - block.start].mean()


def answers(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """How far a student's soft-max is from its teacher's."""
    return -((teacher / temperature).softmax(1) * (student / temperature).log_softmax(1)).sum(1).mean()


def agree(found: dict[str, Tensor], model: nn.Module) -> None:
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


# --- FedKNOW

TEACHERS = {t: net(10 + t) for t in range(3)}


def knowing(drop: float = 0.0, **fields: Any) -> FedKNOWClient:
    made: FedKNOWClient = client("fedknow", drop, **fields)
    made.knowledge = {t: TaskKnowledge.of(each.state_dict(), {}, t, BLOCKS[t]) for t, each in TEACHERS.items()}
    return made


def fedknow_by_hand(
    chosen: Any, start: nn.Sequential, reference: nn.Module | None, round: int = 0
) -> tuple[nn.Sequential, list[list[int]], int]:
    """(the model after a round, the signature tasks of each batch, steps whose gradient was turned)."""
    model, told, turned = start.train(), [], 0
    below, head = [*model[0].parameters()], [*model[2].parameters()]
    signature: list[int] = []
    for epoch, number, x, y in batches(chosen.local_epochs, chosen.batch_size, round):
        if epoch < chosen.head_epochs:
            if reference is not None:
                descend(head, flat(answers(model(x)[:, :EARLIER], reference(x)[:, :EARLIER].detach(), 1.0), head))
            descend(head, flat(entropy(model(x), y), head))
            continue
        learn = below if chosen.head_epochs else below + head
        turn = below if chosen.head_epochs or chosen.project == "features" else below + head
        logits = model(x)
        slope, own = flat(entropy(logits, y), learn), flat(entropy(logits, y), turn)

        def column(teacher: nn.Module, classes: range, x=x, logits=logits, turn=turn) -> Tensor:
            return flat(answers(logits[:, classes], teacher(x)[:, classes].detach(), chosen.temperature), turn)

        past = torch.stack([column(TEACHERS[t], BLOCKS[t]) for t in range(3)])
        if number == 0:
            signature = sorted(select_signature_tasks(own, past, chosen.k, chosen.metric))
        told.append(signature)
        columns = [] if reference is None else [column(reference, range(EARLIER))]
        memories = torch.stack([*columns, *past[signature]], 1)
        if (memories.T @ own < 0).any():
            turned += 1
            own, _ = project_gradient(own, memories, chosen.margin, chosen.eps, chosen.eps_relative)
            slope = torch.cat([own, slope[len(own) :]])
            slope = slope * min(1.0, chosen.clip / float(slope.norm()))
        descend(learn, slope)
    return model, told, turned


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"reference": "none"},
        {"temperature": 6.0},
        {"project": "features"},
        {"head_epochs": 1},
        {"head_epochs": 1, "reference": "none"},
        {"eps": 0.5, "eps_relative": True},
        {"clip": 0.05},
        {"clip": 0.05, "project": "features"},
        {"margin": 0.0},
        {"k": 1, "batch_size": 4},
        {"k": 2, "batch_size": 4, "metric": "cosine"},
    ],
    ids=lambda fields: ",".join(f"{name}={value}" for name, value in fields.items()) or "plain",
)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_round_of_fedknow_is_that_of_the_paper(drop: float, fields: dict[str, Any]):
    made = knowing(drop, **{"local_epochs": 3, "eps": 1e-3} | fields)
    start = net(1, drop)
    update = made.train_round(start.state_dict(), 0)
    frozen = net(1)  # no dropout in what is asked
    reference = None if made.settings.reference == "none" else frozen
    expected, told, turned = fedknow_by_hand(made.settings, start, reference)
    agree(update.weights, expected)
    assert update.metrics["qp_steps"] == turned > 0
    if made.settings.k < 3 and not drop:
        assert len({tuple(each) for each in told[::3]}) > 1, "the choice changes from pass to pass"
        assert any(each != list(range(made.settings.k)) for each in told)


@pytest.mark.parametrize("fields", [{}, {"head_epochs": 1}])
def test_the_reference_of_a_tasks_start_is_that_of_its_first_round(fields: dict[str, Any]):
    made = knowing(reference="task_start", **fields)
    made.train_round(net(1).state_dict(), 0)
    found = made.train_round(net(2).state_dict(), 1).weights
    agree(found, fedknow_by_hand(made.settings, net(2), net(1), round=1)[0])


@pytest.mark.parametrize("method", ["fedknow", "gem"])
def test_a_programme_that_cannot_be_solved_is_counted_and_leaves_plain_descent(method: str):
    made, plain = client(method), client("fedavg")
    if isinstance(made, FedKNOWClient):
        broken = {name: tensor * float("nan") for name, tensor in net(1).state_dict().items()}
        made.knowledge = {0: TaskKnowledge.of(broken, {}, 0, BLOCKS[0])}
    else:
        made.memory = {0: (X * float("nan"), Y - 6)}
    update = made.train_round(net(1).state_dict(), 0)
    assert (update.metrics["qp_steps"], update.metrics["qp_fallen_back"]) == (0, 2)
    expected = plain.train_round(net(1).state_dict(), 0).weights
    for name, tensor in update.weights.items():
        torch.testing.assert_close(tensor, expected[name])


# --- the baselines


def by_hand(step: Callable[[nn.Module, list[nn.Parameter], Tensor, Tensor], Tensor]) -> nn.Module:
    """Two steps on all samples from the weights of ``net(1)``, along what ``step`` returns."""
    model = net(1)
    parameters = [*model.parameters()]
    for _, _, x, y in batches(2, 12):
        descend(parameters, step(model, parameters, x, y))
    return model


def vector(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def test_fedprox_pulls_by_mu_times_the_distance():
    received = vector(net(1).state_dict())
    found = client("fedprox", mu=0.7).train_round(net(1).state_dict(), 0).weights
    agree(found, by_hand(lambda m, p, x, y: flat(entropy(m(x), y), p) + 0.7 * (vector(m.state_dict()) - received)))


def test_ewc_pulls_by_lambda_times_the_information_times_the_distance():
    made, draws = client("ewc", penalty=0.9), torch.Generator().manual_seed(1)
    known = []
    for seed in (20, 21):
        state = net(seed).state_dict()
        known.append(({name: torch.rand(t.shape, generator=draws) for name, t in state.items()}, state))
    made.fisher = {name: sum(f[name] for f, _ in known) for name in known[0][0]}
    made.pull = {name: sum(f[name] * w[name] for f, w in known) for name in known[0][0]}

    def step(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
        now = vector(model.state_dict())
        return flat(entropy(model(x), y), parameters) + 0.9 * sum(vector(f) * (now - vector(w)) for f, w in known)

    agree(made.train_round(net(1).state_dict(), 0).weights, by_hand(step))


@pytest.mark.parametrize("fields", [{}, {"eps": 0.5, "eps_relative": True}, {"clip": 0.05}, {"margin": 0.0}])
def test_gem_turns_by_the_gradients_of_its_samples(fields: dict[str, Any]):
    made, draws = client("gem", **fields), torch.Generator().manual_seed(2)
    labels = {t: torch.randint(2 * t, 2 * t + 2, (5,), generator=draws) for t in range(3)}
    made.memory = {t: (torch.randn(5, 4, generator=draws), y) for t, y in labels.items()}
    chosen, turned = made.settings, []

    def step(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
        kept = made.memory.items()
        memories = torch.stack([flat(entropy(model(a), b, BLOCKS[t]), parameters) for t, (a, b) in kept], 1)
        own = flat(entropy(model(x), y), parameters)
        turned.append(bool((memories.T @ own < 0).any()))
        if turned[-1]:
            own, _ = project_gradient(own, memories, chosen.margin, chosen.eps, chosen.eps_relative)
            own = own * min(1.0, chosen.clip / float(own.norm()))
        return own

    update = made.train_round(net(1).state_dict(), 0)
    agree(update.weights, by_hand(step))
    assert update.metrics["qp_steps"] == sum(turned) > 0


def test_lwf_asks_for_the_answers_of_the_received_weights_on_earlier_classes():
    received = net(1)

    def step(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
        taught = received(x)[:, :EARLIER].detach()
        return flat(entropy(model(x), y) + 1.5 * answers(model(x)[:, :EARLIER], taught, 3.0), parameters)

    found = client("lwf", weight=1.5, temperature=3.0).train_round(received.state_dict(), 0).weights
    agree(found, by_hand(step))
