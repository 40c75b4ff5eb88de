"""Reference files whose kind is told by an array that only this kind has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = Mapping[str, np.ndarray]
Kinds = Mapping[str, Callable[[Arrays], set[str]]]
"""An array that only this kind of file has → what compares it, and returns the names of the arrays it used."""


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def close(found: Any, expected: np.ndarray, what: str, rtol: float = 1e-4, atol: float = 1e-7) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, {expected.shape} in the reference"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=what)


def opened(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as npz:
        return {name: npz[name] for name in npz.files}


def compared(files: Iterable[Path], kinds: Kinds) -> dict[str, int]:
    """File name → how many arrays were compared; every array of every file is, and every file is of one known kind."""
    counts = {}
    for path in files:
        arrays = opened(path)
        found = [kind for kind in kinds if kind in arrays]
        assert len(found) == 1, f"{path.name}: a file of an unknown kind, with {sorted(arrays)}"
        used = kinds[found[0]](arrays)
        assert used == set(arrays), f"{path.name}: not compared: {set(arrays) - used}, not there: {used - set(arrays)}"
        counts[path.name] = len(used)
    print(f"{sum(counts.values())} arrays of {len(counts)} files")
    return counts


def one_with(files: Iterable[Path], marker: str) -> dict[str, np.ndarray]:
    """The first file with this array."""
    return next(arrays for arrays in map(opened, files) if marker in arrays)
