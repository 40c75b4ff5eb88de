"""What a spiking network costs: spikes, additions and multiply-accumulates at measured firing rates, energy (*est.*).

Yao et al. 2023, arXiv:2209.13929, section 3.4 and Table 5, with M. Horowitz's prices for 32-bit floats in 45 nm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from sparing.core.energy import ADD_PJ, MAC_PJ
from sparing.core.errors import DataError, InvalidValue
from sparing.core.predictor.base import Operations
from sparing.models.spiking.attention import ChannelAttention, SpatialAttention, TemporalAttention
from sparing.models.spiking.layers import ConvAttLIF, LinearAttLIF
from sparing.models.spiking.neurons import LIF, Cell

QUIET, BUSY = 0.001, 0.5
"""A layer that fires more rarely, or more often, is remarked on."""
CAVEATS = (
    "Additions stand for multiply-accumulates only on hardware that skips what is not a spike: a CPU or GPU saves "
    "nothing by it. Memory traffic, norms and the neurons' own updates are not counted. Behind average pooling or "
    "gates that follow the neurons, inputs are not binary, and counting additions alone would be optimistic: synapses "
    "whose inputs are not binary are counted as multiply-accumulates here."
)


RULE = (
    "products of the first synapses with inputs that are not zero, of synapses whose inputs are not binary, of making "
    "and applying gates, for one sample at the firing rates measured on this split; what spikes ask of synapses is an "
    "addition each; normalisation and the neurons' updates not counted"
)


class Energy(NamedTuple):
    """Operations of one sample and what they take."""

    macs: float
    accumulates: float
    pj: float
    """Picojoules, estimated."""


def base_energy(operations: Sequence[float], rates: Sequence[float], phi0: float, T: int) -> Energy:
    """Energy of a plain spiking network: E = 4.6·MAC_1 + 0.9·ΣAC pJ.

    Args:
        operations: FL of each layer for one step: k²·h·w·c_in·c_out of a convolution (h, w before pooling), i·o of a
            linear layer.
        rates: Φ of each layer, mean spikes per neuron and step; that of the last is not needed.
        phi0: share of the input that is not zero; 1 for images.
        T: steps.
    """
    if len(rates) < len(operations) - 1:
        raise InvalidValue(
            f"{len(operations)} layers and {len(rates)} rates; one for each layer but the last is needed"
        )
    macs = T * operations[0] * phi0
    accumulates = T * sum(fl * phi for fl, phi in zip(operations[1:], rates, strict=False))
    return Energy(macs, accumulates, MAC_PJ["fp32"] * macs + ADD_PJ["fp32"] * accumulates)


def efficiency_ratio(base_pj: float, more_macs: float, fewer_accumulates: float) -> float:
    """r_EE = E_base / (E_base + ΔE), with ΔE = 4.6·ΔMAC − 0.9·ΔAC pJ: above 1 where attention saves energy."""
    return base_pj / (base_pj + MAC_PJ["fp32"] * more_macs - ADD_PJ["fp32"] * fewer_accumulates)


@dataclass(frozen=True)
class Neurons:
    """A layer of neurons, counted behind its pooling."""

    name: str
    neurons: int
    spikes: float
    """Of one sample, over all steps."""
    rate: float
    """Mean spikes per neuron and step."""


@dataclass(frozen=True)
class Synapses:
    """A convolution or linear layer."""

    name: str
    operations: int
    """Multiply-accumulates of one step if no input were zero."""
    activity: float
    """Share of the inputs that are not zero."""
    macs: float
    """Of one sample: of the first synapses, and of those whose inputs are not binary."""
    accumulates: float
    """Of one sample: additions, where all inputs are spikes."""


@dataclass(frozen=True)
class SpikeReport:
    """What :func:`spike_report` measured, for one sample."""

    layers: tuple[Neurons, ...]
    synapses: tuple[Synapses, ...]
    steps: int
    samples: int
    """So many were measured."""
    gate_macs: float
    """Making the gates as the paper counts it: one pass of each MLP, counted at every step."""
    gate_macs_strict: float
    """The second pass, for the maxima, and every multiplication by a gate as well."""
    gate_additions: float
    """One for each element of each mean; part of the strict count."""

    @property
    def neurons(self) -> int:
        """Of all layers that spike."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def spikes(self) -> float:
        """Of one sample."""
        return sum(layer.spikes for layer in self.layers)

    @property
    def nasar(self) -> float:
        """Network average spiking activity rate: spikes per neuron and step."""
        return self.spikes / (self.neurons * self.steps)

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the synapses."""
        return sum(each.macs for each in self.synapses)

    @property
    def accumulates(self) -> float:
        """Additions of the synapses."""
        return sum(each.accumulates for each in self.synapses)

    @property
    def operations(self) -> Operations:
        """What the ledger counts: synapses and gates, these strictly."""
        macs, accumulates = self.macs + self.gate_macs_strict, self.accumulates + self.gate_additions
        return Operations(round(macs), round(accumulates), RULE)

    def energy_pj(self, strict: bool = False) -> float:
        """Picojoules, estimated, gates included as the paper counts them or strictly."""
        macs = self.macs + (self.gate_macs_strict if strict else self.gate_macs)
        additions = self.accumulates + (self.gate_additions if strict else 0)
        return MAC_PJ["fp32"] * macs + ADD_PJ["fp32"] * additions

    def r_ee(self, baseline: SpikeReport, strict: bool = False) -> float:
        """How many times less energy than ``baseline``, the network without attention on the same data."""
        more = self.gate_macs_strict if strict else self.gate_macs
        added = self.gate_additions if strict else 0
        return efficiency_ratio(
            baseline.energy_pj(strict),
            self.macs - baseline.macs + more,
            baseline.accumulates - self.accumulates - added,
        )

    @property
    def remarks(self) -> list[str]:
        """Layers that hardly ever fire, or nearly always."""
        return [
            f"{layer.name} fires in {layer.rate:.3%} of its steps: "
            + (
                "no gradient passes where nothing comes near the threshold"
                if layer.rate < QUIET
                else "little is saved by spikes that are this many"
            )
            for layer in self.layers
            if not QUIET <= layer.rate <= BUSY
        ]

    def __str__(self) -> str:
        """A table for people, and what the estimate leaves out."""
        lines = [
            f"{self.spikes:,.0f} spikes of {self.neurons:,} neurons in {self.steps} steps: NASAR {self.nasar:.4f}",
            *(f"  {layer.name:<24}{layer.neurons:>10,} neurons, rate {layer.rate:.4f}" for layer in self.layers),
            f"{self.macs:,.0f} MACs and {self.accumulates:,.0f} additions in synapses; gates: {self.gate_macs:,.0f} "
            f"MACs as the paper counts, strictly {self.gate_macs_strict:,.0f} and {self.gate_additions:,.0f} additions",
            f"est. {self.energy_pj() / 1e6:,.3f} µJ, strictly {self.energy_pj(True) / 1e6:,.3f} µJ",
            *self.remarks,
            CAVEATS,
        ]
        return "\n".join(lines)


def spike_report(model: nn.Module, data: Any) -> SpikeReport:
    """Measure a spiking network in evaluation mode.

    Args:
        model: a network of these layers, such as :class:`~sparing.models.spiking.gesture.GestureSNN`; stays as it is.
        data: its inputs (N, T, C, H, W) as a tensor or array, or an iterable of such batches, or of tuples that begin
            with one.

    Raises :class:`InvalidValue` for a network without spiking neurons, :class:`DataError` for no data.
    """
    counter = _Counter(model)
    modes = {module: module.training for module in model.modules()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    try:
        with torch.no_grad(), counter.watching():
            for batch in _batches(data):
                counter.samples += len(batch)
                model(batch.to(device))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return counter.report()


def operations_of(model: nn.Module, data: Any) -> Operations:
    """What the ledger counts of a spiking network: operations of one sample at the rates of ``data``, gates strictly.

    Args:
        model: see :func:`spike_report`.
        data: see :func:`spike_report`.
    """
    return spike_report(model, data).operations


def _batches(data: Any) -> Iterator[Tensor]:
    pieces: Iterable[Any] = (data,) if isinstance(data, Tensor | np.ndarray) else data
    for piece in pieces:
        yield torch.as_tensor(piece[0] if isinstance(piece, tuple | list) else piece)


class _Counter:
    """Sums over forward passes."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.samples = model, 0
        self.spikes: dict[str, float] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.active: dict[str, list[float]] = {}
        self.gates = [0.0, 0.0, 0.0]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count what passes through the network's modules inside."""
        handles, within = [], set[nn.Module]()
        for name, module in self.model.named_modules():
            hook: Any = None
            if isinstance(module, ConvAttLIF | LinearAttLIF):
                within.add(module.lif)
                hook = self._neurons(name, module.lif.cell)
            elif isinstance(module, LIF) and module not in within:
                hook = self._neurons(name or "lif", module.cell)
            elif isinstance(module, nn.Conv2d | nn.Linear):
                hook = self._synapses(name)
            elif isinstance(module, TemporalAttention | ChannelAttention | SpatialAttention):
                hook = self._gate
            if hook is not None:
                handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _neurons(self, name: str, cell: Cell) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            fired = output >= (cell.v_th if cell.mode == "mem" and not cell.threshold_relu else 1e-38)
            self.spikes[name] = self.spikes.get(name, 0.0) + float(fired.sum())
            self.sizes[name] = output[0, 0].numel(), output.shape[1]

        return hook

    def _synapses(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            if x.ndim == 5:  # all steps, merged inside
                x, output = x.flatten(0, 1), output.flatten(0, 1)
            places = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
            active = int(x.count_nonzero())
            binary = active == int((x == 1).sum())
            sums = self.active.setdefault(name, [module.weight.numel() * places, 0.0, 0.0, 0.0, 1.0])
            sums[1] += active
            sums[2] += x.numel()
            sums[3] += len(x)
            sums[4] *= binary

        return hook

    def _gate(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        if isinstance(module, SpatialAttention):
            making = again = module.conv.weight.numel() * x.shape[-2] * x.shape[-1]
        else:
            inner = module.sharedMLP[0].weight
            times = 1 if isinstance(module, TemporalAttention) else x.shape[1]
            making = times * 2 * inner.numel()
            again = 2 * making
        for place, count in enumerate((making, again + x[0].numel(), x[0].numel())):
            self.gates[place] += count * len(x)

    def report(self) -> SpikeReport:
        """Of one sample."""
        if not self.samples:
            raise DataError("spike_report: no sample to measure; at least one is expected")
        if not self.spikes:
            raise InvalidValue(f"spike_report: {type(self.model).__name__} has no layer of spiking neurons")
        n = self.samples
        layers = []
        for name, total in self.spikes.items():
            neurons, steps = self.sizes[name]
            layers.append(Neurons(name, neurons, total / n, total / (n * neurons * steps)))
        synapses: list[Synapses] = []
        for name, (operations, active, seen, rows, binary) in self.active.items():
            counted = operations * active / seen * rows / n
            real = not synapses or not binary
            synapses.append(
                Synapses(name, int(operations), active / seen, counted if real else 0.0, 0.0 if real else counted)
            )
        making, strict, additions = (total / n for total in self.gates)
        steps = max(steps for _, steps in self.sizes.values())
        return SpikeReport(tuple(layers), tuple(synapses), steps, n, making, strict, additions)
