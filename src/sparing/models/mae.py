"""Vision transformers with a class token, and the masked autoencoder that pre-trains them without labels.

He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners" (arXiv 2111.06377), whose networks are the teachers
and students of Ren et al. 2023, "TinyMIM" (arXiv 2301.01296). One trunk — patches, class token, positions, blocks — has
three uses: :class:`ViTEncoder` for pre-training, :class:`MAE` with a decoder on top, :class:`MAEViT` as a classifier.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparing.core import files
from sparing.core.errors import CorruptFile, DataError, InvalidValue, did_you_mean
from sparing.core.predictor.module import build_model
from sparing.models.convnet import whole
from sparing.models.vit import EPS, TransformerBlock

Feature = Literal["block", "ffn", "attention", "attention_residual", "qkv"]
"""What of a block: its output; that of its perceptron, or of its attention, before the residual; the attention's after
the residual; queries, keys and values side by side."""
TRUNK = "pre-trainable"
"""The capability of a model that can be pre-trained without labels."""
FEATURES: tuple[Feature, ...] = ("block", "ffn", "attention", "attention_residual", "qkv")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a vision transformer with a class token. Kept with its weights, head numbers of each block included."""

    image_size: int = 224
    """Height and width in pixels; ``patch_size`` must divide it."""
    patch_size: int = 16
    """Side of a patch in pixels; each becomes one token."""
    dim: int = 768
    """Width of a token; 4 must divide it."""
    depth: int = 12
    """Number of blocks."""
    heads: int = 12
    """Attention heads of every block but the last; must divide ``dim``."""
    last_heads: int | None = None
    """Attention heads of the last block; None: ``heads``. A student of relations has its teacher's number there."""
    mlp_ratio: float = 4.0
    """Hidden units of a block's perceptron over ``dim``."""
    in_channels: int = 3
    """Channels of an image."""

    PRESETS: ClassVar[Mapping[str, tuple[int, int, int]]] = {
        "vit_tiny": (192, 12, 3),
        "vit_small": (384, 12, 6),
        "vit_base": (768, 12, 12),
        "vit_large": (1024, 24, 16),
    }
    """Name → (dim, depth, heads) at 224 pixels and patches of 16."""

    def __post_init__(self) -> None:
        whole("vit", image_size=self.image_size, patch_size=self.patch_size, dim=self.dim, depth=self.depth)
        whole("vit", heads=self.heads, in_channels=self.in_channels)
        if self.image_size % self.patch_size:
            fits = [size for size in range(2, min(self.image_size, 1024) + 1) if self.image_size % size == 0]
            raise InvalidValue(
                f"vit: patch_size = {self.patch_size} does not divide image_size = {self.image_size}; "
                f"{', '.join(map(str, fits)) or '1'} would"
            )
        if self.dim % 4:
            raise InvalidValue(
                f"vit: dim = {self.dim}; a multiple of 4 is expected (sine and cosine of rows and columns)"
            )
        for name in ("heads", "last_heads"):
            heads = getattr(self, name)
            if heads is None:
                continue
            whole("vit", **{name: heads})
            if self.dim % heads:
                raise InvalidValue(f"vit: dim = {self.dim} cannot be shared among {name} = {heads}")
        if not self.mlp_ratio > 0:
            raise InvalidValue(f"vit: mlp_ratio = {self.mlp_ratio!r}; more than 0 is expected")

    @classmethod
    def named(cls, name: str, **changes: Any) -> ViTConfig:
        """The config of a preset, with ``changes``. TinyMIM-T was taught with 6 heads, and fine-tuned with 3."""
        if name not in cls.PRESETS:
            raise InvalidValue(f"vit: {name!r}.{did_you_mean(name, cls.PRESETS)} Presets: {', '.join(cls.PRESETS)}")
        dim, depth, heads = cls.PRESETS[name]
        return cls(**{"dim": dim, "depth": depth, "heads": heads, **changes})

    @property
    def heads_of(self) -> tuple[int, ...]:
        """Attention heads of each block."""
        return (*(self.heads,) * (self.depth - 1), self.last_heads or self.heads)

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch_size

    def deployed(self) -> ViTConfig:
        """With ``heads`` in every block."""
        return replace(self, last_heads=None)


# ------------------------------------------------------------------------------------------------ positions and patches


def sincos_2d(dim: int, grid: int, cls_token: bool = True) -> Float[Tensor, "tokens {dim}"]:
    """The fixed table of positions of a square grid (He et al. 2022, appendix A; Vaswani et al. 2017 in two axes).

    With ω_k = 10000^(−k/(dim/4)), k = 0 … dim/4 − 1, the cell at (row r, column c) has
    [sin(c ω), cos(c ω), sin(r ω), cos(r ω)]: the column first.

    Args:
        dim: width, a multiple of 4.
        grid: cells along a side.
        cls_token: put a row of zeros, the class token's, before those of the cells.

    Returns:
        float32 (grid² + 1, dim) or (grid², dim), row by row of the grid.
    """
    whole("sincos_2d", dim=dim, grid=grid)
    if dim % 4:
        raise InvalidValue(f"sincos_2d: dim = {dim}; a multiple of 4 is expected")
    omega = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
    row, column = (axis.reshape(-1, 1) * omega for axis in np.mgrid[:grid, :grid])
    table = np.concatenate([np.sin(column), np.cos(column), np.sin(row), np.cos(row)], axis=1)
    if cls_token:
        table = np.concatenate([np.zeros((1, dim)), table])
    return torch.from_numpy(table.astype(np.float32))


def interpolate_positions(table: Float[Tensor, "1 tokens dim"], grid: int) -> Float[Tensor, "1 new dim"]:
    """Positions (1, N + 1, dim) for another grid: bicubic over the cells, the class token's row as it is."""
    whole("interpolate_positions", grid=grid)
    old = math.isqrt(table.shape[1] - 1)
    if old * old != table.shape[1] - 1 or not old:
        raise InvalidValue(
            f"interpolate_positions: {table.shape[1]} rows; one for the class token and a square number are expected"
        )
    if old == grid:
        return table
    cells = table[:, 1:].transpose(1, 2).unflatten(2, (old, old))
    cells = nn.functional.interpolate(cells, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], cells.flatten(2).transpose(1, 2)], dim=1)


def patchify(images: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b n pixels"]:
    """(B, C, H, W) → (B, L, p² C): patches row by row; in each, pixels row by row, channels innermost."""
    p, (height, width) = patch_size, images.shape[2:]
    whole("patchify", patch_size=p)
    if height % p or width % p:
        raise InvalidValue(f"patchify: patch_size = {p} does not divide images of {height}×{width} pixels")
    cut = images.unflatten(3, (width // p, p)).unflatten(2, (height // p, p))  # (B, C, rows, p, columns, p)
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Float[Tensor, "b n pixels"], patch_size: int) -> Float[Tensor, "b c h w"]:
    """(B, L, p² C) → (B, C, H, W), square images; undoes :func:`patchify`."""
    whole("unpatchify", patch_size=patch_size)
    p, side = patch_size, math.isqrt(patches.shape[1])
    if side * side != patches.shape[1] or patches.shape[2] % p**2:
        raise InvalidValue(
            f"unpatchify: patches of shape {tuple(patches.shape)}; (B, a square number, channels · {p}²) is expected"
        )
    cut = patches.unflatten(2, (p, p, -1)).unflatten(1, (side, side))  # (B, rows, columns, p, p, C)
    return cut.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def check_mask_ratio(mask_ratio: float) -> None:
    """Raise :class:`InvalidValue` for a share of patches that is not above 0 and below 1."""
    if not 0 < mask_ratio < 1:
        raise InvalidValue(f"mask_ratio = {mask_ratio!r}; a share above 0 and below 1 is expected")


def random_masking(
    noise: Float[Tensor, "b n"], mask_ratio: float
) -> tuple[Int[Tensor, "b kept"], Float[Tensor, "b n"], Int[Tensor, "b n"]]:
    """Which patches stay: those of the smallest noise (He et al. 2022, section 3 and appendix A).

    Args:
        noise: uniform numbers (B, L).
        mask_ratio: share removed, above 0 and below 1; ⌊L (1 − ratio)⌋ patches stay.

    Returns:
        (numbers of the kept patches (B, kept), in the order of their noise; mask (B, L), 1 where removed; ids that
        bring the shuffled patches back into order (B, L)).
    """
    check_mask_ratio(mask_ratio)
    count = noise.shape[1]
    kept = int(count * (1 - mask_ratio))
    if not kept:
        raise InvalidValue(f"mask_ratio = {mask_ratio}: none of {count} patches would stay")
    shuffle = noise.argsort(dim=1)
    restore = shuffle.argsort(dim=1)
    mask = (restore >= kept).to(noise.dtype)
    return shuffle[:, :kept], mask, restore


def mae_loss(
    target: Float[Tensor, "b n pixels"],
    pred: Float[Tensor, "b n pixels"],
    mask: Float[Tensor, "b n"],
    norm_pix_loss: bool = True,
) -> Float[Tensor, ""]:
    """Mean squared error of each removed patch, averaged over the removed patches (He et al. 2022, section 3).

    Args:
        target: patches of the images (B, L, p² C), by :func:`patchify`.
        pred: the decoder's (B, L, p² C).
        mask: (B, L), 1 where a patch was removed; at least one must be.
        norm_pix_loss: bring each patch of the target to mean 0 and variance 1 first (unbiased, + 1e-6).
    """
    if not bool((mask != 0).any()):
        raise InvalidValue("mae_loss: the mask is 0 everywhere; at least one removed patch is expected")
    wide = torch.promote_types(target.dtype, torch.float32)
    target, pred, mask = target.to(wide), pred.to(wide), mask.to(wide)
    if norm_pix_loss:
        spread = target.var(dim=-1, keepdim=True, correction=1)
        target = (target - target.mean(dim=-1, keepdim=True)) / (spread + 1e-6).sqrt()
    error = (pred - target).square().mean(dim=-1)
    return (error * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------------------------------- networks


class PatchEmbed(nn.Module):
    """Square images of one size → tokens, by a convolution that does not overlap.

    Shapes: (B, in_channels, image_size, image_size) → (B, grid², dim), row by row.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.shape = (config.in_channels, config.image_size, config.image_size)
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "b n dim"]:
        """(B, in_channels, image_size, image_size) → (B, grid², dim)."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.shape:
            raise InvalidValue(
                f"vit: an input of shape {tuple(images.shape)}; (B, {', '.join(map(str, self.shape))}) is expected"
            )
        return self.proj(images).flatten(2).transpose(1, 2)


class ViTTrunk(nn.Module):
    """Patches, a class token, positions and blocks; what :class:`ViTEncoder` and :class:`MAEViT` have in common.

    Args:
        config: sizes.
        drop_path: rates of stochastic depth: one for each block.
    """

    pos_embed: Tensor
    """Positions (1, grid² + 1, dim), the class token's first."""

    def __init__(self, config: ViTConfig, drop_path: Sequence[float] | None = None) -> None:
        super().__init__()
        rates = [0.0] * config.depth if drop_path is None else list(drop_path)
        if len(rates) != config.depth:
            raise InvalidValue(f"vit: {len(rates)} rates of drop_path; one for each of {config.depth} blocks is needed")
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.Sequential(
            *(
                TransformerBlock(config.dim, heads, config.mlp_ratio, rate)
                for heads, rate in zip(config.heads_of, rates, strict=True)
            )
        )

    def table(self) -> Float[Tensor, "1 tokens dim"]:
        """The fixed table of positions of this size."""
        return sincos_2d(self.config.dim, self.config.grid)[None]

    def begin(self) -> None:
        """Fill all weights as MAE does: Xavier-uniform matrices, zero biases, tokens normal with deviation 0.02."""
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view: as the linear layer that it is
        nn.init.zeros_(self.patch_embed.proj.bias)  # type: ignore[arg-type]  # made with one

    def tokens(
        self, images: Float[Tensor, "..."], keep: Int[Tensor, "b kept"] | None = None
    ) -> Float[Tensor, "b tokens dim"]:
        """Images → what goes into the first block: the class token, then patches with their positions.

        ``keep`` (B, kept) names the patches that go in, in that order; None: all.
        """
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        if keep is not None:
            patches = patches.gather(1, keep[:, :, None].expand(-1, -1, patches.shape[2]))
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([first.expand(patches.shape[0], -1, -1), patches], dim=1)

    def into(self, tokens: Float[Tensor, "b n dim"], block: int) -> Float[Tensor, "b n dim"]:
        """What goes into block number ``block`` (from 1): the output of the one before it. Later blocks do not run."""
        check_block(block, self.config.depth)
        return self.blocks[: block - 1](tokens)

    def take_over(self, other: ViTTrunk) -> None:
        """Copy another trunk's tokens, patches, blocks and positions (interpolated when its grid differs).

        Head numbers may differ: they change what weights mean, not their shapes. Raises :class:`InvalidValue` for
        another width, depth, patch or number of channels.
        """
        for name in ("dim", "depth", "mlp_ratio", "patch_size", "in_channels"):
            mine, theirs = getattr(self.config, name), getattr(other.config, name)
            if mine != theirs:
                raise InvalidValue(
                    f"vit: {name} = {mine} here and {theirs} in the network to take over; equal is needed"
                )
        with torch.no_grad():
            self.cls_token.copy_(other.cls_token)
            self.pos_embed.copy_(interpolate_positions(other.pos_embed, self.config.grid))
            self.patch_embed.load_state_dict(other.patch_embed.state_dict())
            self.blocks.load_state_dict(other.blocks.state_dict())


def check_block(block: int, depth: int) -> None:
    """Raise :class:`InvalidValue` for a block that is not one of 1 … ``depth``."""
    if isinstance(block, bool) or not isinstance(block, int) or not 1 <= block <= depth:
        raise InvalidValue(f"target_block = {block!r}; 1 … {depth}, the number of blocks, is expected")


def block_feature(
    block: TransformerBlock, x: Float[Tensor, "b n dim"], feature: Feature
) -> Float[Tensor, "b n features"]:
    """One of a block's :data:`FEATURES` for its input (B, N, dim) → (B, N, dim); "qkv": (B, N, 3 dim).

    Nothing behind the feature is computed.
    """
    if feature not in FEATURES:
        raise InvalidValue(f"feature = {feature!r}; one of {', '.join(FEATURES)} is expected")
    inside = block.norm1(x)
    if feature == "qkv":
        return block.attn.qkv(inside)
    attended = block.attn(inside)
    if feature == "attention":
        return attended
    x = x + block.drop_path(attended)
    if feature == "attention_residual":
        return x
    mixed = block.mlp(block.norm2(x))
    return mixed if feature == "ffn" else x + block.drop_path(mixed)


class ViTEncoder(ViTTrunk):
    """A vision transformer for pre-training: fixed positions, a norm behind the last block.

    Shapes: (B, in_channels, image_size, image_size) → (B, grid² + 1, dim), the class token first.

    Args:
        config: sizes.
        drop_path: rates of stochastic depth: one for each block.
    """

    def __init__(self, config: ViTConfig, drop_path: Sequence[float] | None = None) -> None:
        super().__init__(config, drop_path)
        self.register_buffer("pos_embed", self.table())
        self.norm = nn.LayerNorm(config.dim, EPS)
        self.begin()

    def forward(
        self, images: Float[Tensor, "..."], keep: Int[Tensor, "b kept"] | None = None
    ) -> Float[Tensor, "b tokens dim"]:
        """Images → tokens behind the last block and its norm; ``keep`` as in :meth:`tokens`."""
        return self.norm(self.blocks(self.tokens(images, keep)))


class MAE(ViTEncoder):
    """A masked autoencoder: an encoder of the patches that are left, and a light decoder of those that are not.

    Shapes: (B, in_channels, image_size, image_size) → patches (B, grid², patch_size² in_channels).

    Args:
        config: sizes of the encoder.
        decoder_dim: width of the decoder; a multiple of 4.
        decoder_depth: blocks of the decoder.
        decoder_heads: attention heads of the decoder.
        mask_ratio: share of the patches that is removed.
        drop_path: rates of stochastic depth of the encoder: one for each block.
    """

    def __init__(
        self,
        config: ViTConfig,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mask_ratio: float = 0.75,
        drop_path: Sequence[float] | None = None,
    ) -> None:
        super().__init__(config, drop_path)
        whole("mae", decoder_depth=decoder_depth)
        check_mask_ratio(mask_ratio)
        self.mask_ratio = mask_ratio
        self.decoder = {"decoder_dim": decoder_dim, "decoder_depth": decoder_depth, "decoder_heads": decoder_heads}
        inner = ViTConfig(config.image_size, config.patch_size, decoder_dim, decoder_depth, decoder_heads)  # checks it
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.register_buffer("decoder_pos_embed", sincos_2d(decoder_dim, config.grid)[None])
        self.decoder_pos_embed: Tensor
        self.decoder_embed = nn.Linear(config.dim, decoder_dim)
        self.decoder_blocks = nn.Sequential(
            *(TransformerBlock(decoder_dim, heads, config.mlp_ratio) for heads in inner.heads_of)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, EPS)
        self.decoder_pred = nn.Linear(decoder_dim, config.patch_size**2 * config.in_channels)
        self.begin()
        nn.init.normal_(self.mask_token, std=0.02)

    def mask(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"] | None = None
    ) -> tuple[Int[Tensor, "b kept"], Float[Tensor, "b n"], Int[Tensor, "b n"]]:
        """:func:`random_masking` by ``noise``, or by uniform numbers from torch's global generator."""
        if noise is None:
            noise = torch.rand(len(images), self.config.grid**2, device=images.device)
        return random_masking(noise, self.mask_ratio)

    def decode(self, latent: Float[Tensor, "b kept1 dim"], restore: Int[Tensor, "b n"]) -> Float[Tensor, "b n pixels"]:
        """The encoder's output for the kept patches, class token first → all patches (B, L, p² C)."""
        x = self.decoder_embed(latent)
        absent = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], absent.to(x.dtype)], dim=1)
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, patches.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def reconstruct(
        self, images: Float[Tensor, "b c h w"], noise: Float[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b n pixels"], Float[Tensor, "b n"]]:
        """(patches (B, L, p² C) as the decoder fills them in, mask (B, L): 1 where one was removed)."""
        keep, mask, restore = self.mask(images, noise)
        return self.decode(super().forward(images, keep), restore), mask

    def forward(
        self, images: Float[Tensor, "..."], noise: Float[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n pixels"]:
        """All patches as the decoder fills them in; see :meth:`reconstruct`."""
        return self.reconstruct(images, noise)[0]


class MAEViT(ViTTrunk):
    """Vision transformer with a class token, to be pre-trained without labels; classifies by the mean of its patches.

    The network that MAE and TinyMIM fine-tune: trained positions that begin as sines and cosines; a norm behind the
    mean, class token left out; a linear layer.

    Shapes: (N, in_channels, image_size, image_size) → logits (N, num_classes).

    Args:
        in_channels: channels of an image.
        num_classes: number of logits.
        image_size: height and width in pixels; ``patch_size`` must divide it.
        patch_size: side of a patch; each becomes one token.
        dim: width of a token; a multiple of 4.
        depth: number of blocks.
        heads: attention heads; must divide ``dim``.
        last_heads: attention heads of the last block, where they differ.
        mlp_ratio: hidden units of a block's perceptron over ``dim``.
        drop_path: largest rate of stochastic depth; blocks get evenly spaced rates from 0 to it.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset({TRUNK})

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        image_size: int = 64,
        patch_size: int = 8,
        dim: int = 64,
        depth: int = 4,
        heads: int = 2,
        last_heads: int | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        whole("mae_vit", num_classes=num_classes)
        if not 0 <= drop_path < 1:
            raise InvalidValue(f"mae_vit: drop_path = {drop_path!r}; 0 ≤ drop_path < 1 is expected")
        config = ViTConfig(image_size, patch_size, dim, depth, heads, last_heads, mlp_ratio, in_channels)
        super().__init__(config, np.linspace(0, drop_path, depth).tolist())
        self.pos_embed = nn.Parameter(self.table())
        self.fc_norm = nn.LayerNorm(dim, EPS)
        self.head = nn.Linear(dim, num_classes)
        self.begin()
        nn.init.trunc_normal_(self.head.weight, std=2e-5)

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "n classes"]:
        """(N, in_channels, image_size, image_size) → logits (N, num_classes)."""
        return self.head(self.fc_norm(self.blocks(self.tokens(images))[:, 1:].mean(1)))


# -------------------------------------------------------------------------------------------------------------- files

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "sparing_vit"
BLOCK = 12
"""Tensors of a block."""


def save_vit(model: ViTTrunk, folder: Path | str) -> None:
    """Write a :class:`ViTEncoder`, :class:`MAE` or :class:`MAEViT`, to be read by :func:`load_vit`.

    ``config.json`` holds its sizes and the head number of each block, ``model.safetensors`` its weights.
    """
    said: dict[str, Any] = {"model_type": KIND, "trunk": asdict(model.config), "heads_of": list(model.config.heads_of)}
    if isinstance(model, MAE):
        said |= {"decoder": {**model.decoder, "mask_ratio": model.mask_ratio}}
    elif isinstance(model, MAEViT):
        said |= {"num_classes": model.head.out_features}
    with files.folder_atomic(Path(folder)) as place:
        files.write_json(place / CONFIG, said)
        files.write_tensors(place / WEIGHTS, model.state_dict())


def load_vit(folder: Path | str) -> ViTTrunk:
    """The network in a local folder: one of :func:`save_vit`, or a ViT or ViTMAE that ``transformers`` saved.

    The public ones become a :class:`ViTEncoder`, or a :class:`MAE` where there is a decoder. Of a public ViT the pooler
    and the classifier, which work on the class token behind the last norm, have no place here and are left out; all
    other weights must find theirs. Positions that are all zero, as a ViTMAE has that was never trained, become the
    fixed table. Nothing is downloaded, nothing unpickled, and the package ``transformers`` is not needed.

    Raises:
        DataError: no such folder; weights that lack a tensor, or hold one that is not understood.
        InvalidValue: an architecture that this network is not.
        CorruptFile: a damaged file.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name} is missing; a folder with {CONFIG} and {WEIGHTS} is expected (files that would have "
                "to be unpickled, such as pytorch_model.bin, are not read: save them anew with save_pretrained)"
            )
    said = files.read_json(folder / CONFIG)
    if not isinstance(said, dict):
        raise CorruptFile(f"{folder / CONFIG}: a {type(said).__name__}; a mapping is expected")
    state = files.read_tensors(folder / WEIGHTS)
    if said.get("model_type") == KIND:
        return _filled(_own(said, state, folder), state, folder)
    state = _renamed(state, folder)
    return _filled(_public(said, state, folder), state, folder)


def vit_from_transformers(model: Any) -> ViTEncoder:
    """The same of a live ``transformers`` ViTModel, ViTForImageClassification, ViTMAEModel or ViTMAEForPreTraining."""
    name = type(model).__name__
    said = {**model.config.to_dict(), "architectures": [name]}
    state = _renamed(dict(model.state_dict()), name)
    return _filled(_public(said, state, name), state, name)


def _own(said: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path) -> ViTTrunk:
    known = {field.name for field in fields(ViTConfig)}
    trunk, decoder, classes = (said.get(name) for name in ("trunk", "decoder", "num_classes"))
    if not isinstance(trunk, dict) or set(trunk) != known or not isinstance(decoder, dict | None):
        raise CorruptFile(f"{folder / CONFIG} does not hold the sizes {', '.join(sorted(known))}")
    try:
        config = ViTConfig(**trunk)
        sizes = {} if decoder is None else {name: decoder[name] for name in ("decoder_dim", "decoder_depth")}
        _compare(config, state, folder, **sizes)
        if said.get("heads_of") != list(config.heads_of):
            raise InvalidValue(f"heads_of = {said.get('heads_of')}; {list(config.heads_of)} follow from the sizes")
        if classes is not None:
            _shaped(state, "head.weight", (classes, config.dim), folder)
            model = build_model("mae_vit", num_classes=classes, **trunk)
            assert isinstance(model, MAEViT)
            return model
        return ViTEncoder(config) if decoder is None else MAE(config, **decoder)
    except (InvalidValue, TypeError, KeyError) as error:
        raise CorruptFile(f"{folder / CONFIG}: {error}") from error


def _public(said: Mapping[str, Any], state: Mapping[str, Tensor], where: Path | str) -> ViTEncoder:
    """An empty network of the sizes of a transformers config."""
    kind = said.get("model_type")
    if kind not in ("vit", "vit_mae"):
        raise InvalidValue(f'{where}: model_type = {kind!r}; "vit" or "vit_mae" is expected')
    get = {"hidden_act": "gelu", "qkv_bias": True, "mlp_ratio": None, "mask_ratio": 0.75, **said}.__getitem__
    if get("hidden_act") != "gelu" or not get("qkv_bias"):
        raise InvalidValue(
            f"{where}: hidden_act = {get('hidden_act')!r}, qkv_bias = {get('qkv_bias')!r}; exact GELU and biases of "
            "queries, keys and values are expected"
        )
    try:
        ratio = get("intermediate_size") / get("hidden_size")
        config = ViTConfig(
            get("image_size"),
            get("patch_size"),
            get("hidden_size"),
            get("num_hidden_layers"),
            get("num_attention_heads"),
            mlp_ratio=ratio,
            in_channels=get("num_channels"),
        )
        pretraining = any("ForPreTraining" in str(name) for name in said.get("architectures") or ())
        names = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")
        decoder = tuple(get(name) for name in names) if pretraining else (0, 0, 0)
        _compare(config, state, where, *decoder[:2])
        if not pretraining:
            return ViTEncoder(config)
        if (own := get("decoder_intermediate_size") / get("decoder_hidden_size")) != ratio:
            raise InvalidValue(
                f"{where}: its decoder has {own:g} hidden units for one of its width, its encoder {ratio:g}"
            )
        return MAE(config, decoder[0], decoder[1], decoder[2], mask_ratio=get("mask_ratio"))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(f"{where}: {CONFIG} lacks {error}, or gives it as no number") from error


def _compare(
    config: ViTConfig, state: Mapping[str, Tensor], where: Path | str, decoder_dim: int = 0, decoder_depth: int = 0
) -> None:
    """Raise :class:`DataError` unless weights are of these sizes, before anything of these sizes is made."""
    least = BLOCK * (config.depth + decoder_depth)
    if len(state) < least:
        raise DataError(f"{where}: {len(state)} tensors; {config.depth} + {decoder_depth} blocks have {least}")
    _shaped(state, "cls_token", (1, 1, config.dim), where)
    _shaped(state, "pos_embed", (1, config.grid**2 + 1, config.dim), where)
    _shaped(state, "patch_embed.proj.weight", (config.dim, config.in_channels, *(config.patch_size,) * 2), where)
    hidden = int(config.dim * config.mlp_ratio)
    _shaped(state, "blocks.0.mlp.fc1.weight", (hidden, config.dim), where)
    if decoder_depth:
        _shaped(state, "mask_token", (1, 1, decoder_dim), where)


def _shaped(state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], where: Path | str) -> None:
    if name not in state:
        raise DataError(f"{where}: the tensor {name!r} is missing")
    if state[name].shape != shape:
        raise DataError(f"{where}: the tensor {name!r} is {tuple(state[name].shape)}; {shape} is expected")


_PLACES = (
    (r"vit\.", ""),
    (r"decoder\.decoder_(encoder\.layer|layers)\.", "decoder_blocks."),
    (r"decoder\.", ""),
    (r"(encoder\.layer|layers)\.", "blocks."),
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
)
"""Beginnings of names in transformers, in the order in which they are looked at → ours."""
_PARTS = (
    (r"\.attention\.(attention\.)?(query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(attention\.)?(key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(attention\.)?(value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.fc2."),
)
"""Parts of a block's names in transformers, old and new → ours."""
_LEFT_OUT = re.compile(r"(vit\.)?pooler\.dense\.(weight|bias)|classifier\.(weight|bias)")


def _renamed(state: Mapping[str, Tensor], where: Path | str) -> dict[str, Tensor]:
    """Our names, with queries, keys and values in one tensor."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if _LEFT_OUT.fullmatch(name):
            continue
        own = name
        for pattern, place in _PLACES:
            own = re.sub(f"^{pattern}", place, own)
        for pattern, part in _PARTS:
            own = re.sub(pattern, part, own)
        found[own] = tensor
    for q in [name for name in found if ".attn.q." in name]:
        triple = [q.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if lacking := [name for name in triple if name not in found]:
            raise DataError(f"{where}: {lacking[0]} is missing beside {q}")
        found[q.replace(".attn.q.", ".attn.qkv.")] = torch.cat([found.pop(name) for name in triple])
    return found


Network = TypeVar("Network", bound=ViTTrunk)


def _filled(encoder: Network, state: Mapping[str, Tensor], where: Path | str) -> Network:
    own = encoder.state_dict()
    for name, what in (
        *((name, "is not understood") for name in state if name not in own),
        *((name, "is missing") for name in own if name not in state),
    ):
        raise DataError(f"{where}: the tensor {name!r} {what}; those of a {type(encoder).__name__} are expected")
    for name in state:
        _shaped(state, name, tuple(own[name].shape), where)
    # a public net that was never trained has only zeros for positions, and could tell no patch from another
    blank = {name for name, tensor in state.items() if name.endswith("pos_embed") and not bool(tensor.any())}
    encoder.load_state_dict({**state, **{name: own[name] for name in blank}})
    return encoder
