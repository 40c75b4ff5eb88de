"""Repairing a network on a few clean images: fine-pruning and neural attention distillation."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from sparing.audits.backdoor.finding import Defence, Finding, Images, Stamp, Subject, settings
from sparing.audits.backdoor.layers import block_ends, block_outputs, predict
from sparing.audits.backdoor.metrics import BackdoorRates, backdoor_rates
from sparing.models.surgery import evaluating

EPOCHS, LEARNING_RATE, MOMENTUM, BATCH = 10, 0.01, 0.9, 64

Loss = Callable[[Tensor, Tensor], Tensor]


def fine_tune(model: nn.Module, images: Images, loss: Loss, epochs: int, generator: torch.Generator) -> None:
    """Train ``model`` in place by SGD (rate 0.01, momentum 0.9, batches of 64) on ``loss(images, labels)``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    model.train()
    with torch.enable_grad():
        for _ in range(epochs):
            for places in torch.randperm(len(images.y), generator=generator).split(BATCH):
                optimizer.zero_grad()
                loss(images.x[places], images.y[places]).backward()
                optimizer.step()
    model.eval()


def channel_means(features: Float[Tensor, "n c h w"]) -> Float[Tensor, " c"]:
    """Mean activation of each channel over images and places."""
    return features.mean(dim=(0, 2, 3))


def prune_order(means: Float[Tensor, " c"]) -> Int[Tensor, " c"]:
    """Channels by their mean activation, smallest first."""
    return means.argsort(stable=True)


class KeptChannels(nn.Module):
    """(N, C, H, W) with the pruned channels set to zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(channels))
        self.kept: Tensor

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Zero what is pruned."""
        return x * self.kept.view(-1, 1, 1)


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of images classified as they should be."""
    return float((predict(model, images.x).argmax(dim=1) == images.y).float().mean())


def prune_channels(model: nn.Module, images: Images, drop: float = 0.04) -> tuple[nn.Module, list[int]]:
    """(a copy of the network, channels of its last block set to zero in it), pruned by their mean activation.

    From the least active channel on, until the accuracy on ``images`` has fallen by ``drop`` or more; that last
    channel is put back (Liu, Dolan-Gavitt and Garg 2018, section 4.1). One channel always stays.
    """
    changed = copy.deepcopy(model)
    name, end = block_ends(changed, images.x[:1])[-1]
    with torch.no_grad(), evaluating(changed):
        features = block_outputs(changed, images.x, [(name, end)])[1][0]
    means = channel_means(features)
    gate = KeptChannels(len(means)).to(features)
    parent, _, leaf = name.rpartition(".")
    setattr(changed.get_submodule(parent), leaf, nn.Sequential(end, gate))
    before, pruned = accuracy(changed, images), []
    for channel in prune_order(means)[:-1].tolist():
        gate.kept[channel] = 0
        if before - accuracy(changed, images) >= drop:
            gate.kept[channel] = 1
            break
        pruned.append(channel)
    return changed, pruned


def attention_map(features: Float[Tensor, "n c h w"]) -> Float[Tensor, "n places"]:
    """Sum over channels of A², flattened, of length 1 (Li et al., ICLR 2021, equations 1 and 2)."""
    return normalize(features.square().sum(dim=1).flatten(1), dim=1)


def attention_loss(student: Float[Tensor, "n c h w"], teacher: Float[Tensor, "n d h w"]) -> Float[Tensor, ""]:
    """Mean squared difference of the attention maps, over all entries (there equation 3)."""
    return mse_loss(attention_map(student), attention_map(teacher))


def distil_attention(
    model: nn.Module, images: Images, beta: float, epochs: int, generator: torch.Generator
) -> nn.Module:
    """A copy fine-tuned towards the attention of another fine-tuned copy, at every block's output (NAD)."""
    teacher, student = copy.deepcopy(model), copy.deepcopy(model)
    fine_tune(teacher, images, lambda x, y: cross_entropy(teacher(x), y), epochs, generator)
    ends = [block_ends(network, images.x[:1]) for network in (student, teacher)]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits, own = block_outputs(student, x, ends[0])
        with torch.no_grad():
            _, shown = block_outputs(teacher, x, ends[1])
        return (
            cross_entropy(logits, y)
            + beta * torch.stack([attention_loss(mine, theirs) for mine, theirs in zip(own, shown, strict=True)]).sum()
        )

    fine_tune(student, images, loss, epochs, generator)
    return student


def rates_on(model: nn.Module, images: Images, stamp: Stamp) -> BackdoorRates:
    """Rates of ``model`` on images without and with the trigger."""
    return backdoor_rates(predict(model, images.x), predict(model, stamp.apply(images.x)), images.y, stamp.target)


class _Repair(Defence):
    """Repairs on one half of the hold-out and measures on the other.

    The score is the share of the attack's excess (success above the null rate) that is left; below ``threshold``, and
    with no more than ``allowed_drop`` of clean accuracy lost, the backdoor counts as mitigated (design choice).
    """

    threshold: float
    allowed_drop: float

    @abstractmethod
    def repaired(self, subject: Subject, clean: Images, generator: torch.Generator) -> tuple[nn.Module, dict[str, Any]]:
        """A mended copy of the subject's network, and what was done."""

    def judge(self, subject: Subject) -> Finding:
        clean, judged = subject.halves()
        generator = torch.Generator().manual_seed(subject.seed)
        changed, figures = self.repaired(subject, clean, generator)
        before, after = accuracy(subject.model, judged), accuracy(changed, judged)
        figures |= {"cta_before": before, "cta_after": after}
        left = {}
        for stamp in subject.stamps:
            old, new = rates_on(subject.model, judged, stamp), rates_on(changed, judged, stamp)
            figures[f"asr_before_{stamp.target}"] = old.asr.value
            figures[f"asr_after_{stamp.target}"] = new.asr.value
            figures[f"asr_after_{stamp.target}_interval95"] = new.asr.interval
            if old.excess > 0:
                left[stamp.target] = max(new.asr.value - new.null.value, 0.0) / old.excess
        return mitigation(
            self, left, before - after <= self.allowed_drop, self.threshold, bool(subject.stamps), figures
        )


def mitigation(
    defence: Defence, left: dict[int, float], accurate: bool, threshold: float, tried: bool, figures: dict[str, Any]
) -> Finding:
    """The finding of a repair that leaves these shares of the attacks' excess."""
    if not left:
        why = "the trigger has no effect to begin with" if tried else "no trigger is known: clean accuracy only"
        return defence.not_applicable(why, figures=figures)
    worst = max(left.values())
    return defence.finding(
        "mitigated" if worst < threshold and accurate else "not mitigated",
        score=worst,
        threshold=threshold,
        remark="" if accurate else "at the cost of clean accuracy",
        figures=figures,
    )


class FinePruning(_Repair):
    """Prune the last block's least active channels, then fine-tune (Liu, Dolan-Gavitt and Garg, RAID 2018).

    Args:
        drop: loss of accuracy at which pruning stops.
        epochs: of fine-tuning.
        threshold: share of the attack's excess that may be left.
        allowed_drop: of clean accuracy after all.
    """

    name, level = "fine_pruning", "model"
    source = "Liu, Dolan-Gavitt and Garg, RAID 2018"

    def __init__(
        self, drop: float = 0.04, epochs: int = EPOCHS, threshold: float = 0.5, allowed_drop: float = 0.04
    ) -> None:
        settings(
            self.name,
            {
                "drop": (drop, 0, 1),
                "epochs": (epochs, 0, 10**6),
                "threshold": (threshold, 0, 1),
                "allowed_drop": (allowed_drop, 0, 1),
            },
        )
        self.drop, self.epochs, self.threshold, self.allowed_drop = drop, epochs, threshold, allowed_drop

    def repaired(self, subject: Subject, clean: Images, generator: torch.Generator) -> tuple[nn.Module, dict[str, Any]]:
        """(repaired copy, channels pruned)."""
        changed, pruned = prune_channels(subject.model, clean, self.drop)
        fine_tune(changed, clean, lambda x, y: cross_entropy(changed(x), y), self.epochs, generator)
        return changed, {"pruned_channels": pruned}


class AttentionDistillation(_Repair):
    """Fine-tune towards the attention of a fine-tuned teacher (NAD; Li et al., ICLR 2021).

    Args:
        beta: weight of the attention loss, summed over the blocks.
        epochs: of fine-tuning, teacher and student each.
        threshold: share of the attack's excess that may be left.
        allowed_drop: of clean accuracy after all.
    """

    name, level = "nad", "model"
    source = "Li et al., Neural Attention Distillation, ICLR 2021"

    def __init__(
        self, beta: float = 1000.0, epochs: int = EPOCHS, threshold: float = 0.5, allowed_drop: float = 0.04
    ) -> None:
        settings(
            self.name,
            {
                "beta": (beta, 0, 1e9),
                "epochs": (epochs, 0, 10**6),
                "threshold": (threshold, 0, 1),
                "allowed_drop": (allowed_drop, 0, 1),
            },
        )
        self.beta, self.epochs, self.threshold, self.allowed_drop = beta, epochs, threshold, allowed_drop

    def repaired(self, subject: Subject, clean: Images, generator: torch.Generator) -> tuple[nn.Module, dict[str, Any]]:
        """(repaired copy, its settings)."""
        return distil_attention(subject.model, clean, self.beta, self.epochs, generator), {"beta": self.beta}
