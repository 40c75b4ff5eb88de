"""The checks themselves: each finds the fault it is there for, and lets a sound step of a third party through."""

from __future__ import annotations

import os
import socket
from typing import Any, ClassVar

import pytest
import torch
from common_settings import TRAIN
from pydantic import Field
from torch.utils.data import Subset

from sparing import InvalidValue, NoEffect, SparingError
from sparing.core.job import Job
from sparing.core.predictor import ModulePredictor
from sparing.core.step import Stage, Step, step
from sparing.core.store import JSON, TENSORS
from sparing.testing import STEP_CHECKS, StepCase, check_step
from sparing.testing import steps as checks


@step("first_share")
class FirstShare(Step):
    """Keep the first samples: sound, and known to no table of parts."""

    stage = Stage.DATA
    needs = frozenset({"classification"})
    source = "ours"

    share: float = Field(0.5, gt=0, le=1)
    noisy: bool = False

    def apply(self, job: Job) -> Job:
        count = int(len(job.train) * self.share)
        if count == len(job.train):
            raise NoEffect(f"{self.id!r}: {count} samples are all there are, and share = {self.share} keeps them")
        if count == 0:
            raise InvalidValue(f"share = {self.share} of {len(job.train)} samples is none")
        job.record("training samples", count, "")
        return job.replace(train=Subset(job.train, list(range(count))))


def test_a_sound_step_of_a_third_party_passes(tmp_path):
    nothing = StepCase(FirstShare(share=1.0), nothing="is the case")
    check_step(StepCase(FirstShare(share=0.5), nothing=nothing), tmp_path)


@step("sound_training")
class SoundTraining(Step):
    """A loop that keeps its progress, each of whose steps is seeded."""

    stage = Stage.TRAINING
    needs = frozenset({"module"})
    gives = frozenset({"trained"})
    source = "ours"
    seeded: ClassVar[bool] = True

    rounds: int = Field(4, ge=1)

    def apply(self, job: Job) -> Job:
        if len(job.train) == 0:
            raise InvalidValue("the training data are empty")
        weights = job.store.once("model", lambda: self.loop(job), TENSORS)
        model = job.fresh_model()
        model.load_state_dict(weights)
        return job.replace(model=model, predictor=ModulePredictor(model, job.task))

    def loop(self, job: Job) -> dict[str, Any]:
        progress = job.store.progress("model")
        state = progress.load() or {"round": 0, "weights": dict(job.model.state_dict())}
        for number in range(state["round"], self.rounds):
            if self.seeded:
                torch.manual_seed(number)
            noise = {name: torch.randn(value.shape) for name, value in state["weights"].items()}
            mixed = {name: value + 0.01 * noise[name].to(value) for name, value in state["weights"].items()}
            state = {"round": number + 1, "weights": mixed}
            progress.save(state)
        return state["weights"]


def test_a_sound_loop_of_a_third_party_passes(tmp_path):
    check_step(StepCase(SoundTraining(), nothing="it always adds noise"), tmp_path)


@step("anything")
class Anything(FirstShare):
    """A field that takes anything."""

    share: Any = 0.5


@step("unnamed")
class Unnamed(FirstShare):
    """Refuses values without naming the field."""

    level: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.level > 1:
            raise ValueError("no")


@step("sourceless")
class Sourceless(FirstShare):
    """Says nothing of where it comes from."""

    source = ""


@step("secretive")
class Secretive(FirstShare):
    """Its repr leaves a field out."""

    share: float = Field(0.5, gt=0, le=1, repr=False)


class Opaque:
    """No YAML can hold it."""


@step("unwritable")
class Unwritable(FirstShare):
    """A field that no recipe can hold."""

    thing: Opaque = Opaque()


@step("meddling")
class Meddling(FirstShare):
    """Changes the model it was given."""

    def apply(self, job: Job) -> Job:
        next(job.model.parameters()).data.add_(1)
        return job


@step("freezing")
class Freezing(FirstShare):
    """Leaves the model it was given in another mode."""

    def apply(self, job: Job) -> Job:
        job.model.eval()
        return job


@step("unseeded")
class Unseeded(FirstShare):
    """Takes its chance from where no seed reaches."""

    def apply(self, job: Job) -> Job:
        job.record("chance", int.from_bytes(os.urandom(6), "little"), "")
        return job


@step("peeking")
class Peeking(FirstShare):
    """Looks at the test split, and hides that it failed."""

    def apply(self, job: Job) -> Job:
        try:
            len(job.task.splits(job.root).test)
        except Exception:
            return job
        return job


@step("calling_home")
class CallingHome(FirstShare):
    """Asks somebody far away."""

    def apply(self, job: Job) -> Job:
        with socket.socket() as outgoing:
            outgoing.connect(("192.0.2.1", 80))
        return job


@step("brittle")
class Brittle(FirstShare):
    """Divides by the number of samples."""

    def apply(self, job: Job) -> Job:
        job.record("mean", 1 / len(job.train), "")
        return job


@step("pretending")
class Pretending(FirstShare):
    """Finds nothing and says nothing."""

    def apply(self, job: Job) -> Job:
        return job


class Forgetful(ModulePredictor):
    """Answers something else once it was loaded."""

    def __call__(self, *inputs: Any) -> Any:
        return super().__call__(*inputs) + 1


@step("unsavable")
class Unsavable(FirstShare):
    """Its predictor does not come back the same."""

    def apply(self, job: Job) -> Job:
        return job.replace(predictor=Forgetful(job.fresh_model(), job.task))


@step("changeable")
class Changeable(FirstShare):
    """Its row tells how often it ran."""

    times: ClassVar[list[int]] = []

    def apply(self, job: Job) -> Job:
        self.times.append(1)
        job.record("run", len(self.times), "")
        return job


@step("wasteful")
class Wasteful(FirstShare):
    """Stores a result under a new name each time."""

    def apply(self, job: Job) -> Job:
        job.store.once(f"result{os.urandom(4).hex()}", lambda: 1, JSON)
        return job


@step("unresumable")
class Unresumable(SoundTraining):
    """Goes on with other random numbers than it would have had."""

    seeded: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("check", "faulty", "message"),
    [
        (checks.validates_every_field, Anything, "share takes anything"),
        (checks.validates_every_field, Unnamed, r"level = 1\.5 is refused without naming it: unnamed: no"),
        (checks.says_what_it_is_and_where_from, Sourceless, "names no source"),
        (checks.its_repr_builds_it, Secretive, "came back as"),
        (checks.a_recipe_says_the_same, Unwritable, "thing"),
        (checks.leaves_the_job_as_it_was, Meddling, r"changed the job it was given: \['model'\]"),
        (checks.leaves_the_job_as_it_was, Freezing, r"changed the job it was given: \['modes'\]"),
        (checks.gives_the_same_under_the_same_seed, Unseeded, "differ in their rows"),
        (checks.never_looks_at_the_test_split, Peeking, "looks at the test split: len"),
        (checks.never_looks_at_the_test_split, CallingHome, r"tries to reach \('192\.0\.2\.1', 80\)"),
        (checks.stands_odd_data, Brittle, "empty: a ZeroDivisionError came out"),
        (checks.what_it_makes_can_be_saved, Unsavable, "the rebuilt model answers differently"),
        (checks.is_done_once, Changeable, "the ledgers differ"),
        (checks.is_done_once, Wasteful, "a second run made something anew"),
        (checks.survives_being_killed, Unresumable, "the tensors differ|the ledgers differ"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_found(check, faulty, message, tmp_path):
    share = {} if faulty in (SoundTraining, Unresumable, Anything) else {"share": 0.25}
    noisy = {"noisy": False}
    made = faulty() if faulty is Unresumable else faulty(**share, **noisy)
    with pytest.raises((AssertionError, SparingError), match=message):
        check(StepCase(made, nothing="not looked at here"), tmp_path)


def test_a_case_must_say_why_there_is_always_an_effect(tmp_path):
    with pytest.raises(AssertionError, match="must say why"):
        checks.says_when_there_is_nothing_to_do(StepCase(FirstShare(), nothing=" "), tmp_path)
    pretending = StepCase(Pretending(share=1.0), nothing="is the case")
    with pytest.raises(AssertionError, match="finds nothing to act on, and hands on a job as if it had"):
        checks.says_when_there_is_nothing_to_do(StepCase(Pretending(), nothing=pretending), tmp_path)


def test_what_is_needed_is_checked_where_it_can_be_missing(tmp_path):
    @step("undemanding")
    class Undemanding(FirstShare):
        """Needs a trained model."""

        needs = frozenset({"trained"})

    checks.refuses_a_job_without_what_it_needs(StepCase(Undemanding(), nothing="no", before=(TRAIN,)), tmp_path)


def test_every_check_is_tried_here():
    tried = {parameters[0] for parameters in test_a_fault_is_found.pytestmark[0].args[1]}
    untried = {check.__name__ for check in STEP_CHECKS if check not in tried}
    assert untried == {
        # held by the decorator and the pipeline, so that no step can be at fault
        "builds_with_defaults_or_names_what_is_missing",
        "an_unknown_field_is_told_with_the_closest",
        "refuses_a_job_without_what_it_needs",
        # tried on their own above
        "says_when_there_is_nothing_to_do",
    }
