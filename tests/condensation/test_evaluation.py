"""Judging a condensed set of images: the recipe, and what a score says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sparing.condensation.coresets import CoresetSelector
from sparing.condensation.evaluation import (
    ArchitectureScore,
    accuracy,
    embed_images,
    evaluate_condensed,
    train_on_condensed,
)
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.models.blocknet import BlockNet
from sparing.models.mlp import MLP


def bands(each: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, brighter in the rows of the class."""
    labels = torch.arange(3 * each) % 3
    images = torch.randn(3 * each, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    images += 3 * (torch.arange(6)[:, None].expand(6, 6) // 2 == labels[:, None, None])[:, None]
    return images, labels


FACTORIES = {
    "mlp": lambda: MLP(1, 3, 6, widths=(8,)),
    "blocknet": lambda: BlockNet(1, 3, 6, width=4, depth=2),
}


def test_scores_of_two_kinds() -> None:
    given = evaluate_condensed(
        bands(4), TensorDataset(*bands(40, 1)), FACTORIES, (0, 1, 2), whole_set={"mlp": 0.98}, epochs=40, lr=0.05
    )
    mlp, blocknet = given
    assert (mlp.architecture, blocknet.architecture) == ("mlp", "blocknet")
    assert min(mlp.accuracies) > 0.8
    assert len(blocknet.accuracies) == 3
    assert mlp.ratio == pytest.approx(mlp.mean / 0.98)
    assert blocknet.ratio is None
    assert mlp.seconds > 0
    record = mlp.record()
    assert record["interval95"][0] <= record["mean"] <= record["interval95"][1]
    torch.manual_seed(5)
    again = evaluate_condensed(bands(4), bands(40, 1), {"mlp": FACTORIES["mlp"]}, (2, 1), epochs=40, lr=0.05)
    assert again[0].accuracies == (mlp.accuracies[2], mlp.accuracies[1])


def test_the_same_seed_begins_with_the_same_network_on_any_set() -> None:
    first: list[Any] = []

    def factory() -> nn.Module:
        first.append(MLP(1, 3, 6, widths=(8,)))
        return first[-1]

    seen = []
    for seed in (0, 1):
        evaluate_condensed(bands(1, seed), bands(1), {"mlp": factory}, (7,), epochs=1, lr=1e-12, momentum=0.0)
        seen.append(first[-1].head.weight.detach().clone())
    torch.testing.assert_close(*seen)


def test_the_recipe() -> None:
    """Rates by epoch: a tenth after half of them and one more."""
    rates, network = [], MLP(1, 3, 6, widths=())
    original = torch.optim.SGD.step

    def step(self: Any, *arguments: Any) -> Any:
        group = self.param_groups[0]
        rates.append((group["lr"], group["momentum"], group["weight_decay"]))
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        assert not train_on_condensed(network, *bands(2), epochs=6).training
    assert [rate for rate, *_ in rates] == pytest.approx([0.01] * 4 + [0.001] * 2)
    assert rates[0][1:] == (0.9, 5e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", step)
        rates.clear()
        train_on_condensed(MLP(1, 3, 6, widths=()), *bands(1), families=("flip",))
    assert len(rates) == 1000


def test_augmented_training_sees_other_images() -> None:
    seen: list[torch.Tensor] = []
    for families in ((), ("crop",)):
        torch.manual_seed(0)
        network = MLP(1, 3, 6, widths=())
        train_on_condensed(network, *bands(2), epochs=3, families=families)
        seen.append(network.head.weight.detach())
    assert not torch.allclose(*seen)


def test_accuracy_counts_over_batches() -> None:
    network = nn.Flatten()  # the pixels are the logits
    images = torch.eye(3).reshape(3, 1, 1, 3)
    assert accuracy(network, images, torch.tensor([0, 1, 0]), batch_size=2) == pytest.approx(2 / 3)


def test_core_sets_on_what_a_trained_network_sees() -> None:
    images, labels = bands(8)
    torch.manual_seed(0)
    network = train_on_condensed(FACTORIES["mlp"](), images, labels, epochs=20)
    seen = embed_images(network, images, batch_size=5)
    torch.testing.assert_close(seen, network.layers(images).detach())  # type: ignore[operator]
    chosen = CoresetSelector("herding", 2, embed=partial(embed_images, network)).fit(images, labels).indices_
    assert chosen.tolist() == CoresetSelector("herding", 2).fit(seen, labels).indices_.tolist()
    assert chosen.tolist() != CoresetSelector("herding", 2).fit(images, labels).indices_.tolist()


def test_one_seed_has_no_spread() -> None:
    score = ArchitectureScore("mlp", (0.5,), 1.0)
    assert (score.mean, score.std, score.interval) == (0.5, None, None)


def test_refusals() -> None:
    images, labels = bands(1)
    with pytest.raises(InvalidValue, match="0 kinds of network and 20 seeds"):
        evaluate_condensed((images, labels), (images, labels), {})
    with pytest.raises(InvalidValue, match="1 kinds of network and 0 seeds"):
        evaluate_condensed((images, labels), (images, labels), {"mlp": FACTORIES["mlp"]}, ())
    with pytest.raises(InvalidValue, match=r"whole_set\['cnn'\] = 0\.9"):
        evaluate_condensed((images, labels), (images, labels), FACTORIES, whole_set={"cnn": 0.9})
    with pytest.raises(InvalidValue, match="epochs = 0"):
        train_on_condensed(FACTORIES["mlp"](), images, labels, epochs=0)
    with pytest.raises(TrainingDiverged, match="is not finite after 20 epochs at lr = 1e"):
        train_on_condensed(FACTORIES["mlp"](), images, labels, epochs=20, lr=1e30)
