"""Guest: a user's own ``nn.Module`` and data in memory, in a script of a few lines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from harness import METER, survives_kills
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset, TensorDataset

import sparing
from sparing.core.store import Store

STEPS = [sparing.Train(epochs=3, batch_size=16, lr=0.02, checkpoint_every_batches=3)]


class Mine(nn.Module):
    """Any module at all."""

    def __init__(self, hidden: int, activation=torch.relu) -> None:
        super().__init__()
        self.a, self.b, self.activation = nn.Linear(5, hidden), nn.Linear(hidden, 3), activation
        self.settings = {"scale": 1.0}

    def forward(self, x):
        return self.b(self.activation(self.a(x))) * self.settings["scale"]


def points(count: int, seed: int) -> TensorDataset:
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def task(**changes) -> sparing.CustomTask:
    settings = {"model": Mine(12), "loss": cross_entropy, "labels": ["x", "y", "z"]} | changes
    return sparing.CustomTask("mine", points(120, 0), points(60, 1), **settings)


def mine(steps=STEPS, folder: Path | None = None, **changes):
    torch.manual_seed(0)
    return sparing.run(
        task=task(**changes),
        steps=steps,
        meter=METER,
        store=Store(folder / "store") if folder else None,
        out=folder / "out" if folder else None,
    )


def test_ten_lines_are_enough_and_survive_kills(tmp_path):
    done = survives_kills(lambda folder: mine(folder=folder), tmp_path)
    (row,) = done.ledger.rows
    assert row.figures["accuracy"].value > 0.4
    assert row.runtime == "onnxruntime"
    assert row.by_class.keys() == {"x", "y", "z"}
    model = sparing.load(done.folder / "model")
    assert model.labels == ("x", "y", "z")
    assert model(np.zeros((4, 5), np.float32)).shape == (4, 3)


def test_a_model_beside_the_task(tmp_path):
    torch.manual_seed(0)
    own = Mine(7)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    done = sparing.run(task=task(), model=own, steps=STEPS, meter=METER)
    assert done.job.model.a.out_features == 7
    assert all(torch.equal(before[name], value) for name, value in own.state_dict().items())  # yours is not touched


@pytest.mark.parametrize(
    "changed",
    [
        {"model": Mine(12, torch.tanh)},
        {"model": Mine(13)},
        {"loss": lambda outputs, targets: cross_entropy(outputs, targets, label_smoothing=0.1)},
    ],
    ids=["a function it calls", "a size", "the loss"],
)
def test_finished_work_is_used_again_only_when_nothing_has_changed(tmp_path, changed):
    first = mine(folder=tmp_path).job.model.b.weight
    count = len(list(Store(tmp_path / "store").entries()))
    again = mine(folder=tmp_path).job.model.b.weight
    assert torch.equal(first, again)
    assert len(list(Store(tmp_path / "store").entries())) == count
    other = mine(folder=tmp_path, **changed).job.model.b.weight
    assert len(list(Store(tmp_path / "store").entries())) > count
    assert first.shape != other.shape or not torch.equal(first, other)


def test_a_setting_in_a_dictionary_counts_too(tmp_path):
    mine(folder=tmp_path)
    count = len(list(Store(tmp_path / "store").entries()))
    torch.manual_seed(0)
    other = Mine(12)
    other.settings["scale"] = 3.0
    mine(folder=tmp_path, model=other)
    assert len(list(Store(tmp_path / "store").entries())) > count


class Opaque(Dataset):
    """Data that cannot be fingerprinted."""

    def __init__(self, source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int):
        return self.source[index]


def test_data_without_a_fingerprint_run_but_are_not_kept(tmp_path):
    def opaque(version):
        return sparing.CustomTask(
            "mine",
            Opaque(points(120, 0)),
            points(60, 1),
            model=Mine(12),
            loss=cross_entropy,
            labels="xyz",
            version=version,
        )

    store = Store(tmp_path / "store")
    done = sparing.run(task=opaque(None), steps=STEPS, meter=METER, store=store)
    assert any("is kept for later runs" in remark and "Opaque" in remark for remark in done.ledger.rows[0].remarks)
    assert not list(store.entries())
    sparing.run(task=opaque("1"), steps=STEPS, meter=METER, store=store)
    assert list(store.entries())


def test_regression_with_a_metric_of_ones_own(tmp_path):
    data = [TensorDataset(x, x.sum(1, keepdim=True)) for x in (torch.randn(80, 5), torch.randn(40, 5))]
    error = {"error": lambda outputs, targets: np.abs(outputs - targets).mean(1)}
    mine_ = sparing.CustomTask("sums", *data, model=nn.Linear(5, 1), loss=mse_loss, metrics=error, better="lower")
    first, second = sparing.run(
        task=mine_, steps=[*STEPS, sparing.Train(id="longer", epochs=30, lr=0.05)], meter=METER
    ).ledger.summary()
    assert first.headline == "error"
    assert second.to_previous.value < 0  # the error fell
    assert second.to_previous.interval[1] < 0


def test_refused_with_the_reason():
    with pytest.raises(sparing.InvalidValue, match="a task and at least one step"):
        sparing.run(task=task(), steps=[])
    with pytest.raises(sparing.InvalidValue, match=r"steps holds <class .*Train'>, which is no Step; for example"):
        sparing.run(task=task(), steps=[sparing.Train])
    with pytest.raises(sparing.DataError, match=r"the layer 'a'.*refused its input of shape"):
        sparing.run(task=task(model=nn.Sequential(nn.Flatten()), labels="xyz"), model=wrong(), steps=STEPS, meter=METER)


def wrong() -> nn.Module:
    model = Mine(4)
    model.a = nn.Linear(9, 4)
    return model
