"""Packed weights: blocks of 4 outputs × 1 input that are not zero (fast_distilbert sheet, section 5).

Texts on kernels call this block 4×1 (out × in); names of models call it 1×4 (in × out). Two forms hold it. The *4×1
form* lists input indices and is what the vector kernels read. The *tile form* has a bit for each block and is unpacked,
a tile at a time, into the operands of matrix units.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int8, Int32, UInt32, UInt64

from sparing.core.errors import InvalidValue

BLOCK = 4
TILE_ROWS = 16
TILE_COLUMNS = 64


class Packed(NamedTuple):
    """The 4×1 form. G groups of four blocks; blocks that fill a row group's last group are zero."""

    row_ptr: Int32[np.ndarray, " rows_plus_1"]
    """First group of each four outputs, and G."""
    col_index: Int32[np.ndarray, "groups 4"]
    """Input of each block, ascending within four outputs; a filling block has the last index."""
    values: Int8[np.ndarray, "groups 4 4"]
    """[group, output, input]: the four values of one output lie side by side."""

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.row_ptr.nbytes + self.col_index.nbytes + self.values.nbytes


class Tiles(NamedTuple):
    """The tile form, of 16 outputs × 64 inputs."""

    masks: UInt64[np.ndarray, "row_groups columns_64"]
    """Bit i of [r, c]: the block of outputs 4r…4r+3 at input 64c + i is kept."""
    pointers: UInt32[np.ndarray, " tiles_plus_1"]
    """Where the values of each 16 outputs begin, and their number."""
    values: Int8[np.ndarray, " values"]
    """By 16 outputs, 64 inputs, 4 outputs, output: its kept values in order. 64 bytes follow that are never used."""


def _blocks(weight: np.ndarray) -> Int8[np.ndarray, "row_groups 4 columns"]:
    array = np.asarray(weight)
    if array.dtype != np.int8 or array.ndim != 2 or 0 in array.shape:
        raise InvalidValue(f"a weight to pack is an int8 matrix [out, in], not {array.dtype} {list(array.shape)}")
    if array.shape[0] % BLOCK:
        raise InvalidValue(f"out features must be divisible by {BLOCK}, the block's height; {array.shape[0]} are not")
    return array.reshape(-1, BLOCK, array.shape[1])


def block_sparsity(weight: Int8[np.ndarray, "out in"]) -> float:
    """Share of 4 outputs × 1 input blocks that are zero."""
    return 1.0 - float(np.mean((_blocks(weight) != 0).any(axis=1)))


def pack_4x1(weight: Int8[np.ndarray, "out in"]) -> Packed:
    """The 4×1 form of a weight whose outputs come in fours; any other is refused."""
    blocks = _blocks(weight)
    kept = (blocks != 0).any(axis=1)
    counts = kept.sum(axis=1)
    groups = -(-counts // BLOCK)
    row_ptr = np.concatenate([[0], np.cumsum(groups)]).astype(np.int32)
    rows, columns = np.nonzero(kept)
    first = np.cumsum(counts) - counts
    slots = row_ptr[rows] * BLOCK + np.arange(len(rows)) - first[rows]
    col_index = np.zeros(row_ptr[-1] * BLOCK, dtype=np.int32)
    values = np.zeros((row_ptr[-1] * BLOCK, BLOCK), dtype=np.int8)
    filled = np.repeat(np.where(groups > 0, first + counts - 1, 0), groups * BLOCK)
    col_index[:] = columns[filled] if len(columns) else 0
    col_index[slots] = columns
    values[slots] = blocks[rows, :, columns]
    return Packed(row_ptr, col_index.reshape(-1, BLOCK), values.reshape(-1, BLOCK, BLOCK).transpose(0, 2, 1).copy())


def unpack_4x1(packed: Packed, columns: int) -> Int8[np.ndarray, "out in"]:
    """The weight of ``columns`` inputs that was packed; indices and pointers are checked."""
    row_ptr, col_index, values = packed
    check_packed(row_ptr, col_index, values, columns)
    rows = np.repeat(np.arange(len(row_ptr) - 1), np.diff(row_ptr))
    weight = np.zeros((len(row_ptr) - 1, BLOCK, columns), dtype=np.int8)
    # filling blocks repeat an index, and add zero to it
    np.add.at(weight, (rows[:, None, None], np.arange(BLOCK)[None, :, None], col_index[:, None, :]), values)
    return weight.reshape(-1, columns)


def check_packed(row_ptr: np.ndarray, col_index: np.ndarray, values: np.ndarray, columns: int) -> None:
    """Refuse arrays that would lead a kernel outside them."""
    groups = len(col_index)
    if col_index.shape != (groups, BLOCK) or values.shape != (groups, BLOCK, BLOCK):
        raise InvalidValue(f"{groups} groups of 4 × 4 values expected, not {values.shape} and {col_index.shape}")
    if (
        row_ptr.ndim != 1
        or len(row_ptr) < 2
        or row_ptr[0] != 0
        or row_ptr[-1] != groups
        or (np.diff(row_ptr) < 0).any()
    ):
        raise InvalidValue(f"row pointers must ascend from 0 to {groups}")
    if groups and (int(col_index.min()) < 0 or int(col_index.max()) >= columns):
        raise InvalidValue(f"an input index lies outside 0…{columns - 1}")


def fits_tiles(rows: int, columns: int) -> bool:
    """Whether a weight of this size can take the tile form."""
    return rows % TILE_ROWS == 0 and columns % TILE_COLUMNS == 0


def pack_tiles(weight: Int8[np.ndarray, "out in"]) -> Tiles:
    """The tile form of a weight whose outputs come in 16s and inputs in 64s; any other is refused."""
    blocks = _blocks(weight)
    rows, columns = weight.shape
    if not fits_tiles(rows, columns):
        raise InvalidValue(f"tiles are {TILE_ROWS} outputs × {TILE_COLUMNS} inputs; {rows} × {columns} is no multiple")
    kept = (blocks != 0).any(axis=1)
    bits = np.packbits(kept.reshape(rows // 4, columns // 64, 64), axis=2, bitorder="little")
    masks = np.ascontiguousarray(bits).view("<u8").reshape(rows // 4, columns // 64).astype(np.uint64)
    # in the order of reading: 16 outputs, 64 inputs, 4 outputs, output
    order = (rows // 16, 4, 4, columns // 64, 64)
    ordered = weight.reshape(order).transpose(0, 3, 1, 2, 4)
    chosen = np.broadcast_to(kept.reshape(rows // 16, 4, 1, columns // 64, 64), order).transpose(0, 3, 1, 2, 4)
    counts = chosen.reshape(rows // 16, -1).sum(axis=1)
    pointers = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)
    return Tiles(masks, pointers, np.concatenate([ordered[chosen], np.zeros(64, dtype=np.int8)]))


def unpack_tiles(tiles: Tiles) -> Int8[np.ndarray, "out in"]:
    """The weight that was packed; masks and pointers are checked."""
    masks, pointers, values = tiles
    check_tiles(masks, pointers, values)
    groups, wide = masks.shape
    bits = np.unpackbits(np.ascontiguousarray(masks).astype("<u8").view(np.uint8), bitorder="little")
    kept = bits.reshape(groups, wide, 64).astype(bool)
    chosen = np.broadcast_to(kept.reshape(groups // 4, 4, 1, wide, 64), (groups // 4, 4, 4, wide, 64))
    ordered = np.zeros((groups // 4, wide, 4, 4, 64), dtype=np.int8)
    ordered[chosen.transpose(0, 3, 1, 2, 4)] = values[:-64]
    return np.ascontiguousarray(ordered.transpose(0, 2, 3, 1, 4)).reshape(groups * 4, wide * 64)


def check_tiles(masks: np.ndarray, pointers: np.ndarray, values: np.ndarray) -> None:
    """Refuse arrays that would lead a kernel outside them."""
    if masks.ndim != 2 or masks.shape[0] % 4 or values.ndim != 1 or pointers.shape != (masks.shape[0] // 4 + 1,):
        raise InvalidValue(f"masks {masks.shape}, pointers {pointers.shape} and values {values.shape} do not fit")
    counts = 4 * np.bitwise_count(masks).reshape(len(pointers) - 1, -1).sum(axis=1, dtype=np.int64)
    if not np.array_equal(pointers.astype(np.int64), np.concatenate([[0], np.cumsum(counts)])):
        raise InvalidValue("pointers do not follow from the masks")
    if len(values) != int(pointers[-1]) + 64:
        raise InvalidValue(f"{int(pointers[-1]) + 64} values expected, not {len(values)}")
