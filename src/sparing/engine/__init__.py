"""The CPU engine: encoders with 4×1 block-sparse or dense INT8 weights, compiled into one memory-mapped file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.engine.compiler import compile_encoder
    from sparing.engine.linear import Int8Linear
    from sparing.engine.native import cpu_capability, doctor_lines
    from sparing.engine.packing import Packed, pack_4x1, unpack_4x1
    from sparing.engine.runtime import Engine
    from sparing.engine.sparse_linear import SparseInt8Linear
    from sparing.engine.tuner import choose_production, tune_production

_HOMES = {
    "compile_encoder": "compiler",
    "Int8Linear": "linear",
    "cpu_capability": "native",
    "doctor_lines": "native",
    "Packed": "packing",
    "pack_4x1": "packing",
    "unpack_4x1": "packing",
    "Engine": "runtime",
    "SparseInt8Linear": "sparse_linear",
    "choose_production": "tuner",
    "tune_production": "tuner",
}

__all__ = [
    "Engine",
    "Int8Linear",
    "Packed",
    "SparseInt8Linear",
    "choose_production",
    "compile_encoder",
    "cpu_capability",
    "doctor_lines",
    "pack_4x1",
    "tune_production",
    "unpack_4x1",
]


def __getattr__(name: str) -> Any:
    """Public names, imported on first use: a served pack needs no torch."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
