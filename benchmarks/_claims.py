"""What every benchmark writes: claims with their figures, thresholds and whether they hold.

A benchmark is a module with functions that return :class:`Claim` objects; :func:`main` runs those named on the command
line (all by default), merges them with the claims already in ``results/<system>.json`` and writes the file.
"""

from __future__ import annotations

import argparse
import operator
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparing.core import files
from sparing.core.environment import environment

RESULTS = Path(__file__).parent / "results"
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}


@dataclass(frozen=True)
class Claim:
    """One claim, measured. ``holds`` follows from ``figure``, ``threshold`` and ``also``, and from nothing else."""

    id: str
    statement: str
    source: str
    figure: float
    unit: str
    comparison: str
    threshold: float
    gate: bool = True
    interval95: tuple[float, float] | None = None
    seeds: Sequence[int] = ()
    baselines: Sequence[dict[str, Any]] = ()
    """[{"name", "figure"}]: what the figure stands beside, measured in the same run."""
    also: Sequence[tuple[str, float, str, float]] = ()
    """Further conditions of the same claim: (name, figure, comparison, threshold)."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the figure and every further condition reach their thresholds."""
        conditions = [("", self.figure, self.comparison, self.threshold), *self.also]
        return all(COMPARISONS[sign](value, limit) for _, value, sign, limit in conditions)

    def to_json(self) -> dict[str, Any]:
        """The claim as it stands in the results file."""
        return {**asdict(self), "threshold": f"{self.comparison} {self.threshold:g}", "holds": self.holds}


def revision() -> str:
    """The commit measured, with "+changes" when the working tree differs from it."""
    folder = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], cwd=folder, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def main(system: str, benchmarks: dict[str, Callable[[], list[Claim]]], argv: Sequence[str] | None = None) -> int:
    """Run the named benchmarks, write ``results/<system>.json``, print each claim; 1 when a gate does not hold."""
    parser = argparse.ArgumentParser(description=f"Measure the claims of {system}.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of: {', '.join(benchmarks)} (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in benchmarks]
    if unknown:
        parser.error(f"no benchmark named {', '.join(unknown)}; there are: {', '.join(benchmarks)}")
    target = options.out / f"{system}.json"
    known = files.read_json(target)["claims"] if target.is_file() else []
    claims = {claim["id"]: claim for claim in known}
    about = environment()
    failed = False
    for name in options.names or benchmarks:
        start = time.perf_counter()
        for claim in benchmarks[name]():
            claims[claim.id] = claim.to_json() | {"revision": revision(), "wall_s": time.perf_counter() - start}
            failed |= claim.gate and not claim.holds
            verdict = "holds" if claim.holds else "does not hold"
            print(f"{claim.id}: {claim.figure:.4g} {claim.unit} ({claim.comparison} {claim.threshold:g}): {verdict}")
        files.write_json(
            target,
            {
                "system": system,
                "claims": list(claims.values()),
                "machine": {name: about[name] for name in ("cpu", "cpu_features", "cores", "memory_mib", "os")},
                "versions": {"python": about["python"], "sparing": about["sparing"], **about["packages"]},
                "revision": revision(),
                "wall_s": sum(claim["wall_s"] for claim in claims.values()),
            },
        )
    sys.stdout.flush()
    return int(failed)
