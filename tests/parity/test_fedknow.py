"""FedKNOW beside its reference: projection, distillation, PackNet, the whole step; averages, metrics, choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_kind import Arrays, close, compared, one_with, tensor
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from sparing.federated.clients import FedKNOWClient, FedKNOWSettings, Update, head_names, trained_parameters
from sparing.federated.knowledge import PackNet, TaskKnowledge, top_share
from sparing.federated.metrics import ContinualMetrics
from sparing.federated.projection import (
    block_logits,
    distillation_loss,
    flat_gradient,
    gradient_distances,
    integrate_gradients,
    project_gradient,
    select_signature_tasks,
)
from sparing.federated.rounds import average


def equal(found: Any, expected: np.ndarray, what: str) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, {expected.shape} in the reference"
    assert np.array_equal(found, expected), f"{what} differs"


def under(prefix: str, f: Arrays) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor(array) for name, array in f.items() if name.startswith(prefix)}


def layered(state: Mapping[str, Tensor]) -> nn.Sequential:
    """Linear layers, with a ReLU wherever their numbers leave room for one."""
    numbers = sorted({int(name.split(".")[0]) for name in state})
    layers: list[nn.Module] = [nn.ReLU() for _ in range(numbers[-1] + 1)]
    for number in numbers:
        weight = state[f"{number}.weight"]
        layers[number] = nn.Linear(weight.shape[1], weight.shape[0])
    made = nn.Sequential(*layers)
    made.load_state_dict(dict(state))
    return made


class Net(nn.Module):
    """Features, a ReLU behind them, and a head called "last"."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        features = {
            name.removeprefix("feature_net."): t for name, t in state.items() if name.startswith("feature_net.")
        }
        self.feature_net = layered(features)
        self.last = nn.Linear(state["last.weight"].shape[1], state["last.weight"].shape[0])
        self.load_state_dict(dict(state))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.feature_net(x).relu())


# --- one function for each kind of file; each returns the names of the arrays it used


def of_qp(f: Arrays) -> set[str]:
    gradient, memories = tensor(f["gradient"]), tensor(f["memories"])
    margin, eps = float(f["margin"]), float(f["eps"])
    projected, dual = project_gradient(gradient, memories, margin, eps)
    close(dual, f["dual"], "dual", atol=1e-4)
    close(projected, f["projected"], "projected", atol=1e-4)
    close(memories.T @ gradient, f["dots_before"], "dots_before", atol=1e-4)
    close(memories.T @ projected, f["dots_after"], "dots_after", atol=1e-4)
    turned, info = integrate_gradients(gradient, memories, margin, eps)
    close(info.dots_before, f["dots_before"], "dots_before", atol=1e-4)
    if (f["dots_before"] < 0).any():
        assert info.solved
        close(turned, f["projected"], "projected", atol=1e-4)
        close(info.dots_after, f["dots_after"], "dots_after", atol=1e-4)
    else:
        assert not info.violated
        assert torch.equal(turned, gradient)
    return {"gradient", "memories", "margin", "eps", "dual", "projected", "dots_before", "dots_after"}


def of_kd(f: Arrays) -> set[str]:
    logits = tensor(f["student_logits"]).requires_grad_()
    loss = distillation_loss(logits, tensor(f["teacher_logits"]), float(f["temperature"]))
    close(loss, f["loss"], "loss")
    loss.backward()
    assert logits.grad is not None
    close(logits.grad, f["grad"], "grad")
    return {"student_logits", "teacher_logits", "temperature", "loss", "grad"}


def of_packnet(f: Arrays) -> set[str]:
    used, t = {"store_rate"}, 0
    net = PackNet(layered(under("task0_before_", f)), float(f["store_rate"]))
    while any(name.startswith(f"task{t}_before_") for name in f):
        net.model.load_state_dict(under(f"task{t}_before_", f))
        masks = net.prune()
        assert {f"task{t}_mask_{name}" for name in masks} == {n for n in f if n.startswith(f"task{t}_mask_")}
        for name, mask in masks.items():
            equal(mask, f[f"task{t}_mask_{name}"], f"task{t}_mask_{name}")
        for name, weight in net.model.state_dict().items():
            equal(weight, f[f"task{t}_after_{name}"], f"task{t}_after_{name}")
        used |= {name for name in f if name.startswith(f"task{t}_")}
        t += 1
    for task in range(t):
        restored = net.knowledge(task, range(1)).materialize(net.model).state_dict()
        for name, weight in restored.items():
            equal(weight, f[f"eval{task}_{name}"], f"eval{task}_{name}")
            used.add(f"eval{task}_{name}")
    return used


def of_topk(f: Arrays) -> set[str]:
    weights = under("weight_", f)
    masks, threshold, count = top_share(weights, float(f["rho"]))
    equal(count, f["count"], "count")
    close(threshold, f["threshold"], "threshold")
    for name, mask in masks.items():
        equal(mask, f[f"mask_{name}"], f"mask_{name}")
    return {"rho", "count", "threshold", *(f"{kind}_{name}" for kind in ("weight", "mask") for name in weights)}


def of_step(f: Arrays) -> set[str]:
    task, each, x, y = int(f["task"]), int(f["nc_per_task"]), tensor(f["x"]), tensor(f["y"])
    start, pack = under("model_", f), under("pack_", f)
    used = {"task", "nc_per_task", "n_tasks", "x", "y", "lr", "weight_decay", "optimizer"}
    used |= {name for name in f if name.startswith(("model_", "pack_", "old_"))}
    assert Net(start).last.out_features == each * int(f["n_tasks"])

    def made_optimizer(net: nn.Module) -> torch.optim.Optimizer:
        make = getattr(torch.optim, str(f["optimizer"]))
        return make(net.parameters(), lr=float(f["lr"]), weight_decay=float(f["weight_decay"]))

    # a client that has met the tasks before, in a later round of this one: the frozen model is that of the first
    settings = FedKNOWSettings(local_epochs=1, batch_size=len(x), project="features", reference="task_start")
    client = FedKNOWClient(Net(start), settings, optimizer=made_optimizer)
    for t in range(task + 1):
        client.start_task(t, TensorDataset(x, y), range(t * each, (t + 1) * each))
        if t < task:
            client.end_task(t)
    client.start = under("old_", f)
    union: dict[str, Tensor] = {}
    while masks := under(f"mask{len(client.knowledge)}_", f):
        i = len(client.knowledge)
        used |= {f"mask{i}_{name}" for name in masks}
        for name, mask in masks.items():
            union[f"feature_net.{name}"] = union.get(f"feature_net.{name}", torch.zeros_like(mask)) | mask
        client.knowledge[i] = TaskKnowledge.of(pack, dict(union), i, client.blocks[i])
    net = client.model.train()
    client._begin(start)

    def started() -> tuple[Tensor, Tensor, list[nn.Parameter]]:
        """(logits, the task's loss, parameters of the features)."""
        logits, block = net(x), client.classes
        loss = nn.functional.cross_entropy(block_logits(logits, block), y - block.start)
        return logits, loss, [p for name, p in trained_parameters(net).items() if name not in head_names(net)]

    logits, loss, features = started()
    memories = client._columns(x, logits, loss, features, choose=True)
    own = flat_gradient(loss, features, retain_graph=True)
    assert memories is not None
    close(torch.cat([memories, own[:, None]], 1), f["grad_columns"], "grad_columns")
    close(integrate_gradients(own, memories)[0], f["integrated_correct"], "integrated_correct", atol=1e-6)
    client._step(made_optimizer(net), x, y, 0, 0)
    assert client.last is not None
    equal(client.last.solved, f["was_projected_correct"], "was_projected_correct")
    for name, weight in net.state_dict().items():
        close(weight, f[f"correct_after_{name}"], f"correct_after_{name}", atol=1e-6)
    used |= {name for name in f if name.startswith("correct_after_")}
    used |= {"grad_columns", "integrated_correct", "was_projected_correct"}

    # what the reference does: its test looks at the first earlier task's column
    turned = bool((memories.T @ memories[:, 1] < 0).any())
    equal(turned, f["was_projected"], "was_projected")
    expected = project_gradient(own, memories)[0] if turned else own
    close(expected, f["integrated"], "integrated", atol=1e-6)
    net.load_state_dict(start)
    optimizer = made_optimizer(net)
    _, loss, features = started()
    loss.backward()
    for parameter, part in zip(features, expected.split([each.numel() for each in features]), strict=True):
        parameter.grad = part.view_as(parameter)
    optimizer.step()
    for name, weight in net.state_dict().items():
        close(weight, f[f"after_{name}"], f"after_{name}", atol=1e-6)
    used |= {name for name in f if name.startswith("after_")}
    return used | {"integrated", "was_projected"}


def of_fedavg(f: Arrays) -> set[str]:
    names = [name.removeprefix("agg_") for name in f if name.startswith("agg_")]
    updates = [
        Update({name: tensor(f[name][client]) for name in names}, int(examples), {})
        for client, examples in enumerate(f["num_examples"])
    ]
    for name, found in average(updates).items():
        close(found, f[f"agg_{name}"].astype(found.numpy().dtype), f"agg_{name}")
    equal(sum(t.nbytes for t in updates[0].weights.values()), f["bytes_per_client"], "bytes_per_client")
    return {"num_examples", "bytes_per_client", *names, *(f"agg_{name}" for name in names)}


def of_metrics(f: Arrays) -> set[str]:
    found = ContinualMetrics(f["accuracy_matrix"])
    names = ("average_accuracy", "forgetting", "forgetting_rate", "backward_transfer")
    for name in names:
        close(getattr(found, name), f[name], name)
    return {"accuracy_matrix", *names}


def of_selection(f: Arrays) -> set[str]:
    current, past, k = tensor(f["current"]), tensor(f["past"]), int(f["k"])
    close(gradient_distances(current, past, "wasserstein"), f["wasserstein"], "wasserstein")
    close(1 - gradient_distances(current, past, "cosine"), f["cosine_similarity"], "cosine_similarity")
    close(gradient_distances(current, past, "euclidean"), f["euclidean"], "euclidean")
    for metric in ("wasserstein", "cosine", "euclidean"):
        equal(select_signature_tasks(current, past, k, metric), f[f"signature_{metric}"], f"signature_{metric}")
    chosen = {f"signature_{metric}" for metric in ("wasserstein", "cosine", "euclidean")}
    return {"current", "past", "k", "wasserstein", "cosine_similarity", "euclidean"} | chosen


KINDS = {
    "memories": of_qp,
    "teacher_logits": of_kd,
    "store_rate": of_packnet,
    "rho": of_topk,
    "grad_columns": of_step,
    "num_examples": of_fedavg,
    "accuracy_matrix": of_metrics,
    "past": of_selection,
}


def test_against_the_reference(
    oracles: Callable[[str], list[Path]], record_property: Callable[[str, object], None]
) -> None:
    record_property("arrays compared", compared(oracles("fedknow"), KINDS))


@pytest.mark.parametrize(
    ("marker", "changed", "noticed"),
    [
        ("memories", "gradient", "dual|projected|dots_before"),
        ("teacher_logits", "student_logits", "loss"),
        ("store_rate", "task0_before_0.weight", "task0_"),
        ("rho", "weight_0.weight", "mask|threshold"),
        ("grad_columns", "x", "grad_columns"),
        ("num_examples", "weight", "agg_weight"),
        ("accuracy_matrix", "accuracy_matrix", "average_accuracy"),
        ("past", "past", "wasserstein"),
    ],
)
def test_other_inputs_would_be_noticed(
    oracles: Callable[[str], list[Path]], marker: str, changed: str, noticed: str
) -> None:
    arrays = one_with(oracles("fedknow"), marker)
    with pytest.raises(AssertionError, match=noticed):
        KINDS[marker](arrays | {changed: arrays[changed][..., ::-1].copy() * 0.9})
