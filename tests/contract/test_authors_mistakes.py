"""What the author of a step can get wrong is told, since a later step would misunderstand it."""

from __future__ import annotations

import pytest
from harness import Points, go

from sparing.core.errors import RecipeError, SparingError
from sparing.core.job import Job
from sparing.core.step import Stage, Step, step
from sparing.core.training import Train

TRAIN = Train(epochs=1, batch_size=32)


@step("half_done")
class HalfDone(Step):
    """Cuts the model and forgets the predictor."""

    stage = Stage.MODEL

    def apply(self, job: Job) -> Job:
        return job.replace(model=job.fresh_model())


@step("unpromising")
class Unpromising(Step):
    """Adds to the training plan and does not say that a training must follow."""

    stage = Stage.TRAINING

    def apply(self, job: Job) -> Job:
        return job.replace(training=job.training.adding(loss_terms=lambda: lambda loss, *_: loss))


@step("nothing_returned")
class NothingReturned(Step):
    """Forgets to return the job."""

    stage = Stage.MODEL

    def apply(self, job: Job) -> Job:  # type: ignore[return]
        job.fresh_model()


def test_a_model_without_its_predictor_is_refused(tmp_path):
    with pytest.raises(SparingError, match="'half_done' changed the model and left the predictor of the old one"):
        go(Points(), TRAIN, HalfDone())(tmp_path / "after")
    go(Points(), HalfDone(), TRAIN)(tmp_path / "before")  # there is no predictor yet


def test_a_plan_without_a_promise_is_refused(tmp_path):
    with pytest.raises(SparingError, match="'unpromising' adds to the training plan, so a training must follow"):
        go(Points(), Unpromising(), TRAIN)(tmp_path)


def test_a_step_must_return_a_job(tmp_path):
    with pytest.raises(SparingError, match="'nothing_returned' returned NoneType; apply must return a Job"):
        go(Points(), NothingReturned(), TRAIN)(tmp_path)


def test_an_error_names_the_step_and_its_place(tmp_path):
    with pytest.raises(SparingError) as caught:
        go(Points(), TRAIN, HalfDone(id="cut"))(tmp_path)
    assert caught.value.__notes__ == ["in step 'cut' (steps[1])"]
    assert not isinstance(caught.value, RecipeError)
