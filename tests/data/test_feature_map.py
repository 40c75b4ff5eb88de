"""FuxiCTR's feature map: what it holds, there and back, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from sparing.core.errors import DataError, InvalidValue
from sparing.data.ctr import Categorical, CTREncoder, CTRSchema, Numeric
from sparing.data.feature_map import FeatureMap

TABLE = pa.table({"label": [0, 1, 0, 1], "shop": ["b", "a", "b", None], "price": [0.0, 3.0, 3.0, 0.0]})
SCHEMA = CTRSchema((Categorical("shop", 1), Numeric("price", "linear", width=1.0)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    FeatureMap.of(CTREncoder(SCHEMA).fit(TABLE), "shops").save(tmp_path / "shops")
    return tmp_path / "shops"


def test_the_files_are_as_fuxictr_writes_them(saved: Path) -> None:
    def category(size: int) -> dict[str, Any]:
        return {"source": "", "type": "categorical", "padding_idx": 0, "oov_idx": size - 1, "vocab_size": size}

    assert json.loads((saved / "feature_map.json").read_text()) == {
        "dataset_id": "shops",
        "num_fields": 2,
        "total_features": 8,
        "input_length": 2,
        "labels": ["label"],
        "features": [{"shop": category(4)}, {"price": category(4)}],
    }
    assert json.loads((saved / "feature_vocab.json").read_text()) == {
        "shop": {"__PAD__": 0, "b": 1, "a": 2, "__OOV__": 3},
        "price": {"__PAD__": 0, "0": 1, "3": 2, "__OOV__": 3},
    }


def test_what_is_read_is_what_was_written_with_values_and_without(saved: Path) -> None:
    there = FeatureMap.of(CTREncoder(SCHEMA).fit(TABLE), "shops")
    assert FeatureMap.load(saved) == there
    (saved / "feature_vocab.json").unlink()
    sizes = FeatureMap.load(saved)
    assert (sizes.cardinalities, sizes.vocabulary) == (there.cardinalities, None)
    with pytest.raises(InvalidValue, match="holds no values"):
        sizes.encoder()


def test_ids_there_and_back() -> None:
    found = FeatureMap("shops", {"shop": 2, "price": 3})
    ids = np.array([[0, 2], [-1, 0], [1, -1]])
    assert found.theirs(ids).tolist() == [[1, 3], [3, 1], [2, 4]]
    assert found.ours(found.theirs(ids)).tolist() == ids.tolist()
    assert found.ours(np.array([[0, 0]])).tolist() == [[-1, -1]]
    for wrong in (lambda: found.theirs(np.array([[0, 3]])), lambda: found.ours(np.array([[0, 5]]))):
        with pytest.raises(InvalidValue, match="row 0, field 1"):
            wrong()
    with pytest.raises(InvalidValue, match=r"shape \(1, 1\)"):
        found.ours(np.array([[0]]))


def test_a_map_of_fuxictrs_own_becomes_an_encoder(tmp_path: Path) -> None:
    """With what its version 2.2 leaves out, and a column of meta data."""
    features = [
        {"C1": {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": 4}},
        {"id": {"type": "meta"}},
    ]
    kept = {"dataset_id": "x", "num_fields": 1, "total_features": 4, "input_length": 1, "labels": ["click"]}
    (tmp_path / "feature_map.json").write_text(json.dumps({**kept, "features": features}))
    numbers = {"C1": {"__PAD__": 0, "05db": 1, "68fd": 2, "__OOV__": 3}}
    (tmp_path / "feature_vocab.json").write_text(json.dumps(numbers))
    found = FeatureMap.load(tmp_path)
    encoder = found.encoder()
    rows = pa.table({"C1": ["68fd", "new", "05db", None]})
    assert encoder.cardinalities == (2,)
    assert encoder.schema.label == "click"
    assert encoder.encode(rows).tolist() == [[1], [-1], [0], [-1]]
    assert found.theirs(encoder.encode(rows)).tolist() == [[2], [3], [1], [3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "numeric"}, "'shop' is of the type 'numeric'"),
        ({"type": "sequence"}, "'shop' is of the type 'sequence'"),
        ({"share_embedding": "price"}, "'shop' has share_embedding = 'price'"),
        ({"category_processor": "hash_bucket"}, "category_processor"),
        ({"vocab_size": 1}, "vocab_size = 1"),
        ({"vocab_size": "4"}, "vocab_size = '4'"),
        ({"oov_idx": 0}, "oov_idx = 0; 3 is expected"),
        ({"padding_idx": 1}, "padding_idx = 1; 0 is expected"),
    ],
)
def test_fields_of_other_kinds_are_refused(change: dict[str, Any], message: str, saved: Path) -> None:
    kept = json.loads((saved / "feature_map.json").read_text())
    changed = copy.deepcopy(kept)
    changed["features"][0]["shop"].update(change)
    (saved / "feature_map.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match=f"feature_map.json.*{message}"):
        FeatureMap.load(saved)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"dataset_id": "x", "features": []}', '{"features": [1]}'])
def test_other_files_are_refused(text: str, saved: Path) -> None:
    (saved / "feature_map.json").write_text(text)
    with pytest.raises(DataError, match=r"feature_map\.json"):
        FeatureMap.load(saved)


@pytest.mark.parametrize(
    "numbers", [{}, {"shop": {"a": 1}, "price": {}}, {"shop": {"a": 2, "b": 3}, "price": {}}, [], 3]
)
def test_other_values_are_refused(numbers: Any, saved: Path) -> None:
    (saved / "feature_vocab.json").write_text(json.dumps(numbers))
    with pytest.raises(DataError, match=r"feature_vocab\.json"):
        FeatureMap.load(saved)
    (saved / "feature_map.json").unlink()
    with pytest.raises(DataError, match=r"feature_map\.json"):
        FeatureMap.load(saved)
