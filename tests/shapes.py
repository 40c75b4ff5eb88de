"""What ``--shapes`` puts around sparing: shapes and dtypes of arrays and tensors checked at each call."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

# beartype looks at an item of a list by chance; not with the generator whose state the tests compare
with mock.patch("random.getrandbits", random.Random(0).getrandbits):
    from beartype import BeartypeConf, beartype

SHAPED = re.compile(r"\b(Float|Int|Integer|Bool|Complex|Num|Shaped)\[")
check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as it is for mypy


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` checked where it names shapes; other annotations are mypy's affair, and bad input is the tests'."""
    shaped = {name: hint for name, hint in getattr(function, "__annotations__", {}).items() if SHAPED.search(str(hint))}
    if not shaped:
        return function
    function.__annotations__ = shaped
    inner = check(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        # a network that torch.fx traces is called with stand-ins, which have no shape
        kinds = (kind for value in (*args, *kwargs.values()) for kind in type(value).__mro__)
        traced = any(kind.__module__.startswith("torch.fx") for kind in kinds)
        return (function if traced else inner)(*args, **kwargs)

    return guarded
