"""The HTML report: complete in itself, safe whatever names hold, everything of the ledger in it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files as resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparing.core.errors import InvalidValue
from sparing.core.ledger import Figure, Ledger, Picture
from sparing.report import comparison_html, report_html, write_comparison, write_report

NASTY = """</script><script>alert("x")</script><img src='http://evil.example/a.png' onerror=alert(1)>&amp;{{ 7*7 }}"""


class Page(HTMLParser):
    """Elements with their attributes and text; script and style contents apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._open = ""
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif self._open == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def policy(self) -> str:
        return next(
            str(meta["content"]) for meta in self.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"
        )


def test_asks_the_network_for_nothing(ledger: Ledger) -> None:
    page = Page(report_html(ledger))
    for tag, attributes in page.elements:
        assert tag not in {"link", "iframe", "object", "embed", "form", "base"}
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            allowed = "data:image/png;base64," if tag == "img" else "#"
            assert (attributes.get(name) or allowed).startswith(allowed), (tag, attributes)
    css = "".join(page.styles)
    assert css
    assert "url(" not in css
    assert "@import" not in css
    assert "default-src 'none'" in page.policy
    assert "http" not in page.policy


def test_runs_only_its_own_two_scripts(ledger: Ledger) -> None:
    page = Page(report_html(ledger))
    code = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    assert len(code) == 2
    allowed = re.findall(r"'sha256-([^']+)'", page.policy)
    assert allowed == [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    assert "script-src 'sha256" in page.policy
    plotly = (resources("plotly") / "package_data/plotly.min.js").read_text(encoding="utf-8")
    assert "plotly.js v" in plotly[:400]
    assert report_html(ledger).count(plotly[:60]) == 1


def test_names_from_users_are_shown_and_never_run(ledger: Ledger) -> None:
    row = ledger.rows[2]
    ledger.rows[2] = replace(
        row,
        task=NASTY,
        step=NASTY,
        runtime=NASTY,
        kind=NASTY,
        outcome=NASTY,
        headline=NASTY,
        figures={**row.figures, NASTY: Figure(0.5, NASTY, note=NASTY, better="higher")},
        by_class={NASTY: 0.5},
        curves={NASTY: [(0.0, 1.0), (1.0, 0.5)]},
        pictures={NASTY: Picture.of(np.zeros((2, 2), np.uint8), NASTY)},
        candidates=[{"name": NASTY, NASTY: NASTY}],
        remarks=[NASTY],
        sub={NASTY: row.sub["audit"]},
        config={NASTY: NASTY},
    )
    nasty = replace(ledger, name=NASTY, recipe=NASTY, environment={NASTY: NASTY}, created=NASTY, stopped=NASTY)
    for html in (report_html(nasty), comparison_html({NASTY: nasty, "other": ledger})):
        page = Page(html)
        assert len(page.scripts) == 3
        assert all(str(image["src"]).startswith("data:image/png") for image in page.named("img"))
        assert all("onerror" not in attributes for _, attributes in page.elements)
        assert 'alert("x")' in page.text
        assert "{{ 7*7 }}" in page.text
        assert json.loads(page.scripts[0][1])["pareto"]


def test_pictures_stand_under_their_row_with_their_captions(ledger: Ledger) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    ledger.rows[1] = replace(ledger.rows[1], pictures={"Condensed images": Picture.of(pixels, "Two of each class")})
    html = report_html(ledger)
    (image,) = Page(html).named("img")
    assert image["alt"] == "Two of each class"
    content = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)
    gallery = html[html.index('<h2 id="pictures">') : html.index('<h2 id="classes">')]
    assert "<h3>student</h3>" in gallery
    assert "Condensed images" in gallery


def test_every_figure_of_every_row_is_there(ledger: Ledger) -> None:
    page = Page(report_html(ledger))
    titles = [attributes.get("title") for attributes in page.named("td")]
    for row in ledger.rows:
        for name, figure in row.figures.items():
            assert name in page.text
            shown = "n.a." if figure.value is None else f"{figure.value} {figure.unit}".strip()
            assert any(str(title).startswith(shown) for title in titles), (row.id, name)
            assert figure.note in page.text
    assert "est." in page.text
    assert "derived" in page.text
    assert "the step saves no time" in page.text


def test_says_losses_as_plainly_as_gains(build: Callable[..., Ledger]) -> None:
    ledger = build()
    wrong = np.zeros(360, dtype=bool)
    wrong[:180] = True
    ledger.outcomes["0/int8"] = wrong
    figures = {**ledger.rows[2].figures, "accuracy": Figure(0.5, better="higher")}
    ledger.rows[2] = replace(ledger.rows[2], figures=figures)
    html = report_html(ledger)
    cards = html[html.index('<dl class="cards">') : html.index("</dl>")]
    assert re.search(r'class="worse">−0\.4\d+ [^<]*worse', cards)
    assert re.search(r'class="better">0\.052× of the first, better', cards)
    css = (resources("sparing.report") / "report.css").read_text(encoding="utf-8")
    size = re.findall(r"\.(?:better|worse) \{([^}]*)\}", css)
    assert len(size) == 2
    assert all("font" not in rule for rule in size), "gains and losses are set in the same size and weight"


def test_no_ratio_across_runtimes(ledger: Ledger) -> None:
    ledger.rows[2] = replace(ledger.rows[2], runtime="engine")
    html = report_html(ledger)
    assert "not comparable: engine after onnxruntime" in html
    assert "0.052×" not in html


def test_differences_are_the_paired_ones_of_the_ledger(ledger: Ledger) -> None:
    difference = ledger.difference("baseline", "student")
    assert difference is not None
    html = report_html(ledger)
    assert f"{abs(difference.value):.4f}" in html
    assert difference.method in html


def test_several_seeds_show_means_and_each_seed(build: Callable[..., Ledger]) -> None:
    ledger = build((0, 1, 2))
    page = Page(report_html(ledger))
    assert "Seeds: 0, 1, 2." in page.text
    for seed in (0, 1, 2):
        assert f"Seed {seed} alone" in page.text
    mean = np.mean([row.figures["accuracy"].value for row in ledger.of("baseline")])
    assert f"{mean:.4f}" in page.text
    series = json.loads(page.scripts[0][1])["curves"][0]["series"]
    assert [line["name"] for line in series[:2]] == ["baseline · seed 0", "student · seed 0"]


def test_plot_data_hold_the_four_costs(ledger: Ledger) -> None:
    data = json.loads(Page(report_html(ledger)).scripts[0][1])
    (panel,) = data["pareto"]
    assert [axis["short"] for axis in panel["axes"]] == ["Bytes", "Latency", "MACs", "Energy"]
    for row, point in zip(ledger.rows, panel["axes"][0]["points"], strict=True):
        assert point["x"] == row.figures["model bytes"].value
        assert point["y"] == row.figures["accuracy"].value
        assert (point["low"], point["high"]) == row.figures["accuracy"].interval
    assert [curve["name"] for curve in data["curves"]] == ["training loss", "validation accuracy"]


def test_worst_class_is_marked(ledger: Ledger) -> None:
    html = report_html(ledger)
    part = html[html.index('id="classes"') : html.index('id="decisions"')]
    worst = min(ledger.rows[0].by_class.values())
    assert re.search(rf"{worst:.4f}<span class=\"tag\">worst", part)


def test_tables_are_named_and_headings_in_order(build: Callable[..., Ledger]) -> None:
    two = {"a": build(), "b": build((0, 1))}
    for html in (report_html(build((0, 1))), comparison_html(two)):
        page = Page(html)
        tags = [tag for tag, _ in page.elements]
        assert tags.count("h1") == 1
        levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
        assert all(later <= earlier + 1 for earlier, later in pairwise(levels))
        assert tags.count("table") == tags.count("caption")
        assert all(attributes.get("scope") in {"col", "row"} for attributes in page.named("th"))
        ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
        assert len(ids) == len(set(ids))
        links = {str(attributes["href"])[1:] for attributes in page.named("a")}
        assert links <= set(ids)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    css = (resources("sparing.report") / "report.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6})", dark))

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for ground in ("paper", "raised"):
        for ink in ("ink", "muted", "accent", "better", "worse"):
            assert contrast(ink, ground) >= 4.5, (scheme, ink, ground)
        for number in range(8):
            assert contrast(f"plot-{number}", ground) >= 3, (scheme, number, ground)


def test_comparison_refuses_what_cannot_be_compared(build: Callable[..., Ledger]) -> None:
    one, other = build(), build(recipe="task: digits\nsteps:\n  - quantize\n")
    page = Page(comparison_html({"one": one, "other": other}))
    assert "not known" not in page.text
    assert "+ - quantize" in page.text
    foreign = replace(other, tasks={"digits": "sha256:9999"})
    page = Page(comparison_html({"one": one, "foreign": foreign}))
    assert "its data are not known to be those of one" in page.text
    with pytest.raises(InvalidValue, match="at least two runs; 1 given"):
        comparison_html({"one": one})


def test_a_run_that_stopped_says_why(ledger: Ledger) -> None:
    ledger.stop("seed 0: the loss was NaN")
    assert "Stopped early. seed 0: the loss was NaN" in Page(report_html(ledger)).text
    with pytest.raises(InvalidValue, match="nothing to report: seed 0: no data"):
        report_html(Ledger(stopped="seed 0: no data"))


def test_empty_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="no rows"):
        write_report(Ledger(), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def _browse(page: Path, profile: Path, *more: str) -> tuple[str, str]:
    """The document after its scripts ran, and what the browser logged; no name resolves to an address."""
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--window-size=1280,2000"]
    command += ["--enable-logging=stderr", *more, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.slow
def test_draws_in_a_browser_without_a_network(build: Callable[..., Ledger], tmp_path: Path) -> None:
    ledger = build((0, 1))
    ledger.rows[0].curves["<b>loss</b>"] = [(0.0, 1.0), (1.0, 0.5)]  # type: ignore[index]
    target = write_report(ledger, tmp_path / "report.html")
    dom, log = _browse(target, tmp_path / "profile")
    assert 'data-drawn="yes"' in dom
    assert dom.count('class="main-svg"') >= 4
    assert dom.count('class="point"') >= 6
    assert "CONSOLE" not in log, [line for line in log.splitlines() if "CONSOLE" in line]

    other = write_comparison({"a": ledger, "b": build()}, tmp_path / "compare.html")
    dom, log = _browse(other, tmp_path / "profile")
    assert 'data-drawn="yes"' in dom
    assert "CONSOLE" not in log


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.slow
def test_switch_changes_the_axis(ledger: Ledger, tmp_path: Path) -> None:
    html = report_html(ledger)
    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', html)
    assert policy
    click = "<script>document.querySelectorAll('.switch input')[1].click()</script></body>"
    copy = tmp_path / "copy.html"
    copy.write_text(html.replace(policy[0], "").replace("</body>", click), encoding="utf-8")
    dom, _ = _browse(copy, tmp_path / "profile")
    assert re.search(r"xtitle[^>]*>(<[^>]*>)*latency p50 \(ms\)", dom)
    assert "model bytes (B)" not in dom[dom.index('class="main-svg"') : dom.index('id="figures"')]


def test_other_losses_of_quality_are_said_too(ledger: Ledger) -> None:
    for index, value in enumerate((0.9, 0.7, 0.899)):
        figure = Figure(value, better="higher", interval=(value - 0.01, value + 0.01))
        ledger.rows[index] = replace(
            ledger.rows[index], figures={**ledger.rows[index].figures, "accuracy under blur": figure}
        )
    html = report_html(ledger)
    line = re.search(r"<tr><th scope=\"row\">accuracy under blur.*?</tr>", html, re.S)
    assert line
    assert re.search(r'class="sub worse">−0\.2000 worse<', line[0])
    assert re.search(r'class="sub ">−0\.001\d*<', line[0])


def test_a_noisy_figure_gets_no_verdict(ledger: Ledger) -> None:
    figures = dict(ledger.rows[0].figures)
    figures["latency p50"] = replace(figures["latency p50"], note="noisy: others were busy")
    ledger.rows[0] = replace(ledger.rows[0], figures=figures)
    html = report_html(ledger)
    assert re.search(r'class="sub ">0\.21×<', html)
    assert not re.search(r"0\.21× better", html[html.index('id="figures"') : html.index(">throughput<")])
