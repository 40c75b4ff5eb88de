"""A curriculum as a step: easy samples first, in the next training, and short ones cut from the hard.

Li et al. 2022, arXiv:2212.03597, section 3.1: what orders the samples are ``metrics``, each with a pace; what cuts a
batch is ``postprocess``, with the pace ``length``. The paper's seqtru_voc, for instance, is::

    curriculum: {metrics: {vocabulary_rarity: {start: 1}}, postprocess: truncate, length: {start: 80, end: 2048}}
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy as np
from pydantic import Field

from sparing.core.errors import DataError, IncompatibleStep, InvalidValue, NoEffect, did_you_mean, shown
from sparing.core.step import Stage, Step, step
from sparing.core.training.batches import Batches, IndexBatch
from sparing.data_efficiency.metrics import (
    Composed,
    DifficultyMetric,
    FunctionMetric,
    SequenceLength,
    TokenFields,
    VocabularyRarity,
)
from sparing.data_efficiency.pacing import DiscretePacing, PacingFunction, RootPacing
from sparing.data_efficiency.sampler import CurriculumCollate, CurriculumMetric, CurriculumSampler, DifficultyType
from sparing.data_efficiency.settings import known_keys, number, whole_number
from sparing.data_efficiency.tokens import counting

if TYPE_CHECKING:
    from sparing.core.job import Job
    from sparing.core.task import Task
    from sparing.data_efficiency.index import DifficultyIndex

TOKEN_METRICS = ("sequence_length", "vocabulary_rarity")
LENGTH = "length"
"""The name under which the difficulty of post-processing travels with a batch."""
PACE = ("pacing", "start", "end", "over", "steps", "step", "degree", "values", "until", "until_steps")
Postprocess = Literal["none", "truncate", "reshape", "longest"]


# --- paces -----------------------------------------------------------------------------------------------------------


def paced(settings: Mapping[str, Any], total: int, start: float, end: float, what: str) -> PacingFunction:
    """The pacing function of a pace written down for a training of any length.

    Args:
        settings: ``pacing``: "root" (the default), "linear" or "discrete". Of the first two ``start`` and ``end``,
            ``over`` (a share of the training; 0.6) or ``steps`` (optimizer steps) in which it gets there, ``step``
            (what values are multiples of; 1) and, of a root, ``degree`` (2). Of "discrete" the ``values``, and when
            each but the last ends: ``until`` (shares of the training) or ``until_steps``.
        total: optimizer steps of the training.
        start: the default of ``start``.
        end: the default of ``end``.
        what: names the settings in messages.

    Raises:
        InvalidValue: an unknown setting, one that the kind of pacing has no use for, or one out of bounds.
    """
    known_keys(settings, PACE, what)
    kind = settings.get("pacing", "discrete" if "values" in settings else "root")
    if kind not in ("root", "linear", "discrete"):
        hint = did_you_mean(kind, ("root", "linear", "discrete")) if isinstance(kind, str) else ""
        raise InvalidValue(f"{what}: pacing = {shown(kind)}; one of root, linear, discrete is expected.{hint}")
    used = {"root": PACE[:7], "linear": PACE[:6], "discrete": ("pacing", *PACE[7:])}[kind]
    if idle := [name for name in settings if name not in used]:
        raise InvalidValue(f"{what}: {', '.join(idle)} cannot be said of pacing = {kind!r}; {', '.join(used)} can")
    for pair in (("over", "steps"), ("until", "until_steps")):
        if all(name in settings for name in pair):
            raise InvalidValue(f"{what}: {' and '.join(pair)} say the same thing; give one of them")
    if kind == "discrete":
        values = settings.get("values", ())
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise InvalidValue(f"{what}: values = {shown(values)}; a list of at least one number is expected")
        steps = settings.get("until_steps")
        if steps is None:
            steps = [round(_share(f"{what}: until", share) * total) for share in settings.get("until", ())]
        least, most = (pick(number(f"{what}: a value", value) for value in values) for pick in (min, max))
        return DiscretePacing(least, most, tuple(values), tuple(steps))
    over = settings.get("steps")
    if over is None:
        over = _share(f"{what}: over", settings.get("over", 0.6)) * total
    return RootPacing(
        settings.get("start", start),
        settings.get("end", end),
        over,
        settings.get("step", 1),
        settings.get("degree", 2) if kind == "root" else 1,
    )


def _share(name: str, value: Any) -> float:
    if not 0 < number(name, value) <= 1:
        raise InvalidValue(f"{name} = {value}; a share of the training, above 0 and at most 1, is expected")
    return float(value)


# --- what is in a batch ----------------------------------------------------------------------------------------------


class BatchTokens(TokenFields):
    """Tokens and padding of what a task's ``collate`` makes: a mapping with fields, or a tuple that begins with them.

    Args:
        pad_id: the number that is padding where a batch has no mask.
    """

    def __init__(self, pad_id: int | None = None) -> None:
        super().__init__()
        self.padding = pad_id

    def config(self) -> dict[str, Any]:
        """The fields."""
        return {**super().config(), "padding": self.padding}

    def tokens_of(self, batch: Any) -> np.ndarray:
        """Token numbers (B, S)."""
        return super().tokens_of(_inputs(batch))

    def real_of(self, batch: Any) -> np.ndarray | None:
        """True for tokens and False for padding (B, S), or None when nothing tells them apart."""
        inputs = _inputs(batch)
        if isinstance(inputs, Mapping) and self.mask in inputs:
            return super().real_of(inputs)
        return None if self.padding is None else self.tokens_of(batch) != self.padding


def _inputs(batch: Any) -> Any:
    """A mapping as it is; of a tuple the first, and of tuples in it."""
    while isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    return batch


def padding_of(task: Any) -> int | None:
    """The number of padding in a task's batches, where it has one."""
    return getattr(getattr(task, "wordpiece", None), "pad_id", None)


def vocabulary_of(task: Any) -> int:
    """How many tokens a task's vocabulary has; :class:`IncompatibleStep` when it does not say."""
    for name in ("wordpiece", "tokens"):
        vocabulary = getattr(getattr(task, name, None), "vocabulary", None)
        if vocabulary is not None:
            return len(vocabulary)
    raise IncompatibleStep(f"the task {task.name!r} has no vocabulary; say how many tokens there are by vocab_size")


class Postprocessing:
    """(batch, difficulties) → batch, for batches that are mappings, tensors, or tuples of tensors: (ids, labels), say.

    Args:
        kind: "truncate", "reshape" or "longest" (see :mod:`sparing.data_efficiency.postprocessing`).
        shifted: whether inputs are all columns but the last, and what is to be predicted all but the first.
        pad_id: the number of padding where a batch has no ``attention_mask``.
    """

    def __init__(self, kind: Postprocess, shifted: bool, pad_id: int | None = None) -> None:
        self.kind, self.shifted, self.pad_id = kind, shifted, pad_id

    def __call__(self, batch: Any, difficulties: Mapping[str, float]) -> Any:
        """The batch, cut or folded to the length among its difficulties, or to its longest member."""
        # the functions are torch's, which a recipe that is only looked at need not load
        from sparing.data_efficiency.postprocessing import reshape_batch, trim_batch, truncate_batch

        several = isinstance(batch, tuple | list)
        parts = {str(place): part for place, part in enumerate(batch)} if several else batch
        if self.kind == "truncate":
            cut: Any = truncate_batch(parts, int(difficulties[LENGTH]), shifted=self.shifted)
        elif self.kind == "reshape":
            cut = reshape_batch(parts, int(difficulties[LENGTH]), shifted=self.shifted)
        elif several and self.pad_id is not None:
            cut = trim_batch({**parts, "attention_mask": parts["0"] != self.pad_id})
            del cut["attention_mask"]
        else:
            cut = trim_batch(parts)
        return type(batch)(cut.values()) if several else cut


# --- the batches of a training ---------------------------------------------------------------------------------------


class _Drawn(IndexBatch):
    """A batch with the difficulties it was drawn under."""

    def __init__(
        self, indices: Sequence[int], epoch: int, number: int, rank: int, difficulties: Mapping[str, float]
    ) -> None:
        super().__init__(indices, epoch, number, rank)
        self.difficulties = dict(difficulties)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Drawn, (list(self), self.epoch, self.number, self.rank, self.difficulties)


class CurriculumBatches(Batches):
    """The batches of a :class:`~sparing.data_efficiency.sampler.CurriculumSampler` for a training of Sparing.

    An epoch is as many batches as would go through the data once, rounded up to whole optimizer steps; within it
    samples come again as the sampler draws them. States of the sampler at the beginnings of epochs are kept with a
    training's checkpoint (:class:`~sparing.data_efficiency.callbacks.CurriculumCallback`); without one, batches are
    drawn anew from the first, which touches sample numbers only.

    Args:
        dataset: only its length is used.
        batch_size: samples of a batch, of all processes together.
        seed: of all draws.
        metrics: total optimizer steps → the metrics by name.
        process: (collated batch, difficulties) → batch; None: nothing is done to it.
        reshaped: whether ``process`` reshapes: None if not, else its ``shifted``. For who plans ahead.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int,
        metrics: Callable[[int], Mapping[str, CurriculumMetric]],
        process: Callable[[Any, dict[str, float]], Any] | None = None,
        reshaped: bool | None = None,
    ) -> None:
        self.accumulate = 1
        super().__init__(dataset, batch_size, seed)
        self.metrics, self.process, self.reshaped = metrics, process, reshaped
        self.curriculum: Mapping[str, CurriculumMetric] = {}
        """The metrics, once the training's length is known."""
        self._marks: dict[int, dict[str, Any]] = {}
        self._epoch: tuple[int, list[tuple[np.ndarray, dict[str, float]]]] = (-1, [])
        self._sampler: CurriculumSampler | None = None

    def begin(self, epochs: int, max_steps: int | None, accumulate: int) -> int:
        """Optimizer steps of the training; the paces are set by them."""
        self.accumulate = accumulate
        total = super().begin(epochs, max_steps, accumulate)
        self.curriculum = self.metrics(total)
        per_epoch = len(self) // accumulate
        self._sampler = CurriculumSampler(
            self.curriculum,
            self.batch_size,
            -(-total // per_epoch) * per_epoch,
            self.seed,
            rank=0,
            world_size=1,
            accumulation=accumulate,
            samples=self.size,
        )
        return total

    @property
    def drawn(self) -> CurriculumSampler:
        """The sampler of the training that has begun."""
        if self._sampler is None:
            raise InvalidValue(
                "the length of the training is not known yet: begin(epochs, max_steps, accumulate) first"
            )
        return self._sampler

    def __len__(self) -> int:
        batches = -(-self.size // self.batch_size)
        return -(-batches // self.accumulate) * self.accumulate

    def collation(self, collate: Callable[[list[Any]], Any] | None) -> Callable[[list[Any]], Any] | None:
        """The task's, and the post-processing by the difficulties that the batch was drawn under."""
        return collate if self.process is None else CurriculumCollate(self.process, collate)

    def epoch_batches(self, epoch: int) -> list[np.ndarray]:
        """Dataset indices of every batch of an epoch, all processes together."""
        return [indices for indices, _ in self._batches_of(epoch)]

    def _batches_of(self, epoch: int) -> list[tuple[np.ndarray, dict[str, float]]]:
        if self._epoch[0] != epoch:
            sampler, per_epoch = self.drawn, len(self) // self.accumulate
            known = [mark for mark in self._marks if mark <= epoch]
            if sampler.step > epoch * per_epoch or any(mark * per_epoch > sampler.step for mark in known):
                sampler.load_state_dict(self._marks[max(known)] if known else sampler.state_dict(0))
            found: list[tuple[np.ndarray, dict[str, float]]] = []
            for number_, (indices, difficulties) in enumerate(sampler.global_batches(), sampler.step):
                if number_ >= epoch * per_epoch:
                    found += [(part, difficulties) for part in np.array(indices).reshape(self.accumulate, -1)]
                if number_ == epoch * per_epoch - 1:
                    self._mark(epoch)
                if number_ == (epoch + 1) * per_epoch - 1:
                    break
            self._mark(epoch + 1)
            self._epoch = (epoch, found)
        return self._epoch[1]

    def _mark(self, epoch: int) -> None:
        """Remember the state at the beginning of an epoch; the last two are enough."""
        self._marks[epoch] = self.drawn.state_dict()
        for old in sorted(self._marks)[:-2]:
            del self._marks[old]

    def difficulties(self, epoch: int, number: int) -> dict[str, float]:
        """What a batch is drawn under."""
        return self._batches_of(epoch)[number][1]

    def __iter__(self) -> Iterator[IndexBatch]:
        difficulties = [at for _, at in self._batches_of(self.epoch)]
        rest = super().__iter__()
        return (_Drawn(one, one.epoch, one.number, one.rank, difficulties[one.number]) for one in rest)

    def state_dict(self) -> dict[str, Any]:
        """States of the sampler at the beginnings of epochs; their size does not depend on the number of samples."""
        return {"epochs": {str(epoch): state for epoch, state in self._marks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up; :class:`InvalidValue` for those of other settings, data or seed."""
        for epoch, saved in state["epochs"].items():
            self.drawn.load_state_dict(saved)  # compares settings
            self._marks[int(epoch)] = dict(saved)
        self._epoch = (-1, [])


# --- the step --------------------------------------------------------------------------------------------------------


def _by_rarity() -> dict[str, dict[str, Any]]:
    return {"vocabulary_rarity": {}}


class _Indexes:
    """Keeps the indexes of an analysis as a result of the store."""

    def __init__(self, samples: int, dataset: str) -> None:
        self.samples, self.dataset = samples, dataset

    def save(self, value: dict[str, DifficultyIndex], folder: Path) -> None:
        """Copy their folders."""
        for name, index in value.items():
            shutil.copytree(index.path, folder / name)

    def load(self, folder: Path) -> dict[str, DifficultyIndex]:
        """Open them, mapped."""
        from sparing.data_efficiency.index import DifficultyIndex

        return {
            path.name: DifficultyIndex.open(path, samples=self.samples, dataset=self.dataset)
            for path in sorted(folder.iterdir())
        }


def analyse(job: Job, metrics: Sequence[DifficultyMetric], workers: int = 1) -> dict[str, DifficultyIndex]:
    """The indexes of a job's training data, made once and kept by its store; an analysis that is killed goes on."""
    from sparing.core.fingerprint import NoFingerprint, fingerprint
    from sparing.data_efficiency.analysis import DataAnalyzer

    try:
        version = fingerprint(job.train)
    except NoFingerprint:
        version = job.store.key()  # the store keeps nothing then
    with tempfile.TemporaryDirectory(prefix="sparing-") as scratch:
        kept = job.store.progress("difficulty").folder
        place = Path(scratch) if kept is None else kept / "analysis"

        def compute() -> dict[str, DifficultyIndex]:
            return DataAnalyzer(
                job.train, metrics, place, workers, batch_size=256, collate=job.task.collate, version=version
            ).run()

        return job.store.once("difficulty", compute, _Indexes(len(job.train), version))


@step("curriculum")
class Curriculum(Step):
    """Begin the next training with easy samples, or short ones, and let harder ones in as it goes on.

    The order comes from an analysis of the training data, which the store keeps. ``metrics`` orders samples: a mapping
    of names to paces, ``sequence_length``, ``vocabulary_rarity``, both as one order with a "+" between them, or those
    of ``own``. Where there are several, a sample waits until all let it in. ``postprocess`` makes the batch itself
    shorter, to ``length``.

    A pace: ``pacing`` (root, linear, discrete), ``start``, ``end``, ``over`` (share of the training) or ``steps``,
    ``step``, ``degree``; for discrete ``values`` and ``until`` or ``until_steps``. With ``difficulty: percentile`` (the
    default) start and end are percentiles of the samples, 10 to 100 unless said; with ``value`` they are values.
    """

    stage: ClassVar[Stage] = Stage.TRAINING
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    promises: ClassVar[frozenset[str]] = frozenset({"training"})
    slots: ClassVar[frozenset[str]] = frozenset({"batch_sampler"})
    source: ClassVar[str] = "Li et al. 2022, DeepSpeed Data Efficiency, arXiv:2212.03597, section 3.1"

    metrics: dict[str, dict[str, Any]] = Field(default_factory=_by_rarity)
    """Name of a metric → its pace, and ``difficulty``: percentile or value. Empty: only ``postprocess`` is paced."""
    postprocess: Postprocess = "none"
    """What is done to a batch: "truncate" to the length of the moment, "reshape" into more rows of that length,
    or cut to its "longest" member, where a task pads all samples to one length."""
    length: dict[str, Any] = Field(default_factory=dict)
    """Pace of the length in tokens, for "truncate" and "reshape"; it ends at the full length unless said."""
    own: dict[str, Any] = Field(default_factory=dict)
    """Metrics of your own, from Python: name → a function from a batch to a number for each sample, or a metric."""
    vocab_size: int | None = Field(default=None, ge=1)
    """Token numbers are below it; None: the task's vocabulary."""
    workers: int = Field(default=1, ge=1)
    """Processes of the analysis."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.metrics and self.postprocess not in ("truncate", "reshape"):
            raise InvalidValue(f"{self.id}: no metrics, and postprocess = {self.postprocess!r}: nothing would be paced")
        if self.length and self.postprocess not in ("truncate", "reshape"):
            raise InvalidValue(f"{self.id}: length = {self.length} is for postprocess truncate or reshape")
        for name, settings in self.metrics.items():
            self._pace(name, settings, 1000)
            for part in name.split("+"):
                if part not in (*TOKEN_METRICS, *self.own):
                    known = (*TOKEN_METRICS, *self.own)
                    hint = did_you_mean(part, known)
                    raise InvalidValue(f"{self.id}: there is no metric {part!r}.{hint} Known: {', '.join(known)}")
            if len(set(name.split("+"))) < len(name.split("+")) or name == LENGTH:
                raise InvalidValue(f"{self.id}: {name!r} cannot be a metric's name")
        for name, given in self.own.items():
            if not callable(given) and not isinstance(given, DifficultyMetric):
                raise InvalidValue(f"{self.id}: own: {name} = {shown(given)}; a function or DifficultyMetric is needed")
            if name in TOKEN_METRICS or "+" in name or not name:
                raise InvalidValue(f"{self.id}: own: {name!r} cannot be the name of a metric of your own")
        if self.postprocess in ("truncate", "reshape"):
            self._length(1000, 1 << 30)

    def check(self, task: Task) -> None:
        """The task has tokens, where tokens are counted or cut."""
        super().check(task)
        asked = [name for name in self.metrics if set(name.split("+")) & set(TOKEN_METRICS)]
        asked += [] if self.postprocess == "none" else [f"postprocess: {self.postprocess}"]
        if asked and "text" not in task.capabilities:
            raise IncompatibleStep(
                f"{self.id}: {', '.join(asked)} is about sequences of tokens, and the task {task.name!r} has none; "
                "order its samples by a metric of your own"
            )

    def apply(self, job: Job) -> Job:
        """The job, whose next training is paced."""
        size = len(job.train)
        if size == 0:
            raise DataError("the training data are empty; at least one sample is needed")
        indexes = analyse(job, [self._metric(name, job) for name in self.metrics], self.workers) if self.metrics else {}
        for name, index in indexes.items():
            if len(index.values) == 1:
                raise NoEffect(
                    f"{self.id}: {name} is {index.values[0]} for all {size} samples, so there is nothing to order by it"
                    + ("; samples of one length can be ordered by vocabulary_rarity" if name in TOKEN_METRICS else "")
                )
        full = self._full_length(job)
        made = self._paced(indexes, full)
        paces = made(1000)
        # refused now, not in the middle of a training
        CurriculumSampler(paces, 1, 1, samples=size)
        for name, index in indexes.items():
            job.record(f"least {name}", float(index.values[0]), "", "measured", "")
            job.record(f"greatest {name}", float(index.values[-1]), "", "measured", "")
        said = [
            f"{name} from {metric.pacing.min_difficulty:g} to {metric.pacing.max_difficulty:g}"
            + (" %" if metric.difficulty_type == "percentile" else "")
            for name, metric in paces.items()
        ]
        job.notes.remarks.append(f"the next training is paced by {', '.join(said)}")
        process = self._process(job, full)
        reshaped = "causal_lm" in job.task.capabilities if self.postprocess == "reshape" else None

        def batches(dataset: Any, batch_size: int, seed: int) -> CurriculumBatches:
            if len(dataset) != size:
                raise IncompatibleStep(
                    f"{self.id}: {size} samples were analysed, the training has {len(dataset)}; what changes the data "
                    "must come before the curriculum"
                )
            return CurriculumBatches(dataset, batch_size, seed, made, process, reshaped)

        def callback() -> Any:
            from sparing.data_efficiency.callbacks import CurriculumCallback

            return CurriculumCallback()

        plan = job.training.adding(batch_sampler=batches, callbacks=callback)
        return job.replace(training=counting(plan))

    # --- inside

    def _pace(self, name: str, settings: Mapping[str, Any], total: int) -> tuple[PacingFunction, DifficultyType]:
        kind = settings.get("difficulty", "percentile")
        if kind not in ("percentile", "value"):
            raise InvalidValue(f"{self.id}: difficulty of {name} = {shown(kind)}; percentile or value is expected")
        rest = {key: value for key, value in settings.items() if key != "difficulty"}
        if kind == "value" and "values" not in rest and not {"start", "end"} <= rest.keys():
            raise InvalidValue(f"{self.id}: {name} with difficulty = 'value' needs start and end")
        pacing = paced(rest, total, 10, 100, f"{self.id}: {name}")
        if kind == "percentile" and not 0 <= pacing.min_difficulty <= pacing.max_difficulty == 100:
            raise InvalidValue(
                f"{self.id}: {name} goes from {pacing.min_difficulty:g} to {pacing.max_difficulty:g}; percentiles end "
                "at 100, with all samples. Easier data altogether are another data set"
            )
        return pacing, cast("DifficultyType", kind)

    def _length(self, total: int, full: int) -> PacingFunction:
        end = self.length.get("end", full)
        start = whole_number(f"{self.id}: length: start", self.length.get("start", max(1, min(end, full) // 4)), 1)
        pace = self.length if "values" in self.length else {"pacing": "linear", **self.length}
        return paced(pace, total, start, end, f"{self.id}: length")

    def _paced(
        self, indexes: Mapping[str, DifficultyIndex], full: int | None
    ) -> Callable[[int], dict[str, CurriculumMetric]]:
        def made(total: int) -> dict[str, CurriculumMetric]:
            found: dict[str, CurriculumMetric] = {}
            for name, settings in self.metrics.items():
                pacing, kind = self._pace(name, settings, total)
                found[name] = CurriculumMetric(pacing, indexes[name], kind)
            if self.postprocess in ("truncate", "reshape"):
                assert full is not None
                found[LENGTH] = CurriculumMetric(self._length(total, full), None, "value")
            return found

        return made

    def _metric(self, name: str, job: Job) -> DifficultyMetric:
        fields = BatchTokens(padding_of(job.task))
        made: list[DifficultyMetric] = []
        for part in name.split("+"):
            given = self.own.get(part)
            if part == "sequence_length":
                made.append(SequenceLength(fields, part))
            elif part == "vocabulary_rarity":
                size = vocabulary_of(job.task) if self.vocab_size is None else self.vocab_size
                made.append(VocabularyRarity(size, fields, name=part))
            elif isinstance(given, DifficultyMetric):
                named = copy.copy(given)
                named.name = part
                made.append(named)
            else:
                made.append(FunctionMetric(part, cast("Callable[[Any], Any]", given)))
        if len(made) == 1:
            return made[0]
        length = getattr(job.task, "length", None)
        if length is None:
            raise IncompatibleStep(
                f"{self.id}: {name!r} needs the task's greatest length, which {job.task.name!r} has not"
            )
        return Composed(made, length + 1, name)

    def _sample(self, job: Job) -> Any:
        from sparing.data_efficiency.analysis import collated

        return collated(job.train, range(min(4, len(job.train))), job.task.collate)

    def _full_length(self, job: Job) -> int | None:
        """Tokens of the longest input, for the end of the pace."""
        if self.postprocess not in ("truncate", "reshape"):
            return None
        length = getattr(job.task, "length", None)
        return BatchTokens().tokens_of(self._sample(job)).shape[1] if length is None else int(length)

    def _process(self, job: Job, full: int | None) -> Callable[[Any, dict[str, float]], Any] | None:
        """The post-processing, tried on a few samples."""
        if self.postprocess == "none":
            return None
        process = Postprocessing(self.postprocess, "causal_lm" in job.task.capabilities, padding_of(job.task))
        batch = self._sample(job)
        if isinstance(batch, tuple | list) and not all(hasattr(part, "shape") for part in batch):
            raise IncompatibleStep(
                f"{self.id}: a batch of {job.task.name!r} has more than tokens and labels in it; what the rest of it "
                f"says of the tokens would be wrong after postprocess = {self.postprocess!r}"
            )
        try:
            process(batch, {} if full is None else {LENGTH: self._length(1000, full).min_difficulty})
        except InvalidValue as error:
            raise IncompatibleStep(
                f"{self.id}: postprocess = {self.postprocess!r} cannot be done to the batches of {job.task.name!r}: "
                f"{error}"
            ) from error
        return process
