"""The checks look at what is kept and compared, never at what a clock shows."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch  # noqa: F401 - loaded before the session begins, so that no collection of garbage looks at it
import pytest

from sparing.core import clock


@pytest.fixture(autouse=True, scope="module")
def _hasty_clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "WARM_UP_SECONDS", 0.002)
        patch.setattr(clock, "BLOCK_SECONDS", 0.002)
        yield
