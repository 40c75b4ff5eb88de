"""Plain spiking networks for event frames: the networks for DVS128 Gesture and Gait of Yao et al. 2023."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.core.predictor.base import Operations
from sparing.models.convnet import each, whole
from sparing.models.spiking.attention import letters
from sparing.models.spiking.layers import ConvAttLIF, LinearAttLIF, Placement
from sparing.models.spiking.neurons import LIF, Mode, Reset
from sparing.models.spiking.report import operations_of


class GestureSNN(nn.Module):
    """Spiking network for event frames: convolutions, then linear layers, each with gates and neurons of its own.

    The last layer spikes, too; an output is a class's mean of spikes over the steps. The defaults are the "three-layer"
    network for DVS128 Gesture; the "five-layer" one has image_size 128, widths (32, 64, 128, 256, 512), pools
    (2, 2, 2, 2, 4). Yao et al. 2023, arXiv:2209.13929; parameters are named as in its published code.

    Shapes: (N, T, in_channels, image_size, image_size) → rates (N, num_classes) in 0…1 (with ``mode="mem"`` from 0 up).

    Args:
        in_channels: channels of a frame; 2 polarities.
        num_classes: number of outputs.
        image_size: height and width of a frame.
        T: steps of a sequence; gates over time tie the network to it.
        widths: channels of each convolution.
        pools: side of the average pooling behind each convolution.
        hidden: neurons of each linear layer but the last.
        attention: "none", TA, CA, SA, TCA, TSA, CSA or TCSA.
        placement: gates over channels and places act on the "input" of the neurons (the published code) or on their
            "membrane" at each step (the paper).
        r_t: T//r_t hidden units of gates over time.
        r_c: channels//r_c hidden units of gates over channels.
        alpha: what is left of a neuron's state from step to step.
        v_th: threshold of the neurons.
        lens: half the width of the surrogate's window.
        reset: "clamp" (the published code) or "hard" (the paper).
        mode: "spike" or "mem"; see :class:`~sparing.models.spiking.neurons.LIF`.
        threshold_relu: with "mem", send relu(u − v_th).
        relu: the ReLU behind gates on the input.
    """

    def __init__(
        self,
        in_channels: int = 2,
        num_classes: int = 11,
        image_size: int = 32,
        T: int = 60,
        widths: Sequence[int] = (64, 128, 128),
        pools: Sequence[int] = (1, 2, 2),
        hidden: Sequence[int] = (256,),
        attention: str = "TCSA",
        placement: Placement = "input",
        r_t: int = 5,
        r_c: int = 8,
        alpha: float = 0.3,
        v_th: float = 0.3,
        lens: float = 0.25,
        reset: Reset = "clamp",
        mode: Mode = "spike",
        threshold_relu: bool = False,
        relu: bool = True,
    ) -> None:
        super().__init__()
        name = "gesture_snn"
        whole(name, in_channels=in_channels, num_classes=num_classes, image_size=image_size, T=T, r_t=r_t, r_c=r_c)
        widths = each(name, "widths", list(widths), len(widths))
        pools = each(name, "pools", list(pools), len(widths))
        hidden = each(name, "hidden", list(hidden), len(hidden))
        if not widths:
            raise InvalidValue(f"{name}: widths is empty; at least one convolution is expected")
        if placement == "membrane" and letters(name, attention) == "T":
            raise InvalidValue(f'{name}: attention = "TA" with placement = "membrane" has nothing on the membrane')
        self.in_channels, self.num_classes, self.image_size, self.T = in_channels, num_classes, image_size, T

        def neuron() -> LIF:
            return LIF(alpha, v_th, lens, reset, mode, threshold_relu)

        channels, size = in_channels, image_size
        for i, (width, pool) in enumerate(zip(widths, pools, strict=True)):
            layer = ConvAttLIF(channels, width, pool, attention, T, placement, r_t, r_c, neuron(), relu)
            self.add_module(f"convAttLIF{i}", layer)
            channels, size = width, size // pool
            if size < 1:
                raise InvalidValue(f"{name}: pools = {pools} leave nothing of an image_size of {image_size}")
        features = channels * size * size
        for i, width in enumerate([*hidden, num_classes]):
            self.add_module(f"FC{i}", LinearAttLIF(features, width, attention, T, placement, r_t, neuron(), relu))
            features = width

    @property
    def layers(self) -> list[ConvAttLIF | LinearAttLIF]:
        """The layers in order."""
        return cast("list[ConvAttLIF | LinearAttLIF]", list(self.children()))

    @property
    def tied(self) -> bool:
        """Whether gates over time tie the network to its number of steps."""
        return any(layer.attention is not None and "T" in layer.attention.gates for layer in self.layers)

    def check_frames(self, shape: Sequence[int]) -> None:
        """Raise :class:`InvalidValue` for frames of one step, of a shape (N, C, H, W), that do not fit."""
        wanted = (self.in_channels, self.image_size, self.image_size)
        if len(shape) != 4 or tuple(shape[1:]) != wanted:
            raise InvalidValue(
                f"gesture_snn: frames of shape {tuple(shape)}; (N, {', '.join(map(str, wanted))}) of each step are "
                "expected"
            )

    def forward(self, frames: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Frames of all steps (N, T, C, H, W) → mean output over the steps (N, num_classes)."""
        if frames.ndim != 5:
            raise InvalidValue(f"gesture_snn: an input of shape {tuple(frames.shape)}; (N, T, C, H, W) is expected")
        self.check_frames((frames.shape[0], *frames.shape[2:]))
        if self.tied and frames.shape[1] != self.T:
            raise InvalidValue(f"gesture_snn: {frames.shape[1]} steps; T = {self.T}, as trained, is expected")
        x = frames
        for layer in self.layers:
            x = layer(flattened(layer, x, 2))
        return x.mean(1)

    def operations_of(self, batches: Any) -> Operations:
        """Operations of one sample at the firing rates of ``batches``."""
        return operations_of(self, batches)


def flattened(layer: nn.Module, x: Tensor, start: int) -> Tensor:
    """What the layer takes: all behind dimension ``start`` in one for a linear layer, in the order (C, H, W)."""
    return x.flatten(start) if isinstance(layer, LinearAttLIF) else x
