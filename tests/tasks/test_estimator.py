"""EMOClassifier: scikit-learn's manner over the same parts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

import sparing
from sparing.core.errors import DataError, InvalidValue
from sparing.tasks.images.estimator import EMOClassifier

SMALL = {"variant": "0.14M", "epochs": 10, "batch_size": 16, "flip": 0.0}


@pytest.fixture(scope="module")
def stripes() -> tuple[np.ndarray, np.ndarray]:
    """Images of noise with a bright half at the left or at the top."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 120, (96, 16, 16, 3), dtype=np.uint8)
    labels = np.array(["left", "top"])[np.arange(96) % 2]
    images[labels == "left", :, :8] += 120
    images[labels == "top", :8] += 120
    return images, labels


@pytest.fixture(scope="module")
def fitted(stripes, tmp_path_factory) -> EMOClassifier:
    store = tmp_path_factory.mktemp("store")
    return EMOClassifier(**SMALL, fields={"window_sizes": (2, 2, 2, 1)}, store=store).fit(*stripes)


def test_it_learns_and_answers_with_the_labels_it_was_given(fitted, stripes):
    images, labels = stripes
    assert list(fitted.classes_) == ["left", "top"]
    assert fitted.score(images, labels) > 0.9
    probabilities = fitted.predict_proba(images[:5])
    assert probabilities.shape == (5, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    assert (fitted.classes_[probabilities.argmax(axis=1)] == fitted.predict(images[:5])).all()
    assert len(fitted.curves_["val_accuracy"]) == 10


def test_its_predictor_is_saved_and_answers_the_same(fitted, stripes, tmp_path):
    fitted.predictor_.save(tmp_path / "model")
    saved = sparing.load(tmp_path / "model")
    np.testing.assert_allclose(saved.predict(stripes[0][:4]), fitted.decision_function(stripes[0][:4]), atol=1e-5)
    assert saved.labels == ("left", "top")


def test_a_second_fit_is_read_from_the_store(fitted, stripes):
    again = clone(fitted).fit(*stripes)
    assert (again.decision_function(stripes[0]) == fitted.decision_function(stripes[0])).all()
    assert again.get_params() == fitted.get_params()


def test_a_fit_with_other_settings_is_another(fitted, stripes):
    shorter = clone(fitted).set_params(epochs=2).fit(*stripes)
    assert len(shorter.curves_["val_accuracy"]) == 2


def test_it_reports_what_an_image_costs(fitted):
    report = fitted.report()
    assert report.parameters == sum(
        p.numel() for p in sparing.build_model("emo", variant="0.14M", num_classes=2).parameters()
    )
    assert report.macs["strict"].total > 0


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 16, 16)), [0, 1, 0, 1], "X is float64 of shape"),
        (np.zeros((4, 16, 18, 3), np.uint8), [0, 1, 0, 1], "16×18 pixels; squares"),
        (np.zeros((0, 16, 16), np.uint8), [], "at least one"),
        (np.zeros((4, 16, 16), np.uint8), [0, 1, 0], r"4 images and labels of shape \(3,\)"),
        (np.zeros((4, 16, 16), np.uint8), [1, 1, 1, 1], "all labels are '1'"),
        (np.zeros((2, 16, 16), np.uint8), [0, 1], "leave none for the part"),
    ],
    ids=str,
)
def test_what_cannot_be_learned_from_is_refused(images, labels, message):
    with pytest.raises(DataError, match=message):
        EMOClassifier(**SMALL).fit(images, labels)


def test_wrong_settings_and_uses_are_refused(fitted, stripes):
    with pytest.raises(NotFittedError, match="call fit"):
        EMOClassifier().predict(stripes[0])
    with pytest.raises(DataError, match="images of 1 channels; 3, as in fit"):
        fitted.predict(stripes[0][..., :1])
    with pytest.raises(InvalidValue, match="val_share = 1"):
        EMOClassifier(**SMALL | {"val_share": 1.0}).fit(*stripes)
    with pytest.raises(sparing.SparingError, match="variant"):
        EMOClassifier(**SMALL | {"variant": "3M"}).fit(*stripes)
