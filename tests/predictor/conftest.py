"""A trained-looking predictor of each kind, and an operation that preprocessing can name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import guests
import numpy as np
import torch

from sparing.core import registry
from sparing.core.predictor import Context, ModulePredictor, OnnxPredictor, Preprocessing, build_model, to_onnx
from sparing.parts import PARTS, Part


@pytest.fixture(autouse=True, scope="session")
def _scale() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PARTS["operations"], "scale", Part("guests:Scale", "for tests"))
        registry.parts.cache_clear()
        yield
    registry.parts.cache_clear()


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)


@pytest.fixture(scope="session")
def module(images: np.ndarray) -> ModulePredictor:
    torch.manual_seed(0)
    model = build_model(guests.SmallNet, width=5)
    model(torch.from_numpy(images))  # moves the batch norm's statistics
    context = Context("shapes", ("round", "square", "other"), Preprocessing((guests.Scale(0.5),)))
    return ModulePredictor(model, context, example=(torch.from_numpy(images[:2]),))


@pytest.fixture(scope="session")
def onnx(module: ModulePredictor) -> OnnxPredictor:
    return to_onnx(module)
