"""Your own task: any two datasets, a model, a loss and metrics, in Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sparing.core.collation import batches_of
from sparing.core.errors import DataError, InvalidValue, did_you_mean
from sparing.core.fingerprint import fingerprint
from sparing.core.metrics import CLASSIFICATION_METRICS, evaluate_classification
from sparing.core.predictor.tree import leaves, map_leaves, to_numpy
from sparing.core.task import Evaluation, Metric, Splits, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparing.core.predictor import Predictor, Preprocessing

EVALUATION_BATCH = 256
Better = Literal["higher", "lower"]


class CustomTask(Task):
    """Any two map-style datasets of ``(input, target)`` items, with a model, a loss and metrics.

    Args:
        name: what the ledger calls the task.
        train: training items. Validation and calibration are cut from it where they are not given.
        test: items for the meter and audits only.
        val: validation items.
        calibration: items for calibrating quantisation.
        model: an ``nn.Module`` (copied for each run), a function without arguments that makes one, or the name of a
            registered model.
        loss: ``loss(outputs, targets) -> scalar tensor``, reduced over the batch by ``loss_reduction``.
        metrics: name → ``function(outputs, targets)`` on the whole split as NumPy arrays, returning one number or one
            number for each unit (n,), whose mean is then the metric. None: those of a classifier over ``labels``
            (accuracy, worst class's accuracy, calibration error, likelihood) for outputs (N, classes).
        headline: the metric the ledger compares by; the first by default. One that returns a number for each unit gives
            paired intervals.
        better: "higher" or "lower", for all metrics or by name.
        unit: what one item is ("image", "molecule" …).
        version: a text that you change when your data or functions change. Needed for reuse of finished work when a
            dataset is not made of tensors or arrays and has no ``fingerprint()``.
        labels: class names; makes the task a classification.
        preprocessing: raw inputs → model inputs, saved with every predictor.
        collate: list of items → batch ``(inputs, targets)``; torch's default collation if None.
        capabilities: what steps may rely on, e.g. {"images"}.
        loss_reduction: "mean" or "sum".
        val_share: share of ``train`` cut for validation when ``val`` is None.
        calibration_share: share of ``train`` cut for calibration when ``calibration`` is None.
    """

    def __init__(
        self,
        name: str,
        train: Any,
        test: Any,
        val: Any = None,
        calibration: Any = None,
        *,
        model: nn.Module | Callable[[], nn.Module] | str,
        loss: Callable[[Any, Any], Tensor],
        metrics: Mapping[str, Callable[[Any, Any], Any]] | None = None,
        headline: str | None = None,
        better: Better | Mapping[str, Better] = "higher",
        unit: str = "sample",
        version: str | None = None,
        labels: Sequence[str] = (),
        preprocessing: Preprocessing | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        capabilities: Iterable[str] = (),
        loss_reduction: Literal["mean", "sum"] = "mean",
        val_share: float = 0.1,
        calibration_share: float = 0.05,
    ) -> None:
        if not name:
            raise InvalidValue("a task needs a name")
        self.name, self.unit, self.labels = name, unit, tuple(labels)  # type: ignore[misc]  # this task's own
        self.collate, self.preprocessing = collate, preprocessing
        if loss_reduction not in ("mean", "sum"):
            raise InvalidValue(f'{name}: loss_reduction = {loss_reduction!r}; "mean" or "sum" is expected')
        self.loss_reduction = loss_reduction  # type: ignore[misc]
        for what, function in (("loss", loss), *(metrics or {}).items()):
            if not callable(function):
                raise InvalidValue(f"{name}: {what} is a {type(function).__name__}; a function is expected")
        if not isinstance(model, str) and not callable(model):
            raise InvalidValue(
                f"{name}: model is a {type(model).__name__}; an nn.Module, a function that makes one, or the name of a "
                "registered model is expected"
            )
        self._model, self._loss, self._functions, self._version = model, loss, metrics, version
        self.metrics = self._declare(headline, better)
        self.capabilities = frozenset(capabilities) | (frozenset({"classification"}) if labels else frozenset())
        given = {"train": train, "val": val, "calibration": calibration, "test": test}
        for split, dataset in given.items():
            if dataset is not None or split in ("train", "test"):
                _check_dataset(dataset, f"{name}: {split}")
        self._given = given
        self._shares = {"val": val_share, "calibration": calibration_share}
        for split, share in self._shares.items():
            if not 0 < share < 1 or sum(self._shares.values()) >= 1:
                raise InvalidValue(f"{name}: {split}_share = {share!r}; shares above 0 with a sum below 1 are expected")
        self._splits: Splits | None = None

    def _declare(self, headline: str | None, better: Better | Mapping[str, Better]) -> tuple[Metric, ...]:
        if self._functions is None:
            if len(self.labels) < 2:
                raise InvalidValue(f"{self.name}: give metrics, or at least two labels for those of a classifier")
            known = {metric.name: metric for metric in CLASSIFICATION_METRICS}
        else:
            if not self._functions:
                raise InvalidValue(f"{self.name}: metrics is empty; at least one is expected")
            directions = dict.fromkeys(self._functions, better) if isinstance(better, str) else dict(better)
            for metric, direction in directions.items():
                if direction not in ("higher", "lower") or metric not in self._functions:
                    raise InvalidValue(
                        f'{self.name}: better[{metric!r}] = {direction!r}; "higher" or "lower" for one of '
                        f"{', '.join(self._functions)} is expected"
                    )
            known = {metric: Metric(metric, directions.get(metric, "higher")) for metric in self._functions}
        first = headline if headline is not None else next(iter(known))
        if first not in known:
            raise InvalidValue(
                f"{self.name}: headline = {first!r} is no metric.{did_you_mean(first, known)} "
                f"Metrics: {', '.join(known)}"
            )
        return (known.pop(first), *known.values())

    def splits(self, root: Path | None = None) -> Splits:
        """The given datasets; missing ones are cut from ``train`` at random, the same on every run."""
        if self._splits is None:
            parts = self._cut()
            if self._version is not None:
                parts = {split: _Versioned(data, [self._version, split, len(data)]) for split, data in parts.items()}
            self._splits = Splits(**parts)
        return self._splits

    def _cut(self) -> dict[str, Any]:
        from torch.utils.data import Subset

        parts = {split: data for split, data in self._given.items() if data is not None}
        missing = {split: share for split, share in self._shares.items() if split not in parts}
        if not missing:
            return parts
        train = parts["train"]
        order = np.random.RandomState(0).permutation(len(train))
        start = 0
        for split, share in missing.items():
            end = start + max(1, round(share * len(train)))
            parts[split] = Subset(train, np.sort(order[start:end]).tolist())
            start = end
        if start >= len(train):
            raise DataError(
                f"{self.name}: train has {len(train)} items, too few to cut {' and '.join(missing)} from it; give "
                f"at least {start + 1} items, or the missing datasets"
            )
        parts["train"] = Subset(train, np.sort(order[start:]).tolist())
        return parts

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """The given loss of outputs and ``batch[1]``."""
        return self._loss(outputs, batch[1])

    def evaluate(self, predictor: Predictor, split: Any) -> Evaluation:
        """The given metrics over the whole split, in order."""
        outputs, targets = [], []
        for batch in batches_of(split, EVALUATION_BATCH, self.collate):
            outputs.append(map_leaves(_array, self.outputs(predictor, batch)))
            targets.append(map_leaves(_array, batch[1]))
        if not outputs:
            raise DataError(f"{self.name}: the split to evaluate is empty; at least one item is expected")
        everything, wanted = _joined(outputs), _joined(targets)
        if self._functions is None:
            return evaluate_classification(everything, wanted, self.labels)
        values: dict[str, float] = {}
        per_unit: np.ndarray | None = None
        for metric in self.metrics:
            values[metric.name], each = self._score(metric.name, everything, wanted, len(split))
            if metric is self.headline:
                per_unit = each
        return Evaluation(values, per_unit)

    def _score(self, name: str, outputs: Any, targets: Any, units: int) -> tuple[float, np.ndarray | None]:
        assert self._functions is not None
        result = np.asarray(to_numpy(self._functions[name](outputs, targets)))
        if result.dtype.kind not in "fiub" or result.shape not in ((), (units,)):
            raise InvalidValue(
                f"{self.name}: metric {name!r} returned {result.dtype} of shape {result.shape}; one number, or one for "
                f"each of the {units} units, is expected"
            )
        result = result.astype(np.float64)
        if not np.isfinite(result).all():
            place = f" for unit {np.flatnonzero(~np.isfinite(result))[0]}" if result.ndim else ""
            raise InvalidValue(f"{self.name}: metric {name!r} is NaN or infinite{place}; finite numbers are expected")
        return float(result.mean()), result if result.ndim else None

    def example_input(self, batch: int = 2) -> tuple[Any, ...]:
        """Inputs of the first training items (repeated when there are fewer than ``batch``), collated."""
        from torch.utils.data import default_collate

        train = self._given["train"]
        items = [train[i % len(train)] for i in range(batch)]
        return ((self.collate or default_collate)(items)[0],)

    def default_model(self) -> nn.Module:
        """The given model: a copy, a new one from the function, or the registered one."""
        from torch import nn

        from sparing.core.predictor import build_model

        if isinstance(self._model, str):
            return build_model(self._model, self)
        made = copy.deepcopy(self._model) if isinstance(self._model, nn.Module) else self._model()
        if not isinstance(made, nn.Module):
            raise InvalidValue(f"{self.name}: model made a {type(made).__name__}; an nn.Module is expected")
        return made

    def model_fields(self) -> Mapping[str, Any]:
        """``num_classes``, when the task has labels."""
        return {"num_classes": len(self.labels)} if self.labels else {}

    def fingerprint(self) -> str:
        """By the source of loss, metrics and collation (and what they close over), or by ``version``."""
        functions = self._version or [self._loss, dict(self._functions or {}), self.collate]
        directions = [[metric.name, metric.better] for metric in self.metrics]
        return fingerprint([self.name, functions, directions, list(self.labels), self._shares, self.loss_reduction])


class _Versioned:
    """A dataset under a fingerprint that its user vouches for."""

    def __init__(self, dataset: Any, identity: list[Any]) -> None:
        self.dataset, self._identity = dataset, identity
        self.indices = range(len(dataset))
        """As torch's ``Subset``: messages follow it to the sample's number in the user's own data."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(indices) if fetch else [self.dataset[i] for i in indices]

    def fingerprint(self) -> str:
        return fingerprint(self._identity)


def _check_dataset(dataset: Any, where: str) -> None:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{where} is a {type(dataset).__name__}; a map-style dataset with __len__ and __getitem__ is expected"
        )
    try:
        count = len(dataset)
    except TypeError as error:
        raise DataError(
            f"{where}: {type(dataset).__name__} has no length ({error}); a map-style dataset is expected"
        ) from None
    if count == 0:
        raise DataError(f"{where} is empty; at least one item is expected")
    item = dataset[0]
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(f"{where}: item 0 is a {type(item).__name__}; a pair (input, target) is expected")
    for position, tensor in enumerate(getattr(dataset, "tensors", ())):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            record = int((~tensor.isfinite()).reshape(len(tensor), -1).any(dim=1).nonzero()[0])
            what = ("input", "target")[position] if position < 2 else f"tensor {position}"
            raise DataError(f"{where}: the {what} of item {record} holds NaN or infinity; finite values are expected")


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(to_numpy(leaf))


def _joined(parts: list[Any]) -> Any:
    """Trees of arrays (n, …), joined along the first axis leaf by leaf."""
    columns = [[leaf for _, leaf in leaves(part)] for part in parts]
    joined = iter([np.concatenate(column) for column in zip(*columns, strict=True)])
    return map_leaves(lambda _: next(joined), parts[0])
