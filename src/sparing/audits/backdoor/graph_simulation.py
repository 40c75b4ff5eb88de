"""A simulated attack on the condensing of graphs: our extension, with no defences of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sparing.audits.backdoor.attack import CondensationBackdoor
from sparing.audits.backdoor.audit import AuditReport, Victim
from sparing.audits.backdoor.metrics import BackdoorRates
from sparing.audits.backdoor.subgraphs import SubgraphTrigger, graph_rates, node_rates
from sparing.condensation.graph_evaluation import train_on_graphs, train_on_node_graph
from sparing.condensation.kinds import NodeKind, kind_of
from sparing.condensation.step import Condense
from sparing.core.devices import device_named
from sparing.core.job import Job
from sparing.core.randomness import derive_seed
from sparing.core.store import JSON, TENSORS, All, BoundStore, Codec
from sparing.core.training.step import load_weights
from sparing.data.graphs import graph_data

T = TypeVar("T")
CONDENSED: All[Any] = All({"tensors": TENSORS, "record": JSON, "said": JSON})
LOOKS = 10
"""Epochs between two looks at the validation nodes."""


def timed(store: BoundStore, name: str, compute: Callable[[], T], codec: Codec[T]) -> tuple[T, float]:
    """A stored result and the seconds that it took to make, in whatever run that was; they are no part of it."""
    before = store.cost.wall_s
    return store.once(name, compute, codec), store.cost.wall_s - before


@dataclass(frozen=True)
class GraphSimulation:
    """Condenses the graphs of a job's task clean and attacked, trains networks on both, and shows them the trigger."""

    job: Job
    condense: Condense
    attack: Callable[[Tensor], CondensationBackdoor]
    """Features of real nodes (N, F) → the attack."""
    fresh: Callable[[int], nn.Module]
    """Seed → a network for the task, with the weights of that seed."""
    victims: int
    epochs: int | None = None
    """Of their training; None: the papers'."""

    def report(self) -> AuditReport:
        """Rates of networks trained on the attacked set, beside those of networks trained on the clean one."""
        bad, said = self._condensed("attacked")
        clean, _ = self._condensed("clean")
        trigger = SubgraphTrigger(self.job.task.splits(self.job.root).test.x, torch.tensor(said["trigger"]["rows"]))
        victims, seconds = self._rates("attacked", bad, trigger, said["target"])
        control, more = self._rates("clean", clean, trigger, said["target"])
        return AuditReport(
            victims=tuple(Victim(rates.cta, rates) for rates in victims),
            findings=(),
            control=tuple(Victim(rates.cta, rates) for rates in control),
            target=said["target"],
            trigger=said["trigger"],
            provenance=said,
            bytes=said["bytes_after"],
            seconds=seconds + more,
            units=kind_of(self.condense, self.job.task).units,
        )

    def _condensed(self, where: Literal["clean", "attacked"]) -> tuple[Any, Mapping[str, Any]]:
        """(the set, what it says of itself); both are condensed with one seed."""
        job = self.job
        seed = derive_seed("audit", job.seed) % 2**31
        child = job.fork(where, train=job.task.splits(job.root).train, seed=seed)
        kind = kind_of(self.condense, job.task)
        real = kind.read(child)
        kind.check_size(real)

        def made() -> dict[str, Any]:
            attack = self.attack(real.data.x) if where == "attacked" else None
            kind.callbacks = () if attack is None else (attack,)
            stored = kind.make(child, real, device_named(self.condense.device)).stored()
            return {**stored, "said": {} if attack is None else attack.provenance}

        kept = child.store.once("condensed", made, CONDENSED)
        found = kind.finished(child, kind.restored(kept), real)
        return found.data, {**found.record, **kept["said"]}

    def _rates(
        self, where: str, condensed: Any, trigger: SubgraphTrigger, target: int
    ) -> tuple[list[BackdoorRates], float]:
        """Rates of networks trained on a set, and the seconds of their training."""
        splits = self.job.task.splits(self.job.root)
        kind = kind_of(self.condense, self.job.task)
        nodes = isinstance(kind, NodeKind)
        real = kind.read(self.job.replace(train=splits.train)).data if nodes else None
        recipe = {} if self.epochs is None else {"epochs": self.epochs}

        def trained(seed: int) -> dict[str, Tensor]:
            network = self.fresh(seed)
            if nodes:
                train_on_node_graph(network, condensed, real, validate_every=LOOKS, **recipe)
            else:
                train_on_graphs(network, condensed, splits.val, seed=seed, **recipe)
            return dict(network.state_dict())

        rates, seconds = list[BackdoorRates](), 0.0
        for number in range(self.victims):
            seed = derive_seed("victim", self.job.seed, number)
            weights, took = timed(self.job.store, f"victim-{where}-{number}", partial(trained, seed), TENSORS)
            network = self.fresh(seed)
            load_weights(network, weights)
            seconds += took
            if nodes:
                test = splits.test
                labels = torch.zeros(len(test.x), dtype=torch.int64)
                labels[test.nodes] = test.labels
                graph = graph_data(test.x, test.edge_index, labels)
                rates.append(node_rates(network, graph, test.nodes, trigger, target))
            else:
                rates.append(graph_rates(network, splits.test, trigger, target))
        return rates, seconds
