"""Every packaged recipe runs from end to end, at a size that takes seconds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparing
from event_files import dvs_files
from small_recipes import SMALL, overrides
from sparing.cli import main
from sparing.core.recipe import load_recipe, packaged

ROOT = Path(__file__).parents[2]
EMBEDDED = {"digits", "image_folder", "click_table"}
"""Tasks that need nothing from the data root; a recipe's image folder or table is made here."""
POOLED = {"ap", "miou"}
"""Headlines over all units together: no unit has an outcome of its own, and a class that is nowhere has no figure."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes of small images, for recipes on a user's own."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        (folder / label).mkdir()
        for number in range(12):
            Image.fromarray(draw.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(folder / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def criteo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few lines in the layout of Criteo's log, with missing values and rare ones."""
    path, draw = tmp_path_factory.mktemp("criteo") / "train.txt", np.random.default_rng(0)
    lines = []
    for clicked in draw.integers(0, 2, 400):
        numbers = [str(n) if n >= 0 else "" for n in draw.integers(-1, 9, 13)]
        words = [f"{n:08x}" if n else "" for n in draw.geometric(0.2, 26) - 1]
        lines.append("\t".join([str(clicked), *numbers, *words]))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_recipe_has_a_small_form_and_every_small_form_a_recipe():
    assert SMALL.keys() == packaged().keys(), "tests/small_recipes.py: one entry for each file of recipes/"
    files = {path.relative_to(ROOT / "recipes").with_suffix("") for path in (ROOT / "recipes").rglob("*.yaml")}
    assert {path.as_posix() for path in files} == packaged().keys()


@pytest.mark.parametrize("name", sorted(packaged()))
def test_a_recipe_opens_with_what_it_is_and_the_command_that_runs_it(name: str):
    first, *rest = packaged()[name].read_text().splitlines()
    assert re.match(r"# \w.{20,}\.$", first), "'sparing list recipes' shows this line"
    assert f"#     sparing run {name}" in {line.split("   #")[0].rstrip() for line in rest}


@pytest.mark.parametrize("name", sorted(name for name in packaged() if name.startswith("full/")))
def test_a_recipe_of_published_size_builds_its_model_as_it_stands(name: str):
    recipe = load_recipe(name)
    fields = dict(recipe.model.fields)
    if recipe.task.fields.get("layout") == "criteo":
        fields["cardinalities"] = [1] * 39
    assert sum(p.numel() for p in sparing.build_model(recipe.model.name, **fields).parameters()) > 1e5


@pytest.mark.parametrize("name", sorted(packaged()))
def test_a_recipe_runs_and_leaves_a_ledger_a_report_and_a_model(
    name: str, tmp_path: Path, photos: Path, criteo: Path, request: pytest.FixtureRequest
):
    recipe = load_recipe(name)
    own = {"image_folder": photos, "click_table": criteo}.get(recipe.task.name)
    more = ["--set", f"task.path={own}"] if own else []
    if recipe.task.name == "dvs128_gesture":
        more += ["--data", str(dvs_files(tmp_path))]
    elif recipe.task.name not in EMBEDDED or any(step.name == "transfer" for step in recipe.steps):
        more += ["--data", str(request.getfixturevalue("data_root"))]
    out = tmp_path / "out"
    assert main(["run", name, *overrides(name), *more, "--out", str(out), "--quiet"]) == 0
    ledger = sparing.Ledger.load(out)
    assert ledger.ids == tuple(step.id for step in recipe.steps)
    assert not ledger.stopped
    measured = [row for row in ledger.rows if row.headline in row.figures]
    changing = [row for row in ledger.rows if row.stage != "audit"]  # audits leave the model as it is
    assert measured[-1] is changing[-1]
    for row in measured:
        assert row.figures[row.headline].value is not None
        assert row.headline in POOLED or len(ledger.outcomes[f"{row.seed}/{row.id}"]) >= 4
    assert "<html" in (out / "report.html").read_text()
    model = sparing.load(out / "model")
    if measured[-1].headline in POOLED:
        assert set(measured[-1].by_class) <= set(model.labels)
    else:
        assert model.labels == tuple(measured[-1].by_class)
    if model.preprocessing is not None:
        first = model.preprocessing.operations[0]
        kinds = {
            "Decode": lambda: np.zeros((8, 8), np.uint8),
            "EncodeFields": lambda: dict.fromkeys(first.encoder.schema.columns(label=False), 3),
            "EventsToFrames": lambda: {name: np.array([1, 2]) * (name != "p") for name in "xytp"},
            "WordPiece": lambda: ("Who wrote it?", "Nobody knows who wrote it."),
        }
        raw = kinds.get(type(first).__name__, lambda: "Who wrote it?")()
        answer = model.predict([raw])
        assert len(answer) == 1
        if model.context.postprocessing is not None:  # boxes, or a map
            return
        assert np.isfinite(answer).all()
        assert not model.labels or answer.shape == (1, len(model.labels))


def test_the_two_image_recipes_differ_in_size_only():
    quickstart, fashion = load_recipe("quickstart"), load_recipe("fashion_mnist")
    assert (quickstart.model.name, quickstart.model.fields) == (fashion.model.name, fashion.model.fields)
    for ours, theirs in zip(quickstart.steps, fashion.steps, strict=True):
        differing = {key for key, value in ours.config().items() if theirs.config()[key] != value}
        assert (ours.name, ours.id) == (theirs.name, theirs.id)
        assert differing <= {"epochs", "batch_size", "lr"}
