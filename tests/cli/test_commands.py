"""``list``, ``show``, ``init``, ``data``, ``cache`` and ``doctor``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparing.cli import main
from sparing.cli.catalogue import argument_docs, fields_of
from sparing.core.recipe import load_recipe, packaged
from sparing.core.registry import parts
from sparing.core.store import JSON, Store

Sparing = Callable[..., "subprocess.CompletedProcess[str]"]


def test_list_is_the_registry(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    for kind in ("tasks", "steps", "models"):
        lines = {entry["name"]: entry["summary"] for entry in found if entry["kind"] == kind}
        assert lines == {name: part.summary for name, part in parts(kind).items()}
    assert {entry["name"] for entry in found if entry["kind"] == "recipes"} == set(packaged())


def test_list_takes_wildcards(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "steps", "*t?l", "--json"]) == 0
    assert [entry["name"] for entry in json.loads(capfd.readouterr().out)] == ["distil", "group_ftrl"]
    assert main(["list", "models", "nothing*"]) == 0
    assert "nothing matches 'nothing*'" in capfd.readouterr().out
    assert main(["list"]) == 0
    shown = capfd.readouterr().out
    assert "\x1b[" not in shown
    for name in ("digits", "train", "convnet", "quickstart"):
        assert name in shown


@pytest.mark.parametrize("name", sorted(parts("steps")))
def test_every_step_shows_all_its_fields(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from sparing.core.registry import resolve

    assert main(["show", f"steps/{name}", "--json"]) == 0
    (document,) = json.loads(capfd.readouterr().out)
    assert [field["name"] for field in document["fields"]] == [field.name for field in fields(resolve("steps", name))]
    assert document["doc"]
    assert document["stage"]


def test_show_says_ranges_defaults_and_meaning(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "train", "--json"]) == 0
    (document,) = json.loads(capfd.readouterr().out)
    epochs = next(field for field in document["fields"] if field["name"] == "epochs")
    assert epochs["range"] == "≥ 1"
    assert epochs["type"] == "int"
    assert epochs["default"] == 10
    assert epochs["meaning"].startswith("Passes over the training data")
    assert main(["show", "quantize", "--json"]) == 0
    (document,) = json.loads(capfd.readouterr().out)
    margin = next(field for field in document["fields"] if field["name"] == "margin")
    assert margin["range"] == "≥ 0.05, < 1"
    assert main(["show", "image_folder"]) == 0
    shown = capfd.readouterr().out
    assert "height and width of model inputs in pixels." in shown
    assert "required" in shown


def test_show_a_recipe_is_its_text(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "quickstart"]) == 0
    assert capfd.readouterr().out == packaged()["quickstart"].read_text(encoding="utf-8")


def test_fields_of_a_class_with_args_section() -> None:
    class Thing:
        """A thing.

        Args:
            width: how wide
                it is.
            depth: how deep.

        More text: not an argument.
        """

        def __init__(self, width: int, depth: float = 2.5) -> None: ...

    assert argument_docs(Thing.__doc__.replace("\n        ", "\n") if Thing.__doc__ else "") == {
        "width": "how wide it is.",
        "depth": "how deep.",
    }
    width, depth = fields_of(Thing)
    assert (width["required"], width["type"], width["meaning"]) == (True, "int", "how wide it is.")
    assert (depth["required"], depth["default"]) == (False, 2.5)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of 12 small colour images."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dög", "e: #emu")):
        folder = tmp_path / "my photos" / name
        folder.mkdir(parents=True)
        for index in range(12):
            pixels = generator.integers(0, 120, (40, 50, 3)) + 60 * np.eye(3)[number]
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "my photos"


def test_init_writes_a_recipe_that_runs(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", str(photos)]) == 0
    assert "next: sparing run my_photos.yaml" in capfd.readouterr().out
    text = Path("my_photos.yaml").read_text(encoding="utf-8")
    assert "36 images of 3 classes, about 50×40 pixels, colour" in text
    recipe = load_recipe("my_photos.yaml")
    assert recipe.task.name == "image_folder"  # type: ignore[union-attr]
    assert recipe.task.fields == {"path": "my photos", "size": 32, "channels": 3}  # type: ignore[union-attr]
    assert main(["run", "my_photos.yaml", "--dry-run"]) == 0
    quick = ["--set", "steps.baseline.epochs=1", "--set", "meter.max_seconds=0.2", "--set", "meter.min_seconds=0"]
    quick += ["--set", "meter.memory=false", "--until", "baseline", "-q"]
    capfd.readouterr()
    assert main(["run", "my_photos.yaml", *quick]) == 0, capfd.readouterr().err

    assert main(["init", str(photos)]) == 2
    assert "my_photos.yaml is there already; --force replaces it" in capfd.readouterr().err
    assert main(["init", str(photos), "--force"]) == 0


def test_init_sees_grey_images_and_refuses_what_is_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "grey" / name).mkdir(parents=True)
        for index in range(8):
            Image.fromarray(np.full((64, 64), index * 20, np.uint8)).save(tmp_path / "grey" / name / f"{index}.png")
    assert main(["init", "grey", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)["found"]
    assert found["grey"] is True
    assert found["classes"] == {"a": 8, "b": 8}
    assert load_recipe("grey.yaml").task.fields["channels"] == 1  # type: ignore[union-attr]
    (tmp_path / "empty").mkdir()
    assert main(["init", "empty"]) == 1
    assert "no image" in capfd.readouterr().err
    assert main(["init", "nowhere"]) == 1
    assert "package.module:Class" in capfd.readouterr().err
    (tmp_path / "grey/a/0.png").write_bytes(b"no image at all")
    assert main(["init", "grey", "--force"]) == 1
    assert "0.png" in capfd.readouterr().err


MODULE = """\
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self, classes, width=8):
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, classes))
"""


@pytest.mark.slow
def test_init_for_a_model_class_runs_once_data_are_in(tmp_path: Path, sparing: Sparing) -> None:
    (tmp_path / "own_nets.py").write_text(MODULE, encoding="utf-8")
    done = sparing("init", "own_nets:Tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = tmp_path / "tiny_sparing.py"
    text = script.read_text(encoding="utf-8")
    assert "classes=..." in text
    assert "width=8" in text
    data = (
        "import torch\nfrom torch.utils.data import TensorDataset\n"
        "x = torch.randn(200, 1, 8, 8); data = TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())\n"
    )
    text = text.replace("import sparing\n", f"import sparing\n{data}", 1)
    text = text.replace("train_data = ...", "train_data = data").replace("test_data = ...", "test_data = data")
    text = text.replace("classes=...", "classes=2").replace("labels=[...]", 'labels=["no", "yes"]')
    script.write_text(text, encoding="utf-8")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "student" in ran.stdout
    assert sparing("init", "own_nets:Nothing", cwd=tmp_path).returncode == 2


def test_data_list_and_check(tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--data", str(tmp_path), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    present = {line["name"]: line["present"] for line in document["data"]}
    names = ("fashion_mnist", "cifar10", "cifar100", "cora", "citeseer", "mutag", "nci1", "proteins", "dd")
    names += ("recidivism", "credit_default", "german_credit")
    names += ("sst2", "ag_news", "trec", "hflights", "squad", "tiny_shakespeare", "us_addresses")
    assert present == dict.fromkeys(names, False)
    assert main(["data", "check", "fashion_mnist", "--data", str(tmp_path)]) == 1
    shown = capfd.readouterr().out
    assert "NOT sound" in shown
    assert "is missing" in shown
    assert main(["data", "check", str(photos), "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert sum(found["splits"].values()) == 36
    (photos / "cat" / "3.png").write_bytes((photos / "cat" / "3.png").read_bytes()[:60])
    assert main(["data", "check", str(photos)]) == 1
    assert "3.png" in capfd.readouterr().out
    assert main(["data", "check", "fashion_mnst"]) == 2
    assert "Did you mean 'fashion_mnist'?" in capfd.readouterr().err


def test_data_check_reads_the_real_sets(data_root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "fashion_mnist", "--data", str(data_root), "--json"]) == 0
    (found,) = json.loads(capfd.readouterr().out)
    assert found["splits"] == {"train": 60000, "test": 10000}


def test_cache_shows_prunes_and_clears(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "kept"
    bound = Store(store).bind("a job", seed=0)
    for name in ("old", "new"):
        bound.once(name, lambda: {"numbers": list(range(100))}, JSON)
    old = next(entry for entry in Store(store).entries() if entry.name == "old")
    for path in (old.folder / "entry.json", old.folder):
        os.utime(path, (1, 1))
    assert main(["cache", "--store", str(store)]) == 0
    shown = capfd.readouterr().out
    assert "2 results" in shown
    assert "old" in shown
    assert main(["cache", "--store", str(store), "--prune", "30", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["freed"] > 0
    assert [entry["name"] for entry in document["entries"]] == ["new"]
    assert main(["cache", "--store", str(store), "--clear"]) == 0
    assert "0 results" in capfd.readouterr().out
    assert list(Store(store).entries()) == []


def test_cache_refuses_a_folder_that_is_no_store(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    assert main(["cache", "--clear", "--store", str(tmp_path)]) == 1
    assert "not a store" in capfd.readouterr().err
    assert (tmp_path / "holiday.jpg").exists()


def test_doctor_finds_this_machine_well(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in document["findings"]}
    assert document["ok"] is True
    assert states["torchvision"] == "ok"
    assert states["lightning"] == "ok"
    assert states["store"] in {"ok", "note"}


def _fake(site: Path, name: str, version: str, module: str = "") -> dict[str, str]:
    """An environment in which a distribution of this name and version is installed before all others."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    if module:
        (site / f"{name}.py").write_text(module, encoding="utf-8")
    known = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{known}"}


@pytest.mark.parametrize(
    ("name", "version", "module", "said"),
    [
        ("lightning", "2.6.2", "", "compromised release"),
        ("lightning", "2.6.3", "", "compromised release"),
        ("torchvision", "0.1", "raise RuntimeError('operator torchvision::nms does not exist')", "torchvision::nms"),
    ],
)
def test_doctor_names_what_is_known_to_be_bad(
    name: str, version: str, module: str, said: str, tmp_path: Path, sparing: Sparing
) -> None:
    done = sparing("doctor", env=_fake(tmp_path / "site", name, version, module))
    assert done.returncode == 1
    assert f"WRONG  {name}: " in done.stdout
    assert said in done.stdout
    assert "checks found something wrong" in done.stdout


def test_doctor_names_a_store_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("SPARING_STORE", str(tmp_path / "file" / "store"))
    assert main(["doctor"]) == 1
    shown = capfd.readouterr().out
    assert "WRONG  store: cannot be written" in shown
    assert "SPARING_STORE" in shown
