"""``sparing run``, and what looks at finished runs."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import sparing as package
from sparing.cli import main
from sparing.core.ledger import Ledger

Sparing = Callable[..., "subprocess.CompletedProcess[str]"]


def test_a_run_leaves_ledger_report_recipe_and_model(finished: Path, recipe: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "ledger.json",
        "outcomes.npz",
        "recipe.yaml",
        "report.html",
        "model",
    }
    ledger = Ledger.load(finished)
    assert ledger.ids == ("baseline", "int8")
    assert (finished / "recipe.yaml").read_bytes() == recipe.read_bytes()
    assert "<h1>small</h1>" in (finished / "report.html").read_text(encoding="utf-8")
    predictor = package.load(finished / "model")
    assert np.asarray(predictor.predict([np.zeros((8, 8, 1), np.uint8)])).shape == (1, 10)


def test_rows_are_printed_as_they_come_then_the_table(recipe: Path, tmp_path: Path, sparing: Sparing) -> None:
    done = sparing("run", str(recipe), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("baseline: accuracy 0.")
    assert "model bytes" in lines[0]
    assert lines[1].startswith("int8: accuracy 0.")
    table = done.stdout[done.stdout.index("Δ first") :]
    assert "baseline" in table
    assert "Report: runs/small/report.html" in done.stdout
    assert (tmp_path / "runs/small/report.html").is_file()
    assert "\x1b[" not in done.stdout + done.stderr, "no colour and no progress bar in a pipe"
    assert done.stderr == ""


def test_json_is_one_document_and_nothing_else(recipe: Path, tmp_path: Path, sparing: Sparing) -> None:
    done = sparing("run", str(recipe), "--json", "--out", str(tmp_path / "out"), "--seeds", "2")
    document = json.loads(done.stdout)
    assert [(row["id"], row["seed"]) for row in document["rows"]] == [
        ("baseline", 0),
        ("int8", 0),
        ("baseline", 1),
        ("int8", 1),
    ]
    assert [line["id"] for line in document["summary"]] == ["baseline", "int8"]
    assert Path(document["report"]).is_file()
    assert Path(document["model"], "sparing.json").is_file()
    assert (tmp_path / "out/model-seed1/sparing.json").is_file()


def test_quiet_prints_the_folder_only(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["run", str(recipe), "--until", "baseline", "-q", "-o", str(out)]) == 0
    assert capfd.readouterr() == (f"{out}\n", "")
    assert Ledger.load(out).ids == ("baseline",)


def test_set_changes_the_run(recipe: Path, tmp_path: Path) -> None:
    arguments = ["run", str(recipe), "--until", "baseline", "-q", "-o", str(tmp_path / "out")]
    assert main([*arguments, "--set", "steps.baseline.epochs=1", "--set", "steps.baseline.lr=0.01"]) == 0
    (row,) = Ledger.load(tmp_path / "out").rows
    assert (row.config["epochs"], row.config["lr"]) == (1, 0.01)


def test_dry_run_plans_and_writes_nothing(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert main(["run", str(recipe), "--dry-run"]) == 0
    shown = capfd.readouterr().out
    assert f"{recipe}:6" in shown
    assert "nothing" in shown
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "store"}
    assert main(["run", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capfd.readouterr().out)
    assert [step["id"] for step in plan["steps"]] == ["baseline", "int8"]

    assert main(["run", str(recipe), "--until", "baseline", "-q", "-o", str(tmp_path / "out")]) == 0
    capfd.readouterr()
    assert main(["run", str(recipe), "--dry-run", "--json"]) == 0
    first, second = json.loads(capfd.readouterr().out)["steps"]
    assert first["stored_results"] > 0
    assert first["seconds_when_made"] > 0
    assert second["stored_results"] == 0


def test_all_problems_of_a_recipe_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("task: digit\nsteps:\n  - train: {epochs: 0}\n  - quantise\n", encoding="utf-8")
    assert main(["run", str(path)]) == 2
    error = capfd.readouterr().err
    for said in ("wrong.yaml:1", "Did you mean 'digits'", "wrong.yaml:3", "epochs", "wrong.yaml:4", "'quantize'"):
        assert said in error


def test_a_run_that_fails_keeps_its_rows_and_says_why(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparing.compression.quantization import Quantize
    from sparing.core.errors import NoEffect

    def refuse(self: Quantize, job: object) -> None:
        raise NoEffect("no layer could be quantised: <all> of 2 were looked at")

    monkeypatch.setattr(Quantize, "apply", refuse)
    out = tmp_path / "out"
    assert main(["run", str(recipe), "-o", str(out)]) == 1
    printed, error = capfd.readouterr()
    assert printed.startswith("baseline: accuracy")
    assert "sparing: no layer could be quantised" in error
    assert f"{recipe}:7" in error
    report = (out / "report.html").read_text(encoding="utf-8")
    assert "Stopped early." in report
    assert "no layer could be quantised: &lt;all&gt; of 2" in report

    assert main(["explain", str(out), "int8"]) == 0
    shown = capfd.readouterr().out
    assert "has no row" in shown
    assert "no layer could be quantised" in shown


def test_missing_data_is_code_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstart", "--set", "task=fashion_mnist", "--data", str(tmp_path)]) == 1
    error = capfd.readouterr().err
    assert str(tmp_path / "fashion_mnist") in error
    assert "SHA-256" in error


def test_colours_and_progress_only_on_a_terminal(recipe: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "sparing.cli", "run", str(recipe), "--until", "baseline"],
        stdout=slave,
        stderr=slave,
        cwd=tmp_path,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(master)
    assert process.wait(timeout=120) == 0
    assert b"baseline \xe2\x80\xa6" in shown, "the step at work is named"
    assert b"\x1b[" in shown


def test_explain_names_outcome_and_candidates(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = Ledger.load(finished).of("int8")[0]
    assert row.candidates
    assert main(["explain", str(finished), "int8"]) == 0
    shown = capfd.readouterr().out
    assert row.outcome in shown
    for candidate in row.candidates:
        assert candidate["name"] in shown
    assert main(["explain", str(finished / "ledger.json"), "int8", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["rows"][0]["candidates"] == row.candidates
    assert main(["explain", str(finished), "int9"]) == 2
    assert "Did you mean 'int8'?" in capfd.readouterr().err


def test_report_is_written_again(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    (copy / "report.html").unlink()
    assert main(["report", str(copy)]) == 0
    assert "baseline" in capfd.readouterr().out
    assert (copy / "report.html").stat().st_size > 1_000_000
    assert main(["report", str(copy), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["report"] == str(tmp_path / "page.html")
    (copy / "ledger.json").write_text("{}", encoding="utf-8")
    assert main(["report", str(copy)]) == 1
    assert "not a ledger" in capfd.readouterr().err


def test_compare(finished: Path, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    assert main(["run", str(recipe), "--set", "steps.baseline.epochs=1", "-q", "-o", str(other)]) == 0
    capfd.readouterr()
    page = tmp_path / "page.html"
    assert main(["compare", str(finished), str(other), "--out", str(page)]) == 0
    shown = capfd.readouterr().out
    assert "Δ first" in shown
    assert page.is_file()
    assert main(["compare", str(finished), str(other), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert list(document["runs"]) == [str(finished), str(other)]
    assert main(["compare", str(finished), str(finished)]) == 2


def test_bench_measures_one_folder(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(finished / "model"), "--batch", "8", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    figures = document["figures"]
    ledger = Ledger.load(finished).rows[-1].figures
    for name in ("accuracy", "model bytes", "parameters", "MACs"):
        assert figures[name]["value"] == ledger[name].value
    assert figures["latency p50"]["value"] > 0
    assert document["meter"]["batch"] == 8
    assert document["remarks"] == []


def test_bench_without_the_task_measures_costs(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from sparing.core.predictor.base import Context

    predictor = package.load(finished / "model")
    predictor.context = Context("somebody's own", predictor.labels, predictor.preprocessing)
    predictor.save(tmp_path / "own")
    assert main(["bench", str(tmp_path / "own")]) == 0
    shown = capfd.readouterr().out
    assert "quality is not measured: the model's task \"somebody's own\" is not a registered one" in shown
    assert "latency p50" in shown
    assert "accuracy" not in shown

    predictor.context = Context()
    predictor.save(tmp_path / "bare")
    assert main(["bench", str(tmp_path / "bare"), "--json"]) == 0
    figures = json.loads(capfd.readouterr().out)["figures"]
    assert figures["latency p50"]["value"] > 0
    assert "latency p50 with preprocessing" not in figures or figures["latency p50 with preprocessing"]["value"] is None


def test_bench_refuses_a_tampered_folder(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "model"
    shutil.copytree(finished / "model", copy)
    (payload,) = copy.glob("model.*")
    payload.write_bytes(payload.read_bytes()[:-1] + b"\x00")
    assert main(["bench", str(copy)]) == 1
    assert "SHA-256" in capfd.readouterr().err


def test_a_saved_model_of_somebody_s_class_needs_trust(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparing.core.predictor import ModulePredictor
    from sparing.core.registry import resolve

    (tmp_path / "somebodys_nets.py").write_text(
        "from torch import nn\n\nclass Net(nn.Sequential):\n    def __init__(self, width):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = package.build_model("somebodys_nets:Net", width=4)
    ModulePredictor(model, resolve("tasks", "digits")()).save(tmp_path / "net")
    path = tmp_path / "own.yaml"
    meter = "{min_seconds: 0, max_seconds: 0.2, memory: false, energy: estimate}"
    path.write_text(
        f"task: digits\nmodel: {{path: net}}\nmeter: {meter}\nsteps:\n  - train: {{epochs: 1}}\n", encoding="utf-8"
    )
    assert main(["run", str(path), "--dry-run"]) in {1, 2}
    assert "somebodys_nets" in capfd.readouterr().err
    assert main(["run", str(path), "--dry-run", "--trust", "somebodys_nets"]) == 0
    assert "code of others that would be imported: somebodys_nets" in capfd.readouterr().out
    assert main(["run", str(path), "--trust", "somebodys_nets", "-q", "-o", str(tmp_path / "out")]) == 0
    assert Ledger.load(tmp_path / "out").ids == ("given", "train")
