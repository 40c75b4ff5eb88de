"""How good a condensed set of images is: fresh networks of several kinds are trained on it, and tested on real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparing.condensation.images import labelled_images, train_epoch
from sparing.condensation.matching import embeddings
from sparing.condensation.siamese import check_families
from sparing.core.errors import InvalidValue, TrainingDiverged
from sparing.core.randomness import derive_seed, isolated_rng
from sparing.core.statistics import t_interval
from sparing.models.convnet import whole

Factories = Mapping[str, Callable[[], nn.Module]]
"""Name of a kind → makes a fresh network of it."""


@dataclass(frozen=True)
class ArchitectureScore:
    """What networks of one kind learned from a set."""

    architecture: str
    accuracies: tuple[float, ...]
    """Share of test images classified rightly, for each seed."""
    seconds: float
    """Wall seconds of all trainings, without the tests."""
    whole: float | None = None
    """Mean accuracy of the same kind trained on the whole set, where it is known."""

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, with divisor n − 1; None for a single one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % for the mean (Student); None for a single seed."""
        return t_interval(self.accuracies)

    @property
    def ratio(self) -> float | None:
        """Share of the whole set's accuracy; None where that is not known."""
        return None if self.whole is None else self.mean / self.whole

    def record(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        given = {"architecture": self.architecture, "accuracies": list(self.accuracies), "seconds": self.seconds}
        interval = None if self.interval is None else list(self.interval)
        return given | {"mean": self.mean, "std": self.std, "interval95": interval, "ratio": self.ratio}


def train_on_condensed(
    network: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    *,
    epochs: int | None = None,
    families: Sequence[str] = (),
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 256,
    seed: int = 0,
) -> nn.Module:
    """Train a network on few images, in place, by the papers' recipe; it is returned in evaluation mode.

    Stochastic gradient descent on the cross-entropy; after half the epochs and one more the learning rate falls to a
    tenth.

    Args:
        network: a fresh one, (N, C, H, W) → logits (N, classes).
        images: floating-point images.
        labels: their classes.
        epochs: passes over the images. None: 300, with augmentation 1000.
        families: augmentations to pick from, one for each batch, see :mod:`~sparing.condensation.siamese`; those that
            the set was condensed with.
        lr: learning rate.
        momentum: of the gradients.
        weight_decay: added to the gradients, as a share of the weights.
        batch_size: images in a step.
        seed: of the order and of augmentations. What the network itself draws comes from torch's global generator.

    Raises:
        InvalidValue: arguments outside what is allowed.
        TrainingDiverged: weights that are not finite at the end.
    """
    if families:
        check_families(families)
    epochs = (1000 if families else 300) if epochs is None else epochs
    whole("train_on_condensed", epochs=epochs, batch_size=batch_size)
    generator = torch.Generator().manual_seed(derive_seed("training on condensed images", seed))
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2 + 1], gamma=0.1)
    network.train()
    for _ in range(epochs):
        train_epoch(network, optimizer, images, labels, batch_size, generator, families)
        schedule.step()
    for name, parameter in network.named_parameters():
        if not parameter.isfinite().all():
            raise TrainingDiverged(f"{name} is not finite after {epochs} epochs at lr = {lr}; a smaller one may help")
    return network.eval()


@torch.no_grad()
def accuracy(
    network: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], batch_size: int = 512
) -> float:
    """Share of images that a network classifies rightly, 0 … 1."""
    right = 0
    for part, wanted in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += int((network(part).argmax(1) == wanted).sum())
    return right / len(images)


@torch.no_grad()
def embed_images(network: nn.Module, images: Float[Tensor, "n c h w"], batch_size: int = 512) -> Float[Tensor, "n d"]:
    """What enters a trained network's head, batch by batch: ``functools.partial(embed_images, network)`` serves as
    ``embed`` of a :class:`~sparing.condensation.coresets.CoresetSelector`.
    """
    return torch.cat([embeddings(network, part) for part in images.split(batch_size)])


def check_kinds(factories: Factories, seeds: Sequence[int], whole_set: Mapping[str, float] | None) -> None:
    """:class:`InvalidValue` for no kinds or seeds, and for accuracies that are of other kinds or not above 0."""
    if not factories or not len(seeds):
        raise InvalidValue(f"{len(factories)} kinds of network and {len(seeds)} seeds; one of each is needed")
    for name, value in (whole_set or {}).items():
        if name not in factories or not value > 0:
            raise InvalidValue(
                f"whole_set[{name!r}] = {value!r}; positive accuracies of {', '.join(factories)} are expected"
            )


def score_networks(
    purpose: str,
    factories: Factories,
    seeds: Sequence[int],
    whole_set: Mapping[str, float] | None,
    train: Callable[[nn.Module, int], object],
    score: Callable[[nn.Module], float],
) -> list[ArchitectureScore]:
    """Networks of each kind, one for each seed, trained by ``train(network, seed)``; ``purpose`` names their draws."""
    check_kinds(factories, seeds, whole_set)
    scores = []
    for name, factory in factories.items():
        accuracies, seconds = [], 0.0
        for seed in seeds:
            with isolated_rng(purpose, seed):
                network = factory()
                start = time.perf_counter()
                train(network, seed)
                seconds += time.perf_counter() - start
            accuracies.append(score(network))
        scores.append(ArchitectureScore(name, tuple(accuracies), seconds, (whole_set or {}).get(name)))
    return scores


def evaluate_condensed(
    train_set: Any,
    test: Any,
    model_factories: Factories,
    seeds: Sequence[int] = tuple(range(20)),
    *,
    whole_set: Mapping[str, float] | None = None,
    **recipe: Any,
) -> list[ArchitectureScore]:
    """Train fresh networks of each kind on a condensed set, and test them.

    Networks with the same seed begin with the same weights, whatever they are trained on, so that two sets can be
    compared seed by seed.

    Args:
        train_set: (images, labels), or a dataset of such pairs.
        test: likewise, real ones.
        model_factories: name → makes a fresh network. Kinds that the set was not condensed with show whether it serves
            those, too.
        seeds: one network of each kind for each.
        whole_set: name → mean accuracy of that kind trained on the whole set.
        recipe: further arguments of :func:`train_on_condensed`.

    Raises:
        InvalidValue: what :func:`~sparing.condensation.images.labelled_images` raises; no kinds or seeds; accuracies of
            kinds that are not trained here, or that are not above 0.
    """
    images, labels = _pairs(train_set)
    test_images, test_labels = (part.to(images.device) for part in _pairs(test, every_class=False))

    def train(network: nn.Module, seed: int) -> None:
        train_on_condensed(network.to(images.device), images, labels, seed=seed, **recipe)

    def score(network: nn.Module) -> float:
        return accuracy(network, test_images, test_labels)

    return score_networks("evaluating condensed images", model_factories, seeds, whole_set, train, score)


def _pairs(given: Any, every_class: bool = True) -> tuple[Tensor, Tensor]:
    pair = given if isinstance(given, tuple) and len(given) == 2 else (given,)
    return labelled_images(*pair, every_class=every_class)
