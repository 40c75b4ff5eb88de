"""What several tests of the engine share: small INT8 encoders."""

from __future__ import annotations

import pytest
from engine_models import bert, quantised

from sparing.models.bert import Bert


@pytest.fixture(scope="session")
def sparse_bert() -> Bert:
    """A classifier of two blocks, 80 % of the 4×1 blocks zero, all layers INT8."""
    return quantised(bert(sparsity=0.8))
