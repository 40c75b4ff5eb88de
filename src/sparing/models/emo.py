"""EMO: image backbones of 1–6 M parameters made of one block, the inverted residual mobile block.

Source: J. Zhang et al., "Rethinking Mobile Block for Efficient Attention-based Models", ICCV 2023, arXiv 2301.01146.
The block (section 3.2 there) joins MobileNetV2's inverted residual with window attention: expand, mix positions by
attention and a depth-wise convolution, shrink, add. Queries and keys live in the narrow width; only values are
expanded, so a wider block pays nothing for its attention matrix.

Modules are named as in the published checkpoints. No activation works in place, and only the batch is free when a
model is traced: windows are cut for the height and width at hand.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.convnet import whole
from sparing.models.surgery import fill

EPS = 1e-6
"""Of batch norm and layer norm."""
ACTIVATIONS = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}
NORMS = ("bn_2d", "ln_2d")
Mode = Literal["strided", "contiguous"]

_COMMON: dict[str, Any] = {
    "stem_dim": 24,
    "stem_stride": 2,
    "norm_layers": ("bn_2d", "bn_2d", "ln_2d", "ln_2d"),
    "act_layers": ("silu", "silu", "gelu", "gelu"),
    "dw_kss": (3, 3, 5, 5),
    "se_ratios": (0.0, 0.0, 0.0, 0.0),
    "window_sizes": (7, 7, 7, 7),
    "attn_ss": (False, False, True, True),
}
_TINY: dict[str, Any] = {
    **_COMMON,
    "depths": (1, 1, 3, 2),
    "stem_dim": 16,
    "stem_stride": 1,
    "embed_dims": (16, 24, 40, 64),
    "exp_ratios": (2.0, 2.5, 3.0, 3.5),
    "dim_heads": (8, 8, 10, 16),
    "drop_path": 0.02,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "1M": {
        **_COMMON,
        "depths": (2, 2, 8, 3),
        "embed_dims": (32, 48, 80, 168),
        "exp_ratios": (2.0, 2.5, 3.0, 3.5),
        "dim_heads": (16, 16, 20, 21),
        "drop_path": 0.04036,
    },
    "2M": {
        **_COMMON,
        "depths": (3, 3, 9, 3),
        "embed_dims": (32, 48, 120, 200),
        "exp_ratios": (2.0, 2.5, 3.0, 3.5),
        "dim_heads": (16, 16, 20, 20),
        "drop_path": 0.05,
    },
    "5M": {
        **_COMMON,
        "depths": (3, 3, 9, 3),
        "embed_dims": (48, 72, 160, 288),
        "exp_ratios": (2.0, 3.0, 4.0, 4.0),
        "dim_heads": (24, 24, 32, 32),
        "drop_path": 0.05,
    },
    "6M": {
        **_COMMON,
        "depths": (3, 3, 9, 3),
        "embed_dims": (48, 72, 160, 320),
        "exp_ratios": (2.0, 3.0, 4.0, 5.0),
        "dim_heads": (16, 24, 20, 32),
        "drop_path": 0.05,
    },
    "0.14M": {**_TINY, "window_sizes": (8, 8, 8, 4)},
    "0.14M-32px": {**_TINY, "window_sizes": (8, 8, 4, 2)},
}
"""Variant → constructor keywords. The four published ones (table 3 of the paper), and our two small ones: "0.14M" for
images of 64 pixels and "0.14M-32px" for 28 to 32, whose windows are the whole maps of stages 3 and 4."""


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of each pixel.

    Shapes: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, channels: int, eps: float = EPS) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """(B, C, H, W) → the same, each pixel's channels with mean 0 and variance 1 before gain and bias."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SqueezeExcite(nn.Module):
    """Channels weighted by a sigmoid of the image's mean (Hu et al. 2018, arXiv 1709.01507).

    Mean over positions → 1×1 convolution to ``round(channels · ratio)`` → activation → 1×1 convolution → sigmoid.

    Shapes: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, channels: int, ratio: float, act_layer: str = "silu") -> None:
        super().__init__()
        reduced = round(channels * ratio)
        if reduced < 1:
            raise InvalidValue(f"squeeze-excite: {channels} channels times se_ratio = {ratio!r} leave no channel")
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.act = _activation(act_layer)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """(B, C, H, W) → the same, scaled channel by channel."""
        weights = self.conv_expand(self.act(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * weights.sigmoid()


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's residual branch is left out with probability ``rate``.

    The samples that keep theirs have it divided by ``1 − rate``, so that its mean stays (Huang et al. 2016,
    arXiv 1603.09382).

    Shapes: (B, …) → (B, …).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        _share("drop_path", rate)
        self.rate = rate

    def forward(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """(B, …) → the same; some samples all zero in training."""
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty((len(x), *(1,) * (x.ndim - 1))).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:g}"


@dataclass(frozen=True)
class Windows:
    """How a map of ``height`` × ``width`` pixels is cut into windows of ``size`` × ``size``.

    A size of 0 or less is one window, the whole map. Otherwise the map is padded with zeros at the right and at the
    bottom to multiples of the size: n1 × n2 windows. "strided": pixel (r, c) goes to window (r mod n1, c mod n2), at
    (r div n1, c div n2) in it, so that each window sees the whole map in coarse steps. "contiguous": to window
    (r div size, c div size), at (r mod size, c mod size).
    """

    height: int
    width: int
    size: int
    mode: Mode = "strided"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one window."""
        return (self.size, self.size) if self.size > 0 else (self.height, self.width)

    @property
    def number(self) -> tuple[int, int]:
        """(n1, n2) windows down and across."""
        rows, columns = self.shape
        return -(-self.height // rows), -(-self.width // columns)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows added below and columns added at the right."""
        (rows, columns), (n1, n2) = self.shape, self.number
        return rows * n1 - self.height, columns * n2 - self.width

    @property
    def _axes(self) -> tuple[list[int], list[int], list[int]]:
        """(sizes into which H and W are split, order windows-first, the way back), over (B, heads, C, …)."""
        (rows, columns), (n1, n2) = self.shape, self.number
        if self.mode == "strided":
            return [rows, n1, columns, n2], [0, 4, 6, 1, 2, 3, 5], [0, 3, 4, 5, 1, 6, 2]
        return [n1, rows, n2, columns], [0, 3, 5, 1, 2, 4, 6], [0, 3, 4, 1, 5, 2, 6]

    def pad(self, x: Float[Tensor, "b c h w"], value: float = 0.0) -> Float[Tensor, "b c padded_h padded_w"]:
        """(B, C, H, W) → (B, C, H', W')."""
        below, right = self.padding
        return nn.functional.pad(x, (0, right, 0, below), value=value) if below or right else x

    def crop(self, x: Float[Tensor, "b c padded_h padded_w"]) -> Float[Tensor, "b c h w"]:
        """(B, C, H', W') → (B, C, H, W)."""
        return x[:, :, : self.height, : self.width] if any(self.padding) else x

    def split(self, x: Float[Tensor, "b channels padded_h padded_w"], heads: int) -> Float[Tensor, "bn heads c l"]:
        """(B, heads·C, H', W') → (B·n1·n2, heads, C, rows·columns)."""
        channels = int(x.shape[1]) // heads
        if self.number != (1, 1):
            sizes, order, _ = self._axes
            x = x.reshape(-1, heads, channels, *sizes).permute(order)
        return x.reshape(-1, heads, channels, math.prod(self.shape))

    def join(self, windows: Float[Tensor, "bn heads c l"]) -> Float[Tensor, "b channels padded_h padded_w"]:
        """The way back from :meth:`split`."""
        heads, channels = int(windows.shape[1]), int(windows.shape[2])
        (rows, columns), (n1, n2) = self.shape, self.number
        if self.number != (1, 1):
            windows = windows.reshape(-1, n1, n2, heads, channels, rows, columns).permute(self._axes[2])
        return windows.reshape(-1, heads * channels, rows * n1, columns * n2)


def window_index(height: int, width: int, size: int, mode: Mode = "strided") -> Int[Tensor, "n rows columns"]:
    """Which pixel (row-major number, −1 for padding) sits where in which window (row-major), see :class:`Windows`."""
    whole("window_index", height=height, width=width)
    windows = Windows(height, width, _window(size), _mode(mode))
    numbers = torch.arange(height * width, dtype=torch.float64).view(1, 1, height, width)
    return windows.split(windows.pad(numbers, -1), 1).view(-1, *windows.shape).long()


def window_attention(
    windows: Windows,
    qk: Float[Tensor, "b two_c padded_h padded_w"],
    v: Float[Tensor, "b channels padded_h padded_w"],
    heads: int,
    *,
    attn_drop: nn.Module | None = None,
    pad_mask: bool = False,
) -> Float[Tensor, "b channels padded_h padded_w"]:
    """Multi-head attention inside each window: softmax(q kᵀ / √d) v, with d channels of q and k in each head.

    ``qk`` (B, 2C, H', W') holds the queries and then the keys, each of them head by head; ``v`` any number of channels
    that ``heads`` divides. Padded pixels take part as keys, unless ``pad_mask`` gives them a weight of zero.
    """
    # sizes are constants where a graph is traced, so that no shape is worked out when it runs
    q, k = (windows.split(part, heads) for part in qk.split(int(qk.shape[1]) // 2, dim=1))
    scores = (q * int(q.shape[2]) ** -0.5).transpose(2, 3) @ k
    if pad_mask and any(windows.padding):
        real = windows.pad(qk.new_ones((1, 1, windows.height, windows.width)))
        padded = windows.split(real, 1)[:, :, 0, None] == 0  # (n1·n2, 1, 1, l)
        length = math.prod(windows.shape)
        of_each_image = scores.reshape(-1, math.prod(windows.number), heads, length, length)
        scores = of_each_image.masked_fill(padded, -math.inf).reshape(-1, heads, length, length)
    weights = scores.softmax(-1)
    if attn_drop is not None:
        weights = attn_drop(weights)
    return windows.join(windows.split(v, heads) @ weights.transpose(2, 3))


class WindowAttention2d(nn.Module):
    """Multi-head self-attention inside windows of a feature map, without a value projection.

    Shapes: (B, dim, H, W) → (B, dim, H, W); with values v (B, C, H, W) → (B, C, H, W).

    Args:
        dim: channels.
        dim_head: channels of q and k in each head; must divide ``dim``.
        window_size: side of a window in pixels; 0 or less: the whole map.
        mode: "strided" (each window spans the map; the published models) or "contiguous" (tiles). See
            :class:`Windows`.
        pad_mask: give the pixels that pad the map to whole windows no attention. The published models do not.
        qkv_bias: whether the projection to q and k has a bias.
        attn_drop: dropout on the attention weights.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int,
        window_size: int = 7,
        mode: Mode = "strided",
        pad_mask: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.heads = _heads("WindowAttention2d: dim", dim, dim_head)
        self.dim, self.window_size, self.mode, self.pad_mask = dim, _window(window_size), _mode(mode), pad_mask
        self.qk = _named(conv=nn.Conv2d(dim, 2 * dim, 1, bias=qkv_bias))
        self.attn_drop = _dropout("attn_drop", attn_drop)

    def forward(self, x: Float[Tensor, "..."], v: Float[Tensor, "..."] | None = None) -> Float[Tensor, "b c h w"]:
        """(B, dim, H, W), and values (B, C, H, W) or ``x`` itself → (B, C, H, W)."""
        _map("WindowAttention2d", x, self.dim)
        v = x if v is None else v
        if v.ndim != 4 or v.shape[0] != x.shape[0] or v.shape[2:] != x.shape[2:] or v.shape[1] % self.heads:
            raise InvalidValue(
                f"WindowAttention2d: values of shape {tuple(v.shape)} beside an input of {tuple(x.shape)}; the same "
                f"batch, height and width, and channels that {self.heads} heads divide, are expected"
            )
        windows = Windows(int(x.shape[2]), int(x.shape[3]), self.window_size, self.mode)
        qk = self.qk(windows.pad(x))
        mixed = window_attention(
            windows, qk, windows.pad(v), self.heads, attn_drop=self.attn_drop, pad_mask=self.pad_mask
        )
        return windows.crop(mixed)


class InvertedResidualMobileBlock(nn.Module):
    """EMO's block: expand, mix positions by window attention and a depth-wise convolution, shrink, add.

    Norm → attention with values expanded to ``mid = int(dim_in · exp_ratio)`` channels → depth-wise convolution, batch
    norm, SiLU (and squeeze-excite), added to its input → 1×1 convolution to ``dim_out`` → added to the block's input.
    Both additions only where the shape allows and ``has_skip``.

    Shapes: (B, dim_in, H, W) → (B, dim_out, ceil(H / stride), ceil(W / stride)).

    Args:
        dim_in: channels of the input.
        dim_out: channels of the output.
        norm_in: whether the block begins with a norm.
        has_skip: whether input is added to output where ``dim_in == dim_out`` and ``stride == 1``.
        exp_ratio: width inside the block over ``dim_in``.
        norm_layer: "bn_2d" (batch norm) or "ln_2d" (layer norm over channels).
        act_layer: "silu", "gelu" (exact) or "relu": after the value projection and in squeeze-excite.
        v_proj: whether a block without attention expands by a 1×1 convolution; one without needs ``exp_ratio`` 1.
        dw_ks: kernel of the depth-wise convolution, odd.
        stride: of the depth-wise convolution.
        dilation: of the depth-wise convolution.
        se_ratio: reduction of squeeze-excite; 0 leaves it out.
        dim_head: channels of q and k in each head; must divide ``dim_in`` when there is attention.
        window_size: side of an attention window; 0 or less: the whole map.
        attn_s: whether there is attention.
        qkv_bias: whether the projections to q, k and v have a bias.
        attn_drop: dropout on the attention weights.
        drop: dropout before the last convolution.
        drop_path: see :class:`DropPath`.
        v_group: value projection with one group for each head.
        attn_pre: attend over the input and then project to the values (all published models), instead of attending
            over projected values. Another function, not another speed: weights of one do not fit the other.
        window_mode: "strided" (the published models) or "contiguous", see :class:`Windows`.
        pad_mask: give pixels that pad the map to whole windows no attention (the published models do not).
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        norm_in: bool = True,
        has_skip: bool = True,
        exp_ratio: float = 1.0,
        norm_layer: str = "bn_2d",
        act_layer: str = "silu",
        v_proj: bool = True,
        dw_ks: int = 3,
        stride: int = 1,
        dilation: int = 1,
        se_ratio: float = 0.0,
        dim_head: int = 64,
        window_size: int = 7,
        attn_s: bool = True,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        v_group: bool = False,
        attn_pre: bool = False,
        window_mode: Mode = "strided",
        pad_mask: bool = False,
    ) -> None:
        super().__init__()
        whole("iRMB", dim_in=dim_in, dim_out=dim_out, dw_ks=dw_ks, stride=stride, dilation=dilation)
        if dw_ks % 2 == 0:
            raise InvalidValue(f"iRMB: dw_ks = {dw_ks}; an odd kernel is expected")
        if not exp_ratio > 0 or (mid := int(dim_in * exp_ratio)) < 1:
            raise InvalidValue(f"iRMB: exp_ratio = {exp_ratio!r} leaves no channel of {dim_in}")
        if se_ratio < 0:
            raise InvalidValue(f"iRMB: se_ratio = {se_ratio!r}; 0 or more is expected")
        self.dim_in, self.attn_pre, self.pad_mask = dim_in, attn_pre, pad_mask
        self.skip = has_skip and dim_in == dim_out and stride == 1
        self.window_size, self.window_mode = _window(window_size), _mode(window_mode)
        self.heads = _heads("iRMB: dim_in", dim_in, dim_head) if attn_s else 0
        if attn_s and (v_group or not attn_pre) and mid % self.heads:
            raise InvalidValue(
                f"iRMB: {mid} value channels (dim_in {dim_in} times exp_ratio {exp_ratio:g}) cannot be shared among "
                f"{self.heads} heads (dim_in {dim_in} by dim_head {dim_head})"
            )
        self.norm = _norm(norm_layer, dim_in) if norm_in else nn.Identity()
        if attn_s:
            self.qk = _named(conv=nn.Conv2d(dim_in, 2 * dim_in, 1, bias=qkv_bias))
            self.attn_drop = _dropout("attn_drop", attn_drop)
        self.v: nn.Module
        if attn_s or v_proj:
            groups = self.heads if v_group and attn_s else 1
            self.v = _named(conv=nn.Conv2d(dim_in, mid, 1, groups=groups, bias=qkv_bias), act=_activation(act_layer))
        elif mid != dim_in:
            raise InvalidValue(
                f"iRMB: without attention and v_proj, {dim_in} channels cannot become {mid}: exp_ratio 1"
            )
        else:
            _activation(act_layer)
            self.v = nn.Identity()
        padding = math.ceil((dilation * (dw_ks - 1) + 1 - stride) / 2)
        self.conv_local = _named(
            conv=nn.Conv2d(mid, mid, dw_ks, stride, padding, dilation, groups=mid, bias=False),
            norm=nn.BatchNorm2d(mid, EPS),
            act=nn.SiLU(),
        )
        self.se = SqueezeExcite(mid, se_ratio, act_layer) if se_ratio > 0 else nn.Identity()
        self.drop = _dropout("drop", drop)
        self.proj = _named(conv=nn.Conv2d(mid, dim_out, 1, bias=False))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "b dim_out h_out w_out"]:
        """(B, dim_in, H, W) → (B, dim_out, ceil(H / stride), ceil(W / stride))."""
        _map("iRMB", x, self.dim_in)
        expanded = self.norm(x)
        expanded = self._attend(expanded) if self.heads else self.v(expanded)
        local = self.se(self.conv_local(expanded))
        local = self.proj(self.drop(expanded + local if self.skip else local))
        return x + self.drop_path(local) if self.skip else local

    def _attend(self, x: Tensor) -> Tensor:
        """Expanded-window attention (section 3.2): (B, dim_in, H, W) → (B, mid, H, W)."""
        windows = Windows(int(x.shape[2]), int(x.shape[3]), self.window_size, self.window_mode)
        x = windows.pad(x)
        qk, v = self.qk(x), x if self.attn_pre else self.v(x)
        mixed = window_attention(windows, qk, v, self.heads, attn_drop=self.attn_drop, pad_mask=self.pad_mask)
        mixed = _channels_last(mixed)
        return windows.crop(self.v(mixed) if self.attn_pre else mixed)


iRMB = InvertedResidualMobileBlock  # noqa: N816 - the paper's own name


class Stem(nn.Module):
    """A 3×3 convolution with bias and a batch norm.

    Shapes: (B, in_channels, H, W) → (B, width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(in_channels, width, 3, stride, padding=1)
        self.convs = nn.ModuleList([nn.Sequential(convolution, nn.BatchNorm2d(width, EPS))])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b width h_out w_out"]:
        """(B, in_channels, H, W) → (B, width, …)."""
        return _channels_last(self.convs[0](_channels_last(x)))


class EMO(nn.Module):
    """EMO image backbone: five stages of inverted residual mobile blocks, then a linear layer (Zhang et al. 2023).

    Stage 0 is a convolution and a block without attention; each of stages 1–4 halves the resolution in its first block
    and attends, where ``attn_ss`` says so, in the others. Then layer norm, mean over positions and a linear layer.

    Shapes: (N, in_channels, H, W) → logits (N, num_classes); with ``features_only`` → the list of the outputs of stages
    1–4, at strides 2, 4, 8 and 16 times ``stem_stride``. H and W: at least 16 times ``stem_stride``.

    Args:
        variant: "1M", "2M", "5M" or "6M" (published, for 224 pixels), "0.14M" (for 64 pixels), "0.14M-32px" (for 28 to
            32). It decides all fields below that are None.
        num_classes: number of logits.
        in_channels: channels of an image (``in_chans`` in some code bases).
        drop_path: largest rate of stochastic depth; blocks of stages 1–4 get evenly spaced rates from 0 to it.
        image_size: height and width of the images to come, if known: what cannot work is refused at once, and windows
            that do not fit are told. The model itself works at any size.
        features_only: a feature pyramid instead of a classifier; there is no head then.
        depths: blocks in each of stages 1–4.
        stem_dim: channels of stage 0.
        stem_stride: stride of the first convolution, 1 or 2.
        embed_dims: channels of each stage.
        exp_ratios: expansion of each stage's blocks; its first block expands twice as much.
        norm_layers: "bn_2d" or "ln_2d" for each stage.
        act_layers: "silu", "gelu" or "relu" for each stage.
        dw_kss: kernel of the depth-wise convolutions of each stage.
        se_ratios: squeeze-excite's reduction in each stage; 0 leaves it out.
        dim_heads: channels of an attention head in each stage.
        window_sizes: side of an attention window in each stage; 0 or less: the whole map.
        attn_ss: whether each stage attends.
        qkv_bias: whether projections to q, k and v have a bias.
        attn_drop: dropout on attention weights.
        drop: dropout before each block's last convolution.
        v_group: value projections with one group for each head.
        attn_pre: attend before the values are projected (published), or after. Not to be changed on trained weights.
        pre_dim: width of a hidden layer before the logits; 0 leaves it out.
        pad_mask: keep attention off the pixels that pad maps to whole windows. Published weights were trained without.
        window_mode: "strided" (published) or "contiguous".

    A map whose height or width is no multiple of its window is padded: more computation, and attention to pixels that
    are not there unless ``pad_mask``. A warning says so, once for each size.
    """

    def __init__(
        self,
        variant: str = "1M",
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_path: float | None = None,
        image_size: int | None = None,
        *,
        features_only: bool = False,
        depths: Sequence[int] | None = None,
        stem_dim: int | None = None,
        stem_stride: int | None = None,
        embed_dims: Sequence[int] | None = None,
        exp_ratios: Sequence[float] | None = None,
        norm_layers: Sequence[str] | None = None,
        act_layers: Sequence[str] | None = None,
        dw_kss: Sequence[int] | None = None,
        se_ratios: Sequence[float] | None = None,
        dim_heads: Sequence[int] | None = None,
        window_sizes: Sequence[int] | None = None,
        attn_ss: Sequence[bool] | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        v_group: bool = False,
        attn_pre: bool = True,
        pre_dim: int = 0,
        pad_mask: bool = False,
        window_mode: Mode = "strided",
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise InvalidValue(f"emo: variant = {variant!r}; one of {', '.join(map(repr, VARIANTS))} is expected")
        whole("emo", num_classes=num_classes, in_channels=in_channels)
        whole("emo", at_least=0, pre_dim=pre_dim)
        given = {
            "depths": depths,
            "stem_dim": stem_dim,
            "stem_stride": stem_stride,
            "embed_dims": embed_dims,
            "exp_ratios": exp_ratios,
            "norm_layers": norm_layers,
            "act_layers": act_layers,
            "dw_kss": dw_kss,
            "se_ratios": se_ratios,
            "dim_heads": dim_heads,
            "window_sizes": window_sizes,
            "attn_ss": attn_ss,
            "drop_path": drop_path,
        }
        chosen = {**VARIANTS[variant], **{name: value for name, value in given.items() if value is not None}}
        for name, value in chosen.items():
            if isinstance(VARIANTS[variant][name], tuple) and (isinstance(value, str) or len(value) != 4):
                raise InvalidValue(f"emo: {name} = {value!r}; one entry for each of stages 1–4 is expected")
        whole("emo", stem_dim=chosen["stem_dim"], **{f"depths[{i}]": depth for i, depth in enumerate(chosen["depths"])})
        if chosen["stem_stride"] not in (1, 2):
            raise InvalidValue(f"emo: stem_stride = {chosen['stem_stride']!r}; 1 or 2 is expected")
        for name, rate in (("drop_path", chosen["drop_path"]), ("attn_drop", attn_drop), ("drop", drop)):
            _share(name, rate)
        self.in_channels, self.features_only, self.pad_mask = in_channels, features_only, pad_mask
        self.smallest = 16 * chosen["stem_stride"]
        self.embed_dims = tuple(chosen["embed_dims"])
        self._absent: tuple[str, ...] = ()
        shared: dict[str, Any] = {
            "qkv_bias": qkv_bias,
            "attn_drop": attn_drop,
            "drop": drop,
            "v_group": v_group,
            "attn_pre": attn_pre,
            "pad_mask": pad_mask,
            "window_mode": _mode(window_mode),
        }
        width = chosen["stem_dim"]
        self.stage0 = nn.Sequential(
            Stem(in_channels, width, chosen["stem_stride"]),
            InvertedResidualMobileBlock(
                width,
                width,
                norm_in=False,
                has_skip=False,
                v_proj=False,
                attn_s=False,
                act_layer=chosen["act_layers"][0],
                dw_ks=chosen["dw_kss"][0],
                se_ratio=1,
            ),
        )
        rates = iter(np.linspace(0, chosen["drop_path"], sum(chosen["depths"])).tolist())
        self._windows: list[int | None] = []
        for stage in range(4):
            blocks = []
            attends = bool(chosen["attn_ss"][stage])
            expansion = chosen["exp_ratios"][stage]
            for block in range(chosen["depths"][stage]):
                first = block == 0
                blocks.append(
                    InvertedResidualMobileBlock(
                        width,
                        chosen["embed_dims"][stage],
                        has_skip=not first,
                        exp_ratio=2 * expansion if first else expansion,
                        norm_layer=chosen["norm_layers"][stage],
                        act_layer=chosen["act_layers"][stage],
                        dw_ks=chosen["dw_kss"][stage],
                        stride=2 if first else 1,
                        se_ratio=chosen["se_ratios"][stage],
                        dim_head=chosen["dim_heads"][stage],
                        window_size=chosen["window_sizes"][stage],
                        attn_s=attends and not first,
                        drop_path=next(rates),
                        **shared,
                    )
                )
                width = chosen["embed_dims"][stage]
            self._windows.append(chosen["window_sizes"][stage] if attends and len(blocks) > 1 else None)
            setattr(self, f"stage{stage + 1}", nn.Sequential(*blocks))
        hidden = (nn.Linear(width, pre_dim), _activation(chosen["act_layers"][3])) if pre_dim else ()
        self.norm = None if features_only else _norm(chosen["norm_layers"][3], width)
        self.pre_head = nn.Sequential() if features_only else nn.Sequential(*hidden)
        self.head = None if features_only else nn.Linear(pre_dim or width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self._told: set[tuple[int, int]] = set()
        if image_size is not None:
            whole("emo", image_size=image_size)
            self._check_size(image_size, image_size)

    def forward_features(self, images: Float[Tensor, "..."]) -> list[Float[Tensor, "n c h w"]]:
        """(N, in_channels, H, W) → [c1, c2, c3, c4], the outputs of stages 1–4, as the blocks leave them."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise InvalidValue(
                f"emo: an input of shape {tuple(images.shape)}; (N, {self.in_channels}, H, W) is expected"
            )
        self._check_size(int(images.shape[2]), int(images.shape[3]))
        x = self.stage0(images)
        features = []
        for stage in self._stages:
            x = stage(x)
            features.append(x)
        return features

    def forward(self, images: Float[Tensor, "..."]) -> Tensor | list[Tensor]:
        """(N, in_channels, H, W) → logits (N, num_classes), or with ``features_only`` [c1, c2, c3, c4]."""
        features = self.forward_features(images)
        if self.norm is None or self.head is None:
            return features
        return self.head(self.pre_head(self.norm(features[-1]).mean((2, 3))))

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """Copy a state dict into this model.

        A backbone (``features_only``) takes a classifier's: its ``norm.*`` and ``head.*`` are left out, and what
        belongs to stages that the backbone was told not to keep. Nothing else may be missing or too much. Raises
        :class:`InvalidValue` that lists every tensor that does not fit.
        """
        ignored = ("norm.", "head.", *self._absent) if self.features_only else ()
        fill(self, state, "emo", ignored)

    def keep_stages(self, count: int) -> None:
        """Leave out the stages of a backbone after the first ``count``, where nothing looks at them."""
        if not self.features_only or not 1 <= count <= len(self.embed_dims):
            raise InvalidValue(
                f"emo: keep_stages({count!r}); 1…{len(self.embed_dims)} is expected, of a network with features_only"
            )
        for stage in range(count + 1, len(self.embed_dims) + 1):
            delattr(self, f"stage{stage}")
            self._absent = (*self._absent, f"stage{stage}.")
        self.embed_dims, self._windows = self.embed_dims[:count], self._windows[:count]

    def no_weight_decay_names(self) -> list[str]:
        """Parameters that weight decay should leave alone: gains, biases and all others of one dimension."""
        return [name for name, p in self.named_parameters() if p.ndim <= 1 or name.endswith(".bias")]

    @property
    def drop_path_rates(self) -> list[float]:
        """Of the blocks of stages 1–4, in order."""
        return [block.drop_path.rate for stage in self._stages for block in stage]  # type: ignore[misc,union-attr]

    @property
    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self, f"stage{stage}") for stage in range(1, 1 + len(self.embed_dims))]

    def _check_size(self, height: int, width: int) -> None:
        """Refuse images that are too small; tell once of windows that do not fit."""
        if min(height, width) < self.smallest:
            raise InvalidValue(
                f"emo: images of {height} × {width} pixels; at least {self.smallest} × {self.smallest} are needed, "
                "as the model halves them down to a sixteenth of stage 0 (stem_stride 1 needs half of what 2 does)"
            )
        if (height, width) in self._told:
            return
        self._told.add((height, width))
        misfits = []
        for stage, size in enumerate(self._windows, 1):
            stride = self.smallest >> (4 - stage)
            shape = -(-height // stride), -(-width // stride)
            if size is not None and size > 0 and any(side % size for side in shape):
                misfits.append(f"stage {stage}'s map of {shape[0]} × {shape[1]} pixels into windows of {size}")
        if misfits:
            effect = (
                "more computation" if self.pad_mask else "more computation, and attention to padding (see pad_mask)"
            )
            warnings.warn(
                f"emo: images of {height} × {width} pixels are padded to fit {' and '.join(misfits)}: {effect}",
                stacklevel=3,
            )


def emo_1m(**fields: Any) -> EMO:
    """EMO-1M: 1.36 M parameters, 261 M multiply-accumulates at 224 pixels; ``fields`` of :class:`EMO`."""
    return EMO("1M", **fields)


def emo_2m(**fields: Any) -> EMO:
    """EMO-2M: 2.38 M parameters, 439 M multiply-accumulates at 224 pixels; ``fields`` of :class:`EMO`."""
    return EMO("2M", **fields)


def emo_5m(**fields: Any) -> EMO:
    """EMO-5M: 5.11 M parameters, 903 M multiply-accumulates at 224 pixels; ``fields`` of :class:`EMO`."""
    return EMO("5M", **fields)


def emo_6m(**fields: Any) -> EMO:
    """EMO-6M: 6.17 M parameters, 961 M multiply-accumulates at 224 pixels; ``fields`` of :class:`EMO`."""
    return EMO("6M", **fields)


def _channels_last(x: Tensor) -> Tensor:
    """The same numbers, a pixel's channels side by side: later layers keep to it, and are a quarter faster on a CPU."""
    return x if torch.jit.is_tracing() else x.contiguous(memory_format=torch.channels_last)


def _named(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise InvalidValue(f"emo: act_layer = {name!r}; one of {', '.join(map(repr, ACTIVATIONS))} is expected")
    return ACTIVATIONS[name]()


def _norm(name: str, channels: int) -> nn.Module:
    if name not in NORMS:
        raise InvalidValue(f"emo: norm_layer = {name!r}; one of {', '.join(map(repr, NORMS))} is expected")
    return nn.BatchNorm2d(channels, EPS) if name == "bn_2d" else LayerNorm2d(channels)


def _share(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise InvalidValue(f"emo: {name} = {value!r}; 0 ≤ {name} < 1 is expected")


def _dropout(name: str, rate: float) -> nn.Module:
    _share(name, rate)
    return nn.Dropout(rate) if rate else nn.Identity()


def _heads(what: str, dim: int, dim_head: int) -> int:
    whole(what.split(":")[0], dim=dim, dim_head=dim_head)
    if dim % dim_head:
        raise InvalidValue(f"{what} = {dim} cannot be divided into heads of dim_head = {dim_head} channels")
    return dim // dim_head


def _window(size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int):
        raise InvalidValue(
            f"window_size = {size!r}; a whole number of pixels is expected, or 0 or less for the whole map"
        )
    return max(0, size)


def _mode(mode: Mode) -> Mode:
    if mode not in ("strided", "contiguous"):
        raise InvalidValue(f'window_mode = {mode!r}; "strided" or "contiguous" is expected')
    return mode


def _map(what: str, x: Tensor, channels: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels:
        raise InvalidValue(f"{what}: an input of shape {tuple(x.shape)}; (B, {channels}, H, W) is expected")
