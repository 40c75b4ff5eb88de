"""The engine's file: a header, a table of sections, a manifest in JSON, sections of plain arrays (docs/engine.md).

Little-endian; every section begins at a multiple of 64 bytes, so that it is used where it is mapped, by all processes
that map the file. A reader trusts nothing: checksum, sizes, dtypes, every pointer and every index are verified before
native code sees an address.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparing.core import files
from sparing.core.errors import CorruptFile, InvalidValue, StoreError
from sparing.engine import packing

MAGIC = b"SPARPACK"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ32s")
"""magic, version, number of sections, bytes of the file, bytes of the manifest, SHA-256 of all that follows."""
ENTRY = struct.Struct("<48sII3QQQ")
"""name (UTF-8, filled with zeros), dtype, rank, shape (filled with zeros), offset, bytes."""
DTYPES: tuple[np.dtype[Any], ...] = tuple(np.dtype(code) for code in ("i1", "u1", "<u2", "<i4", "<u4", "<f4", "<u8"))
"""A dtype's number in the table is its place here."""
ALIGNMENT = 64
ATTENTION = ("query", "key", "value")
"""The layers of a block whose outputs its attention reads."""
MAX_SECTIONS = 1 << 16
MAX_MANIFEST = 4 << 20
MAX_TOKENS = 1 << 24
"""Tokens that a batch may hold."""
MAX_LENGTH = 1 << 15
"""Tokens of a sequence: Σ p·v of attention, up to 255 · 255 for each, fits into 32 bits up to 33,025 of them."""
MAX_HEAD = 1 << 11
"""Features of a head: two scores, up to 255 · 255 for each apart, stay closer than a masked key is put behind."""

Count = Annotated[int, Field(ge=1, le=1 << 24)]
Format = Literal["float", "dense", "4x1", "tiles"]
"""How a layer's weight is stored: float32 [out, in]; int8 [out, in]; the 4×1 form; the tile form beside it."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class GridOf(_Strict):
    """real = scale · (uint8 − zero)."""

    scale: float = Field(gt=1e-38, lt=1e38)
    zero: int = Field(ge=0, le=255)


class Layer(_Strict):
    """A linear layer; "qkv" is query, key and value in one."""

    rows: Count
    columns: Count
    format: Format
    input: GridOf | None = None
    outputs: tuple[GridOf, ...] = ()
    """Grids that query, key and value are rounded to, in this order; none for float outputs.

    Attention is in integers when all three have one, else in floats, of those that have one rounded to it.
    """


class Encoder(_Strict):
    """A transformer encoder with post-norm blocks and its head."""

    dim: Count
    heads: Count
    vocabulary: Count
    positions: Count
    segments: int = Field(ge=0, le=1 << 16)
    eps: float = Field(gt=0, lt=1)
    pad_id: int = Field(ge=0)
    sep_id: int = Field(ge=0)
    position_offset: int = Field(ge=0)
    head: Literal["classifier", "span", "tokens", "embedding"]
    outputs: Count
    """Numbers for each sequence, or for each token."""
    pooler: Literal["none", "tanh", "relu"] = "none"
    pooling: Literal["first", "mean"] = "first"
    blocks: tuple[dict[str, Layer], ...]


class Manifest(_Strict):
    """What the sections are."""

    kind: Literal["native", "onnx"]
    max_batch: int = Field(ge=1, le=1 << 16)
    max_length: int = Field(ge=1, le=MAX_LENGTH)
    encoder: Encoder
    timings: tuple[dict[str, Any], ...] = ()
    """What each choice between kernels was made by."""


@dataclass(frozen=True)
class Pack:
    """A file's content, verified. ``arrays`` are read-only views of the mapping, which they keep alive."""

    manifest: Manifest
    arrays: Mapping[str, np.ndarray]
    nbytes: int

    def weight(self, layer: str) -> np.ndarray:
        """A layer's weight [out, in] as it was before packing."""
        block, name = layer.split(".")
        about = self.manifest.encoder.blocks[int(block)][name]
        if about.format in ("float", "dense"):
            return self.arrays[f"{layer}.weight"]
        index = self.arrays[f"{layer}.col_index"].astype(np.int32)
        packed = packing.Packed(self.arrays[f"{layer}.row_ptr"], index, self.arrays[f"{layer}.values"])
        return packing.unpack_4x1(packed, about.columns)


def to_bytes(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> bytes:
    """The file as bytes; equal content gives equal bytes."""
    content = files.canonical_json(manifest.model_dump(mode="json")).encode()
    table, body, offset = bytearray(), [], _aligned(HEADER.size + ENTRY.size * len(arrays) + len(content))
    for name, value in arrays.items():
        array = np.ascontiguousarray(value)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        encoded = name.encode()
        if array.dtype not in DTYPES or array.ndim > 3 or len(encoded) > 48:
            raise InvalidValue(f"the section {name!r} of {array.dtype} {list(array.shape)} cannot be written")
        shape = (*array.shape, 0, 0, 0)[:3]
        table += ENTRY.pack(encoded, DTYPES.index(array.dtype), array.ndim, *shape, offset, array.nbytes)
        body.append((offset, array))
        offset = _aligned(offset + array.nbytes)
    made = bytearray(offset)
    made[HEADER.size : HEADER.size + len(table)] = table
    made[HEADER.size + len(table) : HEADER.size + len(table) + len(content)] = content
    for place, array in body:
        made[place : place + array.nbytes] = array.tobytes()
    digest = hashlib.sha256(memoryview(made)[HEADER.size :]).digest()
    made[: HEADER.size] = HEADER.pack(MAGIC, VERSION, len(arrays), offset, len(content), digest)
    return bytes(made)


def read(source: Path | bytes | bytearray | memoryview) -> Pack:
    """Map a file, or copy a buffer, and verify all of it.

    A view of a file that is mapped already is used where it is. Its checksum is left to who mapped it (a model folder
    has one of its own), so that pages that nobody needs stay unmapped.

    Raises :class:`CorruptFile` for whatever is not exactly what :func:`to_bytes` writes.
    """
    if isinstance(source, Path):
        where, mapped = str(source), _mapped(source)
    elif isinstance(source, memoryview) and isinstance(source.obj, mmap.mmap) and source.nbytes == len(source.obj):
        where, mapped = "the mapped file", source.obj
        _verify_header(where, mapped[: HEADER.size])
    else:
        where, mapped = "the buffer", mmap.mmap(-1, max(len(source), 1))  # begins at a page, as a file's map does
        mapped[: len(source)] = bytes(source)
        _verify_digest(where, mapped[: HEADER.size], hashlib.sha256(memoryview(source)[HEADER.size :]).digest())
    try:
        return _parsed(mapped)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise CorruptFile(f"{where}: its manifest is not valid: {place}: {first['msg']}") from error
    except (ValueError, struct.error, KeyError, RecursionError, OverflowError) as error:
        raise CorruptFile(f"{where} is not a valid engine pack: {error}") from error


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _mapped(source: Path) -> mmap.mmap:
    """The file's map. The checksum is taken by reading, which leaves pages that nobody needs unmapped."""
    if not source.is_file():
        found = "a folder" if source.is_dir() else "missing"
        raise CorruptFile(f"{source} is {found}; an engine pack is expected there")
    try:
        with source.open("rb") as file:
            header = file.read(HEADER.size)
            _verify_header(str(source), header)
            _verify_digest(str(source), header, hashlib.file_digest(file, "sha256").digest())
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise StoreError(f"cannot read {source}: {error.strerror or error}") from error


def _verify_header(where: str, header: bytes) -> None:
    if len(header) < HEADER.size:
        raise CorruptFile(f"{where} is no engine pack: a header of {HEADER.size} bytes is missing")
    magic, version, *_ = HEADER.unpack(header)
    if magic != MAGIC:
        raise CorruptFile(f"{where} is no engine pack: it begins with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise CorruptFile(f"{where} has format version {version}; this release reads version {VERSION}")


def _verify_digest(where: str, header: bytes, digest: bytes) -> None:
    _verify_header(where, header)
    if HEADER.unpack(header)[5] != digest:
        raise CorruptFile(f"{where} was changed or cut off: its checksum does not fit")


def _parsed(mapped: mmap.mmap) -> Pack:
    size = len(mapped)
    _, _, count, total, length, _ = HEADER.unpack(mapped[: HEADER.size])
    if total != size:
        raise ValueError(f"it holds {size} bytes and says {total}")
    if count > MAX_SECTIONS or length > MAX_MANIFEST or HEADER.size + ENTRY.size * count + length > size:
        raise ValueError(f"{count} sections and a manifest of {length} bytes do not fit into it")
    start = HEADER.size + ENTRY.size * count
    manifest = Manifest.model_validate_json(_strict_json(mapped[start : start + length]))
    arrays: dict[str, np.ndarray] = {}
    end = start + length
    for index in range(count):
        place = HEADER.size + ENTRY.size * index
        raw, dtype, rank, *shape, offset, nbytes = ENTRY.unpack(mapped[place : place + ENTRY.size])
        name = raw.rstrip(b"\0").decode()
        if dtype >= len(DTYPES) or rank > 3 or any(shape[rank:]):
            raise ValueError(f"section {name!r} has dtype {dtype} and rank {rank}")
        items = 1
        for side in shape[:rank]:
            items *= side
        if items * DTYPES[dtype].itemsize != nbytes:
            raise ValueError(f"section {name!r} of shape {shape[:rank]} holds {nbytes} bytes")
        if offset % ALIGNMENT or offset < end or offset + nbytes > size or name in arrays:
            raise ValueError(f"section {name!r} at {offset} overlaps another, or lies outside")
        end = offset + nbytes
        arrays[name] = np.frombuffer(mapped, DTYPES[dtype], items, offset).reshape(shape[:rank])
    if _aligned(end) != size:
        raise ValueError(f"bytes follow its last section, which ends at {end}")
    if manifest.kind == "native":
        check(manifest, arrays)
    elif set(arrays) != {"onnx"} or arrays["onnx"].dtype != np.uint8 or arrays["onnx"].ndim != 1:
        raise ValueError("a pack of kind onnx has the one section 'onnx'")
    return Pack(manifest, arrays, size)


def _strict_json(content: bytes) -> bytes:
    files.parse_json(content)
    return content


def sections_of(manifest: Manifest) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Section → (dtype, shape) that the manifest asks for; None where a shape depends on the weights."""
    about = manifest.encoder
    wanted: dict[str, tuple[str, tuple[int | None, ...]]] = {
        "embeddings.words": ("f4", (about.vocabulary, about.dim)),
        "embeddings.positions": ("f4", (about.positions, about.dim)),
        "embeddings.norm.weight": ("f4", (about.dim,)),
        "embeddings.norm.bias": ("f4", (about.dim,)),
    }
    if about.segments:
        wanted["embeddings.segments"] = ("f4", (about.segments, about.dim))
    for number, block in enumerate(about.blocks):
        for name in ("attention_norm", "output_norm"):
            wanted |= {f"{number}.{name}.{part}": ("f4", (about.dim,)) for part in ("weight", "bias")}
        for name, layer in block.items():
            wanted |= _sections_of_layer(f"{number}.{name}", layer)
    if about.head == "classifier" and about.pooler != "none":
        wanted |= _of_head("head.pooler", about.dim, about.dim, 16)
    if about.head in ("classifier", "span"):
        wanted |= _of_head("head.classifier", about.outputs, about.dim, 16 if about.head == "classifier" else 4)
    return wanted


def _of_head(name: str, rows: int, columns: int, group: int) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """A float layer filled up with outputs of zeros: [in, out] in 16s on sequences, [out, in] in 4s on tokens."""
    filled = -(-rows // group) * group
    shape = (columns, filled) if group == 16 else (filled, columns)
    return {f"{name}.weight": ("f4", shape), f"{name}.bias": ("f4", (filled,))}


def _sections_of_layer(name: str, layer: Layer) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    rows, columns = layer.rows, layer.columns
    wanted: dict[str, tuple[str, tuple[int | None, ...]]] = {f"{name}.bias": ("f4", (rows,))}
    if layer.format == "float":
        return wanted | {f"{name}.weight": ("f4", (rows, columns))}
    wanted |= {f"{name}.scale": ("f4", (rows,)), f"{name}.compensation": ("i4", (rows,))}
    if layer.format == "dense":
        return wanted | {f"{name}.weight": ("i1", (rows, columns))}
    wanted |= {
        f"{name}.row_ptr": ("i4", (rows // 4 + 1,)),
        f"{name}.col_index": ("u2", (None, 4)),
        f"{name}.values": ("i1", (None, 4, 4)),
    }
    if layer.format == "tiles":
        wanted |= {
            f"{name}.masks": ("u8", (rows // 4, columns // 64)),
            f"{name}.tile_ptr": ("u4", (rows // 16 + 1,)),
            f"{name}.tile_values": ("i1", (None,)),
        }
    return wanted


def check(manifest: Manifest, arrays: Mapping[str, np.ndarray]) -> None:
    """Refuse, as ``ValueError``, a manifest and arrays that native code could not run safely, or not to any sense."""
    about = manifest.encoder
    if about.dim % about.heads or about.dim // about.heads % 4 or manifest.max_length > about.positions:
        raise ValueError(f"dim {about.dim}, heads {about.heads}, length {manifest.max_length} do not fit together")
    if about.dim // about.heads > MAX_HEAD:
        raise ValueError(f"a head of {about.dim // about.heads} features; at most {MAX_HEAD} are possible")
    if manifest.max_batch * manifest.max_length > MAX_TOKENS:
        raise ValueError(f"{manifest.max_batch} sequences of {manifest.max_length} tokens are more than {MAX_TOKENS}")
    if about.position_offset + manifest.max_length > about.positions:
        raise ValueError(
            f"{about.positions} positions are too few for {manifest.max_length} from {about.position_offset}"
        )
    if about.pad_id >= about.vocabulary or about.sep_id >= about.vocabulary:
        raise ValueError("a special token lies outside the vocabulary")
    if about.head in ("tokens", "embedding") and about.outputs != about.dim:
        raise ValueError(f"{about.outputs} outputs of a head that has {about.dim}")
    for number, block in enumerate(about.blocks):
        _check_block(f"block {number}", about.dim, block)
    wanted = sections_of(manifest)
    if wanted.keys() != arrays.keys():
        differing = sorted(wanted.keys() ^ arrays.keys())
        raise ValueError(f"sections that are missing or too many: {', '.join(differing[:4])}")
    for name, (dtype, shape) in wanted.items():
        array = arrays[name]
        fits = array.ndim == len(shape) and all(b is None or a == b for a, b in zip(array.shape, shape, strict=True))
        if array.dtype != np.dtype(f"<{dtype}") or not fits:
            raise ValueError(f"section {name!r} is {array.dtype} {list(array.shape)}, not {dtype} {list(shape)}")
        # whole tables of embeddings are not read for this: what is wrong in them gives NaN, and no more
        if dtype == "f4" and not name.startswith("embeddings.") and not np.isfinite(array).all():
            raise ValueError(f"section {name!r} holds NaN or infinities")
    for number, block in enumerate(about.blocks):
        for name, layer in block.items():
            if layer.format in ("4x1", "tiles"):
                key = f"{number}.{name}"
                row_ptr, col_index, values = (arrays[f"{key}.{part}"] for part in ("row_ptr", "col_index", "values"))
                packing.check_packed(row_ptr, col_index, values, layer.columns)
                if layer.format == "tiles":
                    packing.check_tiles(*(arrays[f"{key}.{part}"] for part in ("masks", "tile_ptr", "tile_values")))


def _check_block(where: str, dim: int, block: Mapping[str, Layer]) -> None:
    attention = [name for name in ("qkv", "query", "key", "value") if name in block]
    if set(block) - set(attention) != {"attention_out", "up", "down"} or attention not in (
        ["qkv"],
        ["query", "key", "value"],
    ):
        raise ValueError(f"{where} has the layers {', '.join(block)}")
    hidden = block["up"].rows
    sizes = {"qkv": (3 * dim, dim), "up": (hidden, dim), "down": (dim, hidden)}
    for name, layer in block.items():
        if (layer.rows, layer.columns) != sizes.get(name, (dim, dim)) or layer.rows % 4 or layer.columns % 4:
            raise ValueError(f"{where}: {name} is {layer.rows} × {layer.columns}")
        if (layer.format == "float") != (layer.input is None) or layer.columns > 65793:
            raise ValueError(f"{where}: {name} of format {layer.format} has the input grid {layer.input}")
        if layer.format == "4x1" and layer.columns > 65536:
            raise ValueError(f"{where}: {name} has more inputs than an index of 16 bits can name")
        if layer.format == "tiles" and not packing.fits_tiles(layer.rows, layer.columns):
            raise ValueError(f"{where}: {name} is {layer.rows} × {layer.columns}, which is not in whole tiles")
        grids = 3 if name == "qkv" else 1 if name in attention else 0
        if len(layer.outputs) not in (0, grids) or (layer.outputs and layer.format == "float"):
            raise ValueError(f"{where}: {name} has {len(layer.outputs)} output grids")
