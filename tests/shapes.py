"""What ``--shapes`` puts around sparing: shapes and dtypes of arrays and tensors checked at each call."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jaxtyping
from torch.fx import Proxy

# beartype looks at an item of a list by chance; not with the generator whose state the tests compare
with mock.patch("random.getrandbits", random.Random(0).getrandbits):
    from beartype import BeartypeConf, beartype

SHAPED = re.compile(r"\b(Float|Int|Integer|Bool|Complex|Num|Shaped)\[")
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as it is for mypy


def install() -> None:
    """Check sparing's functions from its first import on; those that name no shapes stay as they are, and as fast."""
    whole = jaxtyping.jaxtyped

    def jaxtyped(**how: Any) -> Callable[[Any], Any]:
        return lambda thing: whole(**how)(thing) if isinstance(thing, type) or shaped(thing) else thing

    jaxtyping.jaxtyped = jaxtyped  # the hook decorates every function with what has this name
    jaxtyping.install_import_hook("sparing", "shapes.checked")


def shaped(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations that name shapes."""
    return {name: hint for name, hint in getattr(function, "__annotations__", {}).items() if SHAPED.search(str(hint))}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` checked where it names shapes; other annotations are mypy's affair, and bad input is the tests'."""
    if not (hints := shaped(function)):
        return function
    function.__annotations__ = hints
    inner = check(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        # a network that torch.fx traces is called with stand-ins, which have no shape
        traced = any(isinstance(value, Proxy) for value in (*args, *kwargs.values()))
        return (function if traced else inner)(*args, **kwargs)

    return guarded
