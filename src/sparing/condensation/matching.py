"""How far synthetic data are from real ones, as a network sees them: distances of gradients and of embeddings.

Gradient matching is DC's (Zhao, Mopuri and Bilen 2021, arXiv:2006.05929, section 3) and one-step matching's (Jin et al.
2022, arXiv:2206.07746, section 3); distribution matching is DM's (Zhao and Bilen 2023, arXiv:2110.04181, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparing.core.errors import InvalidValue

Metric = Literal["mse", "layer_cos", "ours", "cos"]
METRICS: tuple[Metric, ...] = ("mse", "layer_cos", "ours", "cos")
EPS = 1e-6
"""Added to the product of two norms, so that the cosine of a zero gradient is 0."""


def gradient_distance(
    synthetic: Sequence[Tensor],
    real: Sequence[Tensor],
    metric: Metric = "layer_cos",
    *,
    relative: bool = False,
    transposed: bool = False,
) -> Float[Tensor, ""]:
    """How far the gradients on synthetic data are from those on real data: a scalar, 0 when they are equal.

    - "mse": the sum of squared differences over all parameters; with ``relative`` divided by the squared norm of the
      real gradient, as DosCond does for sets of graphs.
    - "layer_cos", which the papers' code calls "ours": Σ 1 − cos over the output rows of every tensor with two or
      more dimensions (Zhao et al. 2021, section 3). Kernels are flattened to (out, rest). Biases and norms, with one
      dimension, count nothing.
    - "cos": 1 − cos of all parameters in one vector.

    Args:
        synthetic: one gradient for each parameter; the distance can be differentiated through them.
        real: gradients of the same shapes; usually detached.
        metric: which distance.
        relative: for "mse" only.
        transposed: weights are (in, out), as graph convolutions often keep them, not (out, in); matters to "layer_cos".

    Raises:
        InvalidValue: another metric; no gradients, or lists whose lengths or shapes differ; ``relative`` with another
            metric than "mse", or with a real gradient that is 0.
    """
    if metric not in METRICS:
        raise InvalidValue(f"metric = {metric!r}; one of {', '.join(METRICS)} is expected")
    if relative and metric != "mse":
        raise InvalidValue(f'relative = True with metric = {metric!r}; only "mse" can be divided by the real gradient')
    synthetic, real = list(synthetic), list(real)
    if not real or len(synthetic) != len(real):
        raise InvalidValue(
            f"{len(synthetic)} synthetic gradients and {len(real)} real ones; equal numbers, of 1 or more, are expected"
        )
    for number, (a, b) in enumerate(zip(synthetic, real, strict=True)):
        if a.shape != b.shape:
            raise InvalidValue(
                f"gradient {number}: synthetic {tuple(a.shape)}, real {tuple(b.shape)}; equal shapes are expected"
            )
    if metric in ("layer_cos", "ours"):
        terms = [_row_cosines(a, b, transposed) for a, b in zip(synthetic, real, strict=True) if a.ndim > 1]
        return torch.stack(terms).sum() if terms else synthetic[0].new_zeros(())
    a, b = torch.cat([g.flatten() for g in synthetic]), torch.cat([g.flatten() for g in real])
    if metric == "cos":
        return 1 - a @ b / (a.norm() * b.norm() + EPS)
    distance = (a - b).square().sum()
    if not relative:
        return distance
    power = b.square().sum()
    if not power > 0:
        raise InvalidValue("relative = True, but the squared norm of the real gradient is not above 0")
    return distance / power


def _row_cosines(a: Tensor, b: Tensor, transposed: bool) -> Tensor:
    """Σ 1 − cos over the output rows."""
    if transposed:
        a, b = a.transpose(0, 1), b.transpose(0, 1)
    a, b = a.flatten(1), b.flatten(1)
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + EPS)).sum()


def embedding_distance(synthetic: Float[Tensor, "m ..."], real: Float[Tensor, "n ..."]) -> Float[Tensor, ""]:
    """Squared Euclidean distance of two sets' mean embeddings (Zhao and Bilen 2023): a scalar.

    Args:
        synthetic: (M, …), one embedding for each sample.
        real: (N, …), with the same trailing sizes.

    Raises:
        InvalidValue: an empty set, or embeddings of different shapes.
    """
    if synthetic.shape[1:] != real.shape[1:] or not len(synthetic) or not len(real):
        raise InvalidValue(
            f"embeddings {tuple(synthetic.shape)} and {tuple(real.shape)}; samples of one shape, at least one of each, "
            "are expected"
        )
    return (synthetic.mean(0) - real.mean(0)).square().sum()


def embeddings(network: nn.Module, samples: Tensor) -> Float[Tensor, "n d"]:
    """What enters a network's head, flattened to (N, d).

    That of its ``embed``, where it has such a method; otherwise what enters the linear layer that is called last.

    Raises:
        InvalidValue: a network with neither.
    """
    if callable(getattr(network, "embed", None)):
        return network.embed(samples).flatten(1)  # type: ignore[operator]
    seen: list[Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for module in network.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        network(samples)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise InvalidValue(
            f"{type(network).__name__} has neither a method embed nor a linear layer: its embeddings are not known"
        )
    return seen[-1].flatten(1)


def class_gradient(
    network: nn.Module, samples: Tensor, label: int, *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradient of the mean cross-entropy of samples of one class, over the network's trainable parameters in order.

    Args:
        network: gives logits (N, classes).
        samples: (N, …).
        label: the class of all of them.
        create_graph: whether it can be differentiated again, with respect to the samples for example.
    """
    targets = torch.full((len(samples),), label, dtype=torch.int64, device=samples.device)
    loss = cross_entropy(network(samples), targets)
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, create_graph=create_graph)


def gradient_matching_loss(
    network: nn.Module, real: Tensor, synthetic: Tensor, label: int, metric: Metric = "layer_cos"
) -> Float[Tensor, ""]:
    """Distance of the gradients of real and of synthetic samples of one class, differentiable in the synthetic ones."""
    wanted = class_gradient(network, real, label)
    return gradient_distance(class_gradient(network, synthetic, label, create_graph=True), wanted, metric)


def distribution_matching_loss(network: nn.Module, real: Tensor, synthetic: Tensor) -> Float[Tensor, ""]:
    """Distance of the mean embeddings of real and of synthetic samples, differentiable in the synthetic ones."""
    with torch.no_grad():
        wanted = embeddings(network, real)
    return embedding_distance(embeddings(network, synthetic), wanted)
