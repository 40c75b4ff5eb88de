"""Every packaged recipe runs from end to end, at a size that takes seconds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import sparing
from small_recipes import SMALL, overrides
from sparing.cli import main
from sparing.core.recipe import load_recipe, packaged
from sparing.data.catalogue import READERS

ROOT = Path(__file__).parents[2]


def test_every_recipe_has_a_small_form_and_every_small_form_a_recipe():
    assert SMALL.keys() == packaged().keys(), "tests/small_recipes.py: one entry for each file of recipes/"
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} == packaged().keys()


@pytest.mark.parametrize("name", sorted(packaged()))
def test_a_recipe_opens_with_what_it_is_and_the_command_that_runs_it(name: str):
    first, *rest = packaged()[name].read_text().splitlines()
    assert re.match(r"# \w.{20,}\.$", first), "'sparing list recipes' shows this line"
    assert f"#     sparing run {name}" in {line.split("   #")[0].rstrip() for line in rest}


@pytest.mark.parametrize("name", sorted(packaged()))
def test_a_recipe_runs_and_leaves_a_ledger_a_report_and_a_model(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
):
    recipe = load_recipe(name)
    data = ["--data", str(request.getfixturevalue("data_root"))] if recipe.task.name in READERS else []
    out = tmp_path / "out"
    assert main(["run", name, *overrides(name), *data, "--out", str(out), "--quiet"]) == 0
    ledger = sparing.Ledger.load(out)
    assert ledger.ids == tuple(step.id for step in recipe.steps)
    assert not ledger.stopped
    for row in ledger.rows:
        assert row.figures[row.headline].value is not None
        assert len(ledger.outcomes[f"{row.seed}/{row.id}"]) > 100
    assert "<html" in (out / "report.html").read_text()
    model = sparing.load(out / "model")
    assert model.labels == tuple(ledger.rows[-1].by_class)
    assert model.predict([np.zeros((8, 8), np.uint8)]).shape == (1, len(model.labels))


def test_the_two_image_recipes_differ_in_size_only():
    quickstart, fashion = load_recipe("quickstart"), load_recipe("fashion_mnist")
    assert (quickstart.model.name, quickstart.model.fields) == (fashion.model.name, fashion.model.fields)
    for ours, theirs in zip(quickstart.steps, fashion.steps, strict=True):
        differing = {key for key, value in ours.config().items() if theirs.config()[key] != value}
        assert (ours.name, ours.id) == (theirs.name, theirs.id)
        assert differing <= {"epochs", "batch_size", "lr"}
