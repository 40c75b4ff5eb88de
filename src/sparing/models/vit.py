"""A plain columnar vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), small enough for small images.

The same width and number of tokens from the first block to the last, so any block can be put in another's place:
:class:`OnGrid` lets one that works on feature maps, such as EMO's, work on the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparing.core.errors import InvalidValue
from sparing.models.convnet import each, whole
from sparing.models.emo import DropPath, InvertedResidualMobileBlock

EPS = 1e-6
"""Of layer norm."""


class Attention(nn.Module):
    """Multi-head self-attention over tokens: softmax(q kᵀ / √d) v in each head, then a projection.

    Shapes: (B, N, dim) → (B, N, dim). A head has ``head_dim`` units, by default ``dim`` shared among the heads.
    """

    def __init__(self, dim: int, heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        whole("attention", dim=dim, heads=heads)
        if head_dim is None and dim % heads:
            raise InvalidValue(f"attention: dim = {dim} cannot be shared among heads = {heads}")
        inner = dim if head_dim is None else heads * head_dim
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * inner)
        self.proj = nn.Linear(inner, dim)

    def split(self, x: Float[Tensor, "b n dim"]) -> Float[Tensor, "3 b heads n head"]:
        """(B, N, dim) → queries, keys and values of each head (3, B, heads, N, units of a head)."""
        return self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Float[Tensor, "b n dim"]) -> Float[Tensor, "b n dim"]:
        """(B, N, dim) → (B, N, dim)."""
        q, k, v = self.split(x)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear layer to ``hidden`` units, exact GELU, linear layer back, for each token alone.

    Shapes: (B, N, dim) → (B, N, dim).
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n dim"]) -> Float[Tensor, "b n dim"]:
        """(B, N, dim) → (B, N, dim)."""
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: ``x += attn(norm1(x))``, then ``x += mlp(norm2(x))``.

    Shapes: (B, N, dim) → (B, N, dim).

    Args:
        dim: width of a token.
        heads: attention heads; must divide ``dim``.
        mlp_ratio: hidden units of the perceptron over ``dim``.
        drop_path: rate of stochastic depth, for each of the two branches.
        hidden: hidden units, in place of ``mlp_ratio``.
        head_dim: units of a head, where they are not ``dim`` shared among the heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        hidden: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, EPS)
        self.attn = Attention(dim, heads, head_dim)
        self.norm2 = nn.LayerNorm(dim, EPS)
        self.mlp = FeedForward(dim, int(dim * mlp_ratio) if hidden is None else hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b n dim"]) -> Float[Tensor, "b n dim"]:
        """(B, N, dim) → (B, N, dim)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OnGrid(nn.Module):
    """A block that works on feature maps, put to work on tokens that lie on a grid, row by row.

    Shapes: (B, height·width, C) → (B, height·width, C').
    """

    def __init__(self, block: nn.Module, height: int, width: int) -> None:
        super().__init__()
        whole("OnGrid", height=height, width=width)
        self.block, self.height, self.width = block, height, width

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c_out"]:
        """(B, N, C) → the block's output on (B, C, height, width), as tokens again."""
        maps = x.transpose(1, 2).unflatten(2, (self.height, self.width))
        return self.block(maps).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Plain vision transformer: patches, learned positions, equal blocks, mean over tokens, linear layer.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width in pixels; ``patch_size`` must divide it.
        patch_size: side of a patch; each becomes one token.
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads of a transformer block, for all or for each; must divide ``dim`` unless ``head_dim`` is
            given.
        mlp_ratio: hidden units of a transformer block's perceptron over ``dim``.
        drop_path: largest rate of stochastic depth; blocks get evenly spaced rates from 0 to it.
        block: "transformer", or "irmb": EMO's inverted residual mobile block with layer norm and GELU on the grid of
            tokens, ``heads`` heads, a 3×3 depth-wise convolution and attention among all tokens.
        hidden: hidden units of each transformer block, in place of ``mlp_ratio``.
        head_dim: units of each head of a transformer block; ``dim`` shared among them by default.
        exp_ratio: expansion of an "irmb". With the default width the two blocks have 49,984 and 49,888 parameters.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 64,
        patch_size: int = 8,
        dim: int = 64,
        depth: int = 6,
        heads: int | Sequence[int] = 4,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        block: Literal["transformer", "irmb"] = "transformer",
        exp_ratio: float = 4.625,
        hidden: int | Sequence[int] | None = None,
        head_dim: int | None = None,
    ) -> None:
        super().__init__()
        whole("vit", in_channels=in_channels, num_classes=num_classes, image_size=image_size, patch_size=patch_size)
        whole("vit", dim=dim, depth=depth)
        heads_of = each("vit", "heads", heads, depth)
        hidden_of = [None] * depth if hidden is None else each("vit", "hidden", hidden, depth)
        if head_dim is not None:
            whole("vit", head_dim=head_dim)
        if image_size % patch_size:
            fits = [size for size in range(2, image_size + 1) if image_size % size == 0]
            raise InvalidValue(
                f"vit: patch_size = {patch_size} does not divide image_size = {image_size}; "
                f"{', '.join(map(str, fits)) or '1'} would"
            )
        if head_dim is None and any(dim % count for count in heads_of):
            raise InvalidValue(f"vit: dim = {dim} cannot be shared among heads = {heads}")
        if block == "irmb" and (hidden, head_dim) != (None, None):
            raise InvalidValue(f'vit: hidden = {hidden}, head_dim = {head_dim} are for the block "transformer"')
        for name, ratio in (("mlp_ratio", mlp_ratio), ("exp_ratio", exp_ratio)):
            if not ratio > 0:
                raise InvalidValue(f"vit: {name} = {ratio!r}; more than 0 is expected")
        if block not in ("transformer", "irmb"):
            raise InvalidValue(f'vit: block = {block!r}; "transformer" or "irmb" is expected')
        if not 0 <= drop_path < 1:
            raise InvalidValue(f"vit: drop_path = {drop_path!r}; 0 ≤ drop_path < 1 is expected")
        self.in_channels, self.image_size = in_channels, image_size
        self.grid = image_size // patch_size
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid**2, dim))
        rates = np.linspace(0, drop_path, depth).tolist()
        if block == "transformer":
            blocks: list[nn.Module] = [
                TransformerBlock(dim, count, mlp_ratio, rate, units, head_dim)
                for rate, count, units in zip(rates, heads_of, hidden_of, strict=True)
            ]
        else:
            blocks = [
                OnGrid(_irmb(dim, count, exp_ratio, rate), self.grid, self.grid)
                for rate, count in zip(rates, heads_of, strict=True)
            ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, EPS)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))  # a view: as the linear layer that it is
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def embed(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n tokens dim"]:
        """(N, in_channels, image_size, image_size) → tokens with their positions, row by row (N, grid², dim)."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise InvalidValue(
                f"vit: an input of shape {tuple(images.shape)}; (N, {', '.join(map(str, expected))}) is expected"
            )
        return self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed

    def forward_features(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n tokens dim"]:
        """(N, in_channels, image_size, image_size) → tokens after the last block and its norm (N, grid², dim)."""
        return self.norm(self.blocks(self.embed(images)))

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """(N, in_channels, image_size, image_size) → logits (N, num_classes)."""
        return self.head(self.forward_features(images).mean(1))


def _irmb(dim: int, heads: int, exp_ratio: float, drop_path: float) -> InvertedResidualMobileBlock:
    return InvertedResidualMobileBlock(
        dim,
        dim,
        exp_ratio=exp_ratio,
        norm_layer="ln_2d",
        act_layer="gelu",
        dim_head=dim // heads,
        window_size=0,  # the whole grid
        qkv_bias=True,
        attn_pre=True,
        drop_path=drop_path,
    )
