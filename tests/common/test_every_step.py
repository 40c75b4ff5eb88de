"""Every registered step is put through the same checks."""

from __future__ import annotations

from pathlib import Path

import pytest
from common_settings import STEPS

from sparing.core.registry import parts, resolve
from sparing.testing import STEP_CHECKS

DOCS = Path(__file__).parents[2] / "docs" / "steps"


def test_every_step_has_its_line_in_the_settings():
    assert set(STEPS) == set(parts("steps"))
    assert all(type(case.step) is resolve("steps", name) for name, case in STEPS.items())


@pytest.mark.parametrize("check", STEP_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", STEPS)
def test_step(name, check, tmp_path):
    check(STEPS[name], tmp_path)


@pytest.mark.parametrize("name", STEPS)
def test_step_has_a_page_in_the_documentation(name):
    page = (DOCS / f"{name}.md").read_text()
    assert page.startswith("# ")
    assert f".. step:: {name}" in page
