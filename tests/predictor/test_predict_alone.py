"""One raw input that is no list is the commonest mistake; a path would otherwise be read letter by letter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparing.core.errors import InvalidValue
from sparing.core.predictor import ModulePredictor
from sparing.tasks.images.digits import Digits


@pytest.mark.parametrize(
    "alone",
    ["cat.jpg", Path("cat.jpg"), b"\xff\xd8", Image.fromarray(np.zeros((8, 8), np.uint8)), 5],
    ids=lambda v: type(v).__name__,
)
def test_one_raw_input_that_is_no_list_is_refused(alone):
    task = Digits()
    predictor = ModulePredictor(task.default_model(), task)
    with pytest.raises(InvalidValue, match=r"a list of raw inputs is expected, not .* alone: write \[input\]"):
        predictor.predict(alone)
