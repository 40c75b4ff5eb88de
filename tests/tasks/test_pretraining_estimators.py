"""Pre-training, distillation and fine-tuning in scikit-learn's manner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from sparing.core.errors import DataError, InvalidValue
from sparing.models.mae import MAEViT, ViTConfig, load_vit
from sparing.tasks.images.pretraining import MAEPretrainer, SequentialDistiller, TinyMIMDistiller, ViTFineTuner

LARGE, MIDDLE, SMALL = ViTConfig(16, 4, 16, 3, 4), ViTConfig(16, 4, 8, 2, 2), ViTConfig(16, 4, 4, 2, 1)
DECODER = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}


@pytest.fixture(scope="module")
def photos() -> tuple[np.ndarray, np.ndarray]:
    names = np.array(["dark", "light"] * 12)
    images = np.random.RandomState(0).randint(0, 120, (24, 16, 16, 3))
    return (images + 100 * (names == "light")[:, None, None, None]).astype(np.uint8), names


def test_the_whole_way(photos: Any, tmp_path: Path) -> None:
    images, names = photos
    shared = {"epochs": 2, "batch_size": 12, "lr": 2e-3, "store": tmp_path / "store", **DECODER}
    teacher = MAEPretrainer(LARGE, **shared).fit(images)
    teacher.save(tmp_path / "teacher")
    saved = load_vit(tmp_path / "teacher")
    assert isinstance(saved, MAEViT)
    chain = SequentialDistiller(tmp_path / "teacher", [MIDDLE, SMALL], target_block=2, settings=shared).fit(images)
    assert [stage.model_.config.heads_of for stage in chain.stages_] == [(2, 4), (1, 4)]
    direct = TinyMIMDistiller(teacher, MIDDLE, target_block=2, **shared).fit(images)
    state = chain.stages_[0].model_.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in direct.model_.state_dict().items())
    tuner = ViTFineTuner(chain, epochs=12, batch_size=8, lr=5e-3, scale=(0.75, 1.0), store=tmp_path / "store")
    tuner.fit(images, names)
    assert tuner.predictor_.model.config.heads_of == (1, 1)
    assert tuner.score(images, names) > 0.9
    report = direct.report()
    assert report.learning_rate == 2e-3
    assert report.seconds > 0
    assert report.cost.parameters == sum(p.numel() for p in direct.model_.parameters())
    assert "norm.weight" in str(report)
    assert [stage.stage for stage in chain.report()] == ["distillation"] * 2
    assert "fine-tuning" in str(tuner.report())


def test_settings_are_part_of_what_is_kept(photos: Any, tmp_path: Path) -> None:
    images, names = photos
    made = [ViTFineTuner(SMALL, epochs=n, batch_size=12, lr=1e-3, store=tmp_path).fit(images, names) for n in (1, 2, 1)]
    weights = [tuner.predictor_.model.head.weight for tuner in made]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_one_label_each_and_no_label_held_back(photos: Any, tmp_path: Path) -> None:
    images, names = photos
    tuner = ViTFineTuner(SMALL, epochs=1, batch_size=4, lr=1e-3, store=tmp_path).fit(images[:4], names[:4])
    assert tuner.predict(images[:2]).shape == (2,)
    with pytest.raises(DataError, match="at least two classes"):
        ViTFineTuner(SMALL, store=tmp_path).fit(images[:2], ["dark", "dark"])


def test_what_is_refused(photos: Any, tmp_path: Path) -> None:
    images, _ = photos
    with pytest.raises(InvalidValue, match="image_size = 32"):
        MAEPretrainer(ViTConfig(32, 4, 16, 2, 2), store=tmp_path).fit(images)
    with pytest.raises(InvalidValue, match="Presets"):
        MAEPretrainer("vit_huge", store=tmp_path).fit(images)
    with pytest.raises(DataError, match="uint8"):
        MAEPretrainer(LARGE, store=tmp_path).fit(images / 255.0)
    with pytest.raises(NotFittedError):
        MAEPretrainer(LARGE).report()
    with pytest.raises(NotFittedError):
        SequentialDistiller(tmp_path, [SMALL]).report()
    with pytest.raises(DataError, match=r"config\.json is missing"):
        TinyMIMDistiller(tmp_path, SMALL, store=tmp_path).fit(images)
    with pytest.raises(InvalidValue, match="a fitted estimator, a network or its folder"):
        TinyMIMDistiller(3, SMALL, store=tmp_path).fit(images)
    with pytest.raises(InvalidValue, match="students is empty"):
        SequentialDistiller(MAEViT(image_size=16, patch_size=4), []).fit(images)


def test_they_can_be_cloned() -> None:
    for estimator in (MAEPretrainer(LARGE), TinyMIMDistiller("folder", SMALL), SequentialDistiller("folder", [SMALL])):
        assert clone(estimator).get_params(deep=False).keys() == estimator.get_params(deep=False).keys()
