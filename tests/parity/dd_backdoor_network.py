"""The network of the dd_backdoor fixtures, built from the weights that a file holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

Arrays = Mapping[str, np.ndarray]


class Network(nn.Module):
    """Blocks of 3x3 convolution, ReLU, average pool; then two linear layers."""

    def __init__(self, weights: Arrays) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        names = [name.split(".")[1] for name in weights if name.startswith("features.") and name.endswith(".weight")]
        for block, name in enumerate(sorted(names, key=int)):
            wide, channels, kernel, _ = weights[f"features.{name}.weight"].shape
            padding = 3 if block == 0 and channels == 1 else kernel // 2
            layers[name] = nn.Conv2d(channels, wide, kernel, padding=padding)
            layers[f"{int(name) + 1}"] = nn.ReLU(inplace=True)
            layers[f"{int(name) + 2}"] = nn.AvgPool2d(2)
        self.features = nn.Sequential(layers)
        hidden, features = weights["classifier.0.weight"].shape
        classes = weights["classifier.2.weight"].shape[0]
        self.classifier = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes))
        self.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


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
