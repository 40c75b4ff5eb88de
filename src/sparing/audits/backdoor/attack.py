"""A backdoor planted by whoever condenses a data set, simulated through a condenser's callbacks.

Liu, Li, Backes, Shen and Zhang, "Backdoor Attacks Against Dataset Distillation", NDSS 2023, arXiv 2301.01197:
NAIVEATTACK (``mode="static"``) and DOORPING (``mode="doorping"``). For evaluating defences on one's own data.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparing.audits.backdoor.metrics import check_target
from sparing.audits.backdoor.triggers import OptimisedTrigger, PatchTrigger
from sparing.core.errors import InvalidValue


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
    """A condenser's callback that poisons the real images before they are condensed.

    A random ``portion`` of the training images is relabelled as ``target`` and carries the trigger. Under "static" the
    trigger stays as it is (NAIVEATTACK); under "doorping" it is fitted to the condenser's network after each training
    of that network, and the poisoned images are stamped anew.

    ``condenser.callbacks`` may be any sequence; the condenser must go on working with the very tensors that
    :meth:`on_data_ready` returned, for they are stamped in place.

    Raises :class:`InvalidValue` for a mode that the trigger does not allow, and when fitting starts for a target that
    is no class, a ``portion`` outside (0, 1) or of less than one image, and images outside the range of pixels.
    """

    def __init__(
        self,
        trigger: PatchTrigger,
        target: int = 0,
        portion: float = 0.01,
        mode: Literal["static", "doorping"] = "static",
        seed: int = 0,
    ) -> None:
        if mode not in ("static", "doorping"):
            raise InvalidValue(f"mode = {mode!r}; static or doorping is expected")
        if mode == "doorping" and not isinstance(trigger, OptimisedTrigger):
            raise InvalidValue(f"mode = 'doorping' with a {type(trigger).__name__}; an OptimisedTrigger is expected")
        self.trigger, self.target, self.portion, self.mode, self.seed = trigger, target, portion, mode, seed
        self.poisoned: Int[Tensor, " p"] | None = None
        """Places of the poisoned images, once :meth:`on_data_ready` was called."""
        self.effective_share: float | None = None
        """Share of poisoned images among those that then bear the target label."""
        self._images: Tensor | None = None

    def attach(self, condenser: Any) -> Any:
        """Add this to the condenser's callbacks; returns the condenser."""
        condenser.callbacks = (*condenser.callbacks, self)
        return condenser

    def on_data_ready(
        self, data: tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]
    ) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """(normalised images, labels) → copies of both, poisoned."""
        images, labels = data
        check_target(self.target, int(labels.max()) + 1)
        count = poisoned_count(len(images), self.portion)
        self.trigger.pixels.check(images, "training images")
        generator = torch.Generator().manual_seed(self.seed)
        self.poisoned = torch.randperm(len(images), generator=generator)[:count].to(images.device)
        images, labels = images.clone(), labels.clone()
        labels[self.poisoned] = self.target
        self.effective_share = count / int((labels == self.target).sum())
        self._images = images
        self._stamp()
        return images, labels

    def _stamp(self) -> None:
        if self._images is not None and self.poisoned is not None:
            self._images[self.poisoned] = self.trigger.apply(self._images[self.poisoned])

    def after_network_update(self, net: nn.Module) -> None:
        """Fit the trigger to ``net`` and stamp the poisoned images with what it became (DOORPING only)."""
        if self.mode == "doorping" and isinstance(self.trigger, OptimisedTrigger) and self.trigger.update(net).moved:
            self._stamp()

    @property
    def provenance(self) -> dict[str, Any]:
        """What a set condensed under this attack must say of itself; ``poisoned`` is True."""
        never = (
            isinstance(self.trigger, OptimisedTrigger) and self.mode == "doorping" and not self.trigger.history.updates
        )
        note = "the trigger was never updated: a random static patch (one outer step trains no network)"
        return {
            "poisoned": True,
            "mode": self.mode,
            "target": self.target,
            "portion": self.portion,
            "effective_share": self.effective_share,
            "seed": self.seed,
            "trigger": self.trigger.describe(),
        } | ({"note": note} if never else {})

    def state_dict(self) -> dict[str, Any]:
        """What changes while condensing; the choice of images follows from ``seed``."""
        return {"trigger": self.trigger.state_dict()} if isinstance(self.trigger, OptimisedTrigger) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, before or after :meth:`on_data_ready`."""
        if isinstance(self.trigger, OptimisedTrigger):
            self.trigger.load_state_dict(state["trigger"])
            self._stamp()


def require_mark(provenance: dict[str, Any], attacks: tuple[CondensationBackdoor, ...]) -> None:
    """Raise :class:`InvalidValue` when a set condensed under an attack is about to be saved without saying so."""
    if attacks and provenance.get("poisoned") is not True:
        raise InvalidValue(
            "a set condensed under a backdoor attack can only be saved with poisoned = True in its metadata"
        )
