"""Small real runs with dropout, killed until they finish, end as unbroken ones; the benchmark does more of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = """
import json, random, sys
sys.path.insert(0, sys.argv[1])
import _kills
said = []
found = getattr(_kills, sys.argv[2])(report=said.append, rng=random.Random(int(sys.argv[3])), **json.loads(sys.argv[4]))
print(json.dumps({**found, "said": said}))
"""


def killed(kind: str, seed: int, **settings: Any) -> dict[str, Any]:
    """What the harness found, in a process that has imported everything and computed nothing before it forks."""
    command = [sys.executable, "-c", CODE, str(BENCHMARKS), kind, str(seed), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_forked_runs_killed_at_random_moments_and_while_writing(workers):
    found = killed("warm", seed=workers, kills=3, deaths=4, workers_of=[workers])
    assert found["kills"] >= 3
    assert found["unequal"] == 0, found["said"]


@pytest.mark.slow
def test_a_command_line_killed_once():
    found = killed("cold", seed=1, kills=1, deaths=1)
    assert found["kills"] >= 1
    assert found["unequal"] == 0, found["said"]


SHORT = """
task: digits
model: {{name: mlp, widths: [4]}}
seed: {seed}
meter: {{min_seconds: 0, max_seconds: 0.01, memory: false, energy: "off", batch: 4}}
steps: [{{train: {{epochs: 1, workers: {workers}}}}}]
"""


def test_the_comparison_sees_a_difference_and_only_that(tmp_path, monkeypatch):
    """Another seed is another run: its ledger, its model and its stored results differ; the same seed's do not."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _kills

    monkeypatch.setattr(_kills, "RECIPE", SHORT)
    found = []
    for name, seed in {"one": 1, "other": 2, "one again": 1}.items():
        _kills._run(_kills._recipe(tmp_path / name, seed, 0), tmp_path / name)
        found.append(_kills.result(tmp_path / name))
    assert [part for part in found[0] if found[0][part] == found[1][part]] == []
    assert found[0] == found[2]
