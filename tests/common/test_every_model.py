"""Every registered model is put through the same checks."""

from __future__ import annotations

import pytest
from common_settings import MODELS

from sparing.core.registry import parts
from sparing.testing import MODEL_CHECKS


def test_every_model_has_its_line_in_the_settings():
    assert set(MODELS) == set(parts("models"))


@pytest.mark.parametrize("check", MODEL_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_model(name, check, tmp_path):
    check(MODELS[name], tmp_path)
