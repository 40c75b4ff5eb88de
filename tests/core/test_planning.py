"""Planning: a whole recipe is checked before anything is computed, and every message names the values it is about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planning_guests
import pytest
import torch
from planning_guests import Bare, Follow, Go, Hold, Learn, Letters, Mask, Pace, Shrink, Stages
from torch import nn

from sparing.core import pipeline, registry
from sparing.core.errors import RecipeError
from sparing.core.pipeline import plan, run
from sparing.core.recipe import PartRef, Recipe, parse_recipe
from sparing.core.step import Step, declared
from sparing.core.store import Store
from sparing.core.training import Train
from sparing.core.transfer import Transfer
from sparing.parts import PARTS, Part
from sparing.tasks.images.digits import Digits

METER: dict[str, Any] = {"min_seconds": 0, "max_seconds": 0.01, "memory": False, "energy": "off", "batch": 4}


@pytest.fixture(autouse=True)
def _guests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for guest in vars(planning_guests).values():
        if isinstance(guest, type) and issubclass(guest, planning_guests.Guest) and guest.name:
            monkeypatch.setitem(PARTS["steps"], guest.name, Part(f"planning_guests:{guest.__qualname__}", "guest"))
    monkeypatch.setitem(PARTS["tasks"], "letters", Part("planning_guests:Letters", "guest"))
    monkeypatch.setitem(PARTS["tasks"], "bare", Part("planning_guests:Bare", "guest"))
    registry.parts.cache_clear()
    yield
    registry.parts.cache_clear()


def problems(*steps: Step, until: str | None = None, **more: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        plan(Recipe(more.pop("task", PartRef("digits")), steps, **more), until=until)
    return caught.value.problems


def accepted(*steps: Step, **more: Any) -> bool:
    return len(plan(Recipe(more.pop("task", PartRef("digits")), steps, **more)).steps) == len(steps)


# -------------------------------------------------------------------------------------------------------- the order


def test_a_capability_that_is_missing_there_and_who_gives_it():
    assert problems(Mask(), Learn(), Shrink()) == [
        "steps[0]: 'mask' needs 'trained', which the job does not have there; steps that give it: "
        + ", ".join(
            sorted(name for name in PARTS["steps"] if "trained" in declared(registry.resolve("steps", name), "gives"))
        )
    ]
    (line,) = problems(Learn(), Stages(id="mine"))
    assert line == (
        "steps[1]: 'mine' needs 'ordered_stages', which the job does not have there; "
        "no installed step gives it: it comes with the task or the model"
    )


def test_capabilities_come_from_steps_tasks_models_and_are_taken_away():
    class Staged(nn.Linear):
        capabilities = frozenset({"ordered_stages"})

    assert accepted(Learn(), Mask(), Shrink())
    assert accepted(Mask(), Shrink(), model=nn.Linear(64, 10), trained=True)
    assert accepted(Stages(), model=Staged(64, 10))
    assert len(problems(Learn(), planning_guests.Forget(), Mask(), Shrink())) == 1

    class Kind(Digits):
        capabilities = frozenset({"classification", "ordered_stages"})

    assert accepted(Stages(), task=Kind())


def test_a_promise_that_nobody_realises_and_who_would():
    assert problems(Learn(), Mask(id="prune")) == [
        "steps[1]: 'prune' promises sparsity, which no later step realises; add one of: compile, shrink"
    ]
    assert len(problems(Learn(), Shrink(), Mask())) == 1
    assert accepted(Learn(), Mask(), Mask(id="again"), Shrink())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("compile", "shrink"):
            patch.delitem(PARTS["steps"], name)
        registry.parts.cache_clear()
        assert problems(Learn(), Mask())[0].endswith("add one of: none of the installed steps does")


def test_a_recipe_cut_short_on_purpose_may_leave_its_promises_open():
    steps = (Learn(), Mask(id="prune"), Shrink())
    assert len(plan(Recipe(PartRef("digits"), steps), until="prune").steps) == 2
    assert problems(Learn(), Mask(id="prune"), Mask(id="again"), until="gone")[0].startswith("--until gone")


def test_an_exclusive_slot_is_filled_once_before_each_training():
    assert problems(Pace(), Pace(id="other"), Learn()) == [
        "steps[1]: 'other' sets the training plan's batch_sampler, which 'pace' at steps[0] has set"
    ]
    assert accepted(Pace(), Learn(), Pace(id="other"), Learn(id="again"))


def test_ids_are_unique_and_given_is_the_row_of_a_trained_model():
    assert problems(Learn(), Learn(), Learn(id="x"), Learn(id="x")) == [
        "steps[1]: the id 'learn' is taken by an earlier step; give this one 'id: …'",
        "steps[3]: the id 'x' is taken by an earlier step; give this one 'id: …'",
    ]
    assert accepted(Learn(id="given"))
    (line,) = problems(Learn(id="given"), model=nn.Linear(64, 10), trained=True)
    assert "the id 'given' is taken" in line


def test_a_row_that_is_named_must_stand_above_and_have_a_model():
    assert problems(Learn(id="big"), Follow(teacher="bgi")) == [
        "steps[1]: follow.teacher = 'bgi' names no such row. Did you mean 'big'? Earlier rows with a model: big"
    ]
    assert problems(Follow(teacher="big"), Learn(id="big")) == [
        "steps[0]: follow.teacher = 'big' names no such row. Earlier rows with a model: none"
    ]
    (line,) = problems(Pace(), Learn(), Follow(teacher="learn", second="pace"))
    assert "follow.second = 'pace' names no such row" in line
    assert accepted(Learn(id="big"), Follow(teacher="big"))
    assert accepted(Follow(teacher="given"), model=nn.Linear(64, 10), trained=True)


def test_steps_held_by_a_step_are_one_sequence_and_give_the_outside_nothing():
    assert accepted(Hold(one=Learn(), more=(Mask(), Shrink(), Follow(teacher="learn"))))
    assert problems(Hold(one=Mask(), more=(Learn(), Stages()))) == [
        "steps[0] 'hold'.one: 'mask' needs 'trained', which the job does not have there; steps that give it: "
        + ", ".join(
            sorted(name for name in PARTS["steps"] if "trained" in declared(registry.resolve("steps", name), "gives"))
        ),
        "steps[0] 'hold'.more[1]: 'stages' needs 'ordered_stages', which the job does not have there; "
        "no installed step gives it: it comes with the task or the model",
    ]
    first, second = problems(Hold(one=Learn()), Mask(), Follow(teacher="learn"), Shrink())
    assert "'mask' needs 'trained'" in first
    assert "follow.teacher = 'learn' names no such row" in second
    (deep,) = problems(Hold(more=(Learn(), Hold(one=Hold(more=(Stages(),))))))
    assert deep.startswith("steps[0] 'hold'.more[1] 'hold'.one 'hold'.more[0]: 'stages' needs")


def test_after_a_change_of_task_its_capabilities_hold():
    class NeedsLetters(planning_guests.Guest):
        needs = frozenset({"letters"})

    class NeedsImages(planning_guests.Guest):
        needs = frozenset({"images"})

    letters, images = (
        planning_guests.step(f"{name}_only")(cls)
        for name, cls in {"letters": NeedsLetters, "images": NeedsImages}.items()
    )
    assert accepted(images(), Go(), letters())
    first, second = problems(letters(), Go(), images())
    assert "'letters_only' needs 'letters'" in first
    assert "'images_only' needs 'images'" in second
    (line,) = problems(Go(), Go(id="again"))
    assert "steps[1]: 'again' changes the task to one that is also called 'letters'" in line


def test_until_cuts_the_recipe_and_names_the_ids():
    made = plan(Recipe(PartRef("digits"), (Learn(id="a"), Learn(id="b"), Stages(id="c"))), until="b")
    assert [planned.step.id for planned in made.steps] == ["a", "b"]
    found = problems(Learn(id="first"), Learn(id="second"), until="frist")
    assert found == ["--until frist: no such step. Did you mean 'first'? Ids: first, second"]


# ------------------------------------------------------------------------------------------ task, model, meter, all


def test_all_problems_of_all_parts_at_once_each_with_its_place():
    text = """
task: {name: bare, broken: badly}
meter: {threads: 0, bathc: 3}
steps: [learn]
"""
    with pytest.raises(RecipeError) as caught:
        plan(parse_recipe(text, "mine", "mine.yaml"))
    assert caught.value.problems[0] == "mine.yaml:2: task bare: broken = 'badly'"
    assert any("threads = 0" in line for line in caught.value.problems)
    assert any("'bathc'" in line and "Did you mean 'batch'?" in line for line in str(caught.value).splitlines())

    text = """
task: digits
model: {name: convnet, widhts: [4]}
meter: {runtime: abacus}
steps:
  - mask
  - pace
  - pace
  - follow: {teacher: nobody}
  - hold:
      one:
        stages
"""
    with pytest.raises(RecipeError) as caught:
        plan(parse_recipe(text, "mine", "mine.yaml"))
    lines = str(caught.value).splitlines()
    for number, said in [
        (3, "model convnet: the model 'convnet' has no field 'widhts'. Did you mean 'widths'?"),
        (6, "'mask' needs 'trained'"),
        (8, "the id 'pace' is taken by an earlier step"),
        (8, "'pace' sets the training plan's batch_sampler, which 'pace' at mine.yaml:7 has set"),
        (9, "follow.teacher = 'nobody' names no such row"),
        (6, "'mask' promises sparsity"),
        (8, "'pace' promises training"),
        (10, "'hold'.one: 'stages' needs 'ordered_stages'"),
    ]:
        assert [line for line in lines if line.startswith(f"mine.yaml:{number}") and said in line], (said, lines)
    assert any("abacus" in line for line in lines)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"widths": []}, "widths"),
        ({"widths": "wide"}, "widths"),
        ({"width": [4]}, "Did you mean 'widths'?"),
    ],
)
def test_a_model_that_cannot_be_built_is_found_without_training(fields, said):
    (line,) = problems(Learn(), model=PartRef("convnet", fields, "mine.yaml:3"))
    assert line.startswith("mine.yaml:3: model convnet: ")
    assert said in line


def test_a_folder_that_holds_no_model(tmp_path):
    (line,) = problems(Learn(), model=tmp_path / "nothing", trained=True, name="mine")
    assert line.startswith(f"mine: model {tmp_path}/nothing: ")
    assert "missing" in line
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sparing.json").write_text("{")
    (line,) = problems(Learn(), model=tmp_path / "model", trained=True)
    assert "sparing.json is not valid JSON" in line


# -------------------------------------------------------------------------------------------------- what a plan says


def test_planning_computes_nothing_and_keeps_the_callers_generators(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    kept = Store(tmp_path / "store")
    made = plan(Recipe(PartRef("digits"), (Train(epochs=1000),)), store=kept)
    assert torch.equal(torch.rand(3), expected)
    assert list(kept.entries()) == []
    assert made.steps[0].stored is None


def test_a_plan_as_json():
    text = "task: digits\nmodel: mlp\nseed: 4\nsteps:\n- train: {epochs: 2}\n- learn: {id: x}\n"
    described = plan(parse_recipe(text, "mine", "mine.yaml")).describe()
    assert (described["recipe"], described["task"], described["seed"]) == ("mine", "digits", 4)
    assert described["user_code"] == ["planning_guests:Learn"]
    assert described["remarks"] == []
    first, second = described["steps"]
    assert first["fields"]["epochs"] == 2
    assert (first["stored_results"], first["seconds_when_made"], first["estimated_seconds"]) == (0, None, None)
    assert (second["id"], second["step"], second["stage"], second["place"]) == ("x", "learn", "model", "mine.yaml:6")


def test_a_plan_says_what_is_stored_also_behind_a_change_of_task(tmp_path):
    kept = Store(tmp_path / "store")

    def recipe(*steps: Step, seed: int = 0) -> Recipe:
        return Recipe(PartRef("digits"), steps, PartRef("mlp", {"widths": [4]}), seed=seed, meter=METER)

    steps = (Train(epochs=1), Transfer(task=Letters()), Train(id="again", epochs=1))
    assert [planned.stored for planned in plan(recipe(*steps), store=kept).steps] == [None, None, None]
    run(recipe(*steps), store=kept)
    stored = [planned.stored for planned in plan(recipe(*steps), store=kept).steps]
    assert stored[0][0] == stored[2][0] == 1
    assert stored[0][1] > 0
    changed = (*steps[:2], Train(id="again", epochs=2))
    assert [bool(planned.stored) for planned in plan(recipe(*changed), store=kept).steps] == [
        True,
        bool(stored[1]),
        False,
    ]
    elsewhere = plan(recipe(*steps, seed=5), store=kept).steps
    assert [planned.stored for planned in elsewhere] == [None, None, None]
    assert elsewhere[0].estimate == stored[0][1]
    assert elsewhere[2].estimate == stored[2][1]


def test_data_without_a_fingerprint_are_remarked_on():
    made = plan(Recipe(Bare(), (Learn(),)))
    (remark,) = made.remarks
    assert "nothing of this run is kept for later runs" in remark
    assert "Unknowable" in remark


def test_a_recipe_may_be_named_by_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("task: digits\nsteps: [learn]\n")
    for source in (path, str(path)):
        assert plan(source).recipe.name == "mine"
    assert Path(pipeline.__file__).name == "pipeline.py"


def test_how_rows_are_measured_does_not_train_again(tmp_path):
    text = """
task: digits
model: {name: mlp, widths: [4]}
meter: {max_seconds: %s, min_seconds: 0, memory: false, energy: "off"}
steps:
  - train: {max_steps: 1}
  - quantize: {max_loss: 1.0}
"""
    store = Store(tmp_path / "store")
    run(parse_recipe(text % 0.01), store=store)
    trained, chosen = plan(parse_recipe(text % 0.02), store=store).steps
    assert trained.stored is not None
    assert chosen.stored is None, "a choice by other timings is made again"
