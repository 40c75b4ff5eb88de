"""LEAP's claims: sharp wells are left sooner, nothing changes at ρ = 0, it costs little; and does it generalise better?

python benchmarks/leap.py [escape] [bit_identical] [overhead] [cora] [fashion_mnist]

The trainings are plain PyTorch loops with LEAP in them. They are kept in the system's folder for temporary files as
they end, so an interrupted benchmark goes on where it was; they are made anew when the code they depend on changes.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from _claims import Claim, main
from _kept import Kept
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.core.registry import resolve
from sparing.core.statistics import difference_over_seeds, t_interval
from sparing.optimization import leap as leap_module
from sparing.optimization.flatness import sharpness
from sparing.optimization.leap import LEAP
from sparing.optimization.leap_theory import escape_time, stable_curvature

ISSUE = "issue First guests, table of gates"
SHEET = "sheet LEAP, evaluation protocol"
CONTROL_RHO = 1.0
"""The ρ whose noise power and temperature the two larger learning rates match."""


# --------------------------------------------------------------------------------------------------------------- escape


def measure_escape(particles: int = 4000) -> list[Claim]:
    """Mean escape steps over ρ and curvature, and of plain gradient descent at two larger rates."""
    eta, rhos, widths = 0.05, (0.0, 0.5, 1.0, 1.5), (0.5, 0.7, 1.0)  # curvatures 8, 4.08, 2
    found = {(rho, c): escape_time(rho, c, eta=eta, particles=particles) for rho in rhos for c in widths}
    power = 1 + CONTROL_RHO**2
    controls = {
        (name, c): escape_time(0.0, c, eta=rate, particles=particles)
        for name, rate in {"rate × √(1+ρ²)": eta * math.sqrt(power), "rate × (1+ρ²)": eta * power}.items()
        for c in widths
    }
    still, moved = found[0.0, 1.0], found[CONTROL_RHO, 1.0]
    ratio = still.mean / moved.mean
    half = 1.96 * math.hypot(still.stderr / still.mean, moved.stderr / moved.mean)
    over_rho = [found[a, c].mean / found[b, c].mean for a, b in itertools.pairwise(rhos) for c in widths]
    over_flatness = [found[rho, b].mean / found[rho, a].mean for a, b in itertools.pairwise(widths) for rho in rhos]
    return [
        Claim(
            id="leap_escape",
            statement="out of a flat well (curvature 2) LEAP with ρ = 1 escapes many times sooner than without noise",
            source=ISSUE,
            figure=ratio,
            unit="× fewer steps",
            comparison=">=",
            threshold=8.0,
            interval95=(ratio * math.exp(-half), ratio * math.exp(half)),
            baselines=[
                {"name": "steps at ρ = 0", "figure": still.mean},
                {"name": "steps at ρ = 1", "figure": moved.mean},
                *({"name": f"steps at ρ = 0, {name}", "figure": time_.mean}
                  for (name, c), time_ in controls.items() if c == 1.0),
            ],
            also=[
                ("least shortening from one ρ to the next, at each curvature", min(over_rho), ">", 1.0),
                ("least lengthening from one curvature to the next flatter, at each ρ", min(over_flatness), ">", 1.0),
                ("particles that never escaped", float(sum(f.unescaped for f in found.values())), "==", 0.0),
            ],
            details={
                "particles": particles,
                "rows": [
                    {"rho": rho, "curvature": 2 / c**2, "steps": time_.mean, "standard error": time_.stderr}
                    for (rho, c), time_ in found.items()
                ],
                "controls": [
                    {"control": name, "curvature": 2 / c**2, "steps": time_.mean, "standard error": time_.stderr}
                    for (name, c), time_ in controls.items()
                ],
                "largest stable curvature": {f"rho {rho:g}": stable_curvature(eta, rho) for rho in rhos},
            },
        )
    ]  # fmt: skip


# -------------------------------------------------------------------------------------------------------- bit-identical


OPTIMIZERS: dict[type[torch.optim.Optimizer], tuple[dict[str, Any], ...]] = {
    torch.optim.SGD: ({}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "foreach": True}, {"fused": True}),
    torch.optim.Adam: ({"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}),
    torch.optim.AdamW: ({"foreach": False}, {"foreach": True}, {"fused": True}),
    torch.optim.Adagrad: ({}, {"fused": True}),
    torch.optim.Adadelta: ({}, {"foreach": True}),
    torch.optim.Adamax: ({},),
    torch.optim.NAdam: ({}, {"foreach": True}),
    torch.optim.RAdam: ({},),
    torch.optim.RMSprop: ({"momentum": 0.9, "centered": True}, {"foreach": True}),
    torch.optim.Rprop: ({},),
    torch.optim.ASGD: ({"foreach": False}, {"foreach": True}),
    torch.optim.Adafactor: ({},),
}


def measure_bit_identical(steps: int = 250) -> list[Claim]:
    """One epoch on Fashion-MNIST with each of torch's optimizers, bare and in LEAP with ρ = 0, under a schedule."""
    images, labels, _, _ = fashion()
    rows, drawn = [], 0
    for kind, variants in OPTIMIZERS.items():
        for options in variants:
            ends: list[list[Tensor]] = []
            for wrapped in (False, True):
                model = mlp(0)
                optimizer: torch.optim.Optimizer = kind(model.parameters(), **{"lr": 0.01, **options})
                if wrapped:
                    optimizer = LEAP(optimizer, rho=0)
                schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
                for batch in order(len(images), 20, 0, 0)[:steps]:
                    optimizer.zero_grad()
                    cross_entropy(model(images[batch]), labels[batch]).backward()
                    optimizer.step()
                    schedule.step()
                state = [
                    torch.as_tensor(v) for p in model.parameters() for v in optimizer.state[p].values() if v is not None
                ]
                ends.append([*(p.detach() for p in model.parameters()), *state])
                if isinstance(optimizer, LEAP):
                    drawn += len(optimizer.state_dict()["rng"])
            equal = len(ends[0]) == len(ends[1]) and all(map(torch.equal, *ends))
            rows.append({"optimizer": kind.__name__, "options": options, "equal": equal, "tensors": len(ends[0])})
    return [
        Claim(
            id="leap_bit_identical",
            statement="with ρ = 0, weights and optimizer state are those of the bare optimizer, bit for bit",
            source=ISSUE,
            figure=float(sum(not row["equal"] for row in rows)),
            unit="optimizers that differ",
            comparison="==",
            threshold=0.0,
            also=[
                ("variants of torch's optimizers tried", float(len(rows)), ">=", 20.0),
                ("random generators used", float(drawn), "==", 0.0),
            ],
            details={"steps": steps, "rows": rows},
        )
    ]


# ------------------------------------------------------------------------------------------------------------- overhead


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(made, Tensor) and (place := made.untyped_storage().data_ptr()) not in known:
            self.alive[place] = made.untyped_storage().nbytes()
            weakref.finalize(made, self.alive.pop, place, None)
            self.bytes = max(self.bytes, sum(self.alive.values()))
        return made


def measure_overhead(rounds: int = 15, steps: int = 20) -> list[Claim]:
    """CPU time of a training step and of its optimizer part beside the bare optimizer's; extra memory of a step."""
    from sparing.core.predictor import build_model

    task = resolve("tasks", "fashion_mnist")()
    images, labels, _, _ = fashion(flat=False)
    batch = slice(0, 128)
    with isolated_rng("leap overhead"):
        start = build_model("convnet", task)
    size = sum(p.numel() * p.element_size() for p in start.parameters())

    def arm(rho: float | None) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(start).train()
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return model, optimizer if rho is None else LEAP(optimizer, rho=rho)

    arms = {"bare": arm(None), "ρ = 0": arm(0.0), "ρ = 0.1": arm(0.1)}
    whole: dict[str, list[float]] = {name: [] for name in arms}
    alone: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(rounds + 1):
        for name in list(arms) if round_ % 2 else list(reversed(arms)):
            model, optimizer = arms[name]
            begin, inside = time.process_time(), 0.0
            for _ in range(steps):
                optimizer.zero_grad()
                cross_entropy(model(images[batch]), labels[batch]).backward()
                stepping = time.process_time()
                optimizer.step()
                inside += time.process_time() - stepping
            if round_:  # the first warms up
                whole[name].append((time.process_time() - begin) / steps * 1e3)
                alone[name].append(inside / steps * 1e3)
    memory = {}
    for name, (_, optimizer) in arms.items():
        with Peak() as peak:
            optimizer.step()
        memory[name] = peak.bytes / size
    ratios = [b / a for a, b in zip(whole["bare"], whole["ρ = 0.1"], strict=True)]
    return [
        Claim(
            id="leap_overhead",
            statement="a training step with LEAP costs hardly more time than one without",
            source="sheet LEAP, what it does",
            figure=statistics.median(ratios),
            unit="× the bare optimizer's training step",
            comparison="<=",
            threshold=1.10,
            gate=False,
            interval95=t_interval(ratios),
            baselines=[
                *({"name": f"step, {name}, CPU ms", "figure": statistics.median(v)} for name, v in whole.items()),
                *({"name": f"optimizer, {name}, CPU ms", "figure": statistics.median(v)} for name, v in alone.items()),
                *({"name": f"extra memory, {name}, × weights", "figure": value} for name, value in memory.items()),
            ],
            details={"rounds": rounds, "steps": steps, "batch": 128, "parameters": size // 4, "optimizer": "AdamW",
                     "threads": torch.get_num_threads(), "numbers kept at a time": leap_module.CHUNK},
        )
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ trainings


class GradientNoise(torch.optim.Optimizer):
    """The baseline: noise of variance s / (1 + t)^0.55 on each gradient (Neelakantan et al. 2015, arXiv:1511.06807)."""

    def __init__(self, base: torch.optim.Optimizer, s: float, seed: int) -> None:
        self.base, self.s, self.steps = base, s, 0
        self.generator = torch.Generator().manual_seed(seed)
        super().__init__(base.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """The base optimizer's step along the noisy gradient."""
        spread = math.sqrt(self.s / (1 + self.steps) ** 0.55)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad += spread * torch.randn(p.shape, generator=self.generator)
        self.base.step()
        self.steps += 1


Arm = tuple[float, Callable[[torch.optim.Optimizer, int], torch.optim.Optimizer]]


def arms(rhos: Sequence[float]) -> dict[str, Arm]:
    """Name → (factor on the learning rate, (optimizer, seed) → optimizer)."""
    power = 1 + CONTROL_RHO**2

    def perturbed(rho: float) -> Arm:
        return 1.0, lambda optimizer, seed: LEAP(optimizer, rho=rho, generator=derive_seed(seed, "leap"))

    return {
        **{f"ρ = {rho:g}": perturbed(rho) for rho in rhos},
        "ρ = 0, rate × √2": (math.sqrt(power), lambda optimizer, seed: optimizer),
        "ρ = 0, rate × 2": (power, lambda optimizer, seed: optimizer),
        "gradient noise, s = 0.01": (1.0, lambda o, seed: GradientNoise(o, 0.01, derive_seed(seed, "noise"))),
    }


def compared(
    id_: str,
    statement: str,
    found: dict[str, list[dict[str, float]]],
    against: str,
    seeds: int,
    settings: dict[str, Any],
) -> Claim:
    """Accuracy of ``against`` minus that of ρ = 0 for the same seeds, in points, with Student's interval."""

    def differences(one: str, other: str, figure: str = "accuracy") -> Any:
        pairs = zip(found[one], found[other], strict=True)
        return difference_over_seeds([after[figure] - before[figure] for before, after in pairs])

    main_ = differences("ρ = 0", against)
    beside = {name: differences("ρ = 0", name) for name in found if name != "ρ = 0"}
    over_controls = {name: differences(name, against) for name in found if name not in ("ρ = 0", against)}
    return Claim(
        id=id_,
        statement=statement,
        source=SHEET,
        figure=main_.value,
        unit="points of test accuracy over ρ = 0",
        comparison=">",
        threshold=0.0,
        gate=False,
        interval95=main_.interval,
        seeds=list(range(seeds)),
        baselines=[
            {"name": f"accuracy, {name}, %", "figure": statistics.fmean(run["accuracy"] for run in runs)}
            for name, runs in found.items()
        ],
        also=[("lower end of the interval", main_.interval[0], ">", 0.0)],
        details={
            "settings": settings,
            "figures": {
                name: {
                    figure: {"mean": statistics.fmean(values), "standard deviation": statistics.stdev(values)}
                    for figure in runs[0]
                    if (values := [run[figure] for run in runs])
                }
                for name, runs in found.items()
            },
            "over ρ = 0": {
                name: {"points": d.value, "interval95": d.interval, "shown": d.shown} for name, d in beside.items()
            },
            f"{against} over the others": {
                name: {"points": d.value, "interval95": d.interval, "shown": d.shown}
                for name, d in over_controls.items()
            },
            "top eigenvalue over ρ = 0": {
                name: {"difference": d.value, "interval95": d.interval, "shown": d.shown}
                for name in beside
                if (d := differences("ρ = 0", name, "top eigenvalue"))
            },
        },
    )


# ----------------------------------------------------------------------------------------------------------------- Cora


@functools.cache
def cora() -> Any:
    from sparing.data.planetoid import read_planetoid, row_normalised

    graph = read_planetoid(_data(), "cora")
    graph.x = row_normalised(graph.x)
    return graph


def train_gcn(seed: int, arm: Arm, epochs: int = 200) -> dict[str, float]:
    """Kipf and Welling's GCN on the public split, all 140 labels; accuracy after the last epoch."""
    from sparing.models.gnn import GCN

    graph, (factor, wrap) = cora(), arm
    with isolated_rng("leap cora", seed):
        model = GCN(graph.num_features, 7, cached=True)
        optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.01 * factor, weight_decay=5e-4), seed)
        for _ in range(epochs):
            model.train()
            optimizer.zero_grad()
            loss = cross_entropy(model(graph.x, graph.edge_index)[graph.train_mask], graph.y[graph.train_mask])
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(graph.x, graph.edge_index).argmax(1) == graph.y
    top = sharpness(Whole(model), cross_entropy, [(graph, graph.y[graph.train_mask])], iters=30, tol=1e-2)
    return {
        "accuracy": 100 * float(right[graph.test_mask].double().mean()),
        "validation accuracy": 100 * float(right[graph.val_mask].double().mean()),
        "training loss": float(loss.detach()),
        "top eigenvalue": float(top.values[0]),
        "its residual": float(top.residuals[0]),
    }


class Whole(nn.Module):
    """Logits of the training nodes of a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, graph: Any) -> Tensor:
        """A PyG graph → (n_train, classes)."""
        return self.model(graph.x, graph.edge_index)[graph.train_mask]


def measure_cora(seeds: int = 50) -> list[Claim]:
    from sparing.models import gnn

    kept = Kept("leap-cora", leap_module, gnn, train_gcn, arms, GradientNoise, sharpness)
    every = arms((0.0, 0.3, 1.0))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in every}
    for seed in range(seeds):
        for name, arm in every.items():
            found[name].append(kept.once(f"{name}, seed {seed}", lambda seed=seed, arm=arm: train_gcn(seed, arm)))
    settings = {"model": "GCN, 16 hidden, dropout 0.5", "optimizer": "Adam, rate 0.01, weight decay 5e-4",
                "epochs": 200, "split": "public, 140 labels", "accuracy": "last epoch"}  # fmt: skip
    return [
        compared(
            "leap_cora",
            "on Cora a GCN trained with LEAP, ρ = 0.3, classifies more test nodes than one without",
            found,
            "ρ = 0.3",
            seeds,
            settings,
        )
    ]


# -------------------------------------------------------------------------------------------------------- Fashion-MNIST


@functools.cache
def fashion(flat: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First 5000 training images and all test images: pixels/255 (n, 784) or (n, 1, 28, 28), and labels."""
    from sparing.data.idx import read_fashion_mnist

    parts: list[Tensor] = []
    for train in (True, False):
        images, labels = (
            torch.from_numpy(np.array(part[: 5000 if train else None])) for part in read_fashion_mnist(_data(), train)
        )
        images = images.float() / 255
        parts += [images.reshape(len(images), -1) if flat else images.reshape(-1, 1, 28, 28), labels.long()]
    return tuple(parts)  # type: ignore[return-value]


def mlp(seed: int) -> nn.Module:
    with isolated_rng("leap mlp", seed):
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def order(size: int, batch: int, seed: int, epoch: int) -> list[Tensor]:
    shuffled = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size))
    return list(shuffled.split(batch))


def train_mlp(seed: int, arm: Arm, epochs: int = 25, batch: int = 20, lr: float = 0.05) -> dict[str, float]:
    """784-64-10, SGD at a constant rate; mean test accuracy after each of the last five epochs."""
    images, labels, test_images, test_labels = fashion()
    factor, wrap = arm
    model = mlp(seed)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=lr * factor), seed)
    accuracies = []
    for epoch in range(epochs):
        for part in order(len(images), batch, seed, epoch):
            optimizer.zero_grad()
            cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
        if epoch >= epochs - 5:
            with torch.no_grad():
                accuracies.append(100 * float((model(test_images).argmax(1) == test_labels).double().mean()))
    with torch.no_grad():
        loss = float(cross_entropy(model(images), labels))
    top = sharpness(model, cross_entropy, [(images, labels)], iters=50, tol=1e-2)
    return {
        "accuracy": statistics.fmean(accuracies),
        "training loss": loss,
        "top eigenvalue": float(top.values[0]),
        "its residual": float(top.residuals[0]),
    }


def measure_fashion_mnist(seeds: int = 20) -> list[Claim]:
    kept = Kept("leap-fashion-mnist", leap_module, train_mlp, arms, GradientNoise, fashion, order, mlp, sharpness)
    every = arms((0.0, 0.5, 1.0))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in every}
    for seed in range(seeds):
        for name, arm in every.items():
            found[name].append(kept.once(f"{name}, seed {seed}", lambda seed=seed, arm=arm: train_mlp(seed, arm)))
    settings = {"model": "MLP 784-64-10", "optimizer": "SGD, rate 0.05, constant", "batch": 20, "epochs": 25,
                "training images": 5000, "test images": 10000, "accuracy": "mean of the last five epochs"}  # fmt: skip
    return [
        compared(
            "leap_fashion_mnist",
            "on 5000 images of Fashion-MNIST an MLP trained with LEAP, ρ = 0.5, is more accurate than one without",
            found,
            "ρ = 0.5",
            seeds,
            settings,
        )
    ]


def _data() -> Path:
    return Path(os.environ["SPARING_DATA"])


BENCHMARKS: dict[str, Callable[[], list[Claim]]] = {
    "escape": measure_escape,
    "bit_identical": measure_bit_identical,
    "overhead": measure_overhead,
    "cora": measure_cora,
    "fashion_mnist": measure_fashion_mnist,
}

if __name__ == "__main__":
    sys.exit(main("leap", BENCHMARKS))
