"""Choosing a policy's thresholds on data of its own: the cheapest that loses no more than is allowed."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from sparing.adaptive.confidence import ConfidenceRule, activation_thresholds, checked, entropy, magnitude
from sparing.adaptive.exit_cost import CostModel, sdn_exits
from sparing.adaptive.forecast import ExitPredictor, IsotonicPredictor, fit_isotonic
from sparing.adaptive.policies import (
    EveryExitPolicy,
    ExitTrace,
    FullNetworkPolicy,
    PlacedExitPolicy,
    Policy,
    PredictiveExitPolicy,
)
from sparing.core.errors import InvalidValue

GRID = 25
"""Thresholds tried for each rule."""
Family = Literal["predictive", "isotonic", "every", "branchynet", "passalis", "sdn", "patience", "placed"]
FAMILIES: tuple[Family, ...] = typing.get_args(Family)
Objective = Callable[[ExitTrace], float]
"""What the ways of a trace's samples spend, in any unit."""


@dataclass(frozen=True)
class Calibrated:
    """A policy chosen on calibration data, and how it did there."""

    policy: Policy
    accuracy: float
    macs: float
    """Mean over the samples."""
    full_accuracy: float
    tried: int
    """Policies that were looked at."""
    spent: float
    """What the objective came to."""


def softmax_rules(count: int = GRID) -> list[ConfidenceRule]:
    """β even in its logit from 0.5 to 0.999, ascending: the last is the strictest."""
    logit = np.linspace(0.0, np.log(0.999 / 0.001), count)
    return [ConfidenceRule.softmax(1 / (1 + np.exp(-x))) for x in logit]


def activation_rules(
    exit_logits: Float[np.ndarray, "samples heads classes"],
    thresholds: Float[np.ndarray, " exits"] | None = None,
    count: int = GRID,
) -> list[ConfidenceRule]:
    """β log-spaced between the 1 % and 99 % quantiles of the ratios at β = 1. ``thresholds`` None: of these logits."""
    exits = exit_logits[:, :-1]
    t = activation_thresholds(exits) if thresholds is None else np.asarray(thresholds)
    ConfidenceRule.activation(t, 1.0)  # raises, naming the exit whose threshold will not do
    low, high = np.quantile(magnitude(exits) / t, [0.01, 0.99])
    return [ConfidenceRule.activation(t, beta) for beta in np.geomspace(low, high, count)]


def entropy_rules(exit_logits: Float[np.ndarray, "samples heads classes"], count: int = GRID) -> list[ConfidenceRule]:
    """Entropies log-spaced between their 1 % and 99 % quantiles, descending: the last is the strictest."""
    low, high = np.quantile(np.maximum(entropy(exit_logits[:, :-1]), 1e-12), [0.01, 0.99])
    return [ConfidenceRule.entropy(limit) for limit in np.geomspace(high, low, count)]


def candidates(
    family: Family,
    exit_logits: Float[np.ndarray, "samples heads classes"],
    cost: CostModel,
    *,
    kernel: Sequence[float] = (1.0, 1.0, 1.0),
    max_round: int = 8,
    single_jump: bool = False,
    history: int = 1,
    rules: Sequence[ConfidenceRule] | None = None,
    starts: Iterable[int] | None = None,
) -> list[Policy]:
    """The policies of a family that calibration compares, stricter ones later.

    "predictive" and "isotonic" try every threshold with every start, "every" is the softmax rule at each exit,
    "branchynet" the entropy, "passalis" the activation and "patience" the agreement of exits; "sdn" has exits at fixed
    shares of the compute. ("placed" is chosen by :func:`greedy_exits`.)
    """
    exits = exit_logits.shape[1] - 1
    if family == "patience":
        return [EveryExitPolicy(ConfidenceRule.patience(p)) for p in range(1, exits + 1)]
    if rules is None:
        rules = (
            activation_rules(exit_logits)
            if family == "passalis"
            else entropy_rules(exit_logits)
            if family == "branchynet"
            else softmax_rules()
        )
    if family in ("predictive", "isotonic"):
        found: list[Policy] = []
        for rule in rules:
            predictor: ExitPredictor | IsotonicPredictor = (
                ExitPredictor(rule, tuple(float(w) for w in kernel), max_round, history)
                if family == "predictive"
                else fit_isotonic(exit_logits, rule)
            )
            found += [PredictiveExitPolicy(s, predictor, single_jump) for s in starts or range(1, exits + 1)]
        return found
    if family == "sdn":
        return [PlacedExitPolicy(rule, sdn_exits(cost)) for rule in rules]
    if family in ("every", "branchynet", "passalis"):
        return [EveryExitPolicy(rule) for rule in rules]
    raise InvalidValue(f"family = {family!r}; one of {', '.join(FAMILIES)} is expected")


def calibrate(
    family: Family | Sequence[Policy],
    exit_logits: Float[np.ndarray, "samples heads classes"],
    labels: Int[np.ndarray, " labels"],
    cost: CostModel,
    *,
    min_accuracy: float | None = None,
    max_loss: float = 0.005,
    caution: float = 1.0,
    objective: Objective | None = None,
    **settings: object,
) -> Calibrated:
    """The cheapest policy among those that are accurate enough.

    Args:
        family: a name from :data:`FAMILIES`, or the policies to compare, stricter ones later.
        exit_logits: of all exits, the final head last.
        labels: the right classes.
        cost: what each way costs.
        min_accuracy: the accuracy asked for; None: that of the final head less ``max_loss``.
        max_loss: accepted loss of accuracy, as a share of all samples.
        caution: standard errors of a policy's loss, paired by sample, that are added to it: of hundreds of policies the
            cheapest that seems accurate enough is one that these samples flatter. 0: none.
        objective: what a trace spends, to be least; None: the mean of ``cost``.
        settings: see :func:`candidates`.

    A tie goes to the stricter policy; where none is accurate enough, the full network is kept. Raises
    :class:`InvalidValue` for negative ``caution`` and labels that do not fit the logits.
    """
    checked(exit_logits)
    if len(labels) != len(exit_logits):
        raise InvalidValue(f"{len(labels)} labels for {len(exit_logits)} samples")
    if not 0 <= caution < np.inf:
        raise InvalidValue(f"caution = {caution}; a finite number of standard errors, at least 0, is expected")
    labels = np.asarray(labels)
    full = float((exit_logits[:, -1].argmax(axis=-1) == labels).mean())
    wanted = full - max_loss if min_accuracy is None else min_accuracy
    if family == "placed":
        return greedy_exits(exit_logits, labels, cost, wanted, caution=caution, objective=objective)
    compared = candidates(family, exit_logits, cost, **settings) if isinstance(family, str) else list(family)  # type: ignore[arg-type]
    return _best(compared, exit_logits, labels, cost, wanted, caution, objective)


def _best(
    compared: Sequence[Policy],
    logits: np.ndarray,
    labels: np.ndarray,
    cost: CostModel,
    wanted: float,
    caution: float,
    objective: Objective | None,
) -> Calibrated:
    full_right = logits[:, -1].argmax(axis=-1) == labels
    full = float(full_right.mean())

    def tried(policy: Policy, trace: ExitTrace, accuracy: float) -> Calibrated:
        macs = float(cost.per_sample(trace).mean())
        return Calibrated(policy, accuracy, macs, full, len(compared), macs if objective is None else objective(trace))

    best = tried(FullNetworkPolicy(), FullNetworkPolicy().run(logits), full)
    for policy in compared:
        trace = policy.run(logits)
        right = trace.answers(logits) == labels
        error = np.std(full_right.astype(float) - right) / np.sqrt(len(right))
        if right.mean() - caution * error >= wanted - 1e-12:
            found = tried(policy, trace, float(right.mean()))
            best = found if found.spent <= best.spent else best
    return best


def worthwhile_exits(
    family: Family,
    exit_logits: Float[np.ndarray, "samples heads classes"],
    labels: Int[np.ndarray, " labels"],
    cost: CostModel,
    *,
    objective: Callable[[tuple[int, ...]], Objective | None] = lambda exits: None,
    **settings: object,
) -> tuple[int, ...]:
    """The exits, from 0, that a network should keep for policies of a family.

    Added one at a time, each the one with which the cheapest policy spends least, until none helps. An exit that is
    there costs time even where the samples seldom ask it: the network is cut behind it.

    Args:
        family: see :func:`calibrate`.
        exit_logits: of all exits, the final head last.
        labels: the right classes.
        cost: of the network with all its exits.
        objective: for some exits, what is to be least on the network that has these alone.
        settings: further arguments of :func:`calibrate`.
    """
    kept: tuple[int, ...] = ()
    least = np.inf
    while len(kept) < cost.exits:
        found: dict[tuple[int, ...], float] = {}
        for extra in sorted(set(range(cost.exits)) - set(kept)):
            exits = tuple(sorted({*kept, extra}))
            table = exit_logits[:, [*exits, cost.exits]]
            found[exits] = calibrate(
                family,
                table,
                labels,
                cost.of_exits(exits),
                objective=objective(exits),
                **settings,  # type: ignore[arg-type]
            ).spent
        best = min(found, key=found.__getitem__)
        if found[best] >= least:
            break
        kept, least = best, found[best]
    return kept


def greedy_exits(
    exit_logits: Float[np.ndarray, "samples heads classes"],
    labels: Int[np.ndarray, " samples"],
    cost: CostModel,
    min_accuracy: float,
    rules: Callable[[], list[ConfidenceRule]] = softmax_rules,
    caution: float = 1.0,
    objective: Objective | None = None,
) -> Calibrated:
    """Exits added one at a time, each the one that lowers what is spent most at this accuracy, until none does."""
    labels = np.asarray(labels)
    best = _best([], exit_logits, labels, cost, min_accuracy, caution, objective)
    placed: tuple[int, ...] = ()
    tried = 0
    while True:
        better: Calibrated | None = None
        for extra in sorted(set(range(cost.exits)) - set(placed)):
            chosen = tuple(sorted({*placed, extra}))
            compared: list[Policy] = [PlacedExitPolicy(rule, chosen) for rule in rules()]
            tried += len(compared)
            found = _best(compared, exit_logits, labels, cost, min_accuracy, caution, objective)
            if found.spent < (better or best).spent:
                better = found
        if better is None or not isinstance(better.policy, PlacedExitPolicy):
            return replace(best, tried=tried)
        best, placed = better, better.policy.exits
