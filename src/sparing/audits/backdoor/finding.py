"""What a defence is given and what it answers."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparing.audits.backdoor.pixels import PixelSpace
from sparing.core.errors import InvalidValue
from sparing.core.randomness import derive_seed, isolated_rng

if TYPE_CHECKING:
    from sparing.core.training.fit import Keeper

Level = Literal["model", "input", "data"]
Verdict = Literal["evidence", "no evidence", "mitigated", "not mitigated", "not applicable"]


class Images(NamedTuple):
    """Normalised images and their classes."""

    x: Float[Tensor, "n c h w"]
    y: Int[Tensor, " n"]

    def of(self, places: Tensor) -> Images:
        """The images at ``places`` (indices or mask)."""
        return Images(self.x[places], self.y[places])


@dataclass(frozen=True)
class Stamp:
    """A way to put a trigger on images, and the class it should lead to."""

    target: int
    apply: Callable[[Tensor], Tensor]
    """Normalised images (N, C, H, W) → copies with the trigger."""
    origin: str
    """"attacker", or the defence that reconstructed it."""
    parts: tuple[Float[Tensor, "1 h w"], Float[Tensor, "c h w"]] | None = None
    """Mask and pattern of a reconstructed one, 0 to 1, from which it can be made again."""


@dataclass(frozen=True)
class Subject:
    """What is examined, and what there is to examine it with."""

    model: nn.Module
    """Network trained on the condensed set, in eval mode; it must not be changed."""
    holdout: Images
    """Clean real images that it was not trained on."""
    pixels: PixelSpace
    classes: int
    condensed: Images | None = None
    reference: Images | None = None
    """Clean real images of every class to hold the condensed set against; the hold-out if there are no others."""
    own: Images | None = None
    """A set condensed by oneself from the same data."""
    stamps: tuple[Stamp, ...] = ()
    """Triggers to try the input-level defences with."""
    seed: int = 0
    keeper: Keeper | None = None
    """Where a defence that takes long keeps how far it is, and goes on from."""

    def halves(self) -> tuple[Images, Images]:
        """The hold-out cut in two at random: one half to fit a defence to, the other to judge it by."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "halves"))
        order = torch.randperm(len(self.holdout.y), generator=generator)
        middle = len(order) // 2
        return self.holdout.of(order[:middle]), self.holdout.of(order[middle:])


@dataclass(frozen=True)
class Finding:
    """What one defence found.

    ``verdict`` of a detector is "evidence" or "no evidence"; of a repair or a transformation of inputs "mitigated" or
    "not mitigated"; and "not applicable" when the defence could not judge, with the reason in ``remark``. "No
    evidence" does not mean safe.
    """

    defence: str
    level: Level
    verdict: Verdict
    score: float | None = None
    threshold: float | None = None
    remark: str = ""
    suspects: tuple[int, ...] = ()
    """Classes pointed at."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that was measured: numbers, texts and lists of them."""
    stamps: tuple[Stamp, ...] = ()
    """Reconstructed triggers."""
    pictures: Mapping[str, Float[Tensor, "c h w"]] = field(default_factory=dict)
    """Recovered patterns and masks, 0 to 1."""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Without pictures and stamps; numbers that are not finite become None."""
        kept = ("defence", "level", "verdict", "score", "threshold", "remark", "suspects", "figures", "seconds")
        return {name: jsonable(getattr(self, name)) for name in kept}


def jsonable(value: Any) -> Any:
    """Numbers, texts and containers as JSON has them; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, Tensor) or hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class Defence(ABC):
    """One published defence or check; its settings are its constructor's arguments."""

    name: ClassVar[str]
    level: ClassVar[Level]
    source: ClassVar[str]
    """The paper it comes from, or "own"."""
    fewest_images: ClassVar[int] = 2
    """In the hold-out."""
    reconstructs: ClassVar[bool] = False
    """Whether its findings hold triggers that other defences can be tried with."""

    @abstractmethod
    def judge(self, subject: Subject) -> Finding:
        """Look at the subject, which stays as it is."""

    def examine(self, subject: Subject) -> Finding:
        """:meth:`judge` with the seconds it took; the caller's random state is put back."""
        start = time.perf_counter()
        with isolated_rng(subject.seed, self.name):
            finding = self.judge(subject)
        return replace(finding, seconds=time.perf_counter() - start)

    def finding(self, verdict: Verdict, **found: Any) -> Finding:
        """A finding under this defence's name."""
        return Finding(self.name, self.level, verdict, **found)

    def not_applicable(self, remark: str, **found: Any) -> Finding:
        """Why this defence cannot judge."""
        return self.finding("not applicable", remark=remark, **found)


def settings(defence: str, limits: Mapping[str, tuple[float, float, float]]) -> None:
    """Raise :class:`InvalidValue` for the first setting (value, lowest, highest) outside its limits."""
    for name, (value, lowest, highest) in limits.items():
        if not lowest <= value <= highest:
            raise InvalidValue(f"{defence}: {name} = {value}; {lowest} to {highest} is expected")
