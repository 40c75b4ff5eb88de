"""Which exits are evaluated, and where a sample leaves (predictive_exit sheet, section 5 and the baselines).

A policy makes a :class:`Walk` for a batch; the walk is asked exit by exit. The deployed predictor asks it while it
computes, :meth:`Policy.run` replays it on a table of logits: one code decides in both, so their exits are the same.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from pydantic import Field, TypeAdapter, ValidationError

from sparing.adaptive.confidence import ConfidenceRule, checked
from sparing.adaptive.forecast import ExitPredictor, IsotonicPredictor, first_passing
from sparing.core.errors import CorruptFile, InvalidValue


@dataclass(frozen=True)
class ExitTrace:
    """What a policy did with each of S samples of a network with N exits."""

    exit_index: Int[np.ndarray, " samples"]
    """Where it left, from 0; N is the final head."""
    evaluated: Bool[np.ndarray, "samples exits"]
    """Exits whose classifier was computed."""
    jumps: Int[np.ndarray, "samples exits"]
    """The jump that was forecast at an exit; 0: none was."""

    @property
    def n_exit_evals(self) -> Int[np.ndarray, " samples"]:
        """Exits computed for each sample; the final head is none."""
        return self.evaluated.sum(axis=1)

    @property
    def n_predictions(self) -> Int[np.ndarray, " samples"]:
        """Forecasts made for each sample."""
        return (self.jumps > 0).sum(axis=1)

    def answers(self, exit_logits: Float[np.ndarray, "samples heads classes"]) -> Int[np.ndarray, " samples"]:
        """The class each sample was given, from the table the trace was made on."""
        return exit_logits[np.arange(len(exit_logits)), self.exit_index].argmax(axis=-1)


class Walk(ABC):
    """The decisions for a batch of samples on their way."""

    def __init__(self, samples: int, exits: int) -> None:
        self.samples, self.exits = samples, exits
        self.jumps = np.zeros((samples, exits), dtype=np.int64)

    @abstractmethod
    def wants(self, exit_: int) -> Bool[np.ndarray, " samples"]:
        """For which samples this exit (from 0) is to be evaluated, if they are still there."""

    @abstractmethod
    def observe(
        self, exit_: int, who: Int[np.ndarray, " asked"], logits: Float[np.ndarray, "asked classes"]
    ) -> Bool[np.ndarray, " asked"]:
        """Take the exit's logits for the samples ``who``; which of them leave here."""


class Policy(ABC):
    """A way to go through a network with exits; subclasses are frozen dataclasses."""

    kind: str

    @abstractmethod
    def walk(self, samples: int, exits: int) -> Walk:
        """A walk for a batch; raises :class:`InvalidValue` for a policy that does not fit so many exits."""

    def run(self, exit_logits: Float[np.ndarray, "samples heads classes"]) -> ExitTrace:
        """Replay on the logits of all exits, the final head last."""
        checked(exit_logits)
        samples, exits = len(exit_logits), exit_logits.shape[1] - 1
        walk = self.walk(samples, exits)
        left = np.full(samples, exits)
        evaluated = np.zeros((samples, exits), dtype=bool)
        for exit_ in range(exits):
            who = np.flatnonzero(walk.wants(exit_) & (left == exits))
            if len(who):
                evaluated[who, exit_] = True
                left[who[walk.observe(exit_, who, exit_logits[who, exit_])]] = exit_
        return ExitTrace(left, evaluated, walk.jumps)

    def to_config(self) -> dict[str, Any]:
        """Plain JSON that :func:`policy_from` reads."""
        return _plain(asdict(self))  # type: ignore[call-overload]


class _Nowhere(Walk):
    def wants(self, exit_: int) -> Bool[np.ndarray, " samples"]:
        return np.zeros(self.samples, dtype=bool)

    def observe(self, exit_: int, who: Any, logits: Any) -> Any:
        raise AssertionError("no exit was asked for")


@dataclass(frozen=True)
class FullNetworkPolicy(Policy):
    """No exit: every sample goes to the final head."""

    kind: Literal["full"] = "full"

    def walk(self, samples: int, exits: int) -> Walk:
        """A walk that asks for nothing."""
        return _Nowhere(samples, exits)


class _Placed(Walk):
    def __init__(self, samples: int, exits: int, rule: ConfidenceRule, placed: frozenset[int]) -> None:
        super().__init__(samples, exits)
        _check_thresholds(rule, exits)
        self.rule, self.placed = rule, placed
        self.last = np.full(samples, -1)
        self.agreeing = np.zeros(samples, dtype=np.int64)

    def wants(self, exit_: int) -> Bool[np.ndarray, " samples"]:
        return np.full(self.samples, exit_ in self.placed)

    def observe(self, exit_: int, who: Any, logits: Any) -> Any:
        if self.rule.kind != "patience":
            return self.rule.passes(logits, exit_)
        named = logits.argmax(axis=-1)
        self.agreeing[who] = np.where(named == self.last[who], self.agreeing[who] + 1, 1)
        self.last[who] = named
        return self.agreeing[who] >= self.rule.threshold


@dataclass(frozen=True)
class EveryExitPolicy(Policy):
    """Every exit is evaluated until one passes: BranchyNet (entropy rule), SDN (softmax), Passalis et al. (activation),
    PABEE (patience)."""

    rule: ConfidenceRule
    kind: Literal["every"] = "every"

    def walk(self, samples: int, exits: int) -> Walk:
        """A walk that asks for each exit."""
        return _Placed(samples, exits, self.rule, frozenset(range(exits)))


@dataclass(frozen=True)
class PlacedExitPolicy(Policy):
    """Only some exits are there; each of them is evaluated until one passes."""

    rule: ConfidenceRule
    exits: tuple[int, ...]
    """From 0, ascending."""
    kind: Literal["placed"] = "placed"

    def __post_init__(self) -> None:
        if list(self.exits) != sorted({int(e) for e in self.exits if e >= 0}):
            raise InvalidValue(f"exits = {list(self.exits)}; different numbers from 0, ascending, are expected")

    def walk(self, samples: int, exits: int) -> Walk:
        """A walk that asks for the exits that are there."""
        if self.exits and self.exits[-1] >= exits:
            raise InvalidValue(f"exits = {list(self.exits)}; the network has exits 0…{exits - 1}")
        return _Placed(samples, exits, self.rule, frozenset(self.exits))


class _Predictive(Walk):
    def __init__(self, samples: int, exits: int, policy: PredictiveExitPolicy) -> None:
        super().__init__(samples, exits)
        self.policy = policy
        self.target = np.full(samples, policy.start - 1)
        self.seen: list[np.ndarray] = []

    def wants(self, exit_: int) -> Bool[np.ndarray, " samples"]:
        return self.target == exit_

    def observe(self, exit_: int, who: Any, logits: Any) -> Any:
        predictor, single = self.policy.predictor, self.policy.single_jump
        leaves = predictor.rule.passes(logits, exit_)
        if single:
            leaves = leaves | (self.jumps[who].sum(axis=1) > 0)
        stays = np.flatnonzero(~leaves)
        layer = exit_ + 1
        if len(stays) and layer < self.exits:
            earlier = [past[who[stays]] for past in self._newest(logits)]
            jump = predictor.predict(logits[stays], layer, self.exits, single, earlier)
            self.jumps[who[stays], exit_] = jump
            # the activation rule's code stops at the last exit, the later one passes over it to the final head
            last = self.exits if predictor.rule.kind == "activation" else self.exits + 1
            self.target[who[stays]] = np.minimum(layer + jump, last) - 1
        self._keep(who, logits)
        return leaves

    def _newest(self, logits: Any) -> list[np.ndarray]:
        return self.seen[: self.policy.predictor.history - 1]

    def _keep(self, who: Any, logits: Any) -> None:
        """Put these samples' logits before the ones they had."""
        depth = self.policy.predictor.history - 1
        if depth == 0:
            return
        if not self.seen:
            self.seen = [np.full((self.samples, logits.shape[-1]), np.nan) for _ in range(depth)]
        for age in range(depth - 1, 0, -1):
            self.seen[age][who] = self.seen[age - 1][who]
        self.seen[0][who] = logits


@dataclass(frozen=True)
class PredictiveExitPolicy(Policy):
    """Predictive Exit (Li et al. 2023): evaluate exit number ``start``, forecast, run straight to where it points."""

    start: int
    """L0, the first exit that is evaluated, from 1."""
    predictor: Annotated[ExitPredictor | IsotonicPredictor, Field(discriminator="kind")]
    single_jump: bool = False
    """Trust the first forecast: leave where it points, sure or not."""
    kind: Literal["predictive"] = "predictive"

    def __post_init__(self) -> None:
        if self.start < 1:
            raise InvalidValue(f"start = {self.start}; exits are numbered from 1")

    def walk(self, samples: int, exits: int) -> Walk:
        """A walk that asks for the exits that are forecast."""
        if not 1 <= self.start <= exits:
            raise InvalidValue(f"start = {self.start}; the network has exits 1…{exits}")
        _check_thresholds(self.predictor.rule, exits)
        return _Predictive(samples, exits, self)


@dataclass(frozen=True)
class OraclePolicy:
    """Bounds that no deployed policy reaches; on a table of logits only.

    Without ``labels`` the first exit that passes the rule is known beforehand, and only that one is evaluated: a
    perfect forecast. With them, the first exit that is right is (the final head where none is).
    """

    rule: ConfidenceRule

    def run(
        self, exit_logits: Float[np.ndarray, "samples heads classes"], labels: Int[np.ndarray, " samples"] | None = None
    ) -> ExitTrace:
        """Where each sample would leave."""
        checked(exit_logits)
        samples, exits = len(exit_logits), exit_logits.shape[1] - 1
        if labels is None:
            left = first_passing(exit_logits, self.rule)
        else:
            right = exit_logits[:, :exits].argmax(axis=-1) == np.asarray(labels)[:, None]
            left = np.where(right.any(axis=1), right.argmax(axis=1), exits)
        evaluated = np.zeros((samples, exits), dtype=bool)
        inside = left < exits
        evaluated[np.flatnonzero(inside), left[inside]] = True
        return ExitTrace(left, evaluated, np.zeros((samples, exits), dtype=np.int64))


AnyPolicy = Annotated[
    FullNetworkPolicy | EveryExitPolicy | PlacedExitPolicy | PredictiveExitPolicy, Field(discriminator="kind")
]


def policy_from(config: Mapping[str, Any]) -> Policy:
    """The policy of a :meth:`Policy.to_config`; raises :class:`CorruptFile` for anything else."""
    try:
        return TypeAdapter(AnyPolicy).validate_python(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptFile(f"policy: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None


def _check_thresholds(rule: ConfidenceRule, exits: int) -> None:
    if rule.kind == "activation" and len(rule.thresholds) != exits:
        raise InvalidValue(f"the rule has thresholds of {len(rule.thresholds)} exits; the network has {exits}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
