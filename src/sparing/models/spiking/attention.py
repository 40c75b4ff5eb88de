"""Attention gates over time, channels and places of a sequence of currents (Yao et al. 2023, arXiv:2209.13929).

All take sequences (B, T, C, H, W) and return a gate that broadcasts over them. The names of parameters are those of
the published code, so that its state dicts fit.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from sparing.core.errors import InvalidValue, did_you_mean
from sparing.models.convnet import whole

VARIANTS = ("none", "TA", "CA", "SA", "TCA", "TSA", "CSA", "TCSA")


def letters(where: str, attention: str) -> str:
    """The dimensions of a variant: a part of "TCS" in this order, "" for "none"."""
    if attention not in VARIANTS:
        raise InvalidValue(
            f"{where}: attention = {attention!r}.{did_you_mean(str(attention), VARIANTS)} One of "
            f"{', '.join(VARIANTS)} is expected"
        )
    return "" if attention == "none" else attention.removesuffix("A")


class _Squeeze(nn.Module):
    """sigmoid(MLP(mean) + MLP(max)) with one bias-free MLP n → n//ratio → n for both."""

    def __init__(self, size: int, ratio: int, name: str, flat: bool = False) -> None:
        super().__init__()
        whole("attention", **{"ratio": ratio})
        hidden = size // ratio
        if hidden < 1:
            raise InvalidValue(f"attention: {name} leaves {size}//{ratio} = 0 hidden units; at most {size} is expected")
        layer = nn.Conv1d if flat else nn.Conv3d
        self.sharedMLP = nn.Sequential(
            layer(size, hidden, 1, bias=False), nn.ReLU(), layer(hidden, size, 1, bias=False)
        )

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Of the MLP's two layers, (n//ratio, n) and (n, n//ratio)."""
        inner, outer = cast("list[Tensor]", [self.sharedMLP[i].weight for i in (0, 2)])
        return inner.flatten(1), outer.flatten(1)

    def squeezed(self, rows: Float[Tensor, "b n m"]) -> Float[Tensor, "b n"]:
        """Mean and maximum over the last axis → gates (B, n); of equal maxima the first gets the gradient."""
        inner, outer = self.weights
        pooled = torch.stack([rows.mean(2), rows.max(2).values])
        mean, largest = linear(torch.relu(linear(pooled, inner)), outer).unbind(0)
        return torch.sigmoid(mean + largest)


class TemporalAttention(_Squeeze):
    """A gate for each step, from mean and maximum over all that is in the step.

    Shapes: (B, T, C, H, W) → (B, T, 1, 1, 1); with ``flat`` (B, T, N) → (B, T, 1).

    Args:
        T: number of steps, which ties the network to it.
        r_t: T//r_t hidden units.
        flat: for linear layers.
    """

    def __init__(self, T: int, r_t: int = 5, flat: bool = False) -> None:
        whole("TemporalAttention", T=T, r_t=r_t)
        super().__init__(T, r_t, f"r_t = {r_t} of T = {T}", flat)
        self.T = T

    def forward(self, x: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b t *ones"]:
        """The gate of a sequence."""
        if x.shape[1] != self.T:
            raise InvalidValue(
                f"TemporalAttention: {x.shape[1]} steps; {self.T}, for which it was made, are expected: its weights "
                "belong to the steps"
            )
        return self.squeezed(x.flatten(2)).view(*x.shape[:2], *(1,) * (x.ndim - 2))


class ChannelAttention(_Squeeze):
    """A gate for each channel, from mean and maximum over all steps and places.

    Shapes: (B, T, C, H, W) → (B, 1, C, 1, 1).

    Args:
        C: channels.
        r_c: C//r_c hidden units.
    """

    def __init__(self, C: int, r_c: int = 8) -> None:
        whole("ChannelAttention", C=C, r_c=r_c)
        super().__init__(C, r_c, f"r_c = {r_c} of C = {C}")
        self.C = C

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b 1 c 1 1"]:
        """The gate of a sequence."""
        if x.shape[2] != self.C:
            raise InvalidValue(f"ChannelAttention: {x.shape[2]} channels; {self.C} are expected")
        return self.squeezed(x.transpose(1, 2).flatten(2))[:, None, :, None, None]


class SpatialAttention(nn.Module):
    """A gate for each place, from mean and maximum over all steps and channels and a convolution of both.

    Shapes: (B, T, C, H, W) → (B, 1, 1, H, W).

    Args:
        kernel: side of the bias-free convolution, odd.
    """

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        whole("SpatialAttention", kernel=kernel)
        if kernel % 2 == 0:
            raise InvalidValue(f"SpatialAttention: kernel = {kernel}; an odd number is expected")
        self.conv = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b 1 1 h w"]:
        """The gate of a sequence."""
        flat = x.flatten(1, 2)
        pooled = torch.stack([flat.mean(1), flat.max(1).values], 1)
        weight = self.conv.weight
        return torch.sigmoid(conv2d(pooled, weight, padding=weight.shape[-1] // 2)).unsqueeze(1)


class MultiDimAttention(nn.Module):
    """Gates of several dimensions, each computed on what the one before it left: T, then C, then S.

    X1 = TA(X)·X; X2 = CA(X1)·X1; X3 = SA(X2)·X2; then ReLU, which removes every inhibitory input. A variant without a
    letter leaves its gate out.

    Shapes: (B, T, C, H, W) → the same; with ``flat``, where T is the only dimension, (B, T, N) → the same.

    Args:
        dims: TA, CA, SA, TCA, TSA, CSA or TCSA.
        T: number of steps; asked for with T among the dimensions.
        C: channels; asked for with C among them.
        r_t: T//r_t hidden units of the gate over time.
        r_c: C//r_c hidden units of the gate over channels.
        kernel: side of the convolution of the gate over places.
        relu: end with a ReLU.
        flat: for linear layers.
    """

    def __init__(
        self,
        dims: str = "TCSA",
        T: int | None = None,
        C: int | None = None,
        r_t: int = 5,
        r_c: int = 8,
        kernel: int = 3,
        relu: bool = True,
        flat: bool = False,
    ) -> None:
        super().__init__()
        wanted = letters("MultiDimAttention", dims)
        if not wanted:
            raise InvalidValue('MultiDimAttention: dims = "none"; at least one dimension is expected')
        if flat and wanted != "T":
            raise InvalidValue(f"MultiDimAttention: dims = {dims!r} with flat = True; features have no more than steps")
        for letter, size, name in (("T", T, "T"), ("C", C, "C")):
            if letter in wanted and size is None:
                raise InvalidValue(f"MultiDimAttention: dims = {dims!r} needs a value for {name}")
        self.relu = relu
        if T is not None and "T" in wanted:
            self.ta = TemporalAttention(T, r_t, flat)
        if C is not None and "C" in wanted:
            self.ca = ChannelAttention(C, r_c)
        if "S" in wanted:
            self.sa = SpatialAttention(kernel)

    @property
    def gates(self) -> dict[str, nn.Module]:
        """The gates there are, by letter, in their order."""
        found = {letter: getattr(self, name, None) for letter, name in (("T", "ta"), ("C", "ca"), ("S", "sa"))}
        return {letter: gate for letter, gate in found.items() if gate is not None}

    def forward(self, x: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b t *rest"]:
        """The gated sequence."""
        for gate in self.gates.values():
            x = gate(x) * x
        return torch.relu(x) if self.relu else x

    def extra_repr(self) -> str:
        """Whether it ends with a ReLU."""
        return f"relu={self.relu}"


def keep_top(
    x: Float[Tensor, "b t *rest"], gate: Float[Tensor, "b n *ones"], ratio: float, coefficient: bool = True
) -> Tensor:
    """Keep the channels, or steps, with the largest gates and set all others to 0, for inference.

    Args:
        x: a sequence (B, T, C, H, W).
        gate: what :class:`TemporalAttention` (B, T, 1, 1, 1) or :class:`ChannelAttention` (B, 1, C, 1, 1) gave for it.
        ratio: of n channels, or steps, the ⌈ratio·n⌉ with the largest gates are kept, the first of equal ones; 0…1.
        coefficient: multiply what is kept by its gate, as training does.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise InvalidValue(f"keep_top: ratio = {ratio!r}; a share above 0, at most 1, is expected")
    axes = [axis for axis in range(1, gate.ndim) if gate.shape[axis] > 1]
    if len(axes) > 1 or gate.ndim != x.ndim:
        raise InvalidValue(
            f"keep_top: a gate of shape {tuple(gate.shape)} for {tuple(x.shape)}; one over steps or "
            "channels is expected"
        )
    flat = gate.flatten(1)
    count = -int(-ratio * flat.shape[1] // 1)
    order = torch.sort(flat, dim=1, descending=True, stable=True).indices[:, :count]
    kept = torch.zeros_like(flat).scatter_(1, order, 1.0).view_as(gate)
    return x * (kept * gate if coefficient else kept)
