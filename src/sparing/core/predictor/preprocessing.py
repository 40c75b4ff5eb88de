"""Executable preprocessing: what turns a raw input into a model input, saved with the model it belongs to."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from sparing.core import registry
from sparing.core.errors import CorruptFile, InvalidValue, SparingError, shown


class Operation(ABC):
    """One stage of preprocessing: a frozen dataclass with JSON-able fields, in NumPy or Pillow only.

    Registered under ``operations`` so that a saved model folder can name it.
    """

    @abstractmethod
    def __call__(self, batch: Any) -> Any:
        """The batch after this stage. The first stage receives the list of raw inputs."""


@dataclass(frozen=True)
class Preprocessing:
    """Operations in order: raw inputs → a model input with one row each."""

    operations: tuple[Operation, ...]

    def __call__(self, raws: Sequence[Any]) -> np.ndarray:
        """Raw inputs (N of them) → model input (N, …); raises :class:`InvalidValue` when that is not what comes out."""
        if isinstance(raws, str | bytes | PurePath) or not hasattr(raws, "__len__"):
            raise InvalidValue(f"a list of raw inputs is expected, not {shown(raws)} alone: write [input]")
        if len(raws) == 0:
            raise InvalidValue("no inputs were given: preprocessing needs at least one")
        batch: Any = list(raws)
        for operation in self.operations:
            batch = operation(batch)
        if not isinstance(batch, np.ndarray) or batch.dtype.hasobject or len(batch) != len(raws):
            got = f"shape {batch.shape}, {batch.dtype}" if isinstance(batch, np.ndarray) else type(batch).__name__
            raise InvalidValue(f"preprocessing made {got} of {len(raws)} inputs; an array with one row each is needed")
        return batch

    def to_config(self) -> list[dict[str, Any]]:
        """``[{"operation": name, field: value, …}, …]``; an operation nobody registered is refused."""
        config = []
        for operation in self.operations:
            name = registry.name_of("operations", type(operation))
            if name is None:
                raise InvalidValue(
                    f"{type(operation).__module__}.{type(operation).__qualname__} is not a registered operation, so a "
                    "saved model could not name it; declare it under the entry point group 'sparing.operations'"
                )
            config.append({"operation": name, **dataclasses.asdict(operation)})  # type: ignore[call-overload]
        return config

    @classmethod
    def from_config(cls, config: Sequence[Any]) -> Preprocessing:
        """The inverse of :meth:`to_config`; values are checked against each operation's field types."""
        from pydantic import TypeAdapter, ValidationError

        operations = []
        for index, entry in enumerate(config):
            if not isinstance(entry, dict) or not isinstance(entry.get("operation"), str):
                raise CorruptFile(
                    f"preprocessing[{index}] is {entry!r}; a mapping with the key 'operation' is expected"
                )
            fields = {key: value for key, value in entry.items() if key != "operation"}
            made = registry.resolve("operations", entry["operation"])
            known = {field.name for field in dataclasses.fields(made)}
            if unknown := sorted(fields.keys() - known):
                raise CorruptFile(
                    f"preprocessing[{index}] ({entry['operation']}): unknown field {unknown[0]!r}; "
                    f"fields: {', '.join(sorted(known)) or 'none'}"
                )
            try:
                operations.append(TypeAdapter(made).validate_python(fields))
            except SparingError:
                raise
            except (ValidationError, TypeError, ValueError) as error:
                raise CorruptFile(f"preprocessing[{index}] ({entry['operation']}): {error}") from error
        return cls(tuple(operations))
