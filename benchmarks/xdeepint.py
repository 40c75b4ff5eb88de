"""xDeepInt's claims: better than tuned baselines on real flights, with empty rows; and what input and steps cost.

python benchmarks/xdeepint.py train                       # only the trainings, in order of importance
python benchmarks/xdeepint.py [flights]

The trainings are plain PyTorch loops. They are kept in the system's folder for temporary files as they end, so an
interrupted benchmark goes on where it was; they are made anew when the code they depend on changes.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from _kept import Kept
from sparing.core.files import canonical_json
from sparing.core.predictor import ModulePredictor, build_model
from sparing.core.randomness import isolated_rng
from sparing.data import ctr as encoding
from sparing.data.ctr import Clicks, CTREncoder
from sparing.models import ctr as models
from sparing.models import xdeepint
from sparing.models.ctr import CTRModel, without_zero_rows
from sparing.optimization import ftrl
from sparing.optimization.ftrl import combined_optimizer
from sparing.tasks.ctr import hflights
from sparing.tasks.ctr.base import click_metrics
from sparing.tasks.ctr.hflights import HFlights

SHEET = "sheet xDeepInt, demonstration"
BATCH, EPOCHS, DIM, EVALUATION = 2048, 6, 16, 8192
SEEDS = (0, 1, 2)
TRIALS = 8
WIDE = 32
"""Trials of the wider search that is reported beside."""

# ------------------------------------------------------------------------------------------------------------- settings

Spec = dict[str, Any]
"""{"model", "fields", "optimizer", "settings"}: all that a training depends on but data and seed."""

# (lowest, the sheet's, highest), between which a trial is drawn evenly in the logarithm; or ([choices], the sheet's)
DECAY = (3e-6, 1e-5, 3e-4)
PROXIMAL: dict[str, Any] = {"alpha": (0.05, 0.1, 0.2), "lambda1": (2.0, 4.0, 8.0), "lr": (0.025, 0.05, 0.1)}
SEARCH: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    # initial embeddings: of 0.01 and 1/√D the better one on the validation fold at the sheet's rate and decay
    "LR": ("lr", {}, "adam", {"lr": (2.5e-3, 1e-2, 4e-2), "weight_decay": DECAY}),
    "FM": (
        *("fm", {"init_std": 0.01}, "adam"),
        {"lr": (5e-4, 2e-3, 8e-3), "weight_decay": DECAY},
    ),
    "DeepFM": ("deepfm", {"init_std": 0.01}, "adam", {"lr": (2.5e-4, 1e-3, 4e-3), "weight_decay": DECAY}),
    "DCN-v2": ("dcnv2", {}, "adam", {"lr": (2.5e-4, 1e-3, 4e-3), "weight_decay": DECAY}),
    "xDeepInt": ("xdeepint", {"num_layers": 3}, "combined", {**PROXIMAL, "num_subspaces": ([2, 4, 8, 16], 4)}),
    "LR, G-FTRL": ("lr", {}, "combined", PROXIMAL),
    "FM, G-FTRL": ("fm", {}, "combined", PROXIMAL),
    "DeepFM, G-FTRL": ("deepfm", {}, "combined", PROXIMAL),
    "DCN-v2, G-FTRL": ("dcnv2", {}, "combined", PROXIMAL),
    "xDeepInt, Adam": (
        *("xdeepint", {"num_layers": 3}, "adam"),
        {"lr": (2.5e-4, 1e-3, 4e-3), "weight_decay": DECAY, "num_subspaces": ([2, 4, 8, 16], 4)},
    ),
}
BASELINES = ("LR", "FM", "DeepFM", "DCN-v2")
STD: dict[str, Any] = {"init_std": ([0.01, 0.25], 0.25)}
WIDER: dict[str, dict[str, Any]] = {
    "LR": {"lr": (1e-3, 1e-2, 1e-1), "weight_decay": (1e-7, 1e-5, 1e-3)},
    **{
        name: {"lr": (2e-4, 1e-3, 2e-2), "weight_decay": (1e-7, 1e-5, 1e-3), **STD}
        for name in ("FM", "DeepFM", "DCN-v2")
    },
    "xDeepInt": {
        **{"alpha": (0.02, 0.1, 0.5), "lambda1": (1.0, 4.0, 16.0), "lr": (0.01, 0.05, 0.25)},
        "num_subspaces": ([1, 2, 4, 8, 16], 4),
    },
}
OF_THE_NETWORK = ("init_std", "num_subspaces", "residual")


def spec(arm: str, chosen: dict[str, Any]) -> Spec:
    """An arm with chosen settings, of which some are the network's."""
    name, fields, optimizer, _ = SEARCH[arm]
    fields = {**fields, **({} if name == "lr" else {"dim": DIM})}
    fields |= {key: value for key, value in chosen.items() if key in OF_THE_NETWORK}
    settings = {key: value for key, value in chosen.items() if key not in OF_THE_NETWORK}
    return {"model": name, "fields": fields, "optimizer": optimizer, "settings": settings}


def trials(arm: str, count: int = TRIALS, search: dict[str, Any] | None = None) -> list[Spec]:
    """The sheet's settings, and ``count`` − 1 of a Latin hypercube about them, drawn with seed 0."""
    from scipy.stats.qmc import LatinHypercube

    search = SEARCH[arm][3] if search is None else search
    found = [{key: entry[1] for key, entry in search.items()}]
    for point in LatinHypercube(len(search), rng=np.random.default_rng(0)).random(count - 1):
        chosen: dict[str, Any] = {}
        for (key, entry), at in zip(search.items(), point.tolist(), strict=True):
            if isinstance(entry[0], list):
                chosen[key] = entry[0][int(at * len(entry[0]))]
            else:
                chosen[key] = float(f"{entry[0] * (entry[2] / entry[0]) ** at:.4g}")
        found.append(chosen)
    return [spec(arm, chosen) for chosen in found]


# ------------------------------------------------------------------------------------------------------------ trainings

Split = Literal["fold", "time"]


@functools.cache
def flights(split: Split) -> tuple[tuple[int, ...], dict[str, tuple[Tensor, Tensor]]]:
    """(ids of each field, {"fitted", "val", "test"}: ids int64 (n, 11) and labels float32 (n,)), encoded once."""
    task, root = HFlights(split=split), Path(os.environ["SPARING_DATA"])
    encoder = CTREncoder(task.schema(root)).fit(task.fitted_on(root))
    found = {}
    for name in ("fitted", "val", "test"):
        clicks = Clicks.of(encoder, task.sources(root)[name])
        labels = torch.from_numpy(clicks.labels.astype(np.float32))
        found[name] = torch.from_numpy(clicks.ids.astype(np.int64)), labels
    return encoder.cardinalities, found


def logits(model: torch.nn.Module, ids: Tensor) -> np.ndarray:
    """Of all rows (n,)."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(part) for part in ids.split(EVALUATION)]).numpy()


def train(chosen: Spec, seed: int, split: Split = "fold", tested: bool = False, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train; figures of the epoch with the lowest validation log-loss. The test rows are looked at if ``tested``.

    The loss is the mean over a batch for Adam and the sum for the combined optimizer, to which each one's settings
    belong. Every seed has its order of rows, the same for all arms.
    """
    cardinalities, data = flights(split)
    begin = time.process_time()
    with isolated_rng("xdeepint benchmark", seed):
        model = build_model(chosen["model"], cardinalities=list(cardinalities), **chosen["fields"])
    assert isinstance(model, CTRModel)
    combined = chosen["optimizer"] == "combined"
    optimizer: torch.optim.Optimizer
    if combined:
        optimizer = combined_optimizer(model, **chosen["settings"])
    else:
        optimizer = torch.optim.Adam(model.parameters(), **chosen["settings"])
    ids, labels = data["fitted"]
    best: dict[str, Any] = {"log_loss": float("inf")}
    kept: dict[str, Tensor] = {}
    history = []
    for epoch in range(epochs):
        model.train()
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(ids)))
        for rows in order.split(BATCH):
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(
                model(ids[rows]), labels[rows], reduction="sum" if combined else "mean"
            )
            loss.backward()
            optimizer.step()
        found, _ = click_metrics(logits(model, data["val"][0]), data["val"][1].numpy())
        history.append([found["log_loss"], found["roc_auc"]])
        if found["log_loss"] < best["log_loss"]:
            best, kept = {**found, "epoch": epoch + 1}, {name: v.clone() for name, v in model.state_dict().items()}
        elif epoch + 1 - best["epoch"] == 2:
            break
    model.load_state_dict(kept)
    result = {
        **{f"val_{name}": best[name] for name in ("log_loss", "roc_auc")},
        "epoch": best["epoch"],
        "history": history,
        **model.sparsity(),
        "cpu_s": time.process_time() - begin,
    }
    return {**result, **tests(model, data["test"])} if tested else result


def tests(model: CTRModel, rows: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Figures on the test rows, and what becomes of them and of the saved model without rows of zeros."""
    answers = logits(model, rows[0])
    found, _ = click_metrics(answers, rows[1].numpy())
    smaller = without_zero_rows(model)
    example = (rows[0][:2],)
    with tempfile.TemporaryDirectory(prefix="sparing-xdeepint-") as folder:
        sizes = []
        for name, each in (("whole", model), ("pruned", smaller)):
            ModulePredictor(each, example=example).save(Path(folder) / name)
            sizes.append(sum(file.stat().st_size for file in (Path(folder) / name).rglob("*") if file.is_file()))
    return {
        **{f"test_{name}": value for name, value in found.items()},
        "differing": int((logits(smaller, rows[0]).view(np.int32) != answers.view(np.int32)).sum()),
        "bytes": sizes[0],
        "bytes_pruned": sizes[1],
    }


@functools.cache
def kept() -> Kept:
    """Trainings that were made with this code."""
    return Kept("xdeepint", models, xdeepint, ftrl, encoding, hflights, flights, train, tests, EPOCHS, BATCH)


def trained(chosen: Spec, seed: int, split: Split = "fold", tested: bool = False) -> dict[str, Any]:
    """A training that was kept, or a new one."""
    name = canonical_json({**chosen, "seed": seed, "split": split, "tested": tested})
    return kept().once(name, lambda: train(chosen, seed, split, tested))


def tuned(arm: str, count: int = TRIALS, search: dict[str, Any] | None = None, split: Split = "fold") -> Spec:
    """Of an arm's trials the one with the lowest validation log-loss, with seed 0."""
    return min(trials(arm, count, search), key=lambda each: trained(each, 0, split)["val_log_loss"])


def runs(chosen: Spec, split: Split = "fold", seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """Trainings with every seed, tested."""
    return [trained(chosen, seed, split, tested=True) for seed in seeds]


def changed(**fields: Any) -> Spec:
    """The tuned xDeepInt with other fields of the network."""
    best = tuned("xDeepInt")
    return {**best, "fields": {**best["fields"], **fields}}


VARIANTS = {
    **{f"xDeepInt, H = {parts}": {"num_subspaces": parts} for parts in (1, 4, 16)},
    "xDeepInt, plain": {"residual": False},
}


def train_all() -> None:
    """All trainings, in order of importance."""
    print(kept().file, flush=True)
    for number in range(TRIALS):
        for arm in (*BASELINES, "xDeepInt"):
            trained(trials(arm)[number], 0)
    for arm in (*BASELINES, "xDeepInt"):
        runs(tuned(arm))
    for arm in SEARCH:
        runs(tuned(arm))
    for fields in VARIANTS.values():
        runs(changed(**fields))
    for arm in (*BASELINES, "xDeepInt"):
        runs(tuned(arm), "time")
    for arm, search in WIDER.items():
        runs(tuned(arm, WIDE, search))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["train"]:
        train_all()
