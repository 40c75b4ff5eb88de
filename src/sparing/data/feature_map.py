"""FuxiCTR's feature map: the fields of a data set and how many ids each has, for exchange with its models.

FuxiCTR (https://github.com/reczoo/FuxiCTR, version 2) keeps two files for a data set: ``feature_map.json``, with the
fields in order, and ``feature_vocab.json``, with the number of each value. A field of N values has N + 2 numbers there:
0 is padding, 1 … N are the values, and N + 1 is whatever is unknown, which is −1 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from sparing.core.errors import CorruptFile, DataError, InvalidValue, shown
from sparing.core.files import folder_atomic, read_json, write_json
from sparing.data.ctr import Categorical, CTREncoder, CTRSchema
from sparing.data.tables import arrow

PADDING, UNKNOWN = "__PAD__", "__OOV__"


@dataclass(frozen=True)
class FeatureMap:
    """Names and sizes of the fields of a data set, with their values where these are known.

    Args:
        dataset_id: what FuxiCTR calls the data set.
        cardinalities: field → N, values it has, in order.
        labels: columns of labels.
        vocabulary: field → its N values in the order of their ids; none where only the sizes are known.
    """

    dataset_id: str
    cardinalities: Mapping[str, int]
    labels: tuple[str, ...] = ("label",)
    vocabulary: Mapping[str, tuple[str, ...]] | None = None

    @classmethod
    def of(cls, encoder: CTREncoder, dataset_id: str) -> FeatureMap:
        """That of a fitted encoder; values of binned and hashed fields are the numbers of bins and buckets."""
        names = [field.name for field in encoder.schema.fields]
        values = [tuple(str(value) for value in found.tolist()) for found in encoder.vocabulary]
        sizes = dict(zip(names, encoder.cardinalities, strict=True))
        return cls(dataset_id, sizes, (encoder.schema.label,), dict(zip(names, values, strict=True)))

    def save(self, folder: Path | str) -> None:
        """Write ``feature_map.json``, and ``feature_vocab.json`` where values are known, whole or not at all."""
        features = [
            {name: {"source": "", "type": "categorical", "padding_idx": 0, "oov_idx": n + 1, "vocab_size": n + 2}}
            for name, n in self.cardinalities.items()
        ]
        kept = {
            "dataset_id": self.dataset_id,
            "num_fields": len(features),
            "total_features": sum(n + 2 for n in self.cardinalities.values()),
            "input_length": len(features),
            "labels": list(self.labels),
            "features": features,
        }
        with folder_atomic(Path(folder)) as scratch:
            write_json(scratch / "feature_map.json", kept)
            if self.vocabulary is not None:
                numbers = {
                    name: {PADDING: 0, **{v: i for i, v in enumerate(values, 1)}, UNKNOWN: len(values) + 1}
                    for name, values in self.vocabulary.items()
                }
                write_json(scratch / "feature_vocab.json", numbers)

    @classmethod
    def load(cls, folder: Path | str) -> FeatureMap:
        """Read what FuxiCTR or :meth:`save` wrote into a folder.

        Raises:
            DataError: files that are missing or of another form; a field that these models cannot take: one of
                numbers or of sequences, one that shares its embedding with another, or one that is bucketed.
        """
        folder = Path(folder)
        path = folder / "feature_map.json"
        kept = _read(path)
        try:
            entries = [(str(name), dict(spec)) for entry in kept["features"] for name, spec in entry.items()]
            sizes = {name: _size(name, spec) for name, spec in entries if spec.get("type") != "meta"}
            found = cls(str(kept["dataset_id"]), sizes, tuple(map(str, kept.get("labels", ["label"]))))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: is no feature map that can be read: {error}") from error
        if not sizes:
            raise DataError(f"{path}: names no field")
        if not (folder / "feature_vocab.json").is_file():
            return found
        numbers = _read(folder / "feature_vocab.json")
        try:
            values = {name: _values(name, numbers[name], n) for name, n in sizes.items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{folder / 'feature_vocab.json'}: {error}") from error
        return cls(found.dataset_id, sizes, found.labels, values)

    def encoder(self) -> CTREncoder:
        """An encoder that gives the ids of this map to columns of text; it has seen no data, so it reports no leak."""
        if self.vocabulary is None:
            raise InvalidValue("this map holds no values of its fields; a feature_vocab.json beside it does")
        pa = arrow()
        encoder = CTREncoder(CTRSchema(tuple(Categorical(n, 1) for n in self.cardinalities), self.labels[0]))
        encoder.vocabulary = [pa.array(self.vocabulary[name], pa.string()) for name in self.cardinalities]
        return encoder

    def theirs(self, ids: Int[ndarray, "n f"]) -> Int[ndarray, "n f"]:
        """Our ids as FuxiCTR's numbers."""
        sizes = self._sizes(ids)
        _within(ids, -1, sizes - 1)
        return np.where(ids < 0, sizes + 1, ids + 1)

    def ours(self, numbers: Int[ndarray, "n f"]) -> Int[ndarray, "n f"]:
        """FuxiCTR's numbers as our ids; padding is unknown, too."""
        sizes = self._sizes(numbers)
        _within(numbers, 0, sizes + 1)
        return np.where((numbers == 0) | (numbers > sizes), -1, numbers - 1)

    def _sizes(self, ids: ndarray) -> ndarray:
        if ids.ndim != 2 or ids.shape[1] != len(self.cardinalities):
            raise InvalidValue(f"numbers of shape {ids.shape}; (n, {len(self.cardinalities)}) is expected")
        return np.array(list(self.cardinalities.values()), np.int64)


def _within(ids: ndarray, low: int, high: ndarray) -> None:
    for row, field in np.argwhere((ids < low) | (ids > high))[:1]:
        raise InvalidValue(
            f"the number at row {row}, field {field} is {ids[row, field]}; {low}…{high[field]} is expected"
        )


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except CorruptFile as error:
        raise DataError(str(error)) from error


def _size(name: str, spec: Mapping[str, Any]) -> int:
    """N of a field, from what FuxiCTR says of it."""
    for key in ("share_embedding", "category_processor", "pretrained_emb"):
        if key in spec:
            raise ValueError(f"the field {name!r} has {key} = {shown(spec[key])}, which is not known here")
    if spec.get("type") != "categorical":
        raise ValueError(f"the field {name!r} is of the type {shown(spec.get('type'))}; 'categorical' is expected")
    size = spec["vocab_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 2:
        raise ValueError(f"the field {name!r} has vocab_size = {shown(size)}; 2 or more is expected")
    for key, expected in (("padding_idx", 0), ("oov_idx", size - 1)):
        if spec.get(key, expected) != expected:
            raise ValueError(f"the field {name!r} has {key} = {shown(spec[key])}; {expected} is expected")
    return size - 2


def _values(name: str, numbers: Mapping[str, int], size: int) -> tuple[str, ...]:
    ordered = sorted((number, value) for value, number in numbers.items() if value not in (PADDING, UNKNOWN))
    if [number for number, _ in ordered] != list(range(1, size + 1)):
        raise ValueError(f"the values of {name!r} are not numbered 1…{size}, as the map says")
    return tuple(value for _, value in ordered)
