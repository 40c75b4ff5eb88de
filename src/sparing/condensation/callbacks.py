"""What a condenser tells those who listen in, in a fixed order; the audit of backdoors attacks through this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from sparing.core.errors import InvalidValue

MARK = "poisoned"
"""Key of a provenance, and attribute of condensed data, that says that a backdoor was planted in them."""
HOOKS = ("on_data_ready", "before_synthetic_update", "after_network_update", "on_iteration_end")


class Callbacks:
    """Calls the callbacks that have a method, one after the other.

    A callback is any object with one or more of

    - ``on_data_ready(data) -> data``: once, before the synthetic data are begun and before real ones are grouped by
      class. ``data`` is what is condensed (images and labels, graphs, a graph); what it returns is condensed instead,
      and those very tensors are read from then on, so that a callback may change them later.
    - ``before_synthetic_update(iteration, outer)``: before each update of the synthetic data.
    - ``after_network_update(network)``: after each training of the network that the data are matched on.
    - ``on_iteration_end(iteration, loss)``: after each iteration; the loss is a float.

    One whose state changes while condensing also has ``state_dict()`` and ``load_state_dict(state)``, of tensors,
    numbers, texts, None and nested dicts and lists of them. A condensing that is resumed calls ``on_data_ready``, then
    ``load_state_dict``, after which the data must be what they were when the state was taken.

    Raises:
        InvalidValue: a callback with none of these methods, or with only one of the two for its state.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        self.callbacks = tuple(callbacks)
        for number, callback in enumerate(self.callbacks):
            if not any(hasattr(callback, hook) for hook in HOOKS):
                raise InvalidValue(
                    f"callback {number} ({type(callback).__name__}) has none of the methods {', '.join(HOOKS)}"
                )
            if hasattr(callback, "state_dict") != hasattr(callback, "load_state_dict"):
                raise InvalidValue(
                    f"callback {number} ({type(callback).__name__}) has one of state_dict and load_state_dict; both or "
                    "neither are expected"
                )

    def data_ready(self, data: Any) -> Any:
        """What is to be condensed, from what was given."""
        for callback in self.callbacks:
            if hasattr(callback, "on_data_ready"):
                data = callback.on_data_ready(data)
        return data

    def before_synthetic_update(self, iteration: int, outer: int) -> None:
        """The synthetic data are about to be updated."""
        self._call("before_synthetic_update", iteration, outer)

    def after_network_update(self, network: nn.Module) -> None:
        """The network was trained."""
        self._call("after_network_update", network)

    def iteration_end(self, iteration: int, loss: float) -> None:
        """An iteration is over."""
        self._call("on_iteration_end", iteration, loss)

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(*arguments)

    def state(self) -> list[Any]:
        """Each callback's state; None for those without."""
        return [callback.state_dict() if hasattr(callback, "state_dict") else None for callback in self.callbacks]

    def load(self, states: Sequence[Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            InvalidValue: states of other callbacks than these.
        """
        known = [hasattr(callback, "load_state_dict") for callback in self.callbacks]
        if known != [state is not None for state in states]:
            raise InvalidValue(f"a state of {len(states)} callbacks, but {len(known)} are here, or others keep a state")
        for callback, state in zip(self.callbacks, states, strict=True):
            if state is not None:
                callback.load_state_dict(state)

    def provenance(self) -> dict[str, Any]:
        """What the callbacks say about the data they took part in, from their ``provenance``."""
        return {key: value for c in self.callbacks for key, value in getattr(c, "provenance", {}).items()}


T = TypeVar("T")


def marked(condensed: T, said: Mapping[str, Any]) -> T:
    """The condensed data; where ``said`` of them is that they are poisoned, they bear that as an attribute.

    Such data are saved only with a provenance that says so, too.
    """
    if said.get(MARK) is True:
        for part in condensed if isinstance(condensed, list) else [condensed]:
            setattr(part, MARK, True)
    return condensed


def is_marked(condensed: Any) -> bool:
    """Whether :func:`marked` left its mark on the data, or on a part of them."""
    return any(getattr(part, MARK, False) for part in (condensed if isinstance(condensed, list) else [condensed]))
