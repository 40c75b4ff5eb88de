"""The network of the dd_backdoor fixtures, built from the weights that a file holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from sparing.models.blocknet import BlockNet

Arrays = Mapping[str, np.ndarray]


def network(weights: Arrays, size: int) -> BlockNet:
    convolutions = [array for array in weights.values() if array.ndim == 4]
    wide, channels, _, _ = convolutions[0].shape
    hidden = len(weights["classifier.0.weight"])
    classes = len(weights["classifier.2.weight"])
    model = BlockNet(channels, classes, size, wide, len(convolutions), norm="none", hidden=hidden)
    model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    return model


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
