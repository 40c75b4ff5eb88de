"""A backdoor planted by whoever condenses a data set, simulated through a condenser's callbacks.

Liu, Li, Backes, Shen and Zhang, "Backdoor Attacks Against Dataset Distillation", NDSS 2023, arXiv 2301.01197:
NAIVEATTACK (``mode="static"``) and DOORPING (``mode="doorping"``). For evaluating defences on one's own data.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sparing.audits.backdoor.metrics import check_target
from sparing.audits.backdoor.subgraphs import OptimisedSubgraph, SubgraphTrigger, is_node_graph
from sparing.audits.backdoor.triggers import OptimisedTrigger, PatchTrigger
from sparing.core.errors import InvalidValue
from sparing.data.graphs import PackedGraphs


def poisoned_count(n: int, portion: float) -> int:
    """Images that carry the trigger among ``n``: the whole part of portion · n.

    Raises :class:`InvalidValue` when ``portion`` is not between 0 and 1 or leaves no image.
    """
    if not 0 < portion < 1:
        raise InvalidValue(f"portion = {portion}; above 0 and below 1 is expected")
    count = math.floor(portion * n)
    if count < 1:
        raise InvalidValue(f"portion = {portion} of {n} images is less than one; at least {1 / n:.2g} is expected")
    return count


class CondensationBackdoor:
    """A condenser's callback that poisons the real data before they are condensed.

    A random ``portion`` of the training images is relabelled as ``target`` and carries the trigger. Under "static" the
    trigger stays as it is (NAIVEATTACK); under "doorping" it is fitted to the condenser's network after each training
    of that network, and the poisoned images are stamped anew. With a
    :class:`~sparing.audits.backdoor.subgraphs.SubgraphTrigger` the same is done to a set of graphs, or to the training
    nodes of one graph (our extension).

    ``condenser.callbacks`` may be any sequence; the condenser must go on working with the very tensors that
    :meth:`on_data_ready` returned, for they are stamped in place.

    Raises :class:`InvalidValue` for a mode that the trigger does not allow, and when fitting starts for a target that
    is no class, a ``portion`` outside (0, 1) or of less than one image, and images outside the range of pixels.
    """

    def __init__(
        self,
        trigger: PatchTrigger | SubgraphTrigger,
        target: int = 0,
        portion: float = 0.01,
        mode: Literal["static", "doorping"] = "static",
        seed: int = 0,
    ) -> None:
        if mode not in ("static", "doorping"):
            raise InvalidValue(f"mode = {mode!r}; static or doorping is expected")
        if mode == "doorping" and not isinstance(trigger, OptimisedTrigger | OptimisedSubgraph):
            wanted = "OptimisedSubgraph" if isinstance(trigger, SubgraphTrigger) else "OptimisedTrigger"
            raise InvalidValue(f"mode = 'doorping' with a {type(trigger).__name__}; an {wanted} is expected")
        self.trigger, self.target, self.portion, self.mode, self.seed = trigger, target, portion, mode, seed
        self.poisoned: Int[Tensor, " p"] | None = None
        """Places of the poisoned images, graphs or nodes, once :meth:`on_data_ready` was called."""
        self.effective_share: float | None = None
        """Share of poisoned ones among those that then bear the target label."""
        self._carriers: Tensor | None = None
        """What is stamped in place: the images, or the features of nodes."""
        self._places: Tensor | None = None
        """Where in it: the poisoned images, or the cliques' nodes."""

    def attach(self, condenser: Any) -> Any:
        """Add this to the condenser's callbacks; returns the condenser."""
        condenser.callbacks = (*condenser.callbacks, self)
        return condenser

    def on_data_ready(self, data: Any) -> Any:
        """What is condensed → a poisoned copy.

        Of (normalised images (n, C, H, W), labels (n,)) both; of a set of graphs :class:`PackedGraphs`; of one graph
        with a ``train_mask`` the graph.
        """
        if isinstance(self.trigger, SubgraphTrigger):
            return self._poisoned_graphs(data, self.trigger)
        images, labels = data
        self.trigger.pixels.check(images, "training images")
        labels = self._relabelled(labels, torch.arange(len(labels), device=labels.device))
        self._carriers, self._places = images.clone(), self.poisoned
        self._stamp()
        return self._carriers, labels

    def _relabelled(self, labels: Int[Tensor, " n"], candidates: Int[Tensor, " m"]) -> Int[Tensor, " n"]:
        """A copy of the labels in which some of the candidates are of the target class."""
        check_target(self.target, int(labels[candidates].max()) + 1)
        count = poisoned_count(len(candidates), self.portion)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(candidates), generator=generator)[:count].to(candidates.device)
        self.poisoned, labels = candidates[chosen], labels.clone()
        labels[self.poisoned] = self.target
        self.effective_share = count / int((labels[candidates] == self.target).sum())
        return labels

    def _poisoned_graphs(self, data: Any, trigger: SubgraphTrigger) -> Any:
        nodes = is_node_graph(data)
        graphs = data if nodes else PackedGraphs.of(data)
        candidates = data.train_mask.nonzero().flatten() if nodes else torch.arange(len(graphs.y)).to(graphs.y.device)
        labels = self._relabelled(graphs.y, candidates)
        made, self._places = trigger.attached(graphs, self.poisoned)
        made.y[: len(labels)] = labels
        self._carriers = made.x
        return made

    def _stamp(self) -> None:
        if self._carriers is None:
            return
        if isinstance(self.trigger, SubgraphTrigger):
            self._carriers[self._places] = self.trigger.rows.to(self._carriers)
        else:
            self._carriers[self._places] = self.trigger.apply(self._carriers[self._places])

    def after_network_update(self, net: nn.Module) -> None:
        """Fit the trigger to ``net`` and stamp the poisoned ones with what it became (DOORPING only)."""
        if self.mode == "static":
            return
        if isinstance(self.trigger, OptimisedTrigger):
            moved = self.trigger.update(net).moved
        else:
            moved = isinstance(self.trigger, OptimisedSubgraph) and self.trigger.update(net)
        if moved:
            self._stamp()

    @property
    def provenance(self) -> dict[str, Any]:
        """What a set condensed under this attack must say of itself; ``poisoned`` is True."""
        optimised = self._optimised
        never = self.mode == "doorping" and optimised is not None and not optimised.history.updates
        note = "the trigger was never updated: a random static one (one outer step trains no network)"
        return {
            "poisoned": True,
            "mode": self.mode,
            "target": self.target,
            "portion": self.portion,
            "effective_share": self.effective_share,
            "seed": self.seed,
            "trigger": self.trigger.describe(),
        } | ({"note": note} if never else {})

    @property
    def _optimised(self) -> OptimisedTrigger | OptimisedSubgraph | None:
        return self.trigger if isinstance(self.trigger, OptimisedTrigger | OptimisedSubgraph) else None

    def state_dict(self) -> dict[str, Any]:
        """What changes while condensing; the choice of images follows from ``seed``."""
        return {"trigger": self._optimised.state_dict()} if self._optimised is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, before or after :meth:`on_data_ready`."""
        if self._optimised is not None:
            self._optimised.load_state_dict(state["trigger"])
            self._stamp()
