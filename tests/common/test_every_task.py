"""Every registered task is put through the same checks."""

from __future__ import annotations

import pytest
from common_settings import NEEDS_DATA, TASKS

from sparing.core.registry import parts
from sparing.testing import TASK_CHECKS

_cases = {}


@pytest.fixture
def case(name, request, tmp_path_factory):
    data = request.getfixturevalue("data_root") if name in NEEDS_DATA else None
    if name not in _cases:
        _cases[name] = TASKS[name](data, tmp_path_factory.mktemp(name))
    return _cases[name]


def test_every_task_has_its_line_in_the_settings():
    assert set(TASKS) == set(parts("tasks"))


@pytest.mark.parametrize("check", TASK_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", TASKS)
def test_task(case, check, tmp_path):
    check(case, tmp_path)
