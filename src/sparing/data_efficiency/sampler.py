"""Batches from easy to hard: the cluster sampler, its exact resumption, and the difficulty that travels with a batch.

Li et al. 2022, arXiv:2212.03597, section 3.1. Every step the difficulties are updated; the samples that this releases
become one more cluster; and the batch is drawn from all clusters in proportion to their sizes, without replacement
within one pass over a cluster. In a loop of your own::

    length = CurriculumMetric(linear(8, 64, 1000), index, "value")
    sampler = CurriculumSampler({"length": length}, batch_size=32, steps=5000)
    loader = DataLoader(CurriculumItems(dataset), batch_sampler=sampler, collate_fn=CurriculumCollate(cut))

where ``cut(batch, difficulties)`` is for instance ``truncate_batch(batch, difficulties["length"])``. To go on later:
``sampler.state_dict(consumed)``, with the number of batches the loop has consumed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Integer

from sparing.core.collation import items_of
from sparing.core.errors import DataError, InvalidValue, shown
from sparing.core.training.batches import FetchedItems
from sparing.data_efficiency.index import DifficultyIndex
from sparing.data_efficiency.pacing import PacingFunction
from sparing.data_efficiency.settings import agree, distributed, whole_number

VERSION = 1
KEPT = 64
"""Steps whose beginnings are remembered, so that batches fetched ahead can be taken back without a replay."""

DifficultyType = Literal["value", "percentile"]
Clustering = Literal["schedule_based", "single_cluster"]
RngOrder = Literal["keyed", "reference"]
Rounding = Literal["even", "reference"]


@dataclass(frozen=True)
class CurriculumMetric:
    """One metric of a curriculum.

    Args:
        pacing: its difficulty at each step, asked from step 1 on.
        index: the samples by this metric; None: it releases no samples, it only says a difficulty ("single_cluster"),
            for instance the length to cut batches to.
        difficulty_type: what a difficulty means: the greatest "value" released, or the "percentile" of the samples, of
            ``pacing.max_difficulty``.
    """

    pacing: PacingFunction
    index: DifficultyIndex | None = None
    difficulty_type: DifficultyType = "percentile"

    def __post_init__(self) -> None:
        """Check the fields."""
        if not isinstance(self.pacing, PacingFunction):
            raise InvalidValue(f"pacing = {shown(self.pacing)}; a PacingFunction is needed")
        if self.index is not None and not isinstance(self.index, DifficultyIndex):
            raise InvalidValue(f"index = {shown(self.index)}; a DifficultyIndex is needed, or None")
        _one_of("difficulty_type", self.difficulty_type, DifficultyType)
        percentile = self.index is not None and self.difficulty_type == "percentile"
        if percentile and (self.pacing.max_difficulty <= 0 or self.pacing.min_difficulty < 0):
            raise InvalidValue(
                f"percentiles from {self.pacing.min_difficulty} to {self.pacing.max_difficulty}; numbers ≥ 0 are needed"
            )

    def config(self) -> dict[str, Any]:
        """Everything the batches depend on, as plain values."""
        return {
            "pacing": self.pacing.config(),
            "index": None if self.index is None else self.index.fingerprint,
            "difficulty_type": self.difficulty_type,
        }


class CurriculumBatch(list[int]):
    """Dataset indices of one process's part of one micro batch, with what it was drawn under."""

    def __init__(self, indices: Sequence[int], step: int, micro: int, difficulties: Mapping[str, float]) -> None:
        super().__init__(indices)
        self.step, self.micro, self.difficulties = step, micro, dict(difficulties)

    def __reduce__(self) -> tuple[Any, ...]:
        return CurriculumBatch, (list(self), self.step, self.micro, self.difficulties)


class CurriculumSampler:
    """Batches of a curriculum, for ``DataLoader(batch_sampler=…)``.

    It yields ``accumulation`` micro batches for each of ``steps`` optimizer steps, and of each the part of its process;
    all processes together see the same samples whatever their number. An iteration goes on where the state stands.

    Args:
        metrics: by name; or one metric, which is called "difficulty".
        batch_size: samples of one process's micro batch.
        steps: optimizer steps of the training.
        seed: of all draws.
        rank: this process; None: torch.distributed's, or 0.
        world_size: processes; None: torch.distributed's, or 1.
        accumulation: micro batches of a step.
        samples: N; needed when no metric has an index.
        rng_order: "keyed": each cluster's order and each step's draws have keys of their own, so that a state is a few
            numbers and is resumed at once. "reference": one stream of random numbers in DeepSpeed's order, resumed by
            drawing all batches again (no data are touched).
        percentile_rounding: "even": ⌊N · p / max⌋ samples up to percentile p; "reference": ⌊N / max⌋ · p, and N at max.

    Raises:
        InvalidValue: arguments outside these bounds, or indexes of different datasets.
        DataError: a curriculum whose first step releases no sample.
    """

    def __init__(
        self,
        metrics: CurriculumMetric | Mapping[str, CurriculumMetric],
        batch_size: int,
        steps: int,
        seed: int = 0,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        accumulation: int = 1,
        samples: int | None = None,
        rng_order: RngOrder = "keyed",
        percentile_rounding: Rounding = "even",
    ) -> None:
        self.metrics = {"difficulty": metrics} if isinstance(metrics, CurriculumMetric) else dict(metrics)
        if not self.metrics or not all(isinstance(metric, CurriculumMetric) for metric in self.metrics.values()):
            raise InvalidValue(f"metrics = {shown(metrics)}; at least one CurriculumMetric is needed")
        self.batch_size, self.steps = whole_number("batch_size", batch_size, 1), whole_number("steps", steps, 1)
        self.seed, self.accumulation = whole_number("seed", seed, 0), whole_number("accumulation", accumulation, 1)
        found_rank, found_world = distributed()
        self.world_size = whole_number("world_size", found_world if world_size is None else world_size, 1)
        self.rank = whole_number("rank", found_rank if rank is None else rank, 0)
        if self.rank >= self.world_size:
            raise InvalidValue(f"rank = {self.rank}; 0 … {self.world_size - 1} is possible")
        _one_of("rng_order", rng_order, RngOrder)
        _one_of("percentile_rounding", percentile_rounding, Rounding)
        self.rng_order, self.percentile_rounding = rng_order, percentile_rounding
        self.clustered = {name: metric for name, metric in self.metrics.items() if metric.index is not None}
        sizes = {name: len(metric.index) for name, metric in self.clustered.items() if metric.index is not None}
        if samples is not None:
            sizes["samples"] = whole_number("samples", samples, 1)
        if len(set(sizes.values())) != 1:
            raise InvalidValue(
                f"indexes of different datasets: {sizes}" if sizes else "no metric has an index; samples = N is needed"
            )
        self.samples = next(iter(sizes.values()))
        self.step, self.yielded, self._offset = 0, 0, 0
        self.difficulties: dict[str, float] = {}
        self._batch: list[int] | None = None
        self._restart()
        first = self._updated({})
        if not self._released(first):
            raise DataError(
                f"the first step releases no sample: difficulties {first}"
                + "".join(
                    f"; the least value of {name!r} is {metric.index.values[0]}"
                    for name, metric in self.clustered.items()
                    if metric.index is not None and metric.difficulty_type == "value"
                )
                + ". Raise min_difficulty"
            )

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.batch_size * self.world_size * self.accumulation

    def __len__(self) -> int:
        """Micro batches of the whole training, whatever the position."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[CurriculumBatch]:
        """The micro batches that are left."""
        while self.step < self.steps or self._batch is not None:
            if self._batch is None:
                self._draw()
            batch = self._batch
            assert batch is not None
            length = self.batch_size * self.world_size
            part = batch[self._offset : self._offset + length]
            first, last = (round(r * length / self.world_size) for r in (self.rank, self.rank + 1))
            made = CurriculumBatch(part[first:last], self.step, self._offset // length, self.difficulties)
            self._offset += length
            if self._offset >= len(batch):
                self._batch, self._offset = None, 0
            self.yielded += 1
            yield made

    def global_batches(self) -> Iterator[tuple[list[int], dict[str, float]]]:
        """(all samples, difficulties) of each step that is left, from the beginning of one."""
        if self._batch is not None:
            raise InvalidValue(f"the position is within step {self.step}; global batches begin with a step")
        while self.step < self.steps:
            self._draw()
            batch, self._batch = self._batch, None
            self.yielded += self.accumulation
            assert batch is not None
            yield batch, dict(self.difficulties)

    # --- state

    def config(self) -> dict[str, Any]:
        """What a saved state must agree on."""
        return {
            "metrics": {name: metric.config() for name, metric in self.metrics.items()},
            "samples": self.samples,
            "global_batch": self.global_batch,
            "seed": self.seed,
            "rng_order": self.rng_order,
            "percentile_rounding": self.percentile_rounding,
        }

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The position after ``consumed`` micro batches, as plain values, whose number does not depend on N.

        Args:
            consumed: how many the loop has consumed since the beginning. None: all that were yielded, too many
                when a loader fetches ahead.

        Raises:
            InvalidValue: more than were yielded.
        """
        consumed = self.yielded if consumed is None else whole_number("consumed", consumed, 0)
        if consumed > self.yielded:
            raise InvalidValue(f"consumed = {consumed}; {self.yielded} batches were yielded so far")
        step, micro = divmod(consumed, self.accumulation)
        known = {state["step"]: state for state in self._snapshots}
        if self._batch is None:
            known[self.step] = self._snapshot()
        state = known[step] if step in known else self._replayed(step)
        return {
            "version": VERSION,
            "config": self.config(),
            **state,
            "offset": micro * self.batch_size * self.world_size,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where a state was taken, also with another number of processes if the global batch is the same.

        Raises:
            InvalidValue: a state of another version, other settings, data or seed, or within a step where these
                processes cannot take it up.
        """
        if state_dict.get("version") != VERSION:
            raise InvalidValue(f"a state of version {shown(state_dict.get('version'))}; {VERSION} is expected")
        agree(state_dict["config"], self.config(), "CurriculumSampler")
        length, offset = self.batch_size * self.world_size, state_dict["offset"]
        if offset % length:
            raise InvalidValue(
                f"the state lies {offset} samples into step {state_dict['step'] + 1}, which is not between two micro "
                f"batches of {length}; resume it with batch_size · world_size that divides {offset}"
            )
        self._restart()
        if self.rng_order == "reference":
            for _ in range(state_dict["step"]):
                self._draw()
            self._batch = None
        else:
            self.step, self.difficulties = state_dict["step"], dict(state_dict["difficulties"])
            for cluster in state_dict["clusters"]:
                self._release(cluster["difficulties"])
            for cluster, saved in zip(self._clusters, state_dict["clusters"], strict=True):
                if saved["taken"] > len(cluster.ids):
                    raise InvalidValue(f"the state has taken {saved['taken']} of a cluster of {len(cluster.ids)}")
                cluster.pass_, cluster.taken, cluster.order = saved["pass"], saved["taken"], None
        self.yielded = self.step * self.accumulation + offset // length
        if offset:
            self._draw()
            self._offset = offset

    def _snapshot(self) -> dict[str, Any]:
        """The state between two steps."""
        clusters = [
            {"difficulties": cluster.difficulties, "pass": cluster.pass_, "taken": cluster.taken}
            for cluster in (self._clusters if self.rng_order == "keyed" else ())
        ]
        return {"step": self.step, "difficulties": dict(self.difficulties), "clusters": clusters}

    def _replayed(self, step: int) -> dict[str, Any]:
        other = CurriculumSampler(
            self.metrics,
            self.global_batch,
            self.steps,
            self.seed,
            rank=0,
            world_size=1,
            samples=self.samples,
            rng_order=self.rng_order,
            percentile_rounding=self.percentile_rounding,
        )
        for _ in range(step):
            other._draw()
        return other._snapshot()

    def _restart(self) -> None:
        self.step, self.yielded, self._offset = 0, 0, 0
        self.difficulties = {}
        self._batch = None
        self._clusters: list[_Cluster] = []
        self._rng = np.random.default_rng(self.seed)
        self._marks: dict[str, int] = {}
        self._taken_ids: np.ndarray | None = None
        self._snapshots: deque[dict[str, Any]] = deque(maxlen=KEPT)

    # --- which samples are released

    def _updated(self, difficulties: Mapping[str, float]) -> dict[str, float]:
        return {
            name: metric.pacing.after(difficulties.get(name), self.step + 1) for name, metric in self.metrics.items()
        }

    def _count(self, metric: CurriculumMetric, difficulty: float) -> int:
        """How many samples of a metric's order a difficulty releases."""
        assert metric.index is not None
        if metric.difficulty_type == "value":
            return metric.index.count_up_to(difficulty)
        top = metric.pacing.max_difficulty
        if difficulty >= top:
            return self.samples
        share = (
            self.samples // top * difficulty
            if self.percentile_rounding == "reference"
            else self.samples * difficulty // top
        )
        return int(share)

    def _released(self, difficulties: Mapping[str, float]) -> int:
        """How many samples difficulties release."""
        if len(self.clustered) < 2:
            return min((self._count(metric, difficulties[name]) for name, metric in self.clustered.items()),
                       default=self.samples)  # fmt: skip
        return int(self._satisfying(difficulties).sum())

    def _satisfying(self, difficulties: Mapping[str, float]) -> np.ndarray:
        """True for the samples that all metrics release (N,)."""
        all_of = np.ones(self.samples, bool)
        for name, metric in self.clustered.items():
            assert metric.index is not None
            one = np.zeros(self.samples, bool)
            one[metric.index.ids[: self._count(metric, difficulties[name])]] = True
            all_of &= one
        return all_of

    def _new_ids(self, difficulties: Mapping[str, float]) -> Integer[np.ndarray, " n"]:
        """Samples that these difficulties release and none before did, in the order from which they are shuffled."""
        if len(self.clustered) == 1:
            ((name, metric),) = self.clustered.items()
            assert metric.index is not None
            before = self._marks.get(name, 0)
            now = self._marks[name] = max(before, self._count(metric, difficulties[name]))
            return np.asarray(metric.index.ids[before:now]).astype(np.int64)
        if not self.clustered:
            return np.arange(0 if self._clusters else self.samples)
        new = self._satisfying(difficulties)
        if self._taken_ids is None:
            self._taken_ids = np.zeros(self.samples, bool)
        new &= ~self._taken_ids
        self._taken_ids |= new
        return np.flatnonzero(new)

    def _release(self, difficulties: Mapping[str, float]) -> None:
        """One more cluster, unless it would be empty."""
        ids = self._new_ids(difficulties)
        if len(ids):
            cluster = _Cluster(ids, dict(difficulties))
            if self.rng_order == "reference":
                self._rng.shuffle(cluster.ids)
            self._clusters.append(cluster)

    @property
    def clusters(self) -> list[Integer[np.ndarray, " n"]]:
        """The samples of each cluster in their present order."""
        return [self._ordered(number, cluster).copy() for number, cluster in enumerate(self._clusters)]

    # --- drawing

    def _draw(self) -> None:
        """The global batch of the next step."""
        self._snapshots.append(self._snapshot())
        difficulties = self._updated(self.difficulties)
        if difficulties != self.difficulties:
            self._release(difficulties)
        self.step, self.difficulties = self.step + 1, difficulties
        rng = self._rng
        if self.rng_order == "keyed":
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, 1, self.step]))
        sizes = np.array([len(cluster.ids) for cluster in self._clusters])
        slots = rng.choice(len(sizes), self.global_batch, replace=True, p=sizes / sizes.sum())
        batch: list[int] = []
        for number, wanted in enumerate(np.bincount(slots, minlength=len(sizes)).tolist()):
            batch += self._take(number, wanted)
        rng.shuffle(batch)
        self._batch = batch

    def _ordered(self, number: int, cluster: _Cluster) -> np.ndarray:
        """A cluster's samples in the order of its present pass."""
        if self.rng_order == "reference":
            return cluster.ids
        if cluster.order is None:
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, 0, number, cluster.pass_]))
            cluster.order = rng.permutation(cluster.ids)
        return cluster.order

    def _take(self, number: int, wanted: int) -> list[int]:
        """The next samples of a cluster; a new pass begins only when more are wanted than are left."""
        cluster = self._clusters[number]
        taken: list[int] = []
        while len(taken) < wanted:
            if cluster.taken == len(cluster.ids):
                cluster.taken, cluster.pass_, cluster.order = 0, cluster.pass_ + 1, None
                if self.rng_order == "reference":
                    self._rng.shuffle(cluster.ids)
            more = self._ordered(number, cluster)[cluster.taken : cluster.taken + wanted - len(taken)].tolist()
            cluster.taken += len(more)
            taken += more
        return taken


class _Cluster:
    """Samples that were released together, and how far they have been drawn."""

    def __init__(self, ids: np.ndarray, difficulties: dict[str, float]) -> None:
        self.ids, self.difficulties = ids, difficulties
        self.pass_, self.taken = 0, 0
        self.order: np.ndarray | None = None


# --- the difficulty of a batch ---------------------------------------------------------------------------------------


class CurriculumItems:
    """A dataset whose batches remember their difficulties, so that no loader process can confuse them."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: Sequence[int]) -> list[Any]:
        """The items of one :class:`CurriculumBatch`."""
        if not isinstance(batch, CurriculumBatch):
            raise InvalidValue("CurriculumItems needs the batches of a CurriculumSampler as the loader's batch_sampler")
        return FetchedItems(items_of(self.dataset, batch), batch)


class CurriculumCollate:
    """A ``collate_fn`` that post-processes a batch with the difficulties it was drawn under.

    Args:
        process: (collated batch, difficulties by name) → batch.
        collate: items → batch; None: torch's ``default_collate``.
    """

    def __init__(
        self, process: Callable[[Any, dict[str, float]], Any], collate: Callable[[list[Any]], Any] | None = None
    ) -> None:
        self.process, self.collate = process, collate

    def __call__(self, items: list[Any]) -> Any:
        """The finished batch."""
        difficulties = getattr(getattr(items, "batch", None), "difficulties", None)
        if difficulties is None:
            raise InvalidValue("CurriculumCollate needs the items of CurriculumItems")
        from torch.utils.data import default_collate

        return self.process((self.collate or default_collate)(list(items)), difficulties)


def _one_of(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise InvalidValue(f"{name} = {shown(value)}; one of {', '.join(get_args(choices))} is needed")
