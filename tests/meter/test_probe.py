"""The fresh process: what it measures, what it imports, and how its errors come out."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from meter_guests import Blobs, Own

from sparing.core import probe as module
from sparing.core.errors import SparingError, UntrustedCode
from sparing.core.meter import comparable
from sparing.core.predictor import ModulePredictor, build_model
from sparing.core.probe import peak_mib, probe
from sparing.core.registry import resolve


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    task = resolve("tasks", "digits")()
    folder = tmp_path_factory.mktemp("model")
    model = ModulePredictor(build_model("mlp", task), task)
    model.save(folder / "module")
    comparable(model, task).save(folder / "onnx")
    return folder, task.example_input(1)


def test_onnx_without_torch(digits):
    folder, inputs = digits
    found = probe(folder / "onnx", inputs, "onnxruntime")
    assert not {"torch", "lightning", "scipy"} & set(found.modules)
    assert "onnxruntime" in found.modules
    assert found.peak_mib > found.runtime_mib > 10
    assert (found.energy_mj, found.energy_note) == (None, "not asked for")


def test_module_in_torch(digits):
    folder, inputs = digits
    found = probe(folder / "module", inputs, "torch")
    assert "torch" in found.modules
    assert found.runtime_mib > probe(folder / "onnx", inputs, "onnxruntime").peak_mib


def test_a_larger_model_takes_more(digits, tmp_path):
    folder, inputs = digits
    task = resolve("tasks", "digits")()
    comparable(ModulePredictor(build_model("mlp", task, widths=[4096, 2048]), task), task).save(tmp_path / "large")
    small, large = (probe(path, inputs, "onnxruntime") for path in (folder / "onnx", tmp_path / "large"))
    grown = (large.peak_mib - large.runtime_mib) - (small.peak_mib - small.runtime_mib)
    assert grown > 8_700_000 * 4 / (1 << 20)  # its weights at least


def test_our_own_memory_does_not_count(digits):
    folder, inputs = digits
    ballast = np.ones(200 << 20, dtype=np.uint8)
    assert peak_mib() > 200
    assert probe(folder / "onnx", inputs, "onnxruntime").peak_mib < 200
    del ballast


def test_errors_of_the_child(digits, tmp_path):
    folder, inputs = digits
    with pytest.raises(SparingError, match=r"sparing\.json"):
        probe(tmp_path, inputs, "onnxruntime")
    with pytest.raises(SparingError, match="inputs"):
        probe(folder / "onnx", (np.zeros((1, 3)), np.zeros(2)), "onnxruntime")
    task = Blobs()
    ModulePredictor(build_model(Own), task).save(tmp_path / "own")
    with pytest.raises(UntrustedCode, match="meter_guests"):
        probe(tmp_path / "own", task.example_input(1), "torch")


def test_a_child_that_dies(digits, monkeypatch):
    folder, inputs = digits
    monkeypatch.setattr(module.sys, "executable", "/bin/false")
    with pytest.raises(SparingError, match=r"exit status 1.*no message"):
        probe(folder / "onnx", inputs, "onnxruntime")


def test_a_child_that_hangs(digits, monkeypatch):
    folder, inputs = digits
    monkeypatch.setattr(module, "TIMEOUT_S", 0.01)
    with pytest.raises(SparingError, match=r"no answer within 0\.01 s"):
        probe(folder / "onnx", inputs, "onnxruntime")


def test_inputs_that_are_no_arrays(digits):
    folder, _ = digits
    with pytest.raises(SparingError, match=r"input 0\.graph is a object"):
        probe(folder / "onnx", ({"graph": object()},), "onnxruntime")


ZEUS = """
class Cpu:
    def __init__(self): self.mj = 0.0
    def get_total_energy_consumption(self, index):
        self.mj += 500.0
        return type("M", (), {"cpu_mj": self.mj, "dram_mj": DRAM})
    def __len__(self): return 1

def get_cpus():
    FAIL
    return Cpu()
"""


@pytest.mark.parametrize(
    ("fail", "dram", "found_mj", "note"),
    [
        ("pass", "self.mj", 1000.0, "RAPL of 1 CPU package(s) through zeus"),
        ("pass", "None", 500.0, "RAPL of 1 CPU package(s) through zeus"),
        ("raise PermissionError('RAPL requires root privileges')", "None", None, "requires root privileges"),
    ],
)
def test_energy_counter(digits, tmp_path, monkeypatch, fail, dram, found_mj, note):
    """Through the interface of zeus 0.16's ``zeus.device.cpu``: readings in mJ, DRAM where it is counted."""
    package = tmp_path / "zeus" / "device"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    (package / "cpu.py").write_text(ZEUS.replace("FAIL", fail).replace("DRAM", dram))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    folder, inputs = digits
    found = probe(folder / "onnx", inputs, "onnxruntime", energy_seconds=0.05)
    assert note in found.energy_note
    if found_mj is None:
        assert found.energy_mj is None
    else:
        count = int(found.energy_note.split("over ")[1].split()[0])
        assert found.energy_mj == pytest.approx(found_mj / count)


def test_peak_survives_no_exec():
    """A child of a large process reports its own peak; ``ru_maxrss`` would report its parent's."""
    code = textwrap.dedent(
        """
        import subprocess, sys
        ballast = bytearray(150 << 20)
        print(subprocess.run([sys.executable, "-c", "from sparing.core.probe import peak_mib; print(peak_mib())"],
              capture_output=True, text=True, check=True).stdout)
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 120
