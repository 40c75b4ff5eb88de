"""The doscond fixtures that concern images and core sets: matching, augmentation, selection.

``GROUPS`` maps an array that tells what a file holds to a check of all of a file's arrays. A check returns the names it
compared or used.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparing.condensation.coresets import CoresetSelector, herding, k_center
from sparing.condensation.images import ImageCondenser
from sparing.condensation.matching import (
    METRICS,
    class_gradient,
    distribution_matching_loss,
    gradient_distance,
    gradient_matching_loss,
)
from sparing.condensation.siamese import OPERATIONS, Draws, draw_augmentation, draw_parameters, siamese_augment
from sparing.models.blocknet import BlockNet

Arrays = Mapping[str, np.ndarray]
NORMS: dict[str, Any] = {"instancenorm": "instance", "none": "none"}


def close(found: Any, expected: np.ndarray, name: str) -> None:
    """By the fixtures' tolerance for what is no gradient."""
    if isinstance(found, Tensor):
        found = found.detach().numpy()
    assert np.shape(found) == expected.shape, f"{name}: {np.shape(found)} is not {expected.shape}"
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def gradient_close(found: Any, expected: Mapping[str, np.ndarray]) -> None:
    """By the fixtures' tolerance for the tensors of one gradient."""
    largest = max(float(np.abs(array).max()) for array in expected.values())
    for (name, array), tensor in zip(expected.items(), found, strict=True):
        assert tuple(tensor.shape) == array.shape, f"{name}: {tuple(tensor.shape)} is not {array.shape}"
        error = np.abs(tensor.detach().numpy() - array).max()
        allowed = max(1e-4 * float(np.abs(array).max()), 1e-6 * largest)
        assert error <= allowed, f"{name}: an entry differs by {error:.3g}, more than {allowed:.3g}"


# --- matching of images


def network_of(arrays: Arrays) -> BlockNet:
    channels, size, classes, _, _, width, depth = (int(number) for number in arrays["cfg"])
    network = BlockNet(channels, classes, size, width, depth, NORMS[str(arrays["norm"])])
    network.load_state_dict({k.removeprefix("w/"): torch.tensor(v) for k, v in arrays.items() if k.startswith("w/")})
    return network


def images(arrays: Arrays) -> set[str]:
    network = network_of(arrays)
    classes, per_class, batch = (int(number) for number in arrays["cfg"][2:5])
    order = [name for name, _ in network.named_parameters()]
    assert arrays["param_order"].tolist() == order
    real, synthetic = (torch.tensor(arrays[name].astype(np.float32)) for name in ("real", "syn"))
    assert real.shape[:2] == (classes, batch)
    assert len(synthetic) == classes * per_class
    used = {"cfg", "norm", "param_order", "real", "syn", *(name for name in arrays if name.startswith("w/"))}
    synthetic.requires_grad_()
    totals: dict[str, Any] = dict.fromkeys(("ours", "mse", "cos", "dm"), 0.0)
    parts = [synthetic[c * per_class : (c + 1) * per_class] for c in range(classes)]
    for c, part in enumerate(parts):
        labels = {"real": torch.full((batch,), c), "syn": torch.full((per_class,), c)}
        for side, samples in (("real", real[c]), ("syn", part)):
            logits = network(samples)
            close(
                torch.nn.functional.cross_entropy(logits, labels[side]), arrays[f"loss_{side}_{c}"], f"loss_{side}_{c}"
            )
            used.add(f"loss_{side}_{c}")
            if side == "syn":
                close(logits, arrays[f"logits_syn_{c}"], f"logits_syn_{c}")
            if f"grad_{side}_{c}/{order[0]}" in arrays:
                expected = {f"grad_{side}_{c}/{name}": arrays[f"grad_{side}_{c}/{name}"] for name in order}
                gradient_close(class_gradient(network, samples, c), expected)
                used |= expected.keys()
        losses: dict[str, Tensor] = {
            metric: gradient_matching_loss(network, real[c], part, c, metric) for metric in METRICS if metric != "ours"
        }
        losses["ours"] = losses.pop("layer_cos")
        for metric, loss in losses.items():
            close(loss, arrays[f"match_{metric}_{c}"], f"match_{metric}_{c}")
        losses["dm"] = distribution_matching_loss(network, real[c], part)
        close(losses["dm"], arrays[f"dm_{c}"], f"dm_{c}")
        totals = {name: total + losses[name] for name, total in totals.items()}
        used |= {f"logits_syn_{c}", f"dm_{c}", *(f"match_{metric}_{c}" for metric in losses if metric != "dm")}
    for name, total in totals.items():
        close(total, arrays[f"total_{name}"], f"total_{name}")
        found = torch.autograd.grad(total, synthetic, retain_graph=True)
        gradient_close(found, {f"grad_syn_images_{name}": arrays[f"grad_syn_images_{name}"]})
        used |= {f"total_{name}", f"grad_syn_images_{name}"}
    return used | steps(synthetic.detach(), torch.autograd.grad(totals["ours"], synthetic)[0], arrays)


def steps(start: Tensor, gradient: Tensor, arrays: Arrays) -> set[str]:
    """The condenser's own optimiser, at its defaults."""
    moved = start.clone().requires_grad_()
    optimizer = ImageCondenser("dc").image_optimizer(moved)
    moved.grad = gradient
    for name in ("syn_after_1_step", "syn_after_2_steps_same_grad"):
        optimizer.step()
        close(moved, arrays[name], name)
    return {"syn_after_1_step", "syn_after_2_steps_same_grad"}


# --- Siamese augmentation


class Reseeded(Draws):
    """Draws as the fixtures were made: the generator is seeded before each, with one number more every time."""

    def __init__(self, seed: int) -> None:
        super().__init__(torch.Generator())
        self.seed = seed

    def _next(self) -> None:
        self.generator.manual_seed(self.seed)
        self.seed += 1

    def uniform(self) -> float:
        self._next()
        return super().uniform()

    def integer(self, low: int, high: int) -> int:
        self._next()
        return super().integer(low, high)


def augmentation(arrays: Arrays) -> set[str]:
    x = torch.tensor(arrays["dsa_x"])
    height, width = x.shape[2:]
    cases = [match for match in (re.fullmatch(r"dsa_(\w+)_(\d+)_seed", name) for name in arrays) if match]
    assert cases, "dsa_x, but nothing drawn"
    used = {"dsa_x"}
    for case in cases:
        operation, prefix = case[1], case[0].removesuffix("seed")
        draws = Reseeded(int(arrays[f"{prefix}seed"]))
        used |= {f"{prefix}seed", f"{prefix}out"}
        if operation == "full":
            found = draw_augmentation(height, width, draws)(x)
        else:
            assert operation in OPERATIONS, f"unknown operation {operation!r}"
            parameters = arrays[f"{prefix}param"]
            drawn = draw_parameters(operation, height, width, draws)
            close(np.array(drawn), parameters, f"{prefix}param")
            found = siamese_augment(x, operation, parameters.tolist())
            used.add(f"{prefix}param")
        close(found, arrays[f"{prefix}out"], f"{prefix}out")
    return used


# --- core sets


def selection(arrays: Arrays) -> set[str]:
    """Core sets of nodes: the functions on each class, and the selector on all candidates."""
    counts, labels, candidates = arrays["coreset_counts"], arrays["labels"], arrays["idx_train"]
    for strategy, name, rule in (("herding", "herding_selected", herding), ("kcenter", "kcenter_selected", k_center)):
        found = []
        for c, count in enumerate(counts):
            members = candidates[labels[candidates] == c]
            found.append(members[rule(arrays["embeds"][members], int(count))])
        np.testing.assert_array_equal(np.concatenate(found), arrays[name], err_msg=name)
        selector = CoresetSelector(strategy, counts.tolist())  # type: ignore[arg-type]
        selector.fit(arrays["embeds"][candidates], labels[candidates])
        np.testing.assert_array_equal(candidates[selector.indices_], arrays[name], err_msg=name)
    return {"embeds", "labels", "idx_train", "coreset_counts", "herding_selected", "kcenter_selected"}


def transposed_distances(arrays: Arrays) -> set[str]:
    """Distances of gradients over weights that are kept (in, out)."""
    used = set()
    for name in arrays:
        case = re.fullmatch(r"(\w+)_match_(\w+)_(\d+)", name)
        if not case:
            continue
        network, metric, c = case.groups()
        order = arrays[f"{network}_param_order"].tolist()
        names = {side: [f"{network}_grad_{side}_{c}/{parameter}" for parameter in order] for side in ("syn", "real")}
        synthetic, real = ([torch.tensor(arrays[item]) for item in names[side]] for side in ("syn", "real"))
        close(gradient_distance(synthetic, real, metric, transposed=True), arrays[name], name)  # type: ignore[arg-type]
        used |= {name, f"{network}_param_order", *names["syn"], *names["real"]}
    assert used, "gradients of no network"
    return used


GROUPS: dict[str, Callable[[Arrays], set[str]]] = {
    "real": images,
    "dsa_x": augmentation,
    "embeds": selection,
    "gcn_param_order": transposed_distances,
}
