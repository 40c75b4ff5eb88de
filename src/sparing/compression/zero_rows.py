"""The step ``drop_zero_rows``: embedding rows of exact zeros leave the model, and its bytes fall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sparing.core.errors import IncompatibleStep, NoEffect
from sparing.core.predictor import ModulePredictor
from sparing.core.step import Stage, Step, step
from sparing.models.ctr import CTRModel, RemappedIds, without_zero_rows

if TYPE_CHECKING:
    from sparing.core.job import Job


@step("drop_zero_rows")
class DropZeroRows(Step):
    """Drop the embedding rows of exact zeros of a click-through model: the same answers from fewer bytes.

    An id whose row is zero says what an unknown one says, so the rows leave and a list of four bytes for each id tells
    where the others went. Answers stay the same, bit for bit.
    """

    stage: ClassVar[Stage] = Stage.MODEL
    needs: ClassVar[frozenset[str]] = frozenset({"module"})
    realises: ClassVar[frozenset[str]] = frozenset({"rows of zeros"})
    source: ClassVar[str] = (
        "Yan and Li 2020, xDeepInt, arXiv:2301.01089, whose group lasso makes the zeros; dropping: ours"
    )

    def apply(self, job: Job) -> Job:
        """The job with the smaller model, and its predictor if it had one."""
        model: Any = job.model if job.model is not None else job.fresh_model()  # which says why there is none
        inner = model.model if isinstance(model, RemappedIds) else model
        if not isinstance(inner, CTRModel):
            raise IncompatibleStep(
                f"{self.id!r}: {type(model).__name__} does not take ids of fields, so it has no rows to drop; lr, fm, "
                "fnn, deepfm, dcnv2 and xdeepint do"
            )
        zero = inner.zero_rows()
        if not zero.any():
            raise NoEffect(
                f"{self.id!r}: none of the {len(zero):,} rows of {type(inner).__name__} is zero in all its tables; "
                "train with group_ftrl, or with a larger lambda1 there"
            )
        job.record("embedding rows before", len(zero), "rows", how="derived", better="")
        job.record("embedding rows after", len(zero) - int(zero.sum()), "rows", how="derived")
        for name, share in inner.sparsity().items():
            job.record(f"share of {name.replace('_', ' ')}", share, "", how="derived", better="higher")
        made = without_zero_rows(model)
        predictor = None if job.predictor is None else ModulePredictor(made, job.task)
        return job.replace(model=made, predictor=predictor)
