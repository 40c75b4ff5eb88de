"""Bag-of-features pooling beside the reference's classes: outputs and gradients, both variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch

from sparing.adaptive.exits import BoFPooling

Arrays = Mapping[str, np.ndarray]
SCALARS = {1: {"a", "c", "n1", "n2"}, 2: {"a", "c"}}
TOLERANCE = 1e-10


def near(found: object, expected: np.ndarray, what: str) -> int:
    """Within 1e-10 of the array's largest value; counts as one array."""
    values = np.asarray(found, dtype=np.float64)
    assert values.shape == expected.shape, f"{what}: shape {values.shape}, expected {expected.shape}"
    scale = max(float(np.abs(expected).max()), 1e-300)
    apart = float(np.abs(values - expected).max()) / scale
    assert apart <= TOLERANCE, f"{what}: {apart:.3g} of the largest value apart, {TOLERANCE:g} allowed"
    return 1


def pooling(variant: Literal[1, 2]) -> Callable[[Arrays], int]:
    """The check of one variant; names come without their group."""

    def check(arrays: Arrays) -> int:
        trained = SCALARS[variant] | {"codebook.weight", "codebook.bias"}
        known = trained | {f"grad_{name}" for name in trained} | {"horizon", "x", "y", "grad_x", "grad_y"}
        assert set(arrays) == known, f"bof_v{variant}: {sorted(set(arrays) ^ known)} are unknown or missing"
        codewords, channels = arrays["codebook.weight"].shape[:2]
        size = int(arrays["horizon"])
        horizon = size if variant == 1 else None
        module = BoFPooling(channels, codewords, pool=size, variant=variant, horizon=horizon).double()
        module.load_state_dict({name: torch.from_numpy(arrays[name]) for name in trained})
        x = torch.from_numpy(arrays["x"]).requires_grad_()
        y = module(x)
        y.backward(torch.from_numpy(arrays["grad_y"]))
        gradients = {"x": x, **dict(module.named_parameters())}
        compared = near(y.detach(), arrays["y"], f"bof_v{variant}/y")
        for name, tensor in gradients.items():
            assert tensor.grad is not None, f"bof_v{variant}: no gradient of {name}"
            compared += near(tensor.grad, arrays[f"grad_{name}"], f"bof_v{variant}/grad_{name}")
        return compared

    return check


GROUPS: dict[str, Callable[[Arrays], int]] = {"bof_v1": pooling(1), "bof_v2": pooling(2)}
