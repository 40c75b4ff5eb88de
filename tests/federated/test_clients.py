"""Clients in their protocol: state, laziness, determinism, each method's mark, refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sparing import InvalidValue
from sparing.federated.clients import (
    METHODS,
    ContinualClient,
    EWCClient,
    FedKNOWClient,
    FedKNOWSettings,
    GEMClient,
    head_names,
    integrated_step,
    method_settings,
)

BLOCKS = [range(2 * t, 2 * t + 2) for t in range(4)]
SMALL = {"local_epochs": 2, "batch_size": 8}
PACKNET = {"extractor": "packnet", "finetune_epochs": 1, "rho": 0.3}


def net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2), nn.Linear(12, 8))


def samples(t: int, n: int = 24) -> TensorDataset:
    """Task t: the sign of column t."""
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(t))
    return TensorDataset(x, (x[:, t] > 0).long() + 2 * t)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def client(method: str, seed: int = 0, number: int = 0, **fields: Any) -> ContinualClient:
    settings = method_settings(method, **SMALL | fields)
    return METHODS[method][0](net(), settings, seed, number, sgd, ())


def run(made: ContinualClient, tasks: int = 3, rounds: int = 2, between: Any = None) -> dict[str, Tensor]:
    """The weights after a run of one client; ``between`` turns the client into another before each round."""
    weights, number = net().state_dict(), 0
    for t in range(tasks):
        for _ in range(rounds):
            if between is not None:
                made = between(made)
            if made.task is not None and made.task != t:
                made.start_task(made.task, samples(made.task), BLOCKS[made.task])
                made.end_task(made.task)
            made.start_task(t, samples(t), BLOCKS[t])
            weights = made.train_round(weights, number).weights
            number += 1
    return weights


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((method, {"penalty": 1.0} if method == "ewc" else {}) for method in METHODS),
    ("fedknow", {"reference": "task_start"}),
    ("fedknow", {"reference": "none", "margin": 0.0}),
    ("fedknow", {"project": "features"}),
    ("fedknow", {"head_epochs": 1}),
    ("fedknow", {"k": 1, "metric": "cosine"}),
    ("fedknow", {"numbers": "int8"}),
    ("fedknow", PACKNET),
]


def named(variant: Any) -> str:
    return variant if isinstance(variant, str) else ",".join(f"{k}={v}" for k, v in variant.items()) or "plain"


@pytest.mark.parametrize(("method", "fields"), VARIANTS, ids=named)
def test_all_that_lives_from_round_to_round_is_in_the_state(method: str, fields: dict[str, Any]):
    def reborn(old: ContinualClient) -> ContinualClient:
        state = {name: tensor.clone() for name, tensor in old.state().items()}
        torch.rand(5)  # what others draw is no matter
        new = client(method, **fields)
        new.load_state(state)
        assert same(new.state(), state)
        return new

    assert same(run(client(method, **fields)), run(client(method, **fields), between=reborn))


@pytest.mark.parametrize(("method", "fields"), VARIANTS, ids=named)
def test_a_client_learns_and_tells_what_it_did(method: str, fields: dict[str, Any]):
    made = client(method, **fields)
    made.start_task(0, samples(0), BLOCKS[0])
    before = copy.deepcopy(net().state_dict())
    given = net().state_dict()
    updates = [made.train_round(given, round) for round in range(3)]
    assert same(given, before), "the weights that were sent stay as they are"
    assert updates[0].examples == 24
    assert updates[0].metrics["steps"] == 2 * 3
    assert all(isinstance(value, float) for value in updates[0].metrics.values())
    right, seen = made.evaluate(0, samples(0), updates[0].weights)
    assert seen == 24
    assert right > 12
    if made.shared:
        assert not same(updates[0].weights, updates[1].weights), "each round draws its own order"
    again = client(method, **fields)
    again.start_task(0, samples(0), BLOCKS[0])
    assert same(again.train_round(given, 0).weights, updates[0].weights)
    other = client(method, number=1, **fields)
    other.start_task(0, samples(0), BLOCKS[0])
    assert not same(other.train_round(given, 0).weights, updates[0].weights)


def test_knowledge_is_taken_when_the_next_task_begins_also_by_a_client_that_missed_the_last_rounds():
    made = client("fedknow")
    assert isinstance(made, FedKNOWClient)
    made.start_task(0, samples(0), BLOCKS[0])
    local = made.train_round(net().state_dict(), 0).weights
    assert not made.knowledge
    reborn = client("fedknow")
    assert isinstance(reborn, FedKNOWClient)
    reborn.load_state(made.state())
    reborn.start_task(0, samples(0), BLOCKS[0])
    reborn.end_task(0)  # rounds later
    kept = reborn.knowledge[0]
    largest = local["0.weight"].abs().argmax()
    assert largest in kept.indices["0.weight"].long(), "of the weights of its own last round"
    assert reborn.task is None
    assert not any(name.startswith("local/") for name in reborn.state())


def test_a_client_that_was_never_asked_in_a_task_knows_nothing_of_it():
    made = client("fedknow")
    assert isinstance(made, FedKNOWClient)
    weights = net().state_dict()
    for t in (0, 2):
        made.start_task(t, samples(t), BLOCKS[t])
        weights = made.train_round(weights, t).weights
        made.end_task(t)
    made.start_task(3, samples(3), BLOCKS[3])
    made.end_task(3)  # met, but no round
    assert sorted(made.knowledge) == [0, 2]


def test_the_last_task_of_a_known_number_takes_all_that_is_free_also_when_one_was_missed():
    made = client("fedknow", **PACKNET, tasks=3)
    assert isinstance(made, FedKNOWClient)
    assert made.packnet is not None
    assert same(made.packnet.model.state_dict(), net().state_dict()), "it begins as the model the client is made with"
    weights = net().state_dict()
    for t in (0, 2):  # not asked in task 1
        made.start_task(t, samples(t), BLOCKS[t])
        weights = made.train_round({name: tensor * 2 for name, tensor in weights.items()}, t).weights
        made.end_task(t)
        assert all(mask.all() for mask in made.packnet.owned.values()) == (t == 2)
    assert [each.task for each in made.knowledge.values()] == [0, 2]
    state = made.state()
    stored = {name: tensor.nbytes for name, tensor in state.items() if name.startswith(("packnet/w", "packnet/m"))}
    assert made.knowledge_bytes == sum(stored.values())
    assert stored["packnet/masks/1/0.weight"] == 12 * 6 / 8, "a bit for each weight and task"
    again = client("fedknow", **PACKNET, tasks=3)
    again.load_state(state)
    assert isinstance(again, FedKNOWClient)
    assert again.packnet is not None
    assert all(same(one, other) for one, other in zip(again.packnet.masks, made.packnet.masks, strict=True))
    with pytest.raises(InvalidValue, match=r"uint8 of \(9,\) is expected, of a weight of \(12, 6\)"):
        again.load_state(state | {"packnet/masks/0/0.weight": state["packnet/masks/0/4.weight"]})


def test_the_first_task_is_plain_descent_and_later_ones_are_turned():
    plain, ours = client("fedavg"), client("fedknow")
    for made in (plain, ours):
        made.start_task(0, samples(0), BLOCKS[0])
    start = net().state_dict()
    assert same(plain.train_round(start, 0).weights, ours.train_round(start, 0).weights)
    for made in (plain, ours):
        made.end_task(0)
        made.start_task(1, samples(1), BLOCKS[1])
    first, second = plain.train_round(start, 1), ours.train_round(start, 1)
    assert second.metrics["qp_steps"] > 0
    assert second.metrics["knowledge_bytes"] > 0
    assert not same(first.weights, second.weights)


def test_the_aggregation_gradient_is_nothing_on_the_first_batch_of_a_round():
    made = FedKNOWClient(nn.Sequential(nn.Linear(6, 8)), FedKNOWSettings(local_epochs=1, batch_size=24), 0, 0, sgd)
    start = made.model.state_dict()
    made.start_task(0, samples(0), BLOCKS[0])
    made.end_task(0)  # no round: no knowledge, the reference is all there is
    made.start_task(1, samples(1), BLOCKS[1])
    assert made.train_round(start, 0).metrics["qp_steps"] == 0
    assert made.last is not None
    assert abs(made.last.dots_before[0]) < 1e-6


def test_signature_tasks_are_chosen_anew_in_each_pass_and_no_more_than_k():
    seen: list[int] = []

    class Watched(FedKNOWClient):
        def _columns(self, *args: Any, **more: Any) -> Tensor | None:
            found = super()._columns(*args, **more)
            seen.append(0 if found is None else found.shape[1])
            return found

    made = Watched(net(), FedKNOWSettings(**SMALL, k=1), 0, 0, sgd)
    weights = net().state_dict()
    for t in range(4):
        made.start_task(t, samples(t), BLOCKS[t])
        weights = made.train_round(weights, t).weights
        made.end_task(t)
    assert seen == [0] * 6 + [2] * 18, "g₀ is always kept besides"


def test_with_projected_features_the_head_takes_the_plain_gradient():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 3)
    head = [model[2].weight, model[2].bias]
    features = [model[0].weight, model[0].bias]
    loss = model(x).sum()
    plain = torch.autograd.grad(loss, head, retain_graph=True)
    own = torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, features, retain_graph=True)])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    info = integrated_step(
        torch.optim.SGD(model.parameters(), lr=1.0), loss, -own[:, None], list(model.parameters()), features
    )
    assert info is not None
    assert info.solved
    for was, now, slope in zip(before[2:], head, plain, strict=True):
        torch.testing.assert_close(now.detach(), was - slope)
    assert not torch.allclose(before[0] - model[0].weight, own[:12].view(4, 3))
    assert head_names(model) == {"2.weight", "2.bias"}
    with pytest.raises(InvalidValue, match="no linear layer"):
        head_names(nn.Conv2d(1, 1, 1))


def test_a_turned_gradient_is_clipped_with_all_others_and_a_plain_one_is_not():
    def moved(columns: Tensor | None) -> float:
        weight, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
        loss = (weight * torch.tensor([-300.0, 400.0])).sum() + 300 * other.sum()
        sgd = torch.optim.SGD([weight, other], lr=1.0)
        info = integrated_step(sgd, loss, columns, [weight, other], [weight], margin=0.0, clip=50.0)
        if info is not None:
            assert info.norm_before == pytest.approx(500)
            assert info.norm_after == pytest.approx(400 if info.solved else 500, rel=1e-3)
            assert info.norm_clipped == pytest.approx(40 if info.solved else 500, rel=1e-3), "beside 30 of the other"
            assert info.norm_clipped == pytest.approx(float(weight.detach().norm()))
        return float(torch.cat([weight, other]).detach().norm())

    plain = math.hypot(300, 400, 300)
    assert moved(None) == pytest.approx(plain)
    assert moved(torch.tensor([[-1.0], [0.0]])) == pytest.approx(plain), "harms nothing"
    assert moved(torch.tensor([[1.0], [0.0]])) == pytest.approx(50)


def test_local_training_takes_nothing_from_others():
    made = client("local")
    assert not made.shared
    made.start_task(0, samples(0), BLOCKS[0])
    first = made.train_round(net().state_dict(), 0).weights
    zeros = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
    again = client("local")
    again.load_state(made.state())
    again.start_task(0, samples(0), BLOCKS[0])
    assert same(made.train_round(zeros, 1).weights, again.train_round(first, 1).weights)


def test_pulls_grow_with_their_strength():
    def apart(method: str, **fields: Any) -> float:
        made, start = client(method, **fields), net().state_dict()
        made.start_task(0, samples(0), BLOCKS[0])
        start = made.train_round(start, 0).weights
        made.end_task(0)
        made.start_task(1, samples(1), BLOCKS[1])
        after = made.train_round(start, 1).weights
        return float((after["0.weight"] - start["0.weight"]).norm())

    free = apart("fedavg")
    assert apart("fedprox", mu=0.0) == pytest.approx(free)
    assert apart("fedprox", mu=3.0) < 0.8 * free
    assert apart("ewc", penalty=0.0) == pytest.approx(free)
    assert apart("ewc", penalty=30.0) < free
    assert apart("lwf", weight=0.0) == pytest.approx(free)
    assert apart("lwf", weight=5.0) != pytest.approx(free)


def test_the_information_of_single_samples_is_that_of_fisher():
    made = EWCClient(nn.Sequential(nn.Linear(6, 8)), method_settings("ewc", **SMALL), 0, 0, sgd)
    data = samples(0, 5)
    made.start_task(0, data, BLOCKS[0])
    weights = made.train_round(made.model.state_dict(), 0).weights
    made.end_task(0)
    model = nn.Linear(6, 8)
    model.load_state_dict({name.removeprefix("0."): tensor for name, tensor in weights.items()})
    expected = torch.zeros(8, 6)
    for x, y in data:
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None])[:, :2], y[None]).backward()
        expected += model.weight.grad.square() / 5
    torch.testing.assert_close(made.fisher["0.weight"], expected)
    torch.testing.assert_close(made.pull["0.weight"], expected * model.weight.detach())


def softened() -> Any:
    """Labels as probabilities over the whole head, most of it on the sample's class, the rest on its neighbour's."""

    def transform(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        sure = nn.functional.one_hot(batch[1], 8).float()
        return batch[0], 0.9 * sure + 0.1 * nn.functional.one_hot(batch[1] ^ 1, 8)

    return transform


class Softened(TensorDataset):
    """The same labels in the data itself."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return softened()((x, y[None]))[0], softened()((x, y[None]))[1][0]


@pytest.mark.parametrize("soft_data", [False, True], ids=["transform", "data"])
@pytest.mark.parametrize(("method", "fields"), [*VARIANTS[:7], ("fedknow", PACKNET)], ids=named)
def test_soft_labels_are_learnt_from_in_rounds_and_at_a_tasks_end(method: str, fields: dict[str, Any], soft_data: bool):
    settings = method_settings(method, **SMALL | fields)
    soft = METHODS[method][0](net(), settings, 0, 0, sgd, () if soft_data else (softened,))
    found = []
    for made in (soft, client(method, **fields)):
        for t in range(2):
            made.start_task(t, Softened(*samples(t).tensors) if soft_data and made is soft else samples(t), BLOCKS[t])
            weights = made.train_round(net().state_dict(), t).weights
            made.end_task(t)
        found.append(weights)
        assert made.evaluate(1, samples(1), weights)[0] > 12
    assert not same(*found)


def test_stored_samples_are_the_clients_own_and_as_many_as_asked_for():
    made = client("gem", memory=5)
    assert isinstance(made, GEMClient)
    run(made, tasks=2)
    x, y = made.memory[0]
    assert len(x) == len(y) == 5
    assert all((x[i] == samples(0).tensors[0]).all(1).any() for i in range(5))
    assert set(y.tolist()) <= {0, 1}


@pytest.mark.parametrize(
    ("method", "fields", "told"),
    [
        ("fedknow", {"rho": 0.0}, "rho = 0.0"),
        ("fedknow", {"rho": 1.5}, "rho = 1.5"),
        ("fedknow", {"k": 0}, "k = 0"),
        ("fedknow", {"margin": -1}, "margin = -1"),
        ("fedknow", {"eps": -1}, "eps = -1"),
        ("fedknow", {"temperature": 0}, "temperature = 0"),
        ("fedknow", {"metric": "far"}, "metric = 'far'"),
        ("fedknow", {"reference": "first"}, "reference = 'first'"),
        ("fedknow", {"project": "head"}, "project = 'head'"),
        ("fedknow", {"extractor": "random"}, "extractor = 'random'"),
        ("fedknow", {"head_epochs": 2}, "fewer of the first"),
        ("fedknow", {"numbers": "int4"}, "numbers = 'int4'"),
        ("fedknow", {"numbers": "int8", **PACKNET}, "numbers = 'int8' is for"),
        ("fedknow", {"tasks": 3}, "tasks = 3 is for"),
        ("fedknow", {"colour": 1}, "no setting 'colour'"),
        ("fedavg", {"local_epochs": 0}, "local_epochs = 0"),
        ("fedavg", {"batch_size": 0}, "batch_size = 0"),
        ("fedprox", {"mu": -1}, "mu = -1"),
        ("ewc", {"penalty": -1}, "penalty = -1"),
        ("gem", {"memory": 0}, "memory = 0"),
        ("gem", {"margin": -1}, "margin = -1"),
        ("lwf", {"temperature": 0}, "temperature = 0"),
        ("fedavg", {"batch_size": 2.5}, "batch_size = 2.5; a whole number"),
        ("fedavg", {"local_epochs": 1.5}, "local_epochs = 1.5; a whole number"),
        ("fedavg", {"local_epochs": True}, "local_epochs = True; a whole number"),
        ("fedknow", {"finetune_epochs": 1.5}, "finetune_epochs = 1.5; a whole number"),
        ("fedknow", {"k": 2.5}, "k = 2.5; a whole number"),
        ("fedknow", {"tasks": 2.5, **PACKNET}, "tasks = 2.5; a whole number"),
        ("fedknow", {"tasks": 0, **PACKNET}, "tasks = 0; 1 or more"),
        ("fedknow", {"eps_relative": "no"}, "eps_relative = 'no'; true or false"),
        ("fedknow", {"eps": "small"}, "eps = 'small'; a finite number"),
        ("fedknow", {"rho": None}, "rho = None; a finite number"),
        ("fedknow", {"metric": ["cosine"]}, "metric = .*; one of wasserstein, cosine, euclidean"),
        ("fedknow", {"margin": float("inf")}, "margin = inf; a finite number"),
        ("gem", {"clip": float("nan")}, "clip = nan; a finite number"),
        ("gem", {"memory": 2.5}, "memory = 2.5; a whole number"),
        ("lwf", {"temperature": float("inf")}, "temperature = inf; a finite number"),
        ("fedprox", {"mu": float("inf")}, "mu = inf; a finite number"),
        ("lwf", {"weigth": 1}, "Did you mean 'weight'"),
    ],
)
def test_settings_outside_are_refused(method: str, fields: dict[str, Any], told: str):
    with pytest.raises(InvalidValue, match=told):
        method_settings(method, **SMALL | fields)


def test_an_integer_will_do_for_a_number():
    assert method_settings("fedknow", margin=1, rho=1, temperature=2, eps_relative=True, tasks=None).margin == 1


def test_wrong_use_is_told():
    made = client("fedavg")
    with pytest.raises(InvalidValue, match="in no task"):
        made.train_round(net().state_dict(), 0)
    with pytest.raises(InvalidValue, match="no samples of task 0"):
        made.start_task(0, samples(0, 0), BLOCKS[0])
    with pytest.raises(InvalidValue, match="a block of class ids"):
        made.start_task(0, samples(0), range(0))
    made.start_task(0, samples(0), BLOCKS[0])
    with pytest.raises(InvalidValue, match=r"end_task\(0\) comes before 1"):
        made.start_task(1, samples(1), BLOCKS[1])
    with pytest.raises(InvalidValue, match="not in 1"):
        made.end_task(1)
    with pytest.raises(InvalidValue, match=r"another model: 0.bias"):
        made.train_round({"0.weight": torch.zeros(12, 6)}, 0)
    wrong = net().state_dict() | {"0.weight": torch.zeros(2, 2)}
    with pytest.raises(InvalidValue, match=r"0.weight is \(2, 2\), and \(12, 6\) here"):
        made.train_round(wrong, 0)
    with pytest.raises(InvalidValue, match="has not met task 3"):
        made.evaluate(3, samples(3), net().state_dict())
    with pytest.raises(InvalidValue, match="no state of a client"):
        made.load_state({})
    strange = client("fedavg")
    strange.start_task(1, samples(0), BLOCKS[1])
    with pytest.raises(InvalidValue, match=r"client 0, task 1: class [01] in the data of a task of range\(2, 4\)"):
        strange.train_round(net().state_dict(), 0)
    beyond = client("fedavg")
    beyond.start_task(4, samples(3), range(8, 10))
    with pytest.raises(InvalidValue, match="not among the 8 of the head"):
        beyond.train_round(net().state_dict(), 0)
