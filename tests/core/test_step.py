"""Steps: frozen, validated, and able to say what they hold; the registry and the errors that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field
from recipe_guests import Audit, Guest, Needy, Ordered, Plain, Pointing

from sparing.core import registry
from sparing.core.errors import InvalidValue, SparingError, UnknownName, did_you_mean, shown
from sparing.core.step import InvalidFields, Stage, Step, step
from sparing.models.mlp import MLP

FIELDS = "id, rate, count, label, flag, sizes, options, maybe"


def test_a_steps_id_is_its_name_unless_it_has_one():
    assert (Plain().id, Plain(id="mine").id, Plain.name) == ("plain", "mine", "plain")


@pytest.mark.parametrize("name", ["a b", "a/b", "ü", "x" * 65])
def test_ids_are_plain(name):
    with pytest.raises(InvalidValue, match="plain: id = "):
        Plain(id=name)


def test_steps_are_frozen_and_equal_by_value():
    one = Plain(rate=0.25)
    assert one == Plain(rate=0.25) != Plain()
    with pytest.raises(AttributeError):
        one.rate = 1


@pytest.mark.parametrize(
    ("fields", "field", "line"),
    [
        ({"labl": "x"}, "labl", f"plain: unknown field 'labl'. Did you mean 'label'? Fields: {FIELDS}"),
        ({"self": 1}, "self", f"plain: unknown field 'self'. Fields: {FIELDS}"),
        ({"rate": 2}, "rate", "plain: rate = 2: Input should be less than or equal to 1"),
        ({"rate": float("nan")}, "rate", "plain: rate = nan: Input should be a finite number"),
        ({"count": 0}, "count", "plain: count = 0: Input should be greater than or equal to 1"),
        (
            {"sizes": (1, "y")},
            "sizes",
            "plain: sizes.1 = 'y': Input should be a valid integer, unable to parse string as an integer",
        ),
    ],
)
def test_a_wrong_field_is_named_with_value_and_range(fields, field, line):
    with pytest.raises(InvalidFields) as caught:
        Plain(**fields)
    assert caught.value.problems == [(field, line)]
    assert str(caught.value) == line


def test_all_wrong_fields_are_named_at_once():
    with pytest.raises(InvalidValue) as caught:
        Plain(rate=2, count=0, labl="x")
    assert {field for field, _ in caught.value.problems} == {"rate", "count", "labl"}


def test_missing_fields_and_fields_that_do_not_go_together():
    with pytest.raises(InvalidFields) as caught:
        Needy()
    assert caught.value.problems == [("rate", "needy: field 'rate' is required")]
    with pytest.raises(InvalidFields) as caught:
        Ordered(low=3, high=2)
    assert caught.value.problems == [("", "ordered: low = 3 is above high = 2")]


def test_a_step_says_what_it_holds():
    @step("holder")
    class Holder(Guest):
        where: Path = Path("a/b")
        inner: Step | None = None
        mapping: dict[str, Any] = Field(default_factory=dict)
        live: Any = None

    made = Holder(inner=Plain(count=2), mapping={"a": (1, 2.5)}, live=object())
    assert made.config() == {
        "id": "holder",
        "where": "a/b",
        "inner": {"plain": Plain(count=2).config()},
        "mapping": {"a": [1, 2.5]},
        "live": "<builtins.object>",
    }
    assert made.nested() == {"inner": Plain(count=2)}
    assert Audit(steps=(Plain(), Needy(rate=1))).nested() == {"steps[0]": Plain(), "steps[1]": Needy(rate=1)}
    assert Plain().nested() == {}


def test_a_step_says_which_rows_it_names():
    assert Pointing(teacher="big", others="no row").row_references() == {"teacher": "big"}
    assert Plain(label="big").row_references() == {}
    with pytest.raises(InvalidValue, match="teacher = ''"):
        Pointing(teacher="")


def with_apply(**declared):
    """A class that could be a step, with some of its declarations changed; None takes one away."""
    members = {"stage": Stage.DATA, "apply": lambda self, job: job, "__doc__": "A step."} | declared
    return type("Made", (Step,), {name: value for name, value in members.items() if value is not None})


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"stage": None}, r"step 'made' .* declares no stage; one of Stage\.DATA"),
        ({"stage": "data"}, "declares no stage"),
        ({"apply": None}, r"does not define apply\(self, job\)"),
        ({"needs": "trained"}, "needs = 'trained'; a set of words is needed"),
        ({"gives": ("trained",)}, r"gives = \('trained',\); a set of words"),
        ({"slots": {1}}, r"slots = \{1\}; a set of words"),
    ],
)
def test_what_a_step_must_declare(declared, message):
    with pytest.raises(InvalidValue, match=message):
        step("made")(with_apply(**declared))
    assert step("made")(with_apply())().id == "made"


@pytest.mark.parametrize("name", ["", "two words", "x" * 65, "a/b"])
def test_a_steps_name_can_be_an_id(name):
    with pytest.raises(InvalidValue, match="a step's name is made of up to 64 letters"):
        step(name)


def test_a_class_that_is_no_step_yet_says_so_and_so_does_its_child():
    with pytest.raises(InvalidValue, match=r"Made is no step yet: decorate it with @step"):
        with_apply()()
    child = type("Child", (step("made")(with_apply()),), {})
    with pytest.raises(InvalidValue, match="Child is no step yet"):
        child()


def test_a_step_keeps_the_task_by_default():
    assert step("made")(with_apply())().target_task() is None


def test_the_registry_knows_names_and_things():
    assert registry.resolve("models", "mlp") is MLP
    assert registry.name_of("models", MLP) == "mlp"
    assert registry.name_of("models", Path) is None
    with pytest.raises(
        UnknownName,
        match=r"unknown model 'mpl'\. Did you mean 'mlp'\? Known models: alexnet, bert, blocknet, cnn6, convnet, ",
    ):
        registry.resolve("models", "mpl")


def test_a_missing_dependency_of_a_part_passes_through(monkeypatch):
    from sparing.core.errors import MissingDependency
    from sparing.parts import PARTS, Part

    def missing(name: str) -> Any:
        raise MissingDependency("polars", "tables", "reading tables")

    monkeypatch.setitem(PARTS["tasks"], "tables", Part("sparing.tasks.tables:Tables", ""))
    registry.parts.cache_clear()
    monkeypatch.setattr(registry.importlib, "import_module", missing)
    with pytest.raises(MissingDependency, match=r"reading tables needs the package 'polars': pip install 'sparing\["):
        registry.resolve("tasks", "tables")
    registry.parts.cache_clear()


def test_words_close_to_a_known_one():
    assert did_you_mean("epcohs", ["epochs", "lr"]) == " Did you mean 'epochs'?"
    assert did_you_mean("zzz", ["epochs", "lr"]) == ""


def test_values_in_messages_are_short():
    assert shown([1, "a"]) == "[1, 'a']"
    assert shown("x" * 500, 10) == "'xxxxxxxxx…"
    assert shown(10**5000) == "a very large int"


def test_a_deliberate_error_is_one_of_ours():
    assert issubclass(InvalidFields, SparingError)
    assert issubclass(InvalidFields, ValueError)
