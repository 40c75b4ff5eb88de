"""Fixtures of the training tests."""

from __future__ import annotations

import pytest
from points import PointTask

from sparing.core.task import Splits


@pytest.fixture
def task() -> PointTask:
    return PointTask()


@pytest.fixture
def data() -> Splits:
    return PointTask().splits(None)
