"""The two packed forms: nothing is lost, and what cannot be packed is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.core.errors import InvalidValue
from sparing.engine.packing import block_sparsity, pack_4x1, pack_tiles, unpack_4x1, unpack_tiles


def weight(rows: int, columns: int, density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kept = np.repeat(rng.random((rows // 4, columns)) < density, 4, axis=0)
    return (rng.integers(-127, 128, (rows, columns)) * kept).astype(np.int8)


def test_layout_of_a_small_weight() -> None:
    w = np.zeros((8, 6), dtype=np.int8)
    w[0, 1], w[3, 1], w[2, 4] = 5, -6, 7
    packed = pack_4x1(w)
    assert packed.row_ptr.tolist() == [0, 1, 1], "four outputs without a block have no group"
    assert packed.col_index.tolist() == [[1, 4, 4, 4]], "filled up with the last index"
    assert packed.values.tolist() == [[[5, 0, 0, 0], [0, 0, 0, 0], [0, 7, 0, 0], [-6, 0, 0, 0]]]
    assert block_sparsity(w) == 1 - 2 / 12


@given(st.integers(1, 12), st.integers(1, 40), st.floats(0, 1), st.integers(0, 99))
def test_4x1_round_trip(groups: int, columns: int, density: float, seed: int) -> None:
    w = weight(4 * groups, columns, density, seed)
    packed = pack_4x1(w)
    assert np.array_equal(unpack_4x1(packed, columns), w)
    assert [array.dtype for array in packed] == [np.int32, np.int32, np.int8]
    assert packed.row_ptr[-1] == len(packed.col_index) == len(packed.values)
    for group in range(groups):
        listed = packed.col_index[packed.row_ptr[group] : packed.row_ptr[group + 1]].ravel()
        assert (np.diff(listed) >= 0).all()


@given(st.integers(1, 4), st.integers(1, 3), st.floats(0, 1), st.integers(0, 99))
def test_tiles_round_trip(high: int, wide: int, density: float, seed: int) -> None:
    w = weight(16 * high, 64 * wide, density, seed)
    assert np.array_equal(unpack_tiles(pack_tiles(w)), w)


def test_refusals() -> None:
    with pytest.raises(InvalidValue, match=r"divisible by 4.*6 are not"):
        pack_4x1(np.zeros((6, 8), dtype=np.int8))
    with pytest.raises(InvalidValue, match="float64"):
        pack_4x1(np.zeros((4, 8)))  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="16 outputs × 64 inputs; 16 × 32"):
        pack_tiles(np.zeros((16, 32), dtype=np.int8))
    packed = pack_4x1(weight(8, 12, 0.5, 0))
    with pytest.raises(InvalidValue, match="outside 0…3"):
        unpack_4x1(packed, 4)
    with pytest.raises(InvalidValue, match="ascend"):
        unpack_4x1(packed._replace(row_ptr=packed.row_ptr[::-1].copy()), 12)
    tiles = pack_tiles(weight(16, 64, 0.3, 0))
    with pytest.raises(InvalidValue, match="follow from the masks"):
        unpack_tiles(tiles._replace(masks=~tiles.masks))
    with pytest.raises(InvalidValue, match="values expected"):
        unpack_tiles(tiles._replace(values=tiles.values[:-1]))
