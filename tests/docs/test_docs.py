"""README, CONTRIBUTING and the pages of docs/ are programs: each runs top to bottom in a folder of its own.

What a page may hold, and how it is run:

- a ``python`` block is executed in the page's one namespace;
- a ``console`` block's lines that begin with ``$`` are executed: ``sparing …`` and ``python …``, and ``make …`` as
  ``make -n``;
- ``<!-- file: NAME -->`` before a block writes the block to that file instead;
- ``<!-- tests add: --set … -->`` before a console block makes its ``sparing`` commands shorter by these arguments;
- ``<!-- not run: REASON -->`` before a block leaves it out;
- ``<!-- check`` … ``-->`` holds Python that asserts the effect of what ran above. In it, ``printed`` is the
  standard output of the last block, and each executed block needs a check or an ``assert`` of its own below it.

To take seconds, a packaged recipe that is run by its name gets the overrides of ``small_recipes``, all rows are clocked
briefly, and the pages share one store, so that what one page has trained another reads.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from small_recipes import SMALL
from sparing.cli import main
from sparing.core import pipeline

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)])
COMMENT = re.compile(r"<!--\s*(file:|tests add:|not run:|check\b)(.*?)-->", re.DOTALL)
BRIEF = {"min_seconds": 0, "max_seconds": 0.2, "memory": False}
"""Fields of the meter that runs on pages are measured by, unless a recipe says otherwise."""


@dataclass(frozen=True)
class Block:
    """One thing to do: ``python``, ``console``, ``file`` or ``check``."""

    kind: str
    text: str
    line: int
    note: str = ""

    @property
    def asserts(self) -> bool:
        """True when it fails unless something holds."""
        return self.kind != "file" and bool(re.search(r"^\s*assert\b", self.text, re.MULTILINE))


def blocks(text: str) -> list[Block]:
    """What there is to run on a page, in order."""
    found: list[Block] = []
    order: tuple[str, str] | None = None
    for token in MarkdownIt().parse(text):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "html_block":
            for kind, body in COMMENT.findall(token.content):
                if kind == "check":
                    found.append(Block("check", body, line - 1))  # the body begins on the comment's own line
                else:
                    order = (kind, body.strip())
        elif token.type == "fence":
            language = token.info.split()[0] if token.info else ""
            kind, body = order or ("", "")
            order = None
            if kind == "file:":
                found.append(Block("file", token.content, line, body))
            elif kind == "not run:":
                assert body, f"line {line}: a block that is not run needs a reason"
            elif language in {"python", "console"}:
                found.append(Block(language, token.content, line, body))
            else:
                assert language in {"text", "yaml", "json", "toml"} or language.startswith("{"), (
                    f"line {line}: a {language or 'nameless'} block is neither run nor known to be prose"
                )
    return found


def run_python(block: Block, page: Path, names: dict[str, Any]) -> None:
    """Execute a block so that a traceback shows the page and its line."""
    exec(compile("\n" * block.line + block.text, str(page), "exec"), names)


def run_console(block: Block, folder: Path) -> str:
    """Run each ``$`` line; its standard output, joined over lines."""
    printed = ""
    for command in re.findall(r"^\$ (.+)$", block.text.replace("\\\n", " "), re.MULTILINE):
        program, *arguments = shlex.split(command, comments=True)
        if program == "sparing":
            with caught_output() as output:
                code = main([*small(arguments), *shlex.split(block.note)])
            shown = output.getvalue()
        elif program in {"make", "python"}:
            words, where = (["make", "-n"], ROOT) if program == "make" else ([sys.executable], folder)
            done = subprocess.run([*words, *arguments], cwd=where, capture_output=True, text=True, check=False)
            code, shown = done.returncode, done.stdout + done.stderr
        else:
            raise AssertionError(f"line {block.line}: {program!r} is not run here; say why with <!-- not run: … -->")
        assert code == 0, f"line {block.line}: {command}\n{shown}"
        printed += shown
    return printed


def small(arguments: list[str]) -> list[str]:
    """The command, on its small form where it runs a packaged recipe; what the page sets comes later and wins."""
    if arguments[:1] != ["run"] or arguments[1] not in SMALL:
        return arguments
    return [*arguments[:2], *(word for override in SMALL[arguments[1]] for word in ("--set", override)), *arguments[2:]]


@contextlib.contextmanager
def caught_output() -> Iterator[io.StringIO]:
    """Receives all standard output, of Python's streams and of the process."""
    caught, kept, before = io.StringIO(), os.dup(1), sys.stdout
    with tempfile.TemporaryFile("w+", encoding="utf-8") as sys.stdout:
        os.dup2(sys.stdout.fileno(), 1)
        try:
            yield caught
        finally:
            sys.stdout.seek(0)
            caught.write(sys.stdout.read())
            os.dup2(kept, 1)
            os.close(kept)
            sys.stdout = before


def run_page(page: Path, folder: Path) -> int:
    """Run a page inside ``folder``; the number of blocks that ran."""
    names: dict[str, Any] = {"__name__": "__main__", "printed": ""}
    todo = blocks(page.read_text())
    for i, block in enumerate(todo):
        if block.kind == "file":
            target = folder / block.note
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text)
        elif block.kind == "console":
            names["printed"] = run_console(block, folder)
        elif block.kind == "check":
            run_python(block, page, names)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as caught:
                run_python(block, page, names)
            names["printed"] = caught.getvalue()
        if block.kind in {"python", "console"} and not block.asserts:
            after = next((later.asserts for later in todo[i + 1 :] if later.kind != "file"), False)
            assert after, f"{page.name}, line {block.line}: nothing below asserts what this block did"
    return sum(block.kind in {"python", "console"} for block in todo)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages") / "store"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs_and_does_what_it_says(
    page: Path, tmp_path: Path, shared_store: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep))
    monkeypatch.setenv("SPARING_STORE", str(shared_store))
    monkeypatch.setenv("COLUMNS", "240")  # no heading is folded
    monkeypatch.setattr(pipeline, "Meter", partial(pipeline.Meter, **BRIEF))
    before = set(sys.modules)
    try:
        run_page(page, folder)
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(folder)):
                del sys.modules[name]


def test_every_registered_step_has_a_page_that_shows_its_fields():
    from sparing.core.registry import parts

    pages = {page.stem: page.read_text() for page in (ROOT / "docs" / "steps").glob("*.md")}
    missing = [name for name in parts("steps") if f".. step:: {name}\n" not in pages.get(name, "")]
    assert not missing, f"docs/steps/<name>.md with '.. step:: <name>' is missing for {missing}"


HEADINGS = ["When to use it", "When not", "How", "Measured", "Cost and limits", "Reference"]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "steps").glob("[!i]*.md")), ids=lambda page: page.stem)
def test_all_pages_of_steps_answer_the_same_questions(page: Path):
    assert re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE) == HEADINGS


@pytest.mark.parametrize("kind", ["tasks", "models"])
def test_every_registered_task_and_model_is_on_its_page(kind: str):
    from sparing.core.registry import parts

    page = (ROOT / "docs" / f"{kind}.md").read_text()
    missing = [name for name in parts(kind) if f".. part:: {kind} {name}\n" not in page]
    assert not missing, f"docs/{kind}.md has no '.. part:: {kind} <name>' for {missing}"


def test_every_command_shows_its_help_on_the_page():
    from sparing.cli import app, data_app

    page = (ROOT / "docs" / "cli.md").read_text()
    commands = [name for name in app if not name.startswith("-") and name != "data"]
    commands += [f"data {name}" for name in data_app if not name.startswith("-")]
    assert len(commands) > 10
    missing = [name for name in commands if f".. command:: sparing {name} --help\n" not in page]
    assert not missing, f"docs/cli.md has no '.. command:: sparing <name> --help' for {missing}"


@pytest.mark.parametrize("kind", ["steps", "tasks", "models"])
def test_every_field_says_what_it_means(kind: str):
    from sparing.cli.catalogue import fields_of
    from sparing.core.registry import parts, resolve

    silent = [
        f"{name}.{field['name']}"
        for name in parts(kind)
        for field in fields_of(resolve(kind, name))
        if not field["meaning"]
    ]
    assert not silent, "a string below the field, or a line under Args: in the docstring, says what it means"


def test_the_design_page_shows_the_floors_that_are_enforced():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    enforced = [sorted(floor.split(" | ")) for floor in contract["layers"]]
    rows = re.findall(r"^\| \d+ \| (.+?) \|", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    assert [sorted(re.findall(r"`(\w+)`", row)) for row in rows] == enforced


# The harness itself.


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_blocks_share_names_and_a_false_check_fails(tmp_path: Path):
    good = (
        "```python\nx = 2\n```\n<!-- check\nassert x == 2\n-->\n\n```python\nprint(x + 1)\n```\n\n<!-- check\n{}\n-->\n"
    )
    assert run_page(page_of(tmp_path, good.format("assert printed == '3\\n'")), tmp_path) == 2
    with pytest.raises(AssertionError):
        run_page(page_of(tmp_path, good.format("assert printed == '4\\n'")), tmp_path)


def test_a_block_whose_effect_nobody_asserts_fails(tmp_path: Path):
    with pytest.raises(AssertionError, match="line 1: nothing below asserts"):
        run_page(page_of(tmp_path, "```python\nx = 2\n```\n"), tmp_path)


def test_files_are_written_and_importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    text = (
        "<!-- file: for_docs.py -->\n```python\nanswer = 42\n```\n\n"
        "```python\nimport for_docs\nassert for_docs.answer == 42\n```\n"
    )
    assert run_page(page_of(tmp_path, text), tmp_path) == 1


def test_unknown_programs_and_missing_make_targets_fail(tmp_path: Path):
    with pytest.raises(AssertionError, match="'curl' is not run here"):
        run_page(page_of(tmp_path, "```console\n$ curl x\n```\n"), tmp_path)
    with pytest.raises(AssertionError, match="No rule to make target"):
        run_page(page_of(tmp_path, "```console\n$ make nothing-of-the-kind\n```\n"), tmp_path)


def test_a_block_of_an_unknown_language_fails():
    with pytest.raises(AssertionError, match="line 3: a bash block"):
        blocks("text\n\n```bash\nls\n```\n")
