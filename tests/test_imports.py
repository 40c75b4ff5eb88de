"""What is imported, and how long it takes: the tool answers at once, and a saved graph needs no training code."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

HEAVY = ("torch", "lightning", "onnxruntime", "onnx", "scipy", "sklearn", "plotly", "pydantic", "yaml")
NEVER = ("torchvision", "torchaudio", "tensorflow", "jax")


def imported(code: str, *arguments: str) -> tuple[set[str], float]:
    """(top-level modules that ``code`` leaves imported, its seconds) in a fresh process."""
    script = (
        "import sys, time\nstart = time.perf_counter()\n"
        f"{code}\n"
        "print(time.perf_counter() - start, *{name.partition('.')[0] for name in sys.modules}, sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, *modules = done.stdout.splitlines()[-1 - done.stdout.count("\n") :]
    return set(modules), float(seconds)


def command(*arguments: str) -> str:
    """Code that calls the command line and swallows what it prints and its exit."""
    return (
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        f"    from sparing.cli import main; sys.argv = ['sparing', *{list(arguments)!r}]; main()"
    )


def test_importing_sparing_is_quick_and_imports_nothing_heavy():
    times = []
    for _ in range(3):
        modules, seconds = imported("import sparing")
        times.append(seconds)
    assert not modules & {*HEAVY, "numpy", "rich", "cyclopts"}
    assert min(times) < 0.3  # 0.1 s is the aim, on a machine with nothing else to do


@pytest.mark.parametrize(
    "arguments", [("--help",), ("run", "--help"), ("list", "steps"), ("list", "tasks"), ("list", "models")]
)
def test_help_and_lists_import_no_torch(arguments):
    modules, seconds = imported(command(*arguments))
    assert "sparing" in modules
    assert not modules & {"torch", "lightning", "onnxruntime", "onnx", "scipy", "sklearn", "plotly"}
    assert seconds < 0.9  # 0.3 s is the aim


def test_loading_a_graph_imports_neither_torch_nor_lightning(tmp_path):
    from sparing import build_model
    from sparing.core.predictor import to_onnx
    from sparing.tasks.images.digits import Digits

    task = Digits()
    folder = to_onnx(build_model("mlp", task, widths=[4]), task.example_input(), task).save(tmp_path / "model")
    image = tmp_path / "image.npy"
    np.save(image, np.zeros((8, 8, 1), np.uint8))
    code = (
        "import numpy, sparing\n"
        "model = sparing.load(sys.argv[1])\n"
        "assert model.predict([numpy.load(sys.argv[2])]).shape == (1, 10)\n"
        "assert model.describe().parameters > 0"
    )
    modules, _ = imported(code, str(folder), str(image))
    assert "onnxruntime" in modules
    assert not modules & {"torch", "lightning", "sklearn", "scipy"}


def test_planning_imports_torch_and_no_more_than_it_needs():
    modules, _ = imported("import sparing.core.recipe as r\nr.parse_recipe('task: digits\\nsteps: [train]')")
    assert not modules & {"lightning", "onnxruntime", "sklearn"}


def test_nothing_brings_what_we_do_without():
    assert not [name for name in NEVER if find_spec(name)]


def test_every_public_name_is_there():
    import sparing

    for name in sparing.__all__:
        assert getattr(sparing, name) is not None
    assert set(dir(sparing)) >= set(sparing.__all__)
    assert Path(sparing.__file__).with_name("py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'Trian'"):
        sparing.Trian  # noqa: B018
