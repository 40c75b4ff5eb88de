"""Click-through models in scikit-learn's manner: ``fit``, ``predict_proba``, ``score``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray
from scipy.sparse import issparse
from scipy.special import expit
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import NotFittedError
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d, validate_data

from sparing.core.errors import CorruptFile, DataError, InvalidValue, did_you_mean, shown
from sparing.core.files import canonical_json, folder_atomic, read_json, write_json
from sparing.core.predictor import Predictor, load
from sparing.core.step import Step
from sparing.core.training.step import Train
from sparing.data.ctr import CTREncoder, CTRSchema, Field, fields_of
from sparing.data.images import stratified_cut
from sparing.data.root import cut_shares
from sparing.data.tables import Source, arrow, column_kinds
from sparing.tasks.ctr.base import EVALUATION_BATCH, ClickThrough

MODELS = ("xdeepint", "lr", "fm", "fnn", "deepfm", "dcnv2")
FORMAT = 1


class CTRClassifier(ClassifierMixin, BaseEstimator):
    """A model of click-through data, trained on a table in memory, for two classes.

    X is a table of columns (a data frame of pandas or Polars, an Arrow table, a mapping of names to columns), or an
    array (n, F). Of real numbers, columns become bins of equal shares, in which NaN is unknown; everything else is
    a category, and whole numbers below 0 in an array are unknown ids. The encoder is fitted on the training rows: a
    value that is new, missing or too rare has no weight. Rows of zeros are dropped after the training.

    A fit that is killed goes on where it was when it is called again with the same data and settings.

    Args:
        model: "xdeepint", "lr", "fm", "fnn", "deepfm" or "dcnv2".
        optimizer: "group_ftrl", or a class of ``torch.optim``; None: "group_ftrl" for "xdeepint", "Adam" for others.
        fields: how columns are encoded, as :class:`~sparing.data.ctr.Categorical` and
            :class:`~sparing.data.ctr.Numeric`; None: by their types.
        min_count: training rows a category must be in, when ``fields`` are not given.
        epochs: passes over the training rows at most.
        batch_size: rows of an optimizer step.
        val_share: share of each class held out to stop by.
        patience: stop after so many epochs without a lower log-loss on them, and go back to the best; None: make all
            epochs, and keep the last.
        model_fields: further fields of the model, e.g. {"dim": 8}.
        optimizer_fields: fields of the step ``group_ftrl``, or of ``train`` for an optimizer of torch: {"lr": 0.01}.
        seed: decides weights, order and what is held out.
        store: where unfinished and finished work is kept; the user's cache folder by default.

    Attributes:
        classes_: the two labels, sorted; the second is the one that models give the logit of.
        encoder_: what turns columns into ids, a :class:`~sparing.data.ctr.CTREncoder`.
        predictor_: ids → logits (by ``predict`` also mappings of columns to values, unless there are over 200,000
            ids): ``save`` it, or export it in a recipe.
        sparsity_: shares of zeros in the trained model, before rows of zeros were dropped.
        curves_: name → [(optimizer steps, value)] of loss, learning rate and validation figures.

    ``fit`` raises :class:`~sparing.core.errors.InvalidValue` for settings outside their bounds and data that do not fit
    together or are not of two classes, and :class:`~sparing.core.errors.DataError` for columns that cannot be encoded.
    """

    def __init__(
        self,
        model: Literal["xdeepint", "lr", "fm", "fnn", "deepfm", "dcnv2"] = "xdeepint",
        optimizer: str | None = None,
        fields: Sequence[Field] | None = None,
        min_count: int = 5,
        epochs: int = 10,
        batch_size: int = 2048,
        val_share: float = 0.1,
        patience: int | None = 1,
        model_fields: Mapping[str, Any] | None = None,
        optimizer_fields: Mapping[str, Any] | None = None,
        seed: int = 0,
        store: Path | str | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.fields = fields
        self.min_count = min_count
        self.epochs = epochs
        self.batch_size = batch_size
        self.val_share = val_share
        self.patience = patience
        self.model_fields = model_fields
        self.optimizer_fields = optimizer_fields
        self.seed = seed
        self.store = store

    def fit(self, X: Any, y: Any) -> CTRClassifier:
        """Train on n rows and their n labels, of two classes with at least two rows each."""
        from sparing.core.pipeline import apply_steps, begin
        from sparing.core.predictor import ModulePredictor
        from sparing.models.ctr import CTRModel, without_zero_rows

        steps = self._steps()
        table = self._table(X, fitting=True)
        labels = self._labels(y, table.num_rows)
        task = _InMemory(table, labels, self.fields, self.min_count, self.val_share, self.seed)
        name = {**(self.model_fields or {}), "name": self.model}
        job = apply_steps(begin(task, name, seed=self.seed, store=self.store), steps)
        model = job.model
        assert isinstance(model, CTRModel)
        self.encoder_, self.curves_, self.sparsity_ = task.encoder, dict(job.notes.curves), model.sparsity()
        smaller = without_zero_rows(model) if bool(model.zero_rows().any()) else model
        self.predictor_: Predictor = ModulePredictor(smaller, task)
        return self

    def decision_function(self, X: Any) -> ndarray:
        """Logits (n,) of the second class."""
        predictor = self._fitted().predictor_
        ids = self._ids(X)
        parts = [np.asarray(predictor(ids[at : at + EVALUATION_BATCH])) for at in range(0, len(ids), EVALUATION_BATCH)]
        return np.concatenate([np.empty(0), *parts])

    def predict_proba(self, X: Any) -> ndarray:
        """Probabilities (n, 2), in the order of ``classes_``."""
        logits = self.decision_function(X)
        return np.stack([expit(-logits), expit(logits)], 1)

    def predict(self, X: Any) -> ndarray:
        """The likelier label of each row (n,)."""
        logits = self.decision_function(X)
        return self.classes_[(logits > 0).astype(int)]

    def unknown_shares(self, X: Any) -> dict[str, float]:
        """For each field the share of rows whose value is missing, new or too rare, so that it says nothing."""
        ids = self._fitted()._ids(X)
        unknown = (ids < 0).sum(0) / max(len(ids), 1)
        return {field.name: float(share) for field, share in zip(self.encoder_.schema.fields, unknown, strict=True)}

    # --- keeping

    def save(self, folder: Path | str) -> Path:
        """Write the fitted estimator into ``folder``, whole or not at all, for :meth:`load`."""
        self._fitted()
        params = {name: value for name, value in self.get_params().items() if name not in ("fields", "store")}
        kept = {
            "format": FORMAT,
            "params": json.loads(canonical_json({name: _plain(value) for name, value in params.items()})),
            "given": self.fields is not None,
            "classes": self.classes_.tolist(),
            "type": self.classes_.dtype.str,
            "columns": self.n_features_in_,
            "names": None if self._names is None else list(self._names),
            "sparsity": self.sparsity_,
            "curves": {name: [list(point) for point in points] for name, points in self.curves_.items()},
        }
        with folder_atomic(Path(folder)) as scratch:
            self.predictor_.save(scratch / "model")
            self.encoder_.save(scratch / "encoder")
            write_json(scratch / "estimator.json", kept)
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str) -> CTRClassifier:
        """What :meth:`save` wrote; raises :class:`~sparing.core.errors.CorruptFile` for anything else."""
        folder = Path(folder)
        kept = read_json(folder / "estimator.json")
        encoder, predictor = CTREncoder.load(folder / "encoder"), load(folder / "model")
        try:
            if kept["format"] != FORMAT:
                raise ValueError(f"format {kept['format']!r}; this release reads {FORMAT}")
            made = cls(**kept["params"], fields=encoder.schema.fields if kept["given"] else None)
            kind = np.dtype(str(kept["type"]))
            made.classes_ = np.array(kept["classes"], object if kind.hasobject else kind)
            if made.classes_.shape != (2,):
                raise ValueError(f"classes {kept['classes']}; two are expected")
            if kept["names"] is not None:
                made.feature_names_in_ = np.array([str(name) for name in kept["names"]], object)
            made.n_features_in_ = int(kept["columns"])
            made.sparsity_ = {str(name): float(share) for name, share in kept["sparsity"].items()}
            made.curves_ = {str(n): [(float(x), float(y)) for x, y in points] for n, points in kept["curves"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{folder} holds no estimator that can be read: {error}") from error
        made.encoder_, made.predictor_ = encoder, predictor
        return made

    def __sklearn_tags__(self) -> Any:
        """Two classes; NaN is a missing value."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        tags.input_tags.allow_nan = tags.input_tags.string = tags.input_tags.categorical = True
        return tags

    # --- inside

    @property
    def _names(self) -> tuple[str, ...] | None:
        """Columns of the table that was fitted; None for an array."""
        names = getattr(self, "feature_names_in_", None)
        return None if names is None else tuple(names)

    def _steps(self) -> list[Step]:
        from sparing.optimization.ftrl import GroupFtrl

        if self.model not in MODELS:
            hint = did_you_mean(self.model, MODELS) if isinstance(self.model, str) else ""
            raise InvalidValue(f"model = {shown(self.model)}; one of {', '.join(MODELS)} is needed.{hint}")
        cut_shares("CTRClassifier", val=self.val_share)
        name = self.optimizer or ("group_ftrl" if self.model == "xdeepint" else "Adam")
        more = dict(self.optimizer_fields or {})
        fields: dict[str, Any] = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "early_stopping": self.patience,
            "restore_best": self.patience is not None,
        }
        if name == "group_ftrl":
            return [GroupFtrl(**more), Train(**fields)]
        return [Train(**{**fields, "optimizer": name, **more})]

    def _labels(self, y: Any, rows: int) -> ndarray:
        """0 or 1 (n,); sets ``classes_``."""
        try:
            y = column_or_1d(y, warn=True)
            check_classification_targets(y)
        except ValueError as error:
            raise InvalidValue(f"fit: {error}") from error
        if len(y) != rows:
            raise InvalidValue(f"fit: {rows} rows and {len(y)} labels; one label for each row is expected")
        classes, numbers, counts = np.unique(y, return_inverse=True, return_counts=True)
        if len(classes) > 2:
            raise InvalidValue(
                f"Only binary classification is supported. The type of the target is multiclass: {len(classes)} classes"
            )
        if len(classes) < 2 or counts.min() < 2:
            raise InvalidValue(
                f"fit: {rows} sample(s) of {len(classes)} class(es), {int(counts.min())} of the rarest; two classes of "
                "at least two rows each are needed"
            )
        self.classes_ = classes
        return numbers

    def _table(self, X: Any, fitting: bool = False) -> Any:
        """An Arrow table of the columns."""
        pa = arrow("CTRClassifier")
        named = isinstance(X, Mapping) or any(hasattr(X, kind) for kind in ("iloc", "collect_schema", "schema"))
        if named and not issparse(X):  # of which one kind is a mapping
            table = _as_arrow(X)
            if fitting:
                self.n_features_in_ = len(table.column_names)
                self.feature_names_in_ = np.array(table.column_names, object)
            return table
        try:
            X = validate_data(self, X, dtype=None, ensure_all_finite="allow-nan", reset=fitting)
        except ValueError as error:
            raise InvalidValue(f"{error}") from error
        if not fitting and self._names is not None:
            raise InvalidValue(f"an array; the estimator was fitted on a table with the columns {shown(self._names)}")
        return pa.table({f"x{at}": _column(X[:, at]) for at in range(X.shape[1])})

    def _ids(self, X: Any) -> ndarray:
        table = self._table(X)
        for name in self.encoder_.schema.columns(label=False):
            if name not in table.column_names:
                raise InvalidValue(f"no column {name!r}.{did_you_mean(name, table.column_names)}")
        return self.encoder_.encode(table)

    def _fitted(self) -> CTRClassifier:
        if not hasattr(self, "predictor_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(X, y) first")
        return self


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value


def _as_arrow(X: Any) -> Any:
    pa = arrow("CTRClassifier")
    try:
        if hasattr(X, "iloc"):  # pandas, whose index is no column
            return pa.Table.from_pandas(X, preserve_index=False)
        if hasattr(X, "collect_schema"):  # polars
            return (X.collect() if hasattr(X, "collect") else X).to_arrow()
        return X if isinstance(X, pa.Table) else pa.table(X)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"these columns make no table: {error}") from error


def _column(values: ndarray) -> Any:
    """A column of an array: real numbers, whole ones of which those below 0 are missing, or text."""
    pa = arrow()
    if values.dtype.kind in "iu":
        return pa.array(values.astype(np.int64), mask=values < 0)
    if values.dtype.kind in "fb":
        return pa.array(values.astype(np.float64) if values.dtype.kind == "f" else values)
    for value in values:
        if not isinstance(value, str | int | float | np.generic | None):
            raise InvalidValue(f"an array holds {shown(value)}; numbers and texts are expected")
    return pa.array([None if value is None or value != value else str(value) for value in values], pa.string())


class _InMemory(ClickThrough):
    """Rows in memory; what is held out for validation stands for the test split, which nothing here looks at."""

    name = "ctr_classifier"

    def __init__(
        self,
        table: Any,
        labels: ndarray,
        fields: Sequence[Field] | None,
        min_count: int,
        val_share: float,
        seed: int,
    ) -> None:
        super().__init__()
        pa = arrow()
        label = "label"
        while label in table.column_names:
            label += "_"
        found = fields_of(column_kinds(table), min_count) if fields is None else tuple(fields)
        if not found:
            raise DataError("fit: the table has no column")
        self._schema = CTRSchema(found, label)
        self.definition = self._schema.to_config()
        table = table.append_column(label, pa.array(labels.astype(np.int64)))
        parts = stratified_cut(labels, {"val": val_share}, seed)
        if not len(parts["rest"]) or not len(parts["val"]):
            raise InvalidValue(f"fit: of {len(labels)} rows val_share = {val_share:g} leaves none for a part")
        held = table.take(pa.array(parts["val"]))
        self._sources = {"train": table.take(pa.array(parts["rest"])), "val": held, "calibration": held, "test": held}

    def sources(self, root: Path) -> Mapping[str, Source]:
        """The rows of each part; ``root`` is not looked at."""
        return self._sources

    def schema(self, root: Path) -> CTRSchema:
        """The fields that were given, or follow from the columns."""
        return self._schema
