"""The machine as the ledger names it."""

import json
import platform

from sparing.core import environment as module
from sparing.core.environment import environment


def test_entries():
    found = environment()
    json.dumps(found, allow_nan=False)
    assert found["python"] == platform.python_version()
    assert found["packages"].keys() >= {"torch", "onnxruntime", "numpy"}
    assert 1 <= found["usable_cores"] <= found["cores"]
    assert found["memory_mib"] > 100
    assert set(found["cpu_features"]) <= set(module.FEATURES)


def test_no_path_of_this_machine():
    assert str(module.Path.home()) not in json.dumps(environment())
    assert str(module.Path(module.__file__).parents[3]) not in json.dumps(environment())


def test_cpu_flags(monkeypatch):
    text = "processor : 0\nmodel name : Some CPU @ 2 GHz\nflags : fpu avx2 avx512_vnni\n\nprocessor : 1\n"
    monkeypatch.setattr(module.Path, "read_text", lambda self: text)
    assert module.cpu.__wrapped__() == ("Some CPU @ 2 GHz", ("avx2", "avx512_vnni"))


def test_no_cpuinfo(monkeypatch):
    def fail(self):
        raise FileNotFoundError

    monkeypatch.setattr(module.Path, "read_text", fail)
    model, features = module.cpu.__wrapped__()
    assert model
    assert features == ()
