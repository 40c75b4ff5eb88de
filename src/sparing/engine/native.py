"""The native library: what of it is here, what this CPU allows, and the structures it is called with."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.core.environment import cpu
from sparing.core.errors import InvalidValue, SparingError, UnsupportedISA

if TYPE_CHECKING:
    import numpy as np

LIBRARY = Path(__file__).with_name("_native.so")
PATHS = ("portable", "avx2", "vnni", "amx")
"""Instruction paths, slowest first; their places in this list are their numbers in the library."""
VARIABLE = "SPARING_ENGINE_ISA"
"""Environment variable that names the path to run on, instead of the fastest."""
VERSION = 3
"""Of the library, as entry.cpp has it: raised whenever structures or operators change."""
SLAB = {"portable": 64, "avx2": 64, "vnni": 64, "amx": 32}
"""Tokens of a slab."""

Address = ctypes.c_void_p
I32 = ctypes.c_int32
F32 = ctypes.c_float


class Grid(ctypes.Structure):
    """How floats become uint8."""

    _fields_ = [("inverse", F32), ("low", F32), ("high", F32), ("zero", I32)]


class Op(ctypes.Structure):
    """One operator, as engine.h has it."""

    _fields_ = [
        *((name, I32) for name in ("kind", "format", "epilogue", "layout")),
        *((name, I32) for name in ("rows", "columns", "heads", "part")),
        *((name, I32) for name in ("out_rows", "out_row", "chunk", "in_rows")),
        ("constant", F32),
        ("factor", F32),
        ("grid", Grid * 3),
        *((name, Address) for name in ("input", "weight", "index", "pointer")),
        *((name, Address) for name in ("compensation", "scale", "bias", "extra")),
        *((name, Address) for name in ("output", "output8", "query", "key", "value", "key_sum")),
        ("stride", ctypes.c_int64),
        ("scratch", Address),
    ]


class Run(ctypes.Structure):
    """The tokens of one call, as engine.h has it."""

    _fields_ = [
        *((name, I32) for name in ("batch", "tokens", "length", "outputs")),
        *((name, Address) for name in ("start", "count", "ids", "position", "segment", "keep", "output")),
    ]


@cache
def library() -> ctypes.CDLL | str:
    """The loaded library, or why there is none."""
    if not LIBRARY.is_file():
        return "it was not compiled when sparing was installed: no C++ compiler was found, or it failed"
    try:
        found = ctypes.CDLL(str(LIBRARY))
        found.sparing_version.restype = ctypes.c_int32
        found.sparing_built.restype = found.sparing_usable.restype = ctypes.c_uint32
        found.sparing_size_of.restype = ctypes.c_int64
        found.sparing_run.argtypes = [I32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p]
        found.sparing_run.restype = ctypes.c_int32
        found.sparing_peak.restype = found.sparing_stream.restype = ctypes.c_double
        found.sparing_stream.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        sizes = (found.sparing_size_of(0), found.sparing_size_of(1))
        version = found.sparing_version()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY} cannot be loaded: {error}"
    if version != VERSION or sizes != (ctypes.sizeof(Op), ctypes.sizeof(Run)):
        return f"{LIBRARY} is of another version of sparing; install it again"
    return found


@dataclass(frozen=True)
class Capability:
    """What the engine can run on."""

    compiled: bool
    reason: str
    """Why it is not compiled, or empty."""
    cpu: str
    built: tuple[str, ...]
    """Instruction paths in the library, slowest first."""
    usable: tuple[str, ...]
    """Those of them that this CPU and its operating system allow."""

    @property
    def best(self) -> str | None:
        """The fastest usable path."""
        return self.usable[-1] if self.usable else None


@cache
def cpu_capability() -> Capability:
    """Whether the engine's library was compiled, and which of its instruction paths run here."""
    found = library()
    name = cpu()[0]
    if isinstance(found, str):
        return Capability(False, found, name, (), ())
    built, usable = found.sparing_built(), found.sparing_usable()
    return Capability(
        True,
        "",
        name,
        tuple(path for number, path in enumerate(PATHS) if built >> number & 1),
        tuple(path for number, path in enumerate(PATHS) if usable >> number & 1),
    )


def choose_path(isa: str | None = None) -> str:
    """The path named by ``isa`` or by SPARING_ENGINE_ISA, else the fastest.

    Raises :class:`UnsupportedISA` when it is not usable here, and when nothing was compiled.
    """
    able = cpu_capability()
    wanted = isa or os.environ.get(VARIABLE) or None
    if wanted is not None and wanted not in PATHS:
        where = "isa" if isa else VARIABLE
        raise InvalidValue(f"{where} must be one of {', '.join(PATHS)}, not {wanted!r}")
    if not able.compiled:
        raise UnsupportedISA(f"the engine's native library is not here: {able.reason}")
    if wanted is None:
        assert able.best is not None
        return able.best
    if wanted not in able.usable:
        why = "this CPU lacks its instructions" if wanted in able.built else "the library was built without it"
        raise UnsupportedISA(f"the path {wanted!r} cannot run: {why}; usable here: {', '.join(able.usable)}")
    return wanted


def doctor_lines() -> list[tuple[str, str]]:
    """(what, finding) for ``sparing doctor``."""
    able = cpu_capability()
    if not able.compiled:
        return [("engine", f"ONNX Runtime serves: {able.reason}")]
    forced = os.environ.get(VARIABLE)
    try:
        finding = f"compiled, runs on {choose_path()}"
    except SparingError as error:  # of the variable
        finding = f"compiled, but will not run: {error}"
    lines = [("engine", finding), ("engine paths", ", ".join(able.usable))]
    missing = [path for path in able.built if path not in able.usable]
    if missing:
        lines.append(("engine paths not on this CPU", ", ".join(missing)))
    if forced:
        lines.append((VARIABLE, forced))
    return lines


def run(path: str, ops: ctypes.Array[Op], call: Run, seconds: ctypes.Array[ctypes.c_double] | None = None) -> None:
    """Carry out the operators; ``seconds`` adds up the time of each."""
    found = library()
    if isinstance(found, str):
        raise UnsupportedISA(f"the engine's native library is not here: {found}")
    times = ctypes.addressof(seconds) if seconds is not None else None
    if found.sparing_run(PATHS.index(path), ctypes.addressof(ops), len(ops), ctypes.addressof(call), times):
        raise SparingError(f"the path {path!r} does not run on this CPU")


def peak(path: str) -> float:
    """Multiplications a second of one core with nothing to load or store; 0 where there is no measurement of it."""
    found = library()
    return 0.0 if isinstance(found, str) else max(found.sparing_peak(PATHS.index(path)) for _ in range(5))


def stream(array: np.ndarray) -> float:
    """Bytes a second that one core reads of an array, over and over; 0 where there is no measurement of it."""
    found = library()
    return (
        0.0 if isinstance(found, str) else max(found.sparing_stream(array.ctypes.data, array.nbytes) for _ in range(5))
    )
