"""What a reader of the terminal sees."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from sparing.core.ledger import BREAK_EVEN, MACS, MODEL_BYTES, P50, Figure, Ledger, Row
from sparing.core.table import compare, markdown, table
from sparing.core.text import number, plus_minus, ratio


def ledger(*steps, seeds=1, **changes):
    made = Ledger(**changes)
    for seed in range(seeds):
        for row_id, right, size, p50, runtime in steps:
            right = right + seed
            figures = {
                "accuracy": Figure(right / 1000, better="higher", interval=(right / 1000 - 0.01, right / 1000 + 0.01)),
                "ece": Figure(0.0213),
                MODEL_BYTES: Figure(size, "B"),
                MACS: Figure(None, how="n.a.", note="not counted"),
                P50: Figure(p50, "ms", interval=(p50 * 0.99, p50 * 1.01), note="noisy: x" if row_id == "busy" else ""),
            }
            row = Row(row_id, "train", "model", "t", seed, "accuracy", runtime, "onnx", figures, outcome="kept FP32")
            made.add(row, np.arange(1000) < right)
    return made


PLAIN = (("baseline", 950, 1_000_000, 2.0, "onnxruntime"), ("small", 900, 250_000, 1.0, "onnxruntime"))


def printed(thing, width, **options):
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(thing)
    return stream.getvalue()


def test_gains_and_losses_with_uncertainty():
    lines = table(ledger(*PLAIN)).lines
    assert lines[1]["accuracy"].text == "0.9000 ±0.01"
    assert lines[1]["Δ first"].text == "\u22120.0500 ±0.014"
    assert lines[1]["Δ first"].verdict == "loss"
    assert lines[1][MODEL_BYTES] == lines[1][MODEL_BYTES].__class__("250 kB (0.25×)", "gain")
    assert lines[1][P50].text == "1 ms (0.50×)"
    assert lines[0][P50].text == "2 ms"
    assert lines[1][MACS].text == "n.a."
    larger = table(ledger(("a", 900, 100, 1.0, "r"), ("b", 950, 200, 2.0, "r"))).lines[1]
    assert [larger[name].verdict for name in ("Δ first", MODEL_BYTES, P50)] == ["gain", "loss", "loss"]


def test_no_verdict_within_the_uncertainty():
    line = table(ledger(("a", 950, 100, 1.0, "r"), ("b", 949, 100, 1.005, "r"))).lines[1]
    assert line["Δ first"].verdict == ""
    assert line[P50].verdict == ""


def test_a_changed_runtime_is_shown_instead_of_ratios():
    made = table(ledger(("a", 950, 100, 1.0, "torch"), ("b", 950, 100, 0.5, "onnxruntime")))
    assert made.lines[1]["runtime"].text == "torch → onnxruntime"
    assert made.lines[1][P50].text == "0.5 ms"
    assert any("runtime changed" in remark for remark in made.remarks)


def test_seeds_show_their_number():
    line = table(ledger(*PLAIN, seeds=3)).lines[1]
    assert line["accuracy"].text == "0.9010 ±0.0025"
    assert line["Δ first"].text.endswith("n=3")


def test_noise_and_early_stop_are_said():
    made = ledger(("a", 950, 100, 1.0, "r"), ("busy", 950, 100, 0.5, "r"))
    made.stop("seed 0: disk full")
    shown = printed(table(made), 200)
    assert "0.5 ms noisy (0.50×)" in shown
    assert "noisy: the machine was too busy" in shown
    assert "Stopped early: seed 0: disk full" in shown


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100, 120, 200])
def test_narrow_terminals_lose_columns_not_text(width):
    made = table(ledger(*PLAIN))
    shown = printed(made, width)
    assert max(len(line) for line in shown.splitlines()) <= width
    columns, hidden = made.fitting(width)
    assert columns[:2] == ("step", "accuracy") or width < 30
    words = " ".join(shown.split())
    if hidden:
        assert f"Not shown here: {', '.join(hidden)}." in words
    for column in columns:
        for line in made.lines:
            for part in line[column].text.split() if column in line else ():
                assert part in words
    assert ("ece" in columns) == (width >= 120)


@pytest.mark.parametrize("width", range(60, 140))
def test_a_ratio_folds_before_a_name_or_a_number_does(width):
    made = ledger(*PLAIN)
    for index, row in enumerate(made.rows):
        many = {"worst_class_accuracy": Figure(0.5), "peak memory": Figure(80.0 + index, "MiB")}
        made.rows[index] = replace(row, figures={**row.figures, **many}, outcome="")
    columns = table(made).fitting(width)[0]
    shown = printed(table(made), width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert all(column in shown.splitlines()[1] for column in columns), shown


def test_eighty_columns_hold_the_key_figures():
    assert {"step", "accuracy", "Δ first", MODEL_BYTES, P50} <= set(table(ledger(*PLAIN)).fitting(80)[0])


def test_no_colour_when_piped():
    assert "\x1b" not in printed(table(ledger(*PLAIN)), 100)
    assert "\x1b[31m" in printed(table(ledger(*PLAIN)), 100, force_terminal=True, color_system="standard")


def test_compare_names_runs_and_pairs_their_last_rows():
    one = ledger(*PLAIN, tasks={"t": "same"})
    two = ledger(*PLAIN[:1], ("other", 930, 100, 1.0, "onnxruntime"), tasks={"t": "same"})
    made = compare({"one": one, "two": two})
    assert [line["run"].text for line in made.lines] == ["one", "one", "two", "two"]
    assert [line["Δ one"].text for line in made.lines] == ["", "", "", "+0.0300 ±0.011"]
    two.tasks["t"] = "changed"
    assert "Δ one" not in compare({"one": one, "two": two}).columns


def test_markup_in_names_is_text():
    made = Ledger()
    made.add(Row("a", "s", "model", "t", 0, "[red]x", "[/]", "k", {"[red]x": Figure(1.0)}, outcome="[bold]kept"))
    assert "[red]x" in printed(table(made), 120)
    assert "[bold]kept" in printed(table(made), 120)


def test_an_empty_ledger_prints():
    assert table(Ledger()).lines == ()
    printed(table(Ledger()), 80)
    markdown(Ledger())


def test_markdown():
    shown = markdown(ledger(*PLAIN))
    header, rule, first, second = shown.split("\n\n")[0].splitlines()
    assert header == "| step | accuracy | Δ first | model bytes | latency p50 | MACs | outcome | runtime |"
    assert rule.count("---") == 8
    assert second.startswith("| small | 0.9000 ±0.01 | \u22120.0500 ±0.014 | 250 kB (0.25×) |")
    assert first.count("|") == second.count("|") == 9
    assert ledger(*PLAIN, seeds=2).to_markdown(1).count("0.9010") == 1


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (999_949, "B", "999.9 kB"),
        (999_950, "B", "1 MB"),
        (0, "B", "0 B"),
        (2_379_008, "", "2.379 M"),
        (32_213.2, "1/s", "32\u2009213 1/s"),
        (1_901_423.1, "1/s", "1.901 M 1/s"),
        (5000.0, "inferences", "5\u2009000 inferences"),
        (0.01146, "ms", "0.0115 ms"),
        (0.00001145, "s", "1.15e-05 s"),
        (-0.5, "", "\u22120.5000"),
        ("text", "", "text"),
    ],
)
def test_numbers(value, unit, shown):
    assert number(value, unit) == shown


def test_intervals_and_ratios():
    assert plus_minus(Figure(1.0, interval=(0.9, 1.1))) == " ±0.1"
    assert plus_minus(Figure(0.99, interval=(0.9, 1.0))) == " [0.9000, 1]"
    assert plus_minus(Figure(1000, "B", interval=(500, 1500))) == " ±500 B"
    assert plus_minus(Figure(1.0, interval=(1.0, 1.0))) == " ±0"
    assert (ratio(0.2512), ratio(0.0671), ratio(1), ratio(12.34)) == ("0.25×", "0.067×", "1.00×", "12.3×")


def test_break_even_column():
    made = Ledger()
    for row_id, p50 in (("a", 3.0), ("b", 1.0)):
        figures = {"x": Figure(1.0), P50: Figure(p50, "ms", interval=(p50, p50)), "wall": Figure(10.0, "s")}
        made.add(Row(row_id, "s", "model", "t", 0, "x", "r", "k", figures))
    assert table(made).lines[1][BREAK_EVEN].text == "5\u2009000 inferences"
