"""What ``--shapes`` puts around every function and dataclass of sparing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception, BeartypeDecorHintPep3119Exception

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as it is for mypy


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its annotations checked at each call, where they can be.

    Left alone: methods that mention ``Self``, which means nothing outside a class, and protocols not made for it.
    """
    try:
        return check(function)
    except (BeartypeDecorHintPep673Exception, BeartypeDecorHintPep3119Exception):
        return function
