"""Every descendant learns alone, from what the original network feeds its block and what the block makes of it.

Han et al. 2021, LegoDNN, MobiCom, arXiv:2112.09852. Blocks × sparsities small regressions without labels, in place of
one training for each of their combinations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparing.adaptive.blocks import Recorder
from sparing.adaptive.descendants import BlockZoo
from sparing.core.errors import InvalidValue, TrainingDiverged, shown
from sparing.core.randomness import isolated_rng

if TYPE_CHECKING:
    from sparing.core.store import Progress

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


class _Pupil:
    """One descendant in training."""

    def __init__(self, module: nn.Module, lr: float, freeze_bn: bool) -> None:
        self.module, self.freeze_bn = module, freeze_bn
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=lr) if parameters else None
        self.best: dict[str, Tensor] = copy.deepcopy(module.state_dict())
        self.losses: list[float] = []

    def start_epoch(self) -> None:
        self.sum, self.batches = 0.0, 0
        self.module.train()
        if self.freeze_bn:
            for layer in self.module.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()

    def learn(self, given: Tensor, wanted: Tensor, alpha: float) -> None:
        if self.optimizer is None:
            return
        with torch.enable_grad():
            loss = alpha * nn.functional.mse_loss(self.module(given.clone()), wanted)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        self.sum += float(loss.detach())
        self.batches += 1

    def end_epoch(self, name: str) -> None:
        mean = self.sum / max(self.batches, 1)
        if not np.isfinite(mean):
            raise TrainingDiverged(f"descendant {name}: the mean loss of epoch {len(self.losses)} is {mean}")
        if not self.losses or mean < min(self.losses):
            self.best = copy.deepcopy(self.module.state_dict())
        self.losses.append(mean)
        self.module.eval()

    def state(self) -> dict[str, Any]:
        return {
            "module": dict(self.module.state_dict()),
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "best": dict(self.best),
            "losses": self.losses,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.losses = state["best"], list(state["losses"])


def distill_blocks(
    zoo: BlockZoo,
    loader: Batches,
    epochs: int = 65,
    lr: float = 3e-4,
    n_jobs: int = 1,
    *,
    alpha: float = 1.0,
    freeze_bn: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """Train all descendants of a zoo but the originals, in place; each ends with the weights of its best epoch.

    The loss of a descendant is α · mean squared error between what it makes of the tensor that its block reads in the
    frozen original network, and what the block makes of it there; each has an Adam of its own.

    Args:
        zoo: blocks and descendants.
        loader: batches for each epoch: an iterable that can be iterated again, or a function of the epoch's number. A
            batch is a tensor, or a sequence or mapping whose first entry is the network's input; labels are not read.
            What it draws is seeded from ``seed`` and the epoch.
        epochs: passes over the loader.
        lr: learning rate.
        n_jobs: 1: in this process, where one pass of the original network serves all descendants. More (or −1 for all
            cores): blocks as independent jobs through joblib, each with passes of its own; the results are the same.
        alpha: weight of the loss.
        freeze_bn: keep the batch norms' statistics.
        seed: of what the loader and the descendants draw.
        progress: keeps the state after each epoch (after each block with several jobs), and is resumed from.

    Returns:
        Mean loss of each epoch, (B, S, epochs); 0 for the originals.

    Raises:
        InvalidValue: arguments outside what is allowed, or a loader without batches.
        TrainingDiverged: a loss that is not finite, naming block and sparsity.
    """
    for name, value, least in (("epochs", epochs, 1), ("n_jobs", abs(n_jobs) if n_jobs == -1 else n_jobs, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidValue(f"{name} = {shown(value)}; a whole number of at least {least} is expected")
    if not lr > 0 or not alpha > 0:
        raise InvalidValue(f"lr = {shown(lr)}, alpha = {shown(alpha)}; positive numbers are expected")
    options = (epochs, lr, alpha, freeze_bn, seed)
    numbers = range(len(zoo.blocks))
    losses = np.zeros((*zoo.bytes.shape, epochs))
    if n_jobs == 1:
        rows = _train(zoo, list(numbers), loader, *options, progress)
    else:
        rows = _in_jobs(zoo, loader, n_jobs, options, progress)
    for (b, s), (state, history) in rows.items():
        zoo.blocks[b][s].load_state_dict(state)
        zoo.blocks[b][s].eval()
        losses[b, s] = history
    return losses


Options = tuple[int, float, float, bool, int]
"""epochs, lr, alpha, freeze_bn, seed"""
Rows = dict[tuple[int, int], tuple[dict[str, Tensor], list[float]]]


def _in_jobs(zoo: BlockZoo, loader: Batches, n_jobs: int, options: Options, progress: Progress | None) -> Rows:
    from joblib import Parallel, delayed

    rows: Rows = {}
    for b, s, state, history in (progress.load() if progress is not None else None) or ():
        rows[b, s] = state, history
    todo = [b for b in range(len(zoo.blocks)) if (b, 1) not in rows]
    jobs = (delayed(_job)(zoo, b, loader, options) for b in todo)
    for made in Parallel(n_jobs=n_jobs, return_as="generator_unordered")(jobs):
        rows |= made
        if progress is not None:
            progress.save([(b, s, state, history) for (b, s), (state, history) in rows.items()])
    return rows


def _job(zoo: BlockZoo, number: int, loader: Batches, options: Options) -> Rows:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(zoo, [number], loader, *options, None)
    finally:
        torch.set_num_threads(threads)


def _train(
    zoo: BlockZoo,
    numbers: Sequence[int],
    loader: Batches,
    epochs: int,
    lr: float,
    alpha: float,
    freeze_bn: bool,
    seed: int,
    progress: Progress | None,
) -> Rows:
    """Weights and losses of the descendants of some blocks."""
    blocks = zoo.graph.blocks
    pupils = {(b, s): _Pupil(module, lr, freeze_bn) for b in numbers for s, module in enumerate(zoo.blocks[b]) if s > 0}
    before = progress.load() if progress is not None else None
    for (b, s), pupil in pupils.items():
        if before is not None:
            pupil.load(before[f"{b}.{s}"])
    done = len(next(iter(pupils.values())).losses) if pupils else epochs
    teacher = Recorder(zoo.graph.module, [name for b in numbers for name in (blocks[b].input, blocks[b].output)])
    device = zoo.graph.example.device
    for epoch in range(done, epochs):
        for pupil in pupils.values():
            pupil.start_epoch()
        count = 0
        with isolated_rng("block distillation", seed, epoch):
            for batch in loader(epoch) if callable(loader) else loader:
                kept = teacher.record(images_of(batch).to(device))
                count += 1
                for (b, _), pupil in pupils.items():
                    pupil.learn(kept[blocks[b].input], kept[blocks[b].output], alpha)
        if not count:
            raise InvalidValue(f"loader: no batch in epoch {epoch}; it must be iterable anew in each epoch")
        for (b, s), pupil in pupils.items():
            pupil.end_epoch(f"of block {b}, sparsity {zoo.sparsities[s]:g}")
        if progress is not None:
            progress.save({f"{b}.{s}": pupil.state() for (b, s), pupil in pupils.items()})
    return {key: (pupil.best, pupil.losses) for key, pupil in pupils.items()}


def images_of(batch: Any) -> Tensor:
    """The network's input in a batch: itself, or its first entry."""
    first = batch
    if not isinstance(batch, Tensor):
        first = next(iter(batch.values() if isinstance(batch, dict) else batch), None)
    if not isinstance(first, Tensor):
        raise InvalidValue(f"a batch begins with {shown(first)}; a tensor is needed")
    return first


__all__ = ["distill_blocks", "images_of"]
