"""Recipes: whatever is written in one, all problems are found at once, each with its line, and nothing else happens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import recipe_guests
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bounds import SECONDS, refuses, watched, within_bounds
from sparing.core import recipe as module
from sparing.core import registry
from sparing.core.errors import RecipeError, SparingError, UnknownName
from sparing.core.fingerprint import fingerprint
from sparing.core.recipe import MAX_BYTES, MAX_VALUES, PartRef, Recipe, load_recipe, packaged, parse_recipe
from sparing.parts import PARTS, Part


@pytest.fixture(autouse=True)
def _guests(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for guest in (*vars(recipe_guests).values(), None):
        if isinstance(guest, type) and issubclass(guest, recipe_guests.Guest) and guest.name:
            monkeypatch.setitem(PARTS["steps"], guest.name, Part(f"recipe_guests:{guest.__qualname__}", "guest"))
    registry.parts.cache_clear()
    yield
    registry.parts.cache_clear()


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, file="r.yaml", overrides=overrides)
    assert str(caught.value).splitlines() == caught.value.problems
    return caught.value.problems


# ------------------------------------------------------------------------------------------------------ what is read


def test_a_whole_recipe():
    recipe = parse_recipe(
        """
version: 1
task: {name: digits}
model: {name: convnet, widths: [4, 8]}
seed: 3
meter: {threads: 1}
steps:
  - plain
  - plain: {id: second, rate: 0.25, count: 4, label: "yes", flag: yes, sizes: [1, 2], options: {a: 1.5}, maybe: null}
  - plain:
  - audit:
      inner: plain
      steps:
        - plain: {rate: 1}
        - needy: {rate: 1e-3}
""",
        file="r.yaml",
    )
    assert recipe.task == PartRef("digits", {}, "r.yaml:3")
    assert recipe.model == PartRef("convnet", {"widths": [4, 8]}, "r.yaml:4")
    assert (recipe.seed, recipe.meter, recipe.trained) == (3, {"threads": 1}, False)
    first, second, third, audit = recipe.steps
    assert first == third == recipe_guests.Plain()
    assert second.config() == {
        "id": "second",
        "rate": 0.25,
        "count": 4,
        "label": "yes",
        "flag": True,
        "sizes": [1, 2],
        "options": {"a": 1.5},
        "maybe": None,
    }
    assert audit.inner == recipe_guests.Plain()
    assert audit.steps == (recipe_guests.Plain(rate=1), recipe_guests.Needy(rate=0.001))
    assert recipe.places == ("r.yaml:8", "r.yaml:9", "r.yaml:10", "r.yaml:11")
    assert [recipe.place(index) for index in (0, 4)] == ["r.yaml:8", "steps[4]"]


@pytest.mark.parametrize(
    "text",
    [
        "task: digits\nsteps:\n- plain: {rate: 0.25}\n",
        "\ufefftask: digits\nsteps:\n- plain: {rate: 0.25}\n",
        "task: digits\r\nsteps:\r\n- plain: {rate: 0.25}\r\n",
        "---\ntask: digits\nsteps: [{plain: {rate: 0.25}}]\n...\n",
        '{"task": "digits", "steps": [{"plain": {"rate": 0.25}}]}',
        "task: digits # ü\n\n\nsteps:\n\n  -   plain:\n          rate:\n              0.25",
        "task: digits\nmodel:\nmeter: null\nsteps:\n- plain: {rate: '0.25'}\n",
    ],
)
def test_ways_to_write_one_recipe(text):
    recipe = parse_recipe(text)
    assert (recipe.task.name, recipe.model, recipe.seed, recipe.meter) == ("digits", None, 0, {})
    assert recipe.steps == (recipe_guests.Plain(rate=0.25),)


def test_what_is_handed_on_has_forgotten_its_lines():
    text = "task: {name: digits, x: {y: [1]}}\nmeter: {a: [1]}\nsteps: [{plain: {sizes: [1], options: {a: 1}}}]"
    recipe = parse_recipe(text)
    step = recipe.steps[0]
    for value in (recipe.task.fields, recipe.task.fields["x"], recipe.meter, step.options):
        assert type(value) is dict
    assert type(recipe.meter["a"]) is type(recipe.task.fields["x"]["y"]) is list
    assert fingerprint(recipe.meter) == fingerprint({"a": [1]})


def test_a_saved_model_is_named_by_its_path():
    recipe = parse_recipe("task: digits\nmodel: {path: saved/model}\nsteps: [plain]")
    assert (recipe.model, recipe.trained) == (Path("saved/model"), True)


@pytest.mark.parametrize("name", packaged())
def test_packaged_recipes_are_read_by_name_and_by_file(name):
    assert load_recipe(name) == load_recipe(packaged()[name])
    assert load_recipe(name).name == name.replace("/", "-")  # it names the folder of a run


# -------------------------------------------------------------------------------------------------------- problems


def test_all_problems_are_found_at_once_each_with_its_line():
    assert problems(
        """
sedd: 3
seed: -1
version: 2
task: digit
model: {nam: convnet}
meter: [1]
steps:
  - plane
  - plain: {rate: 2, cuont: 3}
  - plain:
      rate: 0.5
      sizes: [1, x]
      count: 0
  - needy
  - ordered: {low: 3, high: 2}
  - {plain: {}, needy: {}}
  - 7
  - plain: 7
  - audit:
      inner: planet
      steps:
        - plain: {rate: 3}
        - needy
        - 8
x: 2001-99-99
"""
    ) == [
        "r.yaml:26: '2001-99-99' is no timestamp; quote it to make it text",
        "r.yaml:2: unknown key 'sedd'. Did you mean 'seed'? Keys: version, task, model, seed, meter, steps",
        "r.yaml:26: unknown key 'x'. Keys: version, task, model, seed, meter, steps",
        "r.yaml:4: recipe version 2; this release reads 1",
        "r.yaml:3: seed = -1: a whole number in 0 … 2³¹−1 is needed",
        "r.yaml:7: meter must be a mapping of fields, not [1]",
        f"r.yaml:5: unknown task 'digit'. Did you mean 'digits'? Known tasks: {', '.join(sorted(PARTS['tasks']))}",
        "r.yaml:6: model is a name, or a mapping with the key 'name'; got {'nam': 'convnet'}",
        f"r.yaml:9: unknown step 'plane'. Did you mean 'plain'? Known steps: {', '.join(sorted(PARTS['steps']))}",
        "r.yaml:10: plain: rate = 2: Input should be less than or equal to 1",
        "r.yaml:10: plain: unknown field 'cuont'. Did you mean 'count'? "
        "Fields: id, rate, count, label, flag, sizes, options, maybe",
        "r.yaml:14: plain: count = 0: Input should be greater than or equal to 1",
        "r.yaml:13: plain: sizes.1 = 'x': Input should be a valid integer, unable to parse string as an integer",
        "r.yaml:15: needy: field 'rate' is required",
        "r.yaml:16: ordered: low = 3 is above high = 2",
        "r.yaml:17: a step is 'name' or 'name: {field: value}', one a list item; got {'plain': {}, 'needy': {}}",
        "r.yaml:18: a step is 'name' or 'name: {field: value}', one a list item; got 7",
        "r.yaml:19: the fields of 'plain' are a mapping, not 7",
        f"r.yaml:21: unknown step 'planet'. Did you mean 'plain'? Known steps: {', '.join(sorted(PARTS['steps']))}",
        "r.yaml:23: plain: rate = 3: Input should be less than or equal to 1",
        "r.yaml:24: needy: field 'rate' is required",
        "r.yaml:25: a step is 'name' or 'name: {field: value}', one a list item; got 8",
    ]


GOOD = "task: digits\nsteps: [plain]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1: the key 'task' is missing or empty; for example 'task: digits'"),
        ("# nothing", "r.yaml:1: 'steps' is a list with at least one step; got None"),
        ("task:\nsteps: [plain]", "r.yaml:1: the key 'task' is missing or empty; for example 'task: digits'"),
        ("steps: [plain]", "r.yaml:1: the key 'task' is missing or empty; for example 'task: digits'"),
        ("task: digits", "r.yaml:1: 'steps' is a list with at least one step; got None"),
        ("task: digits\nsteps: []", "r.yaml:2: 'steps' is a list with at least one step; got []"),
        ("task: digits\nsteps: plain", "r.yaml:2: 'steps' is a list with at least one step; got 'plain'"),
        ("- plain", "r.yaml:1: a recipe is a mapping with the keys version, task, model, seed, meter, steps"),
        ("plain", "r.yaml:1: a recipe is a mapping with the keys version, task, model, seed, meter, steps"),
        ("task: [digits]\nsteps: [plain]", "task is a name, or a mapping with the key 'name'; got ['digits']"),
        (GOOD + "model: 3", "r.yaml:3: model is a name, or a mapping with the key 'name'; got 3"),
        (GOOD + "model: convent", "r.yaml:3: unknown model 'convent'. Did you mean 'convnet'?"),
        (GOOD + "model: {path: 3}", "r.yaml:3: a saved model is named by 'path: folder' alone, got {'path': 3}"),
        (GOOD + "model: {path: a, threads: 2}", "named by 'path: folder' alone, got {'path': 'a', 'threads': 2}"),
        (GOOD + "seed: true", "r.yaml:3: seed = True: a whole number"),
        (GOOD + "seed: 2147483648", "r.yaml:3: seed = 2147483648: a whole number in 0 … 2³¹−1 is needed"),
        (GOOD + "seed: 1.0", "r.yaml:3: seed = 1.0: a whole number"),
        (GOOD + "seed:", "r.yaml:3: seed = None: a whole number"),
        (GOOD + "version: true", "r.yaml:3: recipe version True; this release reads 1"),
        (GOOD + "version:", "r.yaml:3: recipe version None; this release reads 1"),
        (GOOD + "meter: 0", "r.yaml:3: meter must be a mapping of fields, not 0"),
        (GOOD + "seed: 1\nseed: 2", "r.yaml:4: the key 'seed' appears twice (first at line 3)"),
        ("task: digits\nsteps:\n- plain: {rate: 0, rate: 1}", "r.yaml:3: the key 'rate' appears twice"),
        (GOOD + "3: a", "r.yaml:3: keys are text, not 3"),
        (GOOD + "yes: a", "r.yaml:3: keys are text, not True"),
        (GOOD + "null: a", "r.yaml:3: keys are text, not None"),
        (GOOD + "? [a, b]\n: c", "r.yaml:3: keys are text, not ['a', 'b']"),
        (GOOD + "? {a: b}\n: c", "r.yaml:3: keys are text, not {'a': 'b'}"),
        (GOOD + "meter: &m {threads: 1}", "r.yaml:3: anchors and aliases (&m) are not read"),
        (GOOD + "x: [*m]", "r.yaml:3: anchors and aliases (&m) are not read"),
        (GOOD + "seed: !!python/object:os.system 1", "r.yaml:3: tags (tag:yaml.org,2002:python/object:os.system)"),
        (GOOD + "seed: !!int 1", "r.yaml:3: tags (tag:yaml.org,2002:int) are not read"),
        (GOOD + "<<: {seed: 1}", "r.yaml:3: '<<' is no merge; quote it"),
        (GOOD + "seed: =", "r.yaml:3: '=' is no value; quote it"),
        (GOOD + "seed: 2024-05-01", "r.yaml:3: '2024-05-01' reads as a timestamp; quote it to make it text"),
        (GOOD + "seed: 1:30", "r.yaml:3: '1:30' reads as 90, a number to base sixty; quote it to make it text"),
        (GOOD + "seed: .inf", "r.yaml:3: '.inf' is no finite number of 64 bits"),
        (GOOD + "seed: .nan", "r.yaml:3: '.nan' is no finite number of 64 bits"),
        (GOOD + "seed: 1.0e+999", "r.yaml:3: '1.0e+999' is no finite number of 64 bits"),
        (GOOD + "seed: 0x" + "f" * 5000, "is no finite number of 64 bits"),
        (GOOD + "seed: " + "9" * 5000, "is no int; quote it"),
        (GOOD + "seed: 0b_", "r.yaml:3: '0b_' is no int; quote it"),
        (GOOD + "seed: [1", "r.yaml:3: not valid YAML: expected ',' or ']'"),
        (GOOD + "\tseed: 1", "r.yaml:3: not valid YAML: found character '\\t'"),
        (GOOD + "a: b: c", "r.yaml:3: not valid YAML: mapping values are not allowed here"),
        (GOOD + '"a', "r.yaml:3: not valid YAML: found unexpected end of stream"),
        (GOOD + "a: \x00", "r.yaml:3: not valid YAML: the character #x0000"),
        (GOOD + "a: \ud800", "r.yaml:3: not valid YAML: the character #xd800"),
        (GOOD + "%YAML 3.0", "r.yaml:3: not valid YAML"),
        (GOOD + "---\ntask: digits", "r.yaml:3: a second document begins here; one is read"),
        (GOOD + "\nx: [" + "1," * MAX_VALUES, f"r.yaml:4: more than {MAX_VALUES} values, which no recipe needs"),
        ("[" * 3000, "r.yaml:1: nested more than 20 levels deep"),
        ("a: {" * 1000, "r.yaml:1: nested more than 20 levels deep"),
        ("- " * 1000 + "a", "r.yaml:1: nested more than 20 levels deep"),
        ("? " * 1000 + "a", "r.yaml:1: nested more than 20 levels deep"),
        (GOOD + "#" * MAX_BYTES, f"r.yaml: larger than {MAX_BYTES} bytes, which no recipe needs"),
        (GOOD + "#" + "ü" * (MAX_BYTES // 2), f"r.yaml: larger than {MAX_BYTES} bytes, which no recipe needs"),
        ("task: digits\nsteps: [{plain: {self: 1}}]", "r.yaml:2: plain: unknown field 'self'."),
        ("task: digits\nsteps: [{audit: {inner: 3}}]", "r.yaml:2: audit: inner = 3: "),
        ("task: digits\nsteps: [{audit: {steps: [plain, plane]}}]", "r.yaml:2: unknown step 'plane'."),
        ("task: digits\nsteps: [{audit: {inner: {a: 1, b: 2}}}]", "a step is 'name' or 'name: {field: value}'"),
    ],
)
def test_each_problem_says_where_and_what(text, expected):
    found = problems(text)
    assert [line for line in found if expected in line], found
    assert max(map(len, found)) < 1000


def test_a_value_that_looks_like_a_problem_of_another_field_keeps_its_own_line():
    text = "task: digits\nsteps:\n- plain:\n    label: ' rate = field '\n    rate: 3\n    id: 'a b'\n"
    assert [line.partition(" ")[0] for line in problems(text)] == ["r.yaml:6:", "r.yaml:5:"]


def test_long_values_are_cut_in_messages():
    (line,) = problems(f"task: digits\nsteps: [{{plain: {{rate: {'x' * 5000}}}}}]")
    assert "'xxx" in line
    assert "…" in line
    assert len(line) < 400


def test_a_foreign_part_that_cannot_be_imported_is_a_problem_of_its_line(monkeypatch, tmp_path):
    (tmp_path / "broken_guest.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(PARTS["steps"], "broken", Part("broken_guest:Step", "from Acme"))
    monkeypatch.setitem(PARTS["tasks"], "gone", Part("recipe_guests:Nobody", "from Acme"))
    registry.parts.cache_clear()
    assert problems("task: gone\nsteps:\n- broken") == [
        "r.yaml:1: the task 'gone' (from Acme) cannot be imported from recipe_guests:Nobody: "
        "AttributeError: module 'recipe_guests' has no attribute 'Nobody'",
        "r.yaml:3: the step 'broken' (from Acme) cannot be imported from broken_guest:Step: RuntimeError: no licence",
    ]


def test_two_packages_may_not_share_a_name(monkeypatch):
    class Entry:
        name, value = "digits", "acme:Digits"
        dist = type("Distribution", (), {"name": "acme"})()

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])
    registry.parts.cache_clear()
    with pytest.raises(SparingError, match="acme declares the task 'digits', a name already taken by sparing"):
        registry.parts("tasks")
    Entry.name = "digits2"
    Entry.dist = None
    assert registry.parts("tasks")["digits2"] == Part("acme:Digits", "from acme:Digits")


# -------------------------------------------------------------------------------------------------------- overrides

BASE = """
task: digits
steps:
  - plain
  - plain: {id: v1.0, options: {a: 1}}
  - needy: {rate: 1}
  - ordered:
"""


def test_overrides_change_what_they_name():
    recipe = parse_recipe(
        BASE,
        "base",
        overrides=[
            "steps.plain.rate=0.25",
            "steps.plain.sizes=[1, 2]",
            "steps.v1.0.count=7",
            "steps.v1.0.options.a=2.5",
            "steps.needy.rate=2",
            "steps.ordered.high=9",
            "model=convnet",
            "model.widths=[4]",
            "meter.threads=2",
            "meter.batch=4",
            "task.name=digits",
            "seed=5",
            "steps.plain.label=",
            "steps.v1.0.label=a=b",
        ],
    )
    assert recipe.steps == (
        recipe_guests.Plain(rate=0.25, sizes=(1, 2)),
        recipe_guests.Plain(id="v1.0", count=7, options={"a": 2.5}, label="a=b"),
        recipe_guests.Needy(rate=2),
        recipe_guests.Ordered(high=9),
    )
    assert (recipe.model.name, recipe.model.fields) == ("convnet", {"widths": [4]})
    assert (recipe.task.name, recipe.meter, recipe.seed) == ("digits", {"threads": 2, "batch": 4}, 5)


def test_the_text_kept_of_an_overridden_recipe_is_what_was_run():
    recipe = parse_recipe(BASE, "base", overrides=["steps.plain.rate=0.25", "seed=5"])
    assert recipe.text.startswith("# base with --set ['steps.plain.rate=0.25', 'seed=5']\n")
    again = parse_recipe(recipe.text)
    assert (again.steps, again.seed) == (recipe.steps, 5)
    assert parse_recipe(BASE).text == BASE


def test_whole_steps_may_be_given():
    recipe = parse_recipe("task: digits", overrides=["steps=[plain, {needy: {rate: 2}}]"])
    assert recipe.steps == (recipe_guests.Plain(), recipe_guests.Needy(rate=2))
    assert recipe.places == ("--set", "--set")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "--set 'seed': write steps.<id>.<field>=value, task.<field>=value or seed=value"),
        ("=1", "--set '=1': write"),
        ("a..b=1", "--set 'a..b=1': write"),
        ("steps.plane.rate=1", "Did you mean 'plain'? Ids here: plain, v1.0, needy, ordered"),
        ("steps.plain=1", "--set 'steps.plain=1': write steps.<id>.<field>=value."),
        ("steps.plain.rate=3", "--set: plain: rate = 3: Input should be less than or equal to 1"),
        ("steps.plain.raet=1", "--set: plain: unknown field 'raet'. Did you mean 'rate'?"),
        ("steps.v1.0.count=0", "--set: plain: count = 0: Input should be greater than or equal to 1"),
        ("steps.v1.0.options.b.c=0", "--set 'steps.v1.0.options.b.c=0': 'b' is not a mapping in this recipe"),
        ("steps=[{plain: {rate: 3}}]", "--set: plain: rate = 3: "),
        ("sede=1", "--set: unknown key 'sede'. Did you mean 'seed'?"),
        ("a.b=1", "--set 'a.b=1': 'a' is not a mapping in this recipe"),
        ("seed=[1", "--set 'seed=[1': not valid YAML: expected ',' or ']'"),
        ("seed=&a 1", "--set 'seed=&a 1': anchors and aliases (&a) are not read"),
        ("seed=" + "[" * 100, "nested more than 20 levels deep"),
        ("meter={a: 1, a: 2}", "--set 'meter={a: 1, a: 2}': the key 'a' appears twice"),
        ("meter={1: 2}", "--set 'meter={1: 2}': keys are text, not 1"),
        ("seed=\x00", "not valid YAML: the character #x0000"),
        ("task=", "unknown task ''"),
        ("meter.threads=2001-01-01", "'2001-01-01' reads as a timestamp"),
    ],
)
def test_wrong_overrides_are_named_as_such(override, expected):
    found = problems(BASE, override)
    assert [line for line in found if expected in line], found


def test_overrides_of_a_recipe_without_steps():
    assert any("Ids here: " in line for line in problems("task: digits", "steps.a.b=1"))
    assert any("Ids here: " in line for line in problems("task: digits\nsteps: [[a], 3]", "steps.a.b=1"))


# -------------------------------------------------------------------------------------------------------------- files


def test_a_file_is_read_with_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: digits\nsteps: [plane]")
    with pytest.raises(RecipeError, match=rf"{tmp_path}/mine\.yaml:2: unknown step 'plane'"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("task: digits\nsteps: [plain]")
    assert load_recipe(str(tmp_path / "mine.yaml")).name == "mine"
    assert load_recipe(tmp_path / "mine.yaml", ["seed=4"]).seed == 4


def test_unknown_names_are_answered_with_the_packaged_ones():
    with pytest.raises(UnknownName, match=r"'quikstart'. Did you mean 'quickstart'\? Packaged recipes: .*quickstart"):
        load_recipe("quikstart")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("folder", "folder: a folder; a recipe is a YAML file"),
        ("missing.yaml", "missing.yaml: no such file; a recipe is a YAML file"),
        ("loop.yaml", "no such file"),
        ("pipe.yaml", "no such file"),
        ("binary.yaml", "cannot be read as UTF-8 text"),
        ("utf16.yaml", "cannot be read as UTF-8 text"),
        ("x" * 300 + ".yaml", "File name too long"),
        ("large.yaml", "larger than"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, name, expected):
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "utf16.yaml").write_bytes("task: digits".encode("utf-16"))
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / name)
    assert expected in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["\0", "a\nb", "", "x" * 5000])
def test_odd_names(name):
    with pytest.raises(SparingError):
        load_recipe(name)


def test_reading_a_recipe_computes_nothing_and_asks_for_nothing(monkeypatch):
    monkeypatch.setattr("builtins.input", None)
    assert isinstance(load_recipe("quickstart"), Recipe)


# -------------------------------------------------------------------------------------------------------------- bounds

HOSTILE = {
    "a long flow list": "a: [" + "1," * (MAX_BYTES // 2 - 10) + "]",
    "many unknown keys": "".join(f"k{i}: 1\n" for i in range(3400)),
    "many unknown steps": "task: digits\nsteps:\n" + "- plane\n" * 4000,
    "many wrong fields": "task: digits\nsteps:\n- plain: {" + ", ".join(f"f{i}: 1" for i in range(2800)) + "}",
    "many steps with problems": "task: digits\nsteps:\n" + "- plain: {rate: 9}\n" * 1600,
    "a long key": "x" * (MAX_BYTES - 10) + ": 1",
    "a long name": "task: " + "d" * (MAX_BYTES - 100) + "\nsteps: [plain]",
    "many brackets": "[" * (MAX_BYTES - 1),
    "many keys in a line": "{" * (MAX_BYTES - 1),
    "many anchors": "".join(f"- &a{i} 1\n" for i in range(3000)),
    "a bomb of aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)),
    "many questions": "? " * (MAX_BYTES // 2 - 1),
    "many quotes": '"' * (MAX_BYTES - 1),
    "escapes": 'a: "' + "\\x41" * (MAX_BYTES // 4 - 10) + '"',
    "directives": "%TAG ! x\n" * 3000,
    "long numbers": "seed: " + "1_" * (MAX_BYTES // 2 - 10),
    "base sixty": "seed: 1" + ":30" * (MAX_BYTES // 3 - 10),
    "documents": "---\n" * 8000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipes_are_refused_in_time_and_memory(name):
    load_recipe("quickstart")  # imports what any recipe needs
    assert len(HOSTILE[name]) <= MAX_BYTES
    assert refuses(lambda: parse_recipe(HOSTILE[name])).startswith("RecipeError")
    problems(HOSTILE[name])


def test_a_bomb_in_an_override_is_refused():
    bomb = "a=[&a [x,x], &b [*a,*a], &c [*b,*b]]"
    assert refuses(lambda: parse_recipe(GOOD, overrides=[bomb] * 20)).startswith("RecipeError")


def test_a_recipe_as_long_as_allowed_is_read_in_time():
    lines = [f"- plain: {{id: s{number}, rate: 0.25}}\n" for number in range(MAX_VALUES // 7 - 5)]
    text = "task: digits\nsteps:\n" + "".join(lines)
    outcome = watched(lambda: parse_recipe(text))
    assert outcome.raised == ""
    within_bounds(outcome, slower=2)


def read_within_bounds(text: str, *overrides: str) -> None:
    start = time.process_time()
    try:
        parse_recipe(text, overrides=overrides)
    except RecipeError as error:
        assert error.problems  # noqa: PT017
    assert time.process_time() - start < SECONDS


yamlish = st.text(st.sampled_from("abc:-?{}[],&*!|>'\"%@`# \n\t01.~=<\\\u0085\u2028\ufeffü"), max_size=60)
sources = [packaged()[name].read_text() for name in packaged()] + [BASE, GOOD]


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=60), yamlish, st.binary(max_size=60).map(lambda raw: raw.decode("latin1"))))
@example("a: !!binary x")
@example("a: 0o9")
@example("? |-\n")
def test_random_text_is_read_or_refused(text):
    read_within_bounds(text)


@settings(max_examples=300)
@given(data=st.data())
def test_mutated_recipes_are_read_or_refused(data):
    text = data.draw(st.sampled_from(sources))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 20)))
        text = text[:start] + data.draw(st.one_of(yamlish, st.sampled_from(sources).map(lambda s: s[:80]))) + text[end:]
    read_within_bounds(text)


words = st.sampled_from(
    ["steps", "plain", "v1.0", "rate", "task", "model", "meter", "seed", "a", "", "self", "options"]
)
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(path=st.lists(words, max_size=4).map(".".join), value=st.one_of(yamlish, plain_values.map(str)))
def test_random_overrides_are_applied_or_refused(path, value):
    read_within_bounds(BASE, f"{path}={value}")


@settings(max_examples=200)
@given(fields=st.dictionaries(st.sampled_from(["id", "rate", "inner", "steps", "sizes", "options"]), plain_values))
def test_fields_of_any_kind_are_taken_or_refused(fields):
    import json

    for name in ("plain", "audit"):
        read_within_bounds(json.dumps({"task": "digits", "steps": [{name: fields}]}))


def test_the_module_says_what_it_reads():
    assert module.VERSION == 1
    assert "task: digits" in module.__doc__
