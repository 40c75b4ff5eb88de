"""A measured ledger as a table with one column for each step, for README and the tutorial.

    python docs/_ext/ledger_table.py [RUN]

puts the ledger kept in ``benchmarks/results/quickstart/`` into README.md, between its two marks; with RUN, a folder
that ``sparing run quickstart`` left, that folder's ledger is kept there first. ``make readme-ledger`` does all of it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from sparing.core import ledger as columns
from sparing.core.ledger import Ledger
from sparing.core.table import table

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "quickstart"
BEGIN, END = "<!-- ledger: begin (make readme-ledger) -->", "<!-- ledger: end -->"
SHORT = (
    "accuracy",
    "Δ first",
    "worst_class_accuracy",
    "ece",
    "accuracy under gaussian_noise",
    "accuracy under gaussian_blur",
    "accuracy under contrast",
    columns.MODEL_BYTES,
    columns.MACS,
    columns.P50,
    columns.THROUGHPUT,
    columns.PEAK_MEMORY,
    columns.ENERGY,
    columns.WALL,
    "outcome",
)
"""Lines of README's table."""
SAID = {
    "Δ first": "difference from the first row, paired",
    "worst_class_accuracy": "accuracy of the worst class",
    "ece": "expected calibration error",
    columns.THROUGHPUT: "throughput, batch 64",
    columns.PEAK_MEMORY: "peak memory, fresh process",
    columns.WALL: "time it took to make",
    "outcome": "decision",
}


def transposed(ledger: Ledger, names: tuple[str, ...] | None = None) -> tuple[list[str], list[list[str]]]:
    """(head, rows): a row for each of ``names``, by default for every column of the ledger, a column for each step."""
    whole = table(ledger)
    head = ["", *(line["step"].text for line in whole.lines)]
    chosen = [name for name in names or whole.columns if name in whole.columns and name != "step"]
    return head, [[name, *(line[name].text if name in line else "" for line in whole.lines)] for name in chosen]


def origin(ledger: Ledger) -> str:
    """Where, when and how the figures were measured."""
    machine, packages = ledger.environment, ledger.environment["packages"]
    row = next(row for row in ledger.rows if columns.key(row.seed, row.id) in ledger.outcomes)  # the first measured
    units = len(ledger.outcomes[columns.key(row.seed, row.id)])
    seeds = f"seed {row.seed}" if len(ledger.seeds) == 1 else f"{len(ledger.seeds)} seeds"
    return (
        f"Measured {ledger.created[:10]} on {units} test images, {seeds}, in {row.runtime} with "
        f"{ledger.meter['threads']} thread, on {machine['cpu']} ({machine['usable_cores']} cores), "
        f"torch {packages['torch']}, ONNX Runtime {packages['onnxruntime']}."
    )


def markdown(ledger: Ledger) -> str:
    """README's block: the short table, how to read it, and where it comes from."""
    head, rows = transposed(ledger, SHORT)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *([SAID.get(name, name), *cells] for name, *cells in rows)]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n\n".join([body, " ".join([*table(ledger).remarks, origin(ledger)])])


def with_ledger(text: str, ledger: Ledger) -> str:
    """``text`` with the block between its marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md has no block between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{markdown(ledger)}\n\n{END}{after}"


def main(arguments: list[str]) -> None:
    """Keep the ledger of the run named, if one is, and write README."""
    if arguments:
        run = Path(arguments[0])
        Ledger.load(run)  # refuses one that is damaged
        KEPT.mkdir(parents=True, exist_ok=True)
        for name in (columns.FILE, columns.OUTCOMES):
            shutil.copyfile(run / name, KEPT / name)
    readme = ROOT / "README.md"
    readme.write_text(with_ledger(readme.read_text(encoding="utf-8"), Ledger.load(KEPT)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
