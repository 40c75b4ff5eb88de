"""What the checks of dd_backdoor fixtures share."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]


def weights_of(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name.removeprefix("w/"): array for name, array in arrays.items() if name.startswith("w/")}


def channels_first(images: np.ndarray) -> torch.Tensor:
    """(N, H, W) or (N, H, W, 3) 8-bit pictures as (N, C, H, W)."""
    return torch.tensor(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2))


def close(found: object, expected: np.ndarray, name: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    if isinstance(found, torch.Tensor):
        found = found.detach().numpy()
    assert np.shape(found) == expected.shape, f"{name}: {np.shape(found)} is not {expected.shape}"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)


def near_largest(found: object, expected: np.ndarray, name: str, share: float) -> None:
    """Within ``share`` of the largest entry."""
    close(found, expected, name, rtol=0, atol=share * float(np.abs(expected).max()))
