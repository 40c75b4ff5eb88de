"""The dd_backdoor fixtures of unrolled steps: the loss after them, and its slopes in images and learning rates.

``CHECKS`` maps an array that tells what a file holds to the check of all of it, which returns the names it compared or
used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, softplus

from sparing.condensation.unrolled import raw_rate, unrolled_steps
from sparing.models.blocknet import BlockNet

Arrays = Mapping[str, np.ndarray]


def network_of(weights: Arrays, size: int) -> BlockNet:
    convolutions = [name for name in weights if re.fullmatch(r"features\.\d+\.weight", name)]
    wide, channels = weights["features.0.weight"].shape[:2]
    classes, hidden = weights["classifier.2.weight"].shape
    network = BlockNet(channels, classes, size, wide, len(convolutions), "none", hidden)
    network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
    return network


def close(found: Tensor, expected: np.ndarray, name: str) -> None:
    assert tuple(found.shape) == expected.shape, f"{name}: {tuple(found.shape)} is not {expected.shape}"
    atol, rtol = (1e-3 * float(np.abs(expected).max()), 0.0) if "grad" in name else (1e-5, 1e-4)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=rtol, atol=atol, err_msg=name)


def dd_unroll(arrays: Arrays) -> set[str]:
    weights = {name.removeprefix("w/"): array for name, array in arrays.items() if name.startswith("w/")}
    sets = sorted((name for name in arrays if re.fullmatch(r"data_\d+", name)), key=lambda name: int(name[5:]))
    assert sets == [f"data_{number}" for number in range(len(sets))]
    images = [torch.tensor(arrays[name], requires_grad=True) for name in sets]
    raw = torch.tensor(arrays["raw_lr"], requires_grad=True)
    network = network_of(weights, images[0].shape[-1])
    start = {name: parameter.detach() for name, parameter in network.named_parameters()}
    final, losses = unrolled_steps(network, start, images, torch.tensor(arrays["labels"]), softplus(raw))
    loss = cross_entropy(
        functional_call(network, final, (torch.tensor(arrays["real_x"]),)), torch.tensor(arrays["real_y"])
    )
    *slopes, rates = torch.autograd.grad(loss, [*images, raw])
    found = {f"step_loss_{step}": value for step, value in enumerate(losses)}
    found |= {f"grad_{name}": slope for name, slope in zip(sets, slopes, strict=True)}
    found |= {"final_loss": loss, "grad_raw_lr": rates}
    found |= {name: final[name.removeprefix("final/")] for name in arrays if name.startswith("final/")}
    for name, value in found.items():
        close(value, arrays[name], name)
    inverse = [raw_rate(float(rate)) for rate in softplus(raw.detach().double())]
    np.testing.assert_allclose(inverse, arrays["raw_lr"], rtol=1e-6, err_msg="raw_lr")
    return {*found, *sets, *(f"w/{name}" for name in weights), "labels", "raw_lr", "real_x", "real_y"}


CHECKS: dict[str, Callable[[Arrays], set[str]]] = {"raw_lr": dd_unroll}
