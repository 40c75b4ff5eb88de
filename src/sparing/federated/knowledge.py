"""What a device keeps of a task it has learnt: a few of the weights, no sample.

FedKNOW (Luopan et al. 2023, arXiv:2212.01738): the largest weights of the model, all others zero, trained on for a
little; or the weights that a second network has found free (PackNet, Mallya and Lazebnik 2018, arXiv:1711.05769). In a
loop of your own::

    knowledge = KnowledgeExtractor(rho=0.1).extract(model, loader, classes=range(10), task=0)
    soft_labels = knowledge.materialize(model)(x)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparing.core.errors import InvalidValue, shown
from sparing.federated.projection import block_loss

if TYPE_CHECKING:
    from torch.optim import Optimizer

MakeOptimizer = Callable[[nn.Module], "Optimizer"]
"""model → a new optimizer of its trained parameters."""
Batches = Iterable[tuple[Tensor, Tensor]]
"""The samples of a task in batches (inputs, class ids of the whole head or probabilities over it); gone through again
for each epoch."""
NUMBERS = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}


def check_types(settings: Any) -> None:
    """Fields of a dataclass must be what they are annotated as: a whole number, a finite one, a truth value or a word.

    An integer is a number, too; fields of other types are not looked at.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value, kinds = getattr(settings, name), get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if value is None and NoneType in kinds:
            continue
        if get_origin(kinds[0]) is Literal:
            fits, expected = value in get_args(kinds[0]), f"one of {', '.join(map(str, get_args(kinds[0])))}"
        elif kinds[0] is bool:
            fits, expected = isinstance(value, bool), "true or false"
        elif kinds[0] is int:
            fits, expected = isinstance(value, Integral) and not isinstance(value, bool), "a whole number"
        elif kinds[0] is float:
            fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            expected = "a finite number"
        else:
            continue
        if not fits:
            raise InvalidValue(f"{name} = {shown(value)}; {expected} is expected")


def check_share(name: str, share: float) -> None:
    """A share of weights must be above 0 and at most 1."""
    if not 0 < share <= 1:
        raise InvalidValue(f"{name} = {share!r}; above 0 and at most 1 is expected")


def device_of(model: nn.Module) -> torch.device:
    """Where its parameters are; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def prunable(model: nn.Module) -> list[str]:
    """Names of the weight tensors that are cut: parameters of two dimensions or more."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def top_share(weights: Mapping[str, Tensor], rho: float) -> tuple[dict[str, Tensor], float, int]:
    """The largest weights over all tensors together.

    Args:
        weights: name → tensor.
        rho: their share ρ in (0, 1].

    Returns:
        (name → bool mask, the smallest magnitude that is kept, max(1, round(ρ n))). All weights of at least that
        magnitude are kept, so more than the count where several are equal.
    """
    check_share("rho", rho)
    if not weights:
        raise InvalidValue("no weights: a model with a parameter of two dimensions or more is needed")
    sizes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    count = max(1, round(rho * len(sizes)))
    threshold = sizes.topk(count).values[-1]
    return {name: weight.detach().abs() >= threshold for name, weight in weights.items()}, float(threshold), count


@dataclass(frozen=True)
class TaskKnowledge:
    """The weights kept of one task."""

    task: int
    classes: range
    """Its block of the head."""
    values: dict[str, Tensor]
    """Pruned tensor → the values kept (n,), float32, float16, or int8 with a scale."""
    indices: dict[str, Tensor]
    """Pruned tensor → their places in the flattened tensor (n,), int32."""
    whole: dict[str, Tensor]
    """Every other entry of the state dict: biases, parameters and statistics of norms."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Pruned tensor → what its int8 values are multiplied by."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor], masks: Mapping[str, Tensor], task: int, classes: range) -> TaskKnowledge:
        """What ``masks`` (bool, of the tensors that are cut) leave of a state dict, on the CPU; the rest whole."""
        places = {name: mask.cpu().flatten().nonzero()[:, 0] for name, mask in masks.items()}
        return cls(
            task,
            classes,
            {name: state[name].detach().cpu().flatten()[at] for name, at in places.items()},
            {name: at.to(torch.int32) for name, at in places.items()},
            {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items() if name not in masks},
        )

    def state(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict it stands for, zeros where nothing was kept; shapes, types and devices as in ``like``.

        Raises :class:`InvalidValue` for a state dict of another model.
        """
        if like.keys() != self.values.keys() | self.whole.keys():
            odd = sorted(like.keys() ^ (self.values.keys() | self.whole.keys()))
            raise InvalidValue(f"this knowledge is of another model: {', '.join(odd[:5])} on one side only")
        found = {}
        for name, tensor in like.items():
            if name in self.whole:
                if self.whole[name].shape != tensor.shape:
                    raise InvalidValue(
                        f"this knowledge is of another model: {name} is {tuple(self.whole[name].shape)} here and "
                        f"{tuple(tensor.shape)} there"
                    )
                found[name] = self.whole[name].to(tensor.device, tensor.dtype)
                continue
            at = self.indices[name].long().to(tensor.device)
            if len(at) and not 0 <= int(at.min()) <= int(at.max()) < tensor.numel():
                raise InvalidValue(f"this knowledge is of another model: {name} has {tensor.numel()} weights there")
            values = self.values[name].to(tensor.device, tensor.dtype)
            if name in self.scales:
                values = values * self.scales[name].to(tensor.device, tensor.dtype)
            found[name] = torch.zeros_like(tensor).flatten().index_put_((at,), values).reshape(tensor.shape)
        return found

    def materialize(self, model: nn.Module) -> nn.Module:
        """A copy of ``model`` with these weights, in evaluation mode, which never learns."""
        made = copy.deepcopy(model).requires_grad_(False).eval()
        made.load_state_dict(self.state(made.state_dict()))
        return made

    @property
    def nbytes(self) -> int:
        """Bytes it takes: values, indices, scales and whole tensors."""
        kept = (self.values, self.indices, self.scales, self.whole)
        return sum(tensor.nbytes for tensors in kept for tensor in tensors.values())

    def quantized(self, numbers: Literal["float32", "float16", "int8"]) -> TaskKnowledge:
        """The same with its values in fewer bits: float16, or int8 with one scale for each tensor."""
        if numbers not in NUMBERS:
            raise InvalidValue(f"numbers = {numbers!r}; one of {', '.join(NUMBERS)} is expected")
        if self.scales:
            raise InvalidValue("this knowledge is int8 already")
        if numbers != "int8":
            return replace(self, values={name: each.to(NUMBERS[numbers]) for name, each in self.values.items()})
        scales = {
            name: each.float().abs().max().clamp(min=1e-12) / 127 for name, each in self.values.items() if len(each)
        }
        values = {
            name: (each.float() / scales[name]).round().to(torch.int8) if name in scales else each.to(torch.int8)
            for name, each in self.values.items()
        }
        return replace(self, values=values, scales=scales)

    def to_records(self) -> dict[str, Tensor]:
        """As tensors by name, for a safetensors file or an array record; :meth:`from_records` is the way back."""
        about = torch.tensor([self.task, self.classes.start, self.classes.stop])
        kinds = {"values": self.values, "indices": self.indices, "whole": self.whole, "scales": self.scales}
        return {"about": about} | {
            f"{kind}/{name}": t for kind, tensors in kinds.items() for name, t in tensors.items()
        }

    @classmethod
    def from_records(cls, records: Mapping[str, Tensor]) -> TaskKnowledge:
        """Raises :class:`InvalidValue` for tensors that :meth:`to_records` did not write."""
        kinds: dict[str, dict[str, Tensor]] = {"values": {}, "indices": {}, "whole": {}, "scales": {}}
        for name, tensor in records.items():
            kind, slash, rest = name.partition("/")
            if name != "about" and (not slash or kind not in kinds):
                raise InvalidValue(f"{name!r} is no part of a task's knowledge")
            if slash:
                kinds[kind][rest] = tensor
        if "about" not in records or kinds["values"].keys() != kinds["indices"].keys():
            raise InvalidValue("a task's knowledge has 'about', and as many values as indices")
        for name, values in kinds["values"].items():
            at = kinds["indices"][name]
            if values.ndim != 1 or values.shape != at.shape or at.dtype != torch.int32:
                raise InvalidValue(
                    f"{name}: values of shape {tuple(values.shape)} and {at.dtype} indices of {tuple(at.shape)}; as "
                    "many of both in a row, and int32, are expected"
                )
            scale = kinds["scales"].get(name)
            if (scale is not None) != (values.dtype == torch.int8 and len(values) > 0):
                raise InvalidValue(
                    f"{name}: {len(values)} {values.dtype} values with{'out' if scale is None else ''} a scale; int8 "
                    "values have one, and no others"
                )
            if scale is not None and (scale.ndim or not scale.is_floating_point()):
                raise InvalidValue(f"{name}: {scale.dtype} scale of shape {tuple(scale.shape)}; a number is expected")
        for name in sorted(kinds["scales"].keys() - kinds["values"].keys()):
            raise InvalidValue(f"{name}: a scale, and no values")
        for name in sorted(kinds["whole"].keys() & kinds["values"].keys()):
            raise InvalidValue(f"{name}: whole, and a few values as well; one of both is expected")
        about = records["about"]
        told = about.tolist() if about.shape == (3,) and about.dtype == torch.int64 else None
        if told is None or not (told[0] >= 0 and 0 <= told[1] < told[2]):
            raise InvalidValue(
                f"about = {shown(about.tolist())} ({about.dtype}); the task's number and the start and stop of its "
                "classes are expected, as int64"
            )
        return cls(told[0], range(told[1], told[2]), **kinds)


def train_masked(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    loader: Batches,
    classes: range,
    epochs: int,
    optimizer: MakeOptimizer,
) -> None:
    """Train a task's cross-entropy in place where ``masks`` (name → bool) allow it; parameters without one learn whole.

    Entries outside a mask keep their value whatever the optimizer adds to them. Batches and masks follow the model to
    its device.
    """
    parameters = dict(model.named_parameters())
    masks = {name: mask.to(parameters[name].device) for name, mask in masks.items()}
    device = device_of(model)
    fixed = {name: parameters[name].detach().clone() for name in masks}
    made = optimizer(model)
    for _ in range(epochs):
        for x, y in loader:
            made.zero_grad()
            block_loss(model(x.to(device)), y.to(device), classes).backward()
            for name, mask in masks.items():
                if (slope := parameters[name].grad) is not None:
                    slope.mul_(mask)
            made.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    parameters[name].copy_(torch.where(mask, parameters[name], fixed[name]))


@dataclass(frozen=True)
class KnowledgeExtractor:
    """Cuts a trained model down to its largest weights and trains these on for a little.

    What is kept whole, biases and norms, learns on with them.
    """

    rho: float = 0.1
    """Share ρ of the weights that is kept."""
    finetune_epochs: int = 2
    """Passes over the task's samples with the weights kept."""
    numbers: Literal["float32", "float16", "int8"] = "float32"
    """In which numbers they are kept."""

    def __post_init__(self) -> None:
        check_types(self)
        check_share("rho", self.rho)
        if self.finetune_epochs < 0:
            raise InvalidValue(f"finetune_epochs = {self.finetune_epochs!r}; 0 or more is expected")

    def extract(
        self,
        model: nn.Module,
        loader: Batches,
        classes: range,
        task: int = 0,
        optimizer: MakeOptimizer | None = None,
    ) -> TaskKnowledge:
        """The knowledge of a task; ``model`` stays as it is.

        Args:
            model: as local training left it.
            loader: the task's samples in batches; gone through once for each epoch.
            classes: the task's block of the head.
            task: its number.
            optimizer: makes that of the fine-tuning; None: SGD with a rate of 0.01.
        """
        small = copy.deepcopy(model).train()
        parameters = dict(small.named_parameters())
        masks, _, _ = top_share({name: parameters[name] for name in prunable(small)}, self.rho)
        with torch.no_grad():
            for name, mask in masks.items():
                parameters[name].mul_(mask)
        if self.finetune_epochs:
            made = optimizer or (lambda net: torch.optim.SGD(net.parameters(), lr=0.01))
            train_masked(small, masks, loader, classes, self.finetune_epochs, made)
        return TaskKnowledge.of(small.state_dict(), masks, task, classes).quantized(self.numbers)


# ----------------------------------------------------------------------------------------------------------- PackNet


def packnet_mask(weights: Mapping[str, Tensor], owned: Mapping[str, Tensor], store_rate: float) -> dict[str, Tensor]:
    """The weights that a task takes: the largest of those that no earlier one owns.

    Args:
        weights: name → tensor, after the task's training.
        owned: name → bool, what earlier tasks own.
        store_rate: share of the free weights, in (0, 1]: the cutoff is the (1 − rate)-quantile of their magnitudes,
            linearly interpolated, over all tensors together.

    Returns:
        Name → bool, disjoint from ``owned``.
    """
    check_share("store_rate", store_rate)
    free = np.concatenate([weights[name].detach().abs()[~owned[name]].double().cpu().numpy() for name in weights])
    if not len(free):
        raise InvalidValue("no weight is free: earlier tasks own all of them")
    place = (1 - store_rate) * (len(free) - 1)
    if abs(place - round(place)) < 1e-6:  # 0.9 · 110 is a little more than 99
        place = round(place)
    below = int(place)
    ordered = np.partition(free, [below, min(below + 1, len(free) - 1)])
    cutoff = ordered[below] + (place - below) * (ordered[min(below + 1, len(free) - 1)] - ordered[below])
    return {name: (weight.detach().abs().double() >= cutoff) & ~owned[name] for name, weight in weights.items()}


def packed(mask: Tensor) -> Tensor:
    """A bool tensor as bits, eight in a byte (uint8)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that :func:`packed` made these bits of; :class:`InvalidValue` for other bits."""
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-count // 8),):
        raise InvalidValue(
            f"bits of a mask: {bits.dtype} of shape {tuple(bits.shape)}; uint8 of ({-(-count // 8)},) is expected, of "
            f"a weight of {tuple(shape)}"
        )
    return torch.from_numpy(np.unpackbits(bits.cpu().numpy(), count=count).astype(bool)).reshape(tuple(shape))


class PackNet:
    """A second network that holds one task after the other, each in weights of its own.

    Every task trains the weights that are free, takes the largest of them, sets the others to zero and trains its own
    on. Biases and norms learn with the first task and stay as they are afterwards; norms then keep their statistics,
    too. Masks are on the CPU, wherever the model is.

    Args:
        model: the network, trained in place.
        store_rate: share of the free weights that a task takes.
    """

    def __init__(self, model: nn.Module, store_rate: float = 0.1) -> None:
        check_share("store_rate", store_rate)
        self.model, self.store_rate = model, store_rate
        parameters = dict(model.named_parameters())
        self.masks: list[dict[str, Tensor]] = []
        self.names = prunable(model)
        if not self.names:
            raise InvalidValue("the model has no parameter of two dimensions or more")
        self._nothing = {name: torch.zeros(parameters[name].shape, dtype=torch.bool) for name in self.names}

    @property
    def nbytes(self) -> int:
        """Bytes it takes: the network, and the masks as bits."""
        bits = sum(-(-mask.numel() // 8) for masks in self.masks for mask in masks.values())
        return sum(tensor.nbytes for tensor in self.model.state_dict().values()) + bits

    @property
    def owned(self) -> dict[str, Tensor]:
        """Name → bool: what the tasks so far own."""
        return self._owned_by(self.masks)

    def _owned_by(self, tasks: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        found = {name: mask.clone() for name, mask in self._nothing.items()}
        for masks in tasks:
            for name in self.names:
                found[name] |= masks[name]
        return found

    def train(self, loader: Batches, classes: range, epochs: int, optimizer: MakeOptimizer) -> None:
        """Train the weights that no task owns yet."""
        free = {name: ~mask for name, mask in self.owned.items()}
        self._learn(free, not self.masks, loader, classes, epochs, optimizer)

    def prune(self, last: bool = False) -> dict[str, Tensor]:
        """Let the task take its weights, set what stays free to zero, and return its mask; ``last``: take all that
        is free."""
        parameters = dict(self.model.named_parameters())
        owned = self.owned
        if last:
            taken = {name: ~mask for name, mask in owned.items()}
        else:
            taken = packnet_mask({name: parameters[name].cpu() for name in self.names}, owned, self.store_rate)
        with torch.no_grad():
            for name in self.names:
                parameters[name].mul_((taken[name] | owned[name]).to(parameters[name].device))
        self.masks.append(taken)
        return taken

    def finetune(self, loader: Batches, classes: range, epochs: int, optimizer: MakeOptimizer) -> None:
        """Train the weights of the last task that was pruned for."""
        self._learn(self.masks[-1], len(self.masks) == 1, loader, classes, epochs, optimizer)

    def _learn(
        self,
        masks: Mapping[str, Tensor],
        first: bool,
        loader: Batches,
        classes: range,
        epochs: int,
        optimizer: MakeOptimizer,
    ) -> None:
        self.model.train()
        frozen = {}
        if not first:  # later tasks leave biases, norms and their statistics alone
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
            rest = ((name, p) for name, p in self.model.named_parameters() if name not in self.names)
            frozen = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in rest}
        train_masked(self.model, {**masks, **frozen}, loader, classes, epochs, optimizer)

    def knowledge(self, task: int, classes: range) -> TaskKnowledge:
        """Of the ``task``-th task that was pruned for: the weights of it and of those before it; biases as they are
        now."""
        if not 0 <= task < len(self.masks):
            raise InvalidValue(f"task = {task}; {len(self.masks)} tasks have been pruned for")
        return TaskKnowledge.of(self.model.state_dict(), self._owned_by(self.masks[: task + 1]), task, classes)
