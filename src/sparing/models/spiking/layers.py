"""Layers of plain spiking networks: synapses on all steps at once, gates, and the neurons' recurrence.

Yao et al. 2023, arXiv:2209.13929. ``placement="input"`` is the published code: the gates act on the currents of all
steps. ``placement="membrane"`` is the paper (eq. 8–14): the gate over time acts on the currents, those over channels
and places on the membrane potential of each step, inside the recurrence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.convnet import whole
from sparing.models.spiking.attention import MultiDimAttention, letters
from sparing.models.spiking.neurons import LIF

Placement = Literal["input", "membrane"]
KERNELS = {"input": 3, "membrane": 7}
"""Side of the convolution of the gate over places."""


def parted(merged: Tensor, x: Tensor) -> Tensor:
    """What was computed on all steps of x (B, T, …) merged, (B·T, …), as (B, T, …), in a form that exporters know."""
    return merged.reshape(x.shape[0], x.shape[1], *merged.shape[1:])


def gate(x: Tensor, attention: MultiDimAttention, which: str) -> Tensor:
    """The sequence x (B, T, …) times those of its gates that ``which`` names."""
    for letter, each in attention.gates.items():
        if letter in which:
            x = each(x) * x
    return x


class _Layer(nn.Module, ABC):
    """Gates and neurons behind synapses, which :meth:`current` stands for."""

    attention: MultiDimAttention | None
    placement: Placement
    lif: LIF

    @abstractmethod
    def current(self, x: Tensor) -> Tensor:
        """Inputs of all steps → currents of all steps."""

    @property
    def causal(self) -> bool:
        """Whether a step's output depends on no later step."""
        if self.attention is None:
            return True
        return self.placement == "membrane" and "T" not in self.attention.gates

    def gated(self, current: Tensor) -> Tensor:
        """The currents after those gates that look at all steps."""
        if self.attention is None:
            return current
        return self.attention(current) if self.placement == "input" else gate(current, self.attention, "T")

    def step(self, current: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step behind :meth:`gated`: current (B, …) and state → (output, next state)."""
        u = current if h is None else h + current
        return self.lif.fire(self._on_membrane(u))

    def _on_membrane(self, u: Tensor) -> Tensor:
        if self.attention is None or self.placement == "input":
            return u
        return gate(u.unsqueeze(1), self.attention, "CS").squeeze(1)

    def forward(self, x: Float[Tensor, "b t *rest"]) -> Float[Tensor, "b t *out"]:
        """Inputs of all steps → outputs of all steps."""
        return self.neurons(self.current(x))

    def neurons(self, current: Tensor) -> Tensor:
        """Currents of all steps → outputs of all steps."""
        current = self.gated(current)
        if self.placement == "input" or self.attention is None or not set("CS") & set(self.attention.gates):
            return self.lif(current)
        h, outputs = None, []
        for now in current.unbind(1):
            out, h = self.step(now, h)
            outputs.append(out)
        return torch.stack(outputs, 1)


class ConvAttLIF(_Layer):
    """Convolution 3×3 → batch norm → average pooling → attention → neurons.

    Batch norm takes its statistics over batch and time.

    Shapes: (B, T, in_channels, H, W) → (B, T, out_channels, H//pool, W//pool).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        pool: side of the pooling's window; 1 for none.
        attention: "none", TA, CA, SA, TCA, TSA, CSA or TCSA.
        T: number of steps; only a gate over time asks for it.
        placement: "input" (the published code) or "membrane" (the paper).
        r_t: T//r_t hidden units of the gate over time.
        r_c: out_channels//r_c hidden units of the gate over channels.
        neuron: :class:`LIF` by default.
        relu: the ReLU behind gates on the input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        pool: int = 1,
        attention: str = "none",
        T: int | None = None,
        placement: Placement = "input",
        r_t: int = 5,
        r_c: int = 8,
        neuron: LIF | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        whole("ConvAttLIF", in_channels=in_channels, out_channels=out_channels, pool=pool)
        if placement not in KERNELS:
            raise InvalidValue(f'ConvAttLIF: placement = {placement!r}; "input" or "membrane" is expected')
        if placement == "membrane" and letters("ConvAttLIF", attention) == "T":
            raise InvalidValue('ConvAttLIF: attention = "TA" with placement = "membrane" has nothing on the membrane')
        self.placement = placement
        self.conv2d = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.BNLayer = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.attention = None
        if letters("ConvAttLIF", attention):
            self.attention = MultiDimAttention(
                attention, T, out_channels, r_t, r_c, KERNELS[placement], relu and placement == "input"
            )
        self.lif = LIF() if neuron is None else neuron

    def current(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d i j"]:
        """Inputs of all steps → currents of all steps."""
        return parted(self.pool(self.BNLayer(self.conv2d(x.flatten(0, 1)))), x)


class LinearAttLIF(_Layer):
    """Linear layer → batch norm → attention over time, if any → neurons ("AttLIF" in the published code).

    Shapes: (B, T, in_features) → (B, T, out_features).

    Args:
        in_features: numbers of the input.
        out_features: neurons.
        attention: of its dimensions only T acts here, with its ReLU on the input.
        T: number of steps; only a gate over time asks for it.
        placement: with "membrane" the gate has no ReLU.
        r_t: T//r_t hidden units of the gate.
        neuron: :class:`LIF` by default.
        relu: the ReLU behind the gate.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        attention: str = "none",
        T: int | None = None,
        placement: Placement = "input",
        r_t: int = 5,
        neuron: LIF | None = None,
        relu: bool = True,
    ) -> None:
        super().__init__()
        whole("LinearAttLIF", in_features=in_features, out_features=out_features)
        if placement not in KERNELS:
            raise InvalidValue(f'LinearAttLIF: placement = {placement!r}; "input" or "membrane" is expected')
        self.placement = placement
        self.linear = nn.Linear(in_features, out_features)
        self.BNLayer = nn.BatchNorm1d(out_features)
        self.attention = None
        if "T" in letters("LinearAttLIF", attention):
            self.attention = MultiDimAttention("TA", T, r_t=r_t, relu=relu and placement == "input", flat=True)
        self.lif = LIF() if neuron is None else neuron

    def current(self, x: Float[Tensor, "b t n"]) -> Float[Tensor, "b t m"]:
        """Inputs of all steps → currents of all steps."""
        return parted(self.BNLayer(self.linear(x.flatten(0, 1))), x)
