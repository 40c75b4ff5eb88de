"""A student of one's own class, made by a function: like any other model it depends on the seed, and is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import sparing
from sparing.core.store import Store

METER = {"min_seconds": 0, "max_seconds": 0.1, "memory": False}


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


def students(folder: Path, width: int = 3) -> tuple[list[torch.Tensor], int]:
    """The students' first weights for two seeds after a training too short to move them far, and entries kept."""
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, (x[:, 0] > 0).long())
    task = sparing.CustomTask("own", data, data, model=lambda: net(8), loss=cross_entropy, labels=["no", "yes"])
    distil = sparing.Distil(teacher="train", model=lambda: net(width), max_steps=1, lr=1e-6)
    store = Store(folder)
    runs = [
        sparing.run(task=task, steps=[sparing.Train(max_steps=1), distil], seeds=[seed], meter=METER, store=store)
        for seed in (0, 1)
    ]
    return [run.job.model[0].weight for run in runs], len(list(store.entries()))


def test_a_function_makes_the_student_from_the_seed_and_the_result_is_kept(tmp_path: Path) -> None:
    first, kept = students(tmp_path)
    torch.rand(7)  # the state of the process is not the seed's
    again, kept_again = students(tmp_path)
    assert kept == kept_again > 0
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first[0], first[1], atol=1e-3)
    assert students(tmp_path, width=5)[1] > kept


def test_what_makes_no_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sparing.InvalidValue, match="model = 3; a registered model's name"):
        sparing.Distil(teacher="train", model=3)
    job = type("AnyJob", (), {"seed": 0})()
    with pytest.raises(sparing.InvalidValue, match="model made a dict"):
        sparing.Distil(teacher="train", model=dict).student(job)
