"""CTRClassifier: scikit-learn's manner over the same parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.utils.estimator_checks import parametrize_with_checks

import sparing
from sparing.core.errors import CorruptFile, DataError, InvalidValue
from sparing.data.ctr import Categorical, Numeric
from sparing.tasks.ctr.estimator import MODELS, CTRClassifier

QUICK: dict[str, Any] = {"epochs": 6, "batch_size": 64}


@pytest.fixture(scope="module", autouse=True)
def _own_store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_STORE", str(tmp_path_factory.mktemp("store")))
        yield


def rows(count: int = 800, seed: int = 0) -> tuple[dict[str, Any], np.ndarray]:
    """Columns of a table and labels that follow from a shop and a price; the name of the shop is text."""
    draw = np.random.RandomState(seed)
    shop, price = draw.randint(0, 6, count), draw.rand(count)
    clicked = draw.rand(count) < 0.1 + 0.8 * ((shop % 2 == 0) ^ (price > 0.5))
    columns = {"shop": np.array(list("abcdef"))[shop], "price": price, "day": draw.randint(0, 3, count)}
    return columns, np.where(clicked, "yes", "no")


@pytest.fixture(scope="module")
def fitted() -> CTRClassifier:
    halves = Numeric("price", "linear", width=0.5, missing="unknown")
    given = CTRClassifier(
        "xdeepint", fields=[Categorical("shop", 5), halves], optimizer_fields={"lambda1": 0.5}, **QUICK
    )
    return given.fit(*rows())


# --- what it answers


def test_it_learns_and_answers_with_the_labels_it_was_given(fitted: CTRClassifier) -> None:
    columns, labels = rows(400, seed=1)
    assert fitted.classes_.tolist() == ["no", "yes"]
    probabilities = fitted.predict_proba(columns)
    assert probabilities.shape == (400, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert roc_auc_score(labels == "yes", probabilities[:, 1]) > 0.8
    assert (fitted.predict(columns) == fitted.classes_[probabilities.argmax(1)]).all()
    assert fitted.score(columns, labels) == np.mean(fitted.predict(columns) == labels) > 0.75
    np.testing.assert_allclose(np.log(probabilities[:, 1] / probabilities[:, 0]), fitted.decision_function(columns))
    assert set(fitted.sparsity_) == {"zero_rows", "zero_weights", "zero_interactions"}
    assert len(fitted.curves_["val_log_loss"]) >= 2


@pytest.mark.parametrize("model", MODELS)
def test_every_model_learns(model: Any) -> None:
    columns, labels = rows()
    if model == "lr":  # alone, neither column says anything of these labels, so a model without interactions has others
        labels = np.where(np.isin(columns["shop"], list("ace")), "yes", "no")
    settings = {"lambda1": 0.5} if model == "xdeepint" else {"lr": 0.02}
    made = CTRClassifier(model, **{**QUICK, "epochs": 15}, patience=3, optimizer_fields=settings).fit(columns, labels)
    assert made.score(columns, labels) > max(0.5, np.mean(labels == "yes")) + 0.15


def test_all_kinds_of_tables_are_one(fitted: CTRClassifier) -> None:
    columns, labels = rows()
    expected = fitted.decision_function(columns)
    for table in (pl.DataFrame(columns), pl.DataFrame(columns).lazy(), pa.table(columns)):
        np.testing.assert_array_equal(fitted.decision_function(table), expected)
        assert (clone(fitted).fit(table, labels).decision_function(table) == expected).all()
    assert fitted.feature_names_in_.tolist() == ["shop", "price", "day"]
    assert fitted.n_features_in_ == 3


def test_a_data_frame_of_pandas_without_its_index() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    columns, labels = rows()
    frame = pandas.DataFrame(columns, index=np.arange(800)[::-1])
    made = CTRClassifier("fm", **QUICK).fit(frame, labels)
    assert made.feature_names_in_.tolist() == ["shop", "price", "day"]
    assert (made.decision_function(frame) == made.decision_function(columns)).all()


def test_an_array_of_ids_and_what_is_unknown() -> None:
    draw = np.random.RandomState(0)
    ids = draw.randint(-1, 4, (400, 2))
    labels = (ids[:, 0] == ids[:, 1]).astype(int)
    made = CTRClassifier("fm", min_count=2, **QUICK).fit(ids, labels)
    assert made.classes_.tolist() == [0, 1]
    assert made.encoder_.cardinalities == (4, 4)
    later = np.array([[0, 1], [-1, 99], [2, -7]])
    assert made.unknown_shares(later) == {"x0": 1 / 3, "x1": 2 / 3}
    alike = made.decision_function(np.array([[-1, -1], [77, 98], [-5, 99]]))
    assert len(set(alike.tolist())) == 1


def test_rows_of_zeros_leave_and_change_no_answer() -> None:
    draw = np.random.RandomState(0)
    ids = draw.randint(0, 200, (1500, 2))
    labels = ((ids[:, 0] % 2 == 0) & (ids[:, 0] < 60)).astype(int)
    made = CTRClassifier(min_count=1, **QUICK, optimizer_fields={"lambda1": 3.0}).fit(ids, labels)
    assert 0.2 < made.sparsity_["zero_rows"] < 1
    left = made.predictor_.model.model.tables[0].weight  # type: ignore[attr-defined]
    assert len(left) == round((1 - made.sparsity_["zero_rows"]) * sum(made.encoder_.cardinalities))
    assert roc_auc_score(labels, made.decision_function(ids)) > 0.8


def test_early_stopping_goes_back_to_the_best() -> None:
    columns, labels = rows(300)
    made = CTRClassifier("deepfm", epochs=40, batch_size=32, optimizer_fields={"lr": 0.02}).fit(columns, labels)
    losses = [value for _, value in made.curves_["val_log_loss"]]
    assert len(losses) < 40
    assert losses[-1] >= min(losses)
    whole = CTRClassifier("deepfm", epochs=12, batch_size=32, patience=None, optimizer_fields={"lr": 0.02})
    assert len(whole.fit(columns, labels).curves_["val_log_loss"]) == 12


def test_a_second_fit_is_read_from_the_store(fitted: CTRClassifier) -> None:
    again = clone(fitted).fit(*rows())
    assert (again.decision_function(rows()[0]) == fitted.decision_function(rows()[0])).all()
    other = clone(fitted).set_params(seed=1).fit(*rows())
    assert (other.decision_function(rows()[0]) != fitted.decision_function(rows()[0])).any()


# --- keeping


def test_it_is_saved_and_loaded(fitted: CTRClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "it")
    again = CTRClassifier.load(tmp_path / "it")
    columns = rows(50, seed=2)[0]
    assert (again.decision_function(columns) == fitted.decision_function(columns)).all()
    assert again.predict(columns).tolist() == fitted.predict(columns).tolist()
    assert again.classes_.dtype == fitted.classes_.dtype
    assert (again.sparsity_, again.curves_) == (fitted.sparsity_, fitted.curves_)
    assert {**again.get_params(), "fields": None} == {**fitted.get_params(), "fields": None}
    assert list(again.fields) == list(fitted.fields)
    assert again.feature_names_in_.tolist() == ["shop", "price", "day"]
    assert again.n_features_in_ == fitted.n_features_in_ == 3
    assert again.predict_proba({"shop": np.array([], str), "price": np.array([])}).shape == (0, 2)
    model = sparing.load(tmp_path / "it" / "model")
    raw = [{"shop": "b", "price": 0.2}, {"shop": "zz", "price": None}]
    np.testing.assert_allclose(
        model.predict(raw), fitted.decision_function({"shop": ["b", "zz"], "price": [0.2, None]})
    )
    assert (clone(again).fit(*rows()).decision_function(columns) == fitted.decision_function(columns)).all()


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"classes": [1]}, {"params": {"modle": "lr"}}, {"curves": 3}, {"type": "no such"}]
)
def test_what_is_no_saved_estimator_is_refused(change: dict[str, Any], fitted: CTRClassifier, tmp_path: Path) -> None:
    fitted.save(tmp_path / "it")
    file = tmp_path / "it" / "estimator.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CorruptFile, match="it"):
        CTRClassifier.load(tmp_path / "it")
    file.write_text("{")
    with pytest.raises(CorruptFile):
        CTRClassifier.load(tmp_path / "it")


def test_what_is_not_fitted_says_so(tmp_path: Path) -> None:
    for call in (lambda e: e.predict([[1]]), lambda e: e.unknown_shares([[1]]), lambda e: e.save(tmp_path / "it")):
        with pytest.raises(NotFittedError, match=r"call fit\(X, y\) first"):
            call(CTRClassifier())
    assert not (tmp_path / "it").exists()


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "deepfn"}, "model = 'deepfn'; one of .* is needed. Did you mean 'deepfm'"),
        ({"model": 3}, "model = 3"),
        ({"val_share": 0}, "val_share = 0"),
        ({"val_share": 0.9999}, "leaves none"),
        ({"epochs": 0}, "epochs = 0"),
        ({"patience": 0}, "early_stopping = 0"),
        ({"optimizer": "Adamm"}, "unknown optimizer 'Adamm'"),
        ({"optimizer_fields": {"lamda1": 1}}, "Did you mean 'lambda1'"),
        ({"model_fields": {"num_subspaces": 3}}, "num_subspaces = 3 does not divide dim = 16"),
        ({"min_count": 0}, "min_count = 0"),
        ({"fields": [Categorical("shop"), Categorical("shop")]}, "two fields are called 'shop'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        CTRClassifier(**settings).fit(*rows(100))


def test_wrong_data_are_refused(fitted: CTRClassifier) -> None:
    columns, labels = rows(100)
    for X, y, message in (
        (columns, labels[:50], "100 rows and 50 labels"),
        (columns, np.zeros(100), r"100 sample\(s\) of 1 class"),
        (columns, np.arange(100), "Only binary classification"),
        (np.array([[{}]] * 100, object), labels, "an array holds {}"),
    ):
        with pytest.raises(InvalidValue, match=message):
            CTRClassifier().fit(X, y)
    with pytest.raises(DataError, match="these columns make no table"):
        CTRClassifier().fit({"a": [1, 2], "b": [1]}, [0, 1])
    with pytest.raises(DataError, match="no number in 'price'"):
        CTRClassifier(fields=[Numeric("price")]).fit({"price": [1.0, None] * 50}, labels)
    with pytest.raises(InvalidValue, match=r"no column 'shop'. Did you mean 'shopp'"):
        fitted.predict({"shopp": ["a"], "price": [1.0]})
    with pytest.raises(InvalidValue, match="fitted on a table with the columns"):
        fitted.predict(np.zeros((2, 3)))


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [CTRClassifier("fm", min_count=1, epochs=15, batch_size=16, patience=None, optimizer_fields={"lr": 0.05})]
)
def test_as_scikit_learn_wants_estimators(estimator: Any, check: Any) -> None:
    check(estimator)
