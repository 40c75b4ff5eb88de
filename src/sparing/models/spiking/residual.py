"""Residual spiking networks for images with membrane shortcuts and attention in each block (Yao et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sparing.core.errors import InvalidValue
from sparing.core.predictor.base import Operations
from sparing.models.convnet import each, whole
from sparing.models.spiking.attention import MultiDimAttention, letters
from sparing.models.spiking.layers import parted
from sparing.models.spiking.neurons import LIF
from sparing.models.spiking.report import operations_of

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 104: (3, 8, 32, 8)}
"""Depth → blocks of each stage."""
THRESHOLD = 0.5


def residual_lif() -> LIF:
    """The neurons of these networks: decay 0.25, threshold 0.5, strictly above it, reset to 0 without its gradient."""
    return LIF(0.25, THRESHOLD, 0.5, "hard", strict=True, detach_reset=True)


class SequenceConv2d(nn.Conv2d):
    """A bias-free convolution of every step: (B, T, C, H, W) → (B, T, D, H', W')."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=False)

    def forward(self, input: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d i j"]:
        """All steps at once."""
        merged = conv2d(input.flatten(0, 1), self.weight, None, self.stride, self.padding)
        return parted(merged, input)


class SequenceNorm(nn.Module):
    """Batch norm with statistics over batch, time and places, and a gain that begins at ``gain``."""

    def __init__(self, channels: int, gain: float) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        nn.init.constant_(self.bn.weight, gain)

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        """All steps at once."""
        return parted(self.bn(x.flatten(0, 1)), x)


class Gates(nn.Module):
    """Attention as a stage of a residual branch."""

    def __init__(self, attention: str, channels: int, r_c: int) -> None:
        super().__init__()
        self.attention = MultiDimAttention(attention, None, channels, r_c=r_c)

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t c h w"]:
        """The gated sequence."""
        return self.attention(x)


class MSBlock(nn.Module):
    """Neurons → convolution → norm → neurons → convolution → norm → gates, plus a shortcut of the membrane.

    No spike follows the sum ("Att-Res-SNN-1"). Where the shape changes, the shortcut is average pooling → convolution
    1×1 → norm.

    Shapes: (B, T, in_channels, H, W) → (B, T, out_channels, H//stride, W//stride).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: of the first convolution, and of the pooling in the shortcut.
        attention: "none", CA, SA or CSA.
        r_c: out_channels//r_c hidden units of the gate over channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, attention: str = "CSA", r_c: int = 8
    ) -> None:
        super().__init__()
        whole("MSBlock", in_channels=in_channels, out_channels=out_channels, stride=stride)
        branch: list[nn.Module] = [
            residual_lif(),
            SequenceConv2d(in_channels, out_channels, 3, stride, 1),
            SequenceNorm(out_channels, THRESHOLD),
            residual_lif(),
            SequenceConv2d(out_channels, out_channels, 3, 1, 1),
            SequenceNorm(out_channels, 0.2 * THRESHOLD),
        ]
        if letters("MSBlock", attention):
            branch.append(Gates(attention, out_channels, r_c))
        self.residual_function = nn.Sequential(*branch)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool3d((1, stride, stride)),
                SequenceConv2d(in_channels, out_channels, 1),
                SequenceNorm(out_channels, THRESHOLD),
            )

    def forward(self, x: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t d i j"]:
        """Membrane potentials of all steps → those behind the block."""
        return self.residual_function(x) + self.shortcut(x)


class MSResSNN(nn.Module):
    """Residual spiking network for images: a stem, four stages that each halve the image, linear layer on mean spikes.

    An image is shown T times. Weights of one T fit every other, so that training can begin with T = 1. Yao et al. 2023,
    arXiv:2209.13929, on the membrane shortcuts of Hu et al. 2021, arXiv:2112.08954; parameters are named as in the
    published code.

    Shapes: (N, in_channels, H, W), or (N, T, in_channels, H, W), H and W multiples of 32 → logits (N, num_classes).

    Args:
        depth: 18, 34 or 104.
        in_channels: channels of an image.
        num_classes: number of logits.
        attention: "none", CA, SA or CSA; over time there is none.
        T: how often an image is shown.
        r_c: channels//r_c hidden units of gates over channels.
        widths: channels of each of the four stages; the first also of the stem.
        blocks: blocks of each stage, instead of those of ``depth``.
        dropout: before the linear layer.
    """

    def __init__(
        self,
        depth: int = 18,
        in_channels: int = 3,
        num_classes: int = 1000,
        attention: str = "CSA",
        T: int = 1,
        r_c: int = 8,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] | None = None,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        name = "ms_res_snn"
        whole(name, in_channels=in_channels, num_classes=num_classes, T=T, r_c=r_c)
        if depth not in DEPTHS or isinstance(depth, bool):
            raise InvalidValue(f"{name}: depth = {depth!r}; one of {', '.join(map(str, DEPTHS))} is expected")
        if "T" in letters(name, attention):
            raise InvalidValue(f'{name}: attention = {attention!r}; "none", CA, SA or CSA is expected')
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise InvalidValue(f"{name}: dropout = {dropout!r}; a share in 0…1, below 1, is expected")
        widths = each(name, "widths", list(widths), 4)
        numbers = each(name, "blocks", list(DEPTHS[depth] if blocks is None else blocks), 4)
        self.in_channels, self.T = in_channels, T
        self.conv1 = nn.Sequential(SequenceConv2d(in_channels, widths[0], 7, 2, 3), SequenceNorm(widths[0], THRESHOLD))
        channels = widths[0]
        for stage, (width, number) in enumerate(zip(widths, numbers, strict=True), start=2):
            made = []
            for i in range(number):
                made.append(MSBlock(channels, width, 1 if i else 2, attention, r_c))
                channels = width
            self.add_module(f"conv{stage}_x", nn.Sequential(*made))
        self.lif = residual_lif()
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)

    def features(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n features"]:
        """Images → mean spikes over places and steps, what the linear layer sees."""
        x = images
        if x.ndim == 4:
            x = x.unsqueeze(1).expand(-1, self.T, -1, -1, -1)
        if x.ndim != 5 or x.shape[1] != self.T or x.shape[2] != self.in_channels or x.shape[3] % 32 or x.shape[4] % 32:
            raise InvalidValue(
                f"ms_res_snn: an input of shape {tuple(images.shape)}; (N, {self.in_channels}, H, W) or (N, {self.T}, "
                f"{self.in_channels}, H, W) with H and W multiples of 32 is expected"
            )
        x = self.conv1(x)
        for number in range(2, 6):
            x = self.get_submodule(f"conv{number}_x")(x)
        return self.lif(x).mean((3, 4)).mean(1)

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """Images → logits (N, num_classes)."""
        return self.fc(self.dropout(self.features(images)))

    def operations_of(self, batches: Any) -> Operations:
        """Operations of one sample at the firing rates of ``batches``."""
        return operations_of(self, batches)
