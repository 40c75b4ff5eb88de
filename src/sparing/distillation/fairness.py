"""Fairness losses that can be trained with, and the index sets they are taken over (Dong et al. 2023, RELIANT).

Statistical parity asks for the same share of positive decisions in both groups, equal opportunity for the same share
among those whose label is positive. A decision is softened by a function h of the class's probability. The hard figures
are :func:`~sparing.core.fairness.delta_sp` and :func:`~sparing.core.fairness.delta_eo`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from numpy.polynomial import legendre
from torch import Tensor

from sparing.core.errors import InvalidValue
from sparing.core.fairness import group_masks

StepKind = Literal["reference", "legendre", "sigmoid"]
_INTEGRALS = {1: 1 / 2, 3: -1 / 8, 5: 1 / 16, 7: -5 / 128, 9: 7 / 256}
"""k → the integral of the Legendre polynomial P_k over 0…1."""
TEMPERATURE = 0.1
"""Of the step "sigmoid"."""


def _powers(weights: dict[int, float]) -> list[float]:
    """Coefficients of 1, x, x² … of ½ + Σ weights[k] P_k(x)."""
    series = np.zeros(max(weights) + 1)
    series[0] = 0.5
    for k, weight in weights.items():
        series[k] = weight
    return [float(c) for c in legendre.leg2poly(series)]


_POLYNOMIALS = {
    "reference": _powers(_INTEGRALS),
    "legendre": _powers({k: (2 * k + 1) / 2 * integral for k, integral in _INTEGRALS.items()}),
}


def soft_step(p: Float[Tensor, "*n"], kind: StepKind = "reference") -> Float[Tensor, "*n"]:
    """h(p): a smooth stand-in for the decision p > ½, of any shape; h(½) = ½.

    Args:
        p: probabilities, in 0…1.
        kind: "reference": ½ + ½P₁ − ⅛P₃ + 1/16 P₅ − 5/128 P₇ + 7/256 P₉ of x = 2p − 1, P_k Legendre polynomials, which
            the published results were made with: almost a ramp, from 0.074 to 0.926. "legendre": the true expansion of
            the step to degree 9, whose coefficients are (2k + 1)/2 times these: steeper, from −0.123 to 1.123.
            "sigmoid": 1/(1 + exp((½ − p)/0.1)).

    Raises:
        InvalidValue: another kind.
    """
    if kind == "sigmoid":
        return torch.sigmoid((p - 0.5) / TEMPERATURE)
    if kind not in _POLYNOMIALS:
        raise InvalidValue(f'step = {kind!r}; "reference", "legendre" or "sigmoid" is expected')
    x = 2 * p - 1
    *rest, value = _POLYNOMIALS[kind]
    found = torch.full_like(x, value)
    for coefficient in reversed(rest):
        found = found * x + coefficient
    return found


def _one_each(**given: Tensor) -> None:
    """Refuse tensors that do not have a row for each node."""
    if len({len(rows) for rows in given.values()}) > 1:
        found = ", ".join(f"{name} {len(rows)}" for name, rows in given.items())
        raise InvalidValue(f"rows: {found}; one for each node is expected of all")


def members(
    sens: Shaped[Tensor, " n"],
    index: Shaped[Tensor, " k"] | None = None,
    *,
    among: Shaped[Tensor, "..."] | None = None,
    groups: Sequence[Any] | None = None,
) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Numbers of the nodes of the first and of the second group in an index set, (a,) and (b,).

    Args:
        sens: the sensitive attribute of all N nodes.
        index: numbers of nodes (k,), or a mask (N,); None: all.
        among: mask (N,) of those that count, e.g. those of the positive class.
        groups: the two values that are compared; None: 0 and 1, and there are no others.

    Raises:
        InvalidValue: a group of which nobody is in the set; a node that does not exist; see also
            :func:`~sparing.core.fairness.group_masks`.
    """
    n = len(sens)
    if among is not None:
        _one_each(sens=sens, among=among)
    if index is None:
        index = torch.arange(n, device=sens.device)
    elif index.dtype == torch.bool:
        if len(index) != n:
            raise InvalidValue(f"a mask of {len(index)} nodes for {n} values of the sensitive attribute")
        index = index.nonzero().flatten()
    for node in index[(index < 0) | (index >= n)][:1].tolist():
        raise InvalidValue(f"index names node {node}; 0 … {n - 1} is expected")
    found = []
    for number, inside in enumerate(group_masks(sens[index].cpu().numpy(), groups)):
        chosen = index[torch.from_numpy(inside).to(index.device)]
        if among is not None:
            chosen = chosen[among[chosen]]
        if not len(chosen):
            name = groups[number] if groups is not None else number
            whom = "" if among is None else " of the positive class"
            raise InvalidValue(
                f"the group {name!r} of the sensitive attribute has no node{whom} among the {len(index)} that fairness "
                "is asked for: a mean over it does not exist. Take another set of nodes, or other groups"
            )
        found.append(chosen)
    return found[0], found[1]


def parity_gap(
    prob: Float[Tensor, "n c"], first: Int[Tensor, " a"], second: Int[Tensor, " b"], step: StepKind = "reference"
) -> Float[Tensor, ""]:
    """Σ over classes c of (mean of h(p_c) over ``first`` − mean of h(p_c) over ``second``)²; with two classes twice the
    gap of one.

    Args:
        prob: probabilities (N, C).
        first: numbers of the nodes of one group.
        second: of the other.
        step: h, see :func:`soft_step`.
    """
    soft = [soft_step(prob[nodes], step).mean(0) for nodes in (first, second)]
    return (soft[0] - soft[1]).square().sum()


def statistical_parity_loss(
    prob: Float[Tensor, "n c"],
    sens: Shaped[Tensor, "..."],
    index: Shaped[Tensor, " k"] | None = None,
    *,
    step: StepKind = "reference",
    groups: Sequence[Any] | None = None,
) -> Float[Tensor, ""]:
    """L_SP: :func:`parity_gap` of the two groups among the nodes ``index``, a scalar.

    Args:
        prob: probabilities (N, C).
        sens: the sensitive attribute (N,).
        index: numbers of nodes (k,), or a mask (N,); None: all.
        step: h, see :func:`soft_step`.
        groups: the two values that are compared; None: 0 and 1, and there are no others.

    Raises:
        InvalidValue: lengths that differ; see also :func:`members`.
    """
    _one_each(prob=prob, sens=sens)
    return parity_gap(prob, *members(sens, index, groups=groups), step)


def equal_opportunity_loss(
    prob: Float[Tensor, "n c"],
    sens: Shaped[Tensor, "..."],
    labels: Int[Tensor, "..."],
    index: Shaped[Tensor, " k"] | None = None,
    *,
    positive: int = 1,
    step: StepKind = "reference",
    groups: Sequence[Any] | None = None,
) -> Float[Tensor, ""]:
    """L_EO: as :func:`statistical_parity_loss`, over those nodes of ``index`` whose label (N,) is ``positive``.

    A label is looked at only where ``index`` says; give no node whose label training must not see.
    """
    _one_each(prob=prob, sens=sens, labels=labels)
    return parity_gap(prob, *members(sens, index, among=labels == positive, groups=groups), step)
