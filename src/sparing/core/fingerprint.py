"""Content fingerprints: equal content gives equal text on every machine; never ``id``, ``repr`` or pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from sparing.core.environment import cpu, version_of
from sparing.core.errors import SparingError
from sparing.core.files import sha256_of


class NoFingerprint(SparingError):
    """A thing has no content Sparing can read; give it ``fingerprint()`` or pass ``version="…"``."""


def fingerprint(thing: Any) -> str:
    """Hex digest of ``thing``'s content.

    Understood: plain values and containers of them, NumPy arrays, tensors, ``nn.Module`` (class source, structure,
    state), datasets made of tensors, PyG objects, files and folders (``Path``), dataclasses, functions and classes
    (their source and what they close over), and anything with a method ``fingerprint()``. Raises
    :class:`NoFingerprint` for the rest.
    """
    digest = hashlib.sha256()
    _feed(digest.update, thing, frozenset())
    return digest.hexdigest()


def _feed(update: Callable[[bytes], Any], thing: Any, above: frozenset[int]) -> None:
    if id(thing) in above and isinstance(thing, dict | list | types.FunctionType):
        update(b"cycle;")
        return
    above |= {id(thing)}

    def feed(part: Any) -> None:
        _feed(update, part, above)

    if thing is None or isinstance(thing, bool | int | float | complex | str):
        update(f"{type(thing).__name__}:{len(str(thing))}:{thing!r};".encode())
    elif isinstance(thing, bytes | bytearray):
        update(f"bytes:{len(thing)}:".encode() + bytes(thing))
    elif isinstance(thing, type):
        update(b"class:")
        feed(_class_source(thing))
    elif callable(getattr(thing, "fingerprint", None)):
        update(f"own:{type(thing).__qualname__}:".encode())
        feed(thing.fingerprint())
    elif isinstance(thing, Path):
        _feed_path(update, thing)
    elif isinstance(thing, np.ndarray):
        _feed_array(update, thing)
    elif isinstance(thing, np.generic):
        _feed_array(update, np.asarray(thing))
    elif isinstance(thing, Mapping):
        update(f"map:{len(thing)}:".encode())
        for key in sorted(thing, key=lambda key: (type(key).__name__, str(key))):
            feed(key)
            feed(thing[key])
    elif isinstance(thing, list | tuple):
        update(f"seq:{type(thing).__name__}:{len(thing)}:".encode())
        for item in thing:
            feed(item)
    elif isinstance(thing, set | frozenset):
        update(f"set:{len(thing)}:".encode())
        for item in sorted(fingerprint(item) for item in thing):
            feed(item)
    elif isinstance(thing, range | slice):
        update(repr(thing).encode())
    elif _feed_torch(update, thing, feed):
        pass
    elif isinstance(thing, partial):
        update(b"partial:")
        feed((thing.func, thing.args, thing.keywords))
    elif inspect.isroutine(thing):
        _feed_function(update, thing, feed)
    elif dataclasses.is_dataclass(thing):
        update(b"dataclass:")
        feed(type(thing))
        feed({field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)})
    else:
        raise NoFingerprint(
            f"cannot fingerprint a {type(thing).__module__}.{type(thing).__qualname__}: "
            'give it a method fingerprint() -> str, or pass version="…" with a text you change when its content changes'
        )


def _feed_array(update: Callable[[bytes], Any], array: np.ndarray) -> None:
    if array.dtype.hasobject:
        raise NoFingerprint(f"cannot fingerprint an array of Python objects (shape {array.shape})")
    update(f"array:{array.dtype.str}:{array.shape}:".encode())
    update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes())


@cache
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    return sha256_of(Path(path))


def _feed_path(update: Callable[[bytes], Any], path: Path) -> None:
    if path.is_dir():
        for folder, subfolders, names in os.walk(path):
            subfolders.sort()
            for name in sorted(names):
                file = Path(folder, name)
                update(f"file:{file.relative_to(path).as_posix()}:".encode())
                _feed_path(update, file)
    elif path.is_file():
        stat = path.stat()
        update(_file_digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns).encode())
    else:
        raise NoFingerprint(f"cannot fingerprint {path}: there is no such file or folder")


def _class_source(cls: type) -> str:
    if cls.__module__.split(".")[0] in {"builtins", "torch", "numpy", "torch_geometric"}:
        return f"{cls.__module__}.{cls.__qualname__}"
    try:
        return "\n".join(inspect.getsource(base) for base in cls.__mro__ if _is_users(base))
    except (OSError, TypeError) as error:
        raise NoFingerprint(
            f"cannot read the source of class {cls.__module__}.{cls.__qualname__} ({error}); "
            "define it in a file, or pass version=…"
        ) from None


def _is_users(cls: type) -> bool:
    return cls.__module__.split(".")[0] not in {"builtins", "torch", "numpy", "torch_geometric", "abc", "typing"}


def _feed_function(update: Callable[[bytes], Any], function: Any, feed: Callable[[Any], None]) -> None:
    update(f"function:{function.__module__}.{function.__qualname__}:".encode())
    if isinstance(function, types.MethodType):
        feed(function.__self__)
        function = function.__func__
    if not isinstance(function, types.FunctionType) or not _is_users(function):  # type: ignore[arg-type]
        return
    try:
        feed(inspect.getsource(function))
    except (OSError, TypeError) as error:
        raise NoFingerprint(f"cannot read the source of {function.__qualname__} ({error}); pass version=…") from None
    feed(function.__defaults__)
    feed([cell.cell_contents for cell in function.__closure__ or ()])


def _feed_torch(update: Callable[[bytes], Any], thing: Any, feed: Callable[[Any], None]) -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if isinstance(thing, torch.Tensor):
        if thing.layout != torch.strided:
            thing = thing.coalesce() if thing.layout == torch.sparse_coo else thing.to_sparse_coo().coalesce()
            update(f"sparse:{tuple(thing.shape)}:".encode())
            feed([thing.indices(), thing.values()])
        else:
            tensor = thing.detach().cpu().contiguous()
            update(f"tensor:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    elif isinstance(thing, torch.nn.Module):
        update(b"module:")
        feed([(name, type(module), _plain_attributes(module)) for name, module in thing.named_modules()])
        feed(dict(thing.state_dict()))
    elif isinstance(thing, torch.utils.data.TensorDataset):
        feed(["TensorDataset", *thing.tensors])
    elif isinstance(thing, torch.utils.data.Subset):
        feed(["Subset", thing.dataset, list(thing.indices)])
    elif isinstance(thing, torch.utils.data.ConcatDataset):
        feed(["ConcatDataset", *thing.datasets])
    elif isinstance(thing, torch.dtype | torch.device | torch.Size):
        update(str(thing).encode())
    elif type(thing).__module__.startswith("torch_geometric.") and hasattr(thing, "to_dict"):
        feed([type(thing).__name__, thing.to_dict()])
    elif type(thing).__module__.startswith("torch_geometric.") and hasattr(thing, "__getitem__"):
        feed([type(thing).__name__, *(thing[i] for i in range(len(thing)))])
    else:
        return False
    return True


def _plain_attributes(module: Any) -> dict[str, Any]:
    """What a module holds besides parameters, buffers and submodules, as far as it is plain data (stride, eps …)."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, plain)
    }


@cache
def code_fingerprint() -> str:
    """Digest of every source file of this package: results of another version of the code are not reused."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*")):
        if path.suffix in {".py", ".cpp", ".h"}:
            digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def environment_fingerprint(threads: int) -> str:
    """Digest of what besides data and fields decides the bits of a result: code, versions, threads, CPU."""
    return fingerprint(
        {
            "code": code_fingerprint(),
            "python": list(sys.version_info[:3]),
            "versions": {name: version_of(name) for name in ("torch", "lightning", "onnxruntime", "numpy")},
            "threads": threads,
            "cpu": cpu(),
        }
    )
