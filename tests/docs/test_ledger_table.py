"""README's ledger is made from a measured one, and from nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sparing.core.ledger import MODEL_BYTES, Ledger
from sparing.core.recipe import load_recipe

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs" / "_ext"))

from ledger_table import BEGIN, END, KEPT, SHORT, markdown, origin, transposed, with_ledger  # noqa: E402


@pytest.fixture(scope="module")
def kept() -> Ledger:
    return Ledger.load(KEPT)


def test_readme_shows_the_kept_ledger_as_it_is(kept: Ledger):
    text = (ROOT / "README.md").read_text()
    assert text == with_ledger(text, kept), "python docs/_ext/ledger_table.py writes README's ledger"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in KEPT.parent.glob("*/ledger.json")))
def test_a_kept_ledger_is_of_its_recipe_as_it_now_is(name: str):
    recipe, ledger = load_recipe(name), Ledger.load(KEPT.parent / name)
    again = "make readme-ledger" if name == "quickstart" else f"sparing run {name} --out benchmarks/results/{name}"
    assert ledger.ids == tuple(step.id for step in recipe.steps), f"the recipe has changed: {again}"
    for row, step in zip(ledger.rows, recipe.steps, strict=True):
        kept, now = dict(row.config), step.config()
        assert kept == {field: now[field] for field in kept}, f"the recipe has changed: {again}"
        # a field that has come since is as if it were not there when it has its default
        known = type(step).__pydantic_fields__.items()
        since = {field: about.get_default(call_default_factory=True) for field, about in known if field not in kept}
        assert {field: getattr(step, field) for field in since} == since, f"the recipe has changed: {again}"


def test_every_line_of_the_short_table_is_a_column_and_a_step_of_the_ledger_a_column(kept: Ledger):
    head, rows = transposed(kept, SHORT)
    assert head == ["", *kept.ids]
    assert [row[0] for row in rows] == list(SHORT)
    first = kept.rows[0].figures[MODEL_BYTES].value
    assert {row[0]: row[1] for row in rows}[MODEL_BYTES] == f"{first / 1e6:.3f} MB"
    _, whole = transposed(kept)
    assert {row[0] for row in whole} > set(SHORT)


def test_only_what_stands_between_the_marks_is_replaced(kept: Ledger):
    made = with_ledger(f"above\n{BEGIN}\nold\n{END}\nbelow\n", kept)
    assert made == f"above\n{BEGIN}\n\n{markdown(kept)}\n\n{END}\nbelow\n"
    assert origin(kept) in made
    with pytest.raises(SystemExit, match="no block between"):
        with_ledger("nothing", kept)
