"""Which samples come in which batch, and with which random numbers: pure functions of (seed, epoch, batch).

Usable from any training loop::

    batches = Batches(dataset, batch_size=128, seed=0)
    loader = DataLoader(SeededItems(dataset, seed=0), batch_sampler=batches, num_workers=2)
    for epoch in range(10):
        batches.set_epoch(epoch)
        for batch in loader:
            ...

To go on after an interruption, ``batches.seek(epoch, consumed)`` with the number of batches consumed in that epoch.
Nothing a loader has fetched ahead counts as consumed, so the position does not depend on the number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np

from sparing.core.collation import items_of
from sparing.core.errors import DataError, InvalidValue
from sparing.core.randomness import derive_seed


def reseed(*parts: int | str) -> None:
    """Seed Python's, NumPy's and torch's global generators from ``parts``; cheap enough for every step."""
    import torch

    seed = derive_seed(*parts)
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed formats a stack trace on every call while CUDA is not initialised
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def _seeded(*parts: int | str) -> Iterator[None]:
    """The host's generators seeded from ``parts`` inside the block, as they were after it."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed = derive_seed(*parts)
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class IndexBatch(list[int]):
    """Dataset indices of one process's part of one batch, with the batch's place in the training."""

    def __init__(self, indices: Sequence[int], epoch: int, number: int, rank: int = 0) -> None:
        super().__init__(indices)
        self.epoch = epoch
        self.number = number
        self.rank = rank

    def __reduce__(self) -> tuple[Any, ...]:
        return IndexBatch, (list(self), self.epoch, self.number, self.rank)


class FetchedItems(list[Any]):
    """Items of one batch, and the batch: what a collation may need to know of how they were chosen."""

    def __init__(self, items: Iterable[Any], batch: Sequence[int]) -> None:
        super().__init__(items)
        self.batch = batch


class Batches:
    """Batch sampler whose order is a pure function of (seed, epoch) and whose position can be set.

    ``batch_size`` counts the samples of all processes together: with ``world`` processes, process ``rank`` gets every
    ``world``-th sample of each batch, so that any number of processes sees the same batches. A process whose part of a
    short last batch is empty gets one of the batch's samples all the same, to be given the weight zero
    (see :meth:`shares`).

    Subclasses that choose samples differently override :meth:`order` or :meth:`epoch_batches`, which must stay pure in
    the epoch, and keep ``len`` the same for every epoch. What they choose by may depend on the training's length
    (:meth:`begin`), and what becomes of the items on how they were chosen (:meth:`collation`).
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """``dataset``: only its length is used. ``drop_last``: leave out a last batch that is not full."""
        if not isinstance(dataset, Sized):
            raise InvalidValue(
                f"the training data ({type(dataset).__name__}) have no length; a map-style dataset with __len__ and "
                "__getitem__ is needed"
            )
        if batch_size < 1:
            raise InvalidValue(f"batch_size = {batch_size}; at least 1 is needed")
        self.size = len(dataset)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        if self.size == 0:
            raise DataError("the training data are empty; at least one sample is needed")
        if drop_last and self.size < batch_size:
            raise DataError(
                f"the training data hold {self.size} samples, fewer than one batch of {batch_size}, and "
                f"drop_last leaves out the rest: use batch_size ≤ {self.size} or drop_last=False"
            )
        self.shard(rank, world)
        self.seek(0, 0)

    def begin(self, epochs: int, max_steps: int | None, accumulate: int) -> int:
        """Optimizer steps of a training, which is told before its first batch; ``epochs`` if ``max_steps`` is None."""
        return epochs * -(-len(self) // accumulate) if max_steps is None else max_steps

    def collation(self, collate: Callable[[list[Any]], Any] | None) -> Callable[[list[Any]], Any] | None:
        """What makes a batch of the :class:`FetchedItems` of a loader; by default the task's own way."""
        return collate

    def shard(self, rank: int, world: int) -> None:
        """Yield the part of process ``rank`` of ``world`` from now on."""
        if not 0 <= rank < world:
            raise InvalidValue(f"rank = {rank}; 0 … {world - 1} is possible with {world} processes")
        self.rank, self.world = rank, world

    def seek(self, epoch: int, consumed: int) -> None:
        """Set the position: the next iteration yields the batches of ``epoch`` after the first ``consumed``."""
        if not 0 <= consumed <= len(self):
            raise InvalidValue(f"consumed = {consumed}; an epoch has {len(self)} batches")
        self.epoch, self.consumed = epoch, consumed

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of ``epoch``, unless that is the epoch :meth:`seek` was told."""
        if epoch != self.epoch:
            self.seek(epoch, 0)

    @property
    def sampler(self) -> Batches:
        """Itself: where Lightning looks for ``set_epoch``."""
        return self

    def order(self, epoch: int) -> np.ndarray:
        """Dataset indices in the order of this epoch (size,)."""
        if not self.shuffle:
            return np.arange(self.size)
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """Dataset indices of every batch of an epoch, all processes together."""
        order = self.order(epoch)
        size = self.batch_size
        return [order[number * size : (number + 1) * size] for number in range(len(self))]

    def shares(self, epoch: int) -> list[tuple[int, int]]:
        """For every batch of an epoch: (samples of all processes, samples of this one)."""
        sizes = [len(batch) for batch in self.epoch_batches(epoch)]
        return [(size, len(range(self.rank, size, self.world))) for size in sizes]

    def __len__(self) -> int:
        """Batches in a whole epoch, whatever the position."""
        return self.size // self.batch_size if self.drop_last else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[IndexBatch]:
        batches = self.epoch_batches(self.epoch)
        epoch, consumed, rank, world = self.epoch, self.consumed, self.rank, self.world

        def rest() -> Iterator[IndexBatch]:
            for number in range(consumed, len(batches)):
                part = batches[number][rank::world]
                if len(part) == 0:
                    part = batches[number][:1]
                yield IndexBatch(part.tolist(), epoch, number, rank)

        return rest()


class SeededItems:
    """A dataset whose random numbers depend on the batch only, not on worker processes or earlier batches.

    Python's, NumPy's and torch's global generators are seeded from (seed, epoch, batch number) while a batch's items
    are read, and put back afterwards. An item that cannot be read raises :class:`DataError` with its index.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: Sequence[int]) -> list[Any]:
        """The items of one :class:`IndexBatch`."""
        if not isinstance(batch, IndexBatch):
            raise InvalidValue("SeededItems needs the batches of sparing's Batches as the loader's batch_sampler")
        with _seeded(self.seed, "items", batch.epoch, batch.number, batch.rank):
            return FetchedItems(items_of(self.dataset, batch, "of the training data "), batch)
