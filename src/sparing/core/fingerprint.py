"""Content fingerprints: equal content gives equal text on every machine; never ``id``, ``repr`` or pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import cache, partial
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np

from sparing.core.environment import cpu, version_of
from sparing.core.errors import SparingError
from sparing.core.files import sha256_of

Update = Callable[[Any], Any]
"""Takes a piece of bytes, as a buffer of any kind."""
_PLAIN = (type(None), bool, int, float, str, tuple, list)


class NoFingerprint(SparingError):
    """A thing has no content Sparing can read; give it ``fingerprint()`` or pass ``version="…"``."""


def fingerprint(thing: Any) -> str:
    """Hex digest of ``thing``'s content.

    Understood: plain values and containers of them, NumPy arrays, tensors, ``nn.Module`` (class source, structure,
    attributes, state, ties, what is frozen), datasets made of tensors, PyG objects, files and folders (``Path``),
    dataclasses, functions and classes (see :func:`own_code`, and what they close over), anything with a method
    ``fingerprint()`` or ``to_dict()``. Raises :class:`NoFingerprint` for the rest.
    """
    try:
        return _digest(thing, ())
    except RecursionError:
        raise NoFingerprint(f"cannot fingerprint a {type(thing).__name__} nested hundreds of levels deep") from None


def _digest(thing: Any, above: tuple[int, ...]) -> str:
    digest = hashlib.sha256()
    _feed(digest.update, thing, above)
    return digest.hexdigest()


def _feed(update: Update, thing: Any, above: tuple[int, ...]) -> None:
    """Feed ``thing``, which is inside the things with the ids ``above``."""
    if thing is None or isinstance(thing, bool | float | complex | str):
        text = repr(thing)
        update(f"{type(thing).__name__}:{len(text)}:{text};".encode())
        return
    if isinstance(thing, int):
        update(f"{type(thing).__name__}:{int(thing):x};".encode())  # decimal is slow, and refused beyond 4300 digits
        return
    if id(thing) in above:
        update(f"cycle:{len(above) - above.index(id(thing))};".encode())
        return
    above = (*above, id(thing))

    def feed(part: Any) -> None:
        _feed(update, part, above)

    def digest(part: Any) -> str:
        return _digest(part, above)

    if isinstance(thing, bytes | bytearray | memoryview):
        content = bytes(thing) if isinstance(thing, memoryview) else thing
        update(f"bytes:{len(content)}:".encode())
        update(content)
    elif isinstance(thing, type):
        update(b"class:")
        feed(own_code(thing))
    elif callable(getattr(thing, "fingerprint", None)):
        update(f"own:{type(thing).__module__}.{type(thing).__qualname__}:".encode())
        feed(thing.fingerprint())
    elif isinstance(thing, Path):
        _feed_path(update, thing)
    elif isinstance(thing, np.ndarray):
        _feed_array(update, thing)
    elif isinstance(thing, np.generic):
        _feed_array(update, np.asarray(thing))
    elif isinstance(thing, Mapping):
        update(f"map:{len(thing)}:".encode())
        plain = all(type(key) is str for key in thing)
        for key in sorted(thing, key=None if plain else digest):
            feed(key)
            feed(thing[key])
    elif isinstance(thing, list | tuple):
        update(f"seq:{type(thing).__name__}:{len(thing)}:".encode())
        for item in thing:
            feed(item)
    elif isinstance(thing, set | frozenset):
        update(f"set:{len(thing)}:".encode())
        for item in sorted(map(digest, thing)):
            feed(item)
    elif isinstance(thing, range | slice):
        update(f"{type(thing).__name__}:".encode())
        feed((thing.start, thing.stop, thing.step))
    elif _feed_torch(update, thing, feed, digest):
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
    elif isinstance(thing, Enum):
        update(f"enum:{type(thing).__qualname__}.{thing.name};".encode())
    elif isinstance(thing, logging.Logger):
        update(b"logger;")
    elif callable(getattr(thing, "to_dict", None)):
        update(b"to_dict:")
        feed((type(thing), thing.to_dict()))
    else:
        raise NoFingerprint(
            f"cannot fingerprint a {type(thing).__module__}.{type(thing).__qualname__}: "
            'give it a method fingerprint() -> str, or pass version="…" with a text you change when its content changes'
        )


def _feed_array(update: Update, array: np.ndarray) -> None:
    if array.dtype.hasobject:
        raise NoFingerprint(f"cannot fingerprint an array of Python objects (shape {array.shape})")
    if isinstance(array, np.ma.MaskedArray):
        update(b"masked:")
        _feed_array(update, np.ma.getmaskarray(array))
        array = array.filled(array.dtype.type())  # what lies under the mask does not count
    update(f"array:{array.dtype.descr if array.dtype.names else array.dtype}:{array.shape}:".encode())
    if array.nbytes:
        update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@cache
def _file_digest(path: str, inode: int, size: int, modified_ns: int, changed_ns: int) -> str:
    return sha256_of(Path(path))


def _feed_path(update: Update, path: Path, above: tuple[Path, ...] = ()) -> None:
    """The content of a file, or names and contents of all there is in a folder, links followed."""
    try:
        if path.is_dir():
            real = path.resolve()
            if real in above:
                update(f"cycle:{len(above) - above.index(real)};".encode())
                return
            inside = sorted(path.iterdir(), key=os.fsencode)
            update(f"folder:{len(inside)}:".encode())
            for child in inside:
                name = os.fsencode(child.name)
                update(b"%d:%s" % (len(name), name))
                _feed_path(update, child, (*above, real))
        elif path.is_file():
            stat = path.stat()
            digest = _file_digest(str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            update(f"file:{digest};".encode())
        else:
            raise NoFingerprint(f"cannot fingerprint {path}: there is no such file or folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead back to themselves
        raise NoFingerprint(f"cannot fingerprint {path}: {error}") from error


_KNOWN = frozenset({"builtins", "torch", "numpy", "torch_geometric", "lightning", "pydantic", "sparing"})
"""Packages whose versions, or all of whose source, are in every store key."""


@cache
def _is_library(module: str) -> bool:
    """True for the modules of installed packages: their name and version stand for their code."""
    top = module.split(".")[0]
    if top in _KNOWN or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _called(thing: Any) -> str:
    name = f"{thing.__module__}.{thing.__qualname__}"
    top = thing.__module__.split(".")[0]
    if not _is_library(thing.__module__) or top in _KNOWN or top in sys.stdlib_module_names:
        return name
    return " ".join([name, *sorted(version_of(package) or "" for package in _packages().get(top, [top]))])


@cache
def _packages() -> Mapping[str, list[str]]:
    return packages_distributions()


def own_code(root: Any) -> list[str]:
    """Name and source of a user's function or class, and of all that it names and that is the user's own as well.

    Followed are base classes, functions and classes that its code names, in its module, in another module of the user's
    or in a container there; plain constants it names count with their value. What libraries hold is told apart by name
    and version. So an edited helper function makes results that rest on it outdated, and other edits do not.
    """
    if _is_library(root.__module__):
        return [_called(root)]
    texts: set[str] = set()
    seen: set[int] = set()
    todo: list[Any] = [root]
    while todo:
        thing = todo.pop()
        if isinstance(thing, type | types.FunctionType):
            if id(thing) in seen or _is_library(thing.__module__ or "builtins"):
                continue
            seen.add(id(thing))
            texts.add(f"{_called(thing)}\n{_source(thing)}")
            todo += thing.__mro__[1:] if isinstance(thing, type) else ()
            for name, value in _named(thing):
                todo.append(value)
                if _is_plain(value):
                    texts.add(f"{name} = {fingerprint(value)}")
        elif isinstance(thing, dict | list | tuple) and id(thing) not in seen:
            seen.add(id(thing))
            todo += thing.values() if isinstance(thing, dict) else thing
    return sorted(texts)


@cache
def _source(thing: Any) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError) as error:
        raise NoFingerprint(
            f"cannot read the source of {thing.__module__}.{thing.__qualname__} ({error}); "
            "define it in a file, or pass version=…"
        ) from None


def _named(thing: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of the globals, and of the members of the user's modules, that a function or class names."""
    for function in _functions(thing):
        names = sorted(_names(function.__code__))
        scope = function.__globals__
        package = scope.get("__package__") or ""
        modules = []
        for name in names:
            value = scope.get(name, sys.modules.get(name) or sys.modules.get(f"{package}.{name}"))
            if isinstance(value, types.ModuleType):
                modules += [] if _is_library(value.__name__) else [value]
            elif name in scope:
                yield name, value
        for module in modules:
            yield from ((f"{module.__name__}.{name}", vars(module)[name]) for name in names if name in vars(module))


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    parts = [thing] if not isinstance(thing, type) else list(vars(thing).values())
    for part in parts:
        if isinstance(part, property):
            inside: list[Any] = [part.fget, part.fset]
        else:
            inside = [getattr(part, "__func__", getattr(part, "func", part))]  # static and class methods, cached ones
        for function in inside:
            plain = inspect.unwrap(function) if callable(function) else None
            if isinstance(plain, types.FunctionType) and not _is_library(plain.__module__ or "builtins"):
                yield plain


def _names(code: types.CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(part) for part in code.co_consts if isinstance(part, types.CodeType)))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(part) for item in value.items() for part in item)
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _feed_function(update: Update, function: Any, feed: Callable[[Any], None]) -> None:
    update(f"function:{function.__module__}.{function.__qualname__}:".encode())
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        feed(owner)
    function = getattr(function, "__func__", function)
    if not isinstance(function, types.FunctionType):
        return
    feed(own_code(function))
    if not _is_library(function.__module__):
        feed(_instructions(function.__code__))  # tells apart two lambdas of one line
        feed((function.__defaults__, function.__kwdefaults__))
        feed([_content(cell) for cell in function.__closure__ or ()])


def _instructions(code: types.CodeType) -> list[Any]:
    constants = [_instructions(part) if isinstance(part, types.CodeType) else part for part in code.co_consts]
    return [code.co_code, constants, code.co_names]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return "empty cell"


def _feed_torch(update: Update, thing: Any, feed: Callable[[Any], None], digest: Callable[[Any], str]) -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if isinstance(thing, torch.Tensor):
        try:
            _feed_tensor(update, thing)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise NoFingerprint(
                f"cannot fingerprint a tensor ({thing.dtype}, {thing.layout}, on {thing.device}): "
                f"{str(error).splitlines()[0]}"
            ) from error
    elif isinstance(thing, torch.nn.Module):
        update(b"module:")
        feed([(name, type(module), _attributes(module, digest)) for name, module in thing.named_modules()])
        feed([dict(thing.state_dict()), dict(thing.named_buffers())])
        first: dict[int, str] = {}
        for name, parameter in thing.named_parameters(remove_duplicate=False):
            feed((name, first.setdefault(id(parameter), name), parameter.requires_grad))
    elif isinstance(thing, torch.utils.data.TensorDataset | torch.utils.data.Subset | torch.utils.data.ConcatDataset):
        update(b"dataset:")
        feed((type(thing), vars(thing)))
    elif isinstance(thing, torch.Generator):
        feed(thing.get_state())
    elif isinstance(thing, torch.dtype | torch.device):
        update(f"torch:{thing};".encode())
    elif type(thing).__module__.startswith("torch_geometric.") and hasattr(thing, "to_dict"):
        feed([type(thing).__name__, thing.to_dict()])
    elif type(thing).__module__.startswith("torch_geometric.") and hasattr(thing, "__getitem__"):
        feed([type(thing).__name__, *(thing[i] for i in range(len(thing)))])
    else:
        return False
    return True


def _feed_tensor(update: Update, tensor: Any) -> None:
    import torch

    if tensor.is_quantized:
        raise NotImplementedError("quantized tensors are not read")
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        sparse = (tensor if tensor.layout == torch.sparse_coo else tensor.to_sparse_coo()).coalesce()
        update(f"sparse:{tuple(tensor.shape)}:".encode())
        _feed_tensor(update, sparse.indices())
        _feed_tensor(update, sparse.values())
    else:
        tensor = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        update(f"tensor:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        if tensor.numel():
            update(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _attributes(module: Any, digest: Callable[[Any], str]) -> dict[str, Any]:
    """What a module holds besides parameters, buffers and submodules: numbers, functions it calls, hooks …

    Of torch's own classes the public plain values and functions (stride, eps, activation …). Of others everything; what
    is private counts as far as it can be read.
    """
    from torch import nn

    found: dict[str, Any] = {}
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        if hooks := list(vars(module)[name].values()):
            plain = (types.FunctionType, types.MethodType, partial)
            found[name] = [hook if isinstance(hook, plain) else (type(hook), vars(hook)) for hook in hooks]
    internal = vars(nn.Module())
    for name, value in vars(module).items():
        if name in internal:
            continue
        if _is_library(type(module).__module__):
            if not name.startswith("_") and (isinstance(value, _PLAIN) or inspect.isroutine(value)):
                found[name] = value
            continue
        try:
            found[name] = digest(value)
        except NoFingerprint as error:
            if not name.startswith("_"):
                raise NoFingerprint(f"the attribute {name!r} of {type(module).__qualname__}: {error}") from None
    return found


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
