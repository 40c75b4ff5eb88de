"""What the tool costs before it does anything, and how it answers wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import sparing as package
from sparing.cli import main

HEAVY = ("torch", "lightning", "onnx", "onnxruntime", "numpy", "scipy", "pydantic", "plotly")


def _modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)), file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import sparing",
        "from sparing.cli import main; main(['--help'])",
        "from sparing.cli import main; main(['run', '--help'])",
        "from sparing.cli import main; main(['--version'])",
        "from sparing.cli import main; main(['run', '--sed', '1'])",
    ],
)
def test_starts_without_heavy_libraries(code: str) -> None:
    loaded = _modules_after(code)
    assert "sparing" in loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize("command", [["list"], ["data", "list"], ["show", "quickstart"], ["cache"]])
def test_light_commands_import_no_torch(command: list[str]) -> None:
    loaded = _modules_after(f"from sparing.cli import main; assert main({command!r}) == 0")
    assert not loaded & {"torch", "lightning", "onnxruntime"}


def _cpu_seconds(code: str) -> float:
    """The least of five processes, less what an empty one takes."""
    clock = "import resource; r = resource.getrusage(resource.RUSAGE_SELF); print(r.ru_utime + r.ru_stime)"

    def least(program: str) -> float:
        outputs = [
            subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            for _ in range(5)
        ]
        return min(float(output.splitlines()[-1]) for output in outputs)

    return least(f"{code}\n{clock}") - least(clock)


def test_import_and_help_are_quick() -> None:
    assert _cpu_seconds("import sparing") < 0.1
    assert _cpu_seconds("from sparing.cli import main; main(['--help'])") < 0.27


def test_every_public_name_is_there() -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'rune'"):
        package.rune  # noqa: B018


def test_types_and_run_time_agree_on_where_public_names_live() -> None:
    import ast

    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert declared == package._HOME
    assert {*declared, "__version__"} == set(package.__all__)


def test_version_is_the_project_s(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert package.__version__ == project["project"]["version"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == package.__version__


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("run", "list", "show", "explain", "compare", "report", "bench", "init", "data", "cache", "doctor"):
        assert f" {command} " in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rum"], 'Did you mean "run"?'),
        (["rum"], "see: sparing --help"),
        (["data", "chekc"], "see: sparing data --help"),
        (["data", "list", "--jsn"], "see: sparing data list --help"),
        (["run"], "requires an argument"),
        (["run", "quickstart", "--sed", "3"], "Did you mean --seeds?"),
        (["run", "quickstart", "--seeds", "0"], "Must be >= 1"),
        (["run", "quickstart", "--seeds", "x"], 'unable to convert "x" into int'),
        (["bench", "folder", "--threads", "0"], "Must be >= 1"),
        (["cache", "--prune", "-1"], "Must be >= 0"),
        (["list", "stepz"], "stepz"),
        (["run", "quickstat"], "Did you mean 'quickstart'?"),
        (["show", "convnett"], "Did you mean 'convnet'?"),
        (["run", "missing.yaml"], "no such file"),
        (["run", "quickstart", "--set", "steps.baseline.epochs=0"], "greater than or equal to 1"),
        (["run", "quickstart", "--set", "steps.baseline.epoch=3"], "Did you mean 'epochs'?"),
        (["run", "quickstart", "--set", "steps.baselin.epochs=3"], "Did you mean 'baseline'?"),
        (["run", "quickstart", "--until", "stud", "--dry-run"], "Ids: baseline"),
        (["compare", "one"], "at least two runs"),
        (["explain", "nowhere", "baseline"], "nowhere is missing"),
        (["cache", "--prune", "1", "--clear"], "exclude each other"),
    ],
)
def test_wrong_usage_is_code_2_and_says_what_is_right(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, error = capfd.readouterr()
    assert out == ""
    assert said in error
    assert "Traceback" not in error


def test_wrong_usage_with_json_is_one_document(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "quickstat", "--json"]) == 2
    document = json.loads(capfd.readouterr().out)
    assert document["error"]["type"] == "UnknownName"
    assert "Did you mean 'quickstart'?" in document["error"]["message"]
    assert main(["list", "--jsom", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["type"] == "Usage"


def test_no_traceback_unless_asked_for(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*arguments: object, **more: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("sparing.cli.catalogue.list_parts", broken)
    assert main(["list"]) == 1
    _, error = capfd.readouterr()
    assert "RuntimeError: a bug" in error
    assert "SPARING_DEBUG=1" in error
    assert "Traceback" not in error
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list", "--debug"])
    monkeypatch.setenv("SPARING_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list"])


def test_interrupt_is_code_130(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparing.cli.catalogue.list_parts", interrupted)
    assert main(["list"]) == 130
    assert "goes on from what is finished" in capfd.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m sparing.cli show train | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("step train")
    assert done.stderr == ""
