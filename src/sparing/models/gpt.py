"""A causal transformer for language modelling, built as GPT-2 is (Radford et al. 2019): pre-norm, learned positions."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from sparing.core.errors import InvalidValue
from sparing.models.convnet import whole
from sparing.models.vit import FeedForward


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and those before it, then a projection.

    Shapes: (N, T, dim), mask of keys (N, 1, 1, T) → (N, T, dim).
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Float[Tensor, "n t dim"], mask: Bool[Tensor, "n 1 1 t"] | None = None
    ) -> Float[Tensor, "n t dim"]:
        """(N, T, dim) → (N, T, dim)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        rate = self.rate if self.training else 0.0
        if mask is None:
            mixed = scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=True)
        else:
            place = torch.arange(x.shape[1], device=x.device)
            # a token always sees itself: padding in front, which sees nothing else, gives numbers
            seen = (mask & (place[:, None] >= place)) | (place[:, None] == place)
            mixed = scaled_dot_product_attention(q, k, v, seen, dropout_p=rate)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Pre-norm block: ``x += attn(norm1(x))``, then ``x += mlp(norm2(x))``, with dropout on what is added.

    Shapes: (N, T, dim), mask of keys (N, 1, 1, T) → (N, T, dim).

    Args:
        dim: width of a token.
        heads: attention heads; must divide ``dim``.
        hidden: units of the perceptron.
        dropout: share dropped of attention weights and of what is added, in training.
        eps: of the layer norms.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps)
        self.attn = CausalAttention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.mlp = FeedForward(dim, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "n t dim"], mask: Bool[Tensor, "n 1 1 t"] | None = None
    ) -> Float[Tensor, "n t dim"]:
        """(N, T, dim) → (N, T, dim)."""
        x = x + self.dropout(self.attn(self.norm1(x), mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Gpt(nn.Module):
    """Causal transformer for language modelling: pre-norm blocks, learned positions, a final norm (as GPT-2, 2019).

    Shapes: token numbers (N, T ≤ max_length), mask (N, T) → logits of the next token (N, T, vocab_size). The mask is 0
    where there is padding, which no other token then sees; padding behind a text needs none, as no token sees what
    follows it.

    Args:
        vocab_size: how many tokens there are.
        max_length: positions.
        dim: width of a token.
        depth: number of blocks.
        heads: attention heads; must divide ``dim``.
        hidden: units of a block's perceptron; 4 · dim if none.
        dropout: share dropped of embeddings, attention weights and what a block adds, in training.
        tied: whether the output layer is the table of embeddings.
        eps: of the layer norms.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        max_length: int = 128,
        dim: int = 64,
        depth: int = 6,
        heads: int = 4,
        hidden: int | None = None,
        dropout: float = 0.0,
        tied: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        whole("gpt", vocab_size=vocab_size, max_length=max_length, dim=dim, depth=depth, heads=heads, hidden=hidden)
        if dim % heads:
            raise InvalidValue(f"gpt: dim = {dim} cannot be shared among heads = {heads}")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise InvalidValue(f"gpt: dropout = {dropout!r}; 0 ≤ dropout < 1 is expected")
        if not isinstance(tied, bool):
            raise InvalidValue(f"gpt: tied = {tied!r}; true or false is expected")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
            raise InvalidValue(f"gpt: eps = {eps!r}; 0 < eps < 1 is expected")
        self.vocab_size, self.max_length = vocab_size, max_length
        self.words = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_length, dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(DecoderBlock(dim, heads, hidden, dropout, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps)
        self.head = None if tied else nn.Linear(dim, vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def encode(self, ids: Shaped[Tensor, "..."], mask: Shaped[Tensor, "..."] | None = None) -> Float[Tensor, "n t dim"]:
        """Token numbers (N, T), mask (N, T) → what the last block gives, normalised (N, T, dim)."""
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise InvalidValue(
                f"gpt: an input of shape {tuple(ids.shape)} and type {ids.dtype}; token numbers (N, T) of type int64 "
                "are expected"
            )
        if not 1 <= ids.shape[1] <= self.max_length:
            raise InvalidValue(f"gpt: {ids.shape[1]} tokens; 1…{self.max_length} (max_length) are expected")
        keys = None
        if mask is not None:
            if mask.shape != ids.shape:
                raise InvalidValue(f"gpt: a mask of shape {tuple(mask.shape)}; {tuple(ids.shape)} is expected")
            keys = mask.bool()[:, None, None]
        x = self.dropout(self.words(ids) + self.positions.weight[: ids.shape[1]])
        for block in self.blocks:
            x = block(x, keys)
        return self.norm(x)

    def forward(
        self, ids: Shaped[Tensor, "..."], mask: Shaped[Tensor, "..."] | None = None
    ) -> Float[Tensor, "n t vocab_size"]:
        """Token numbers (N, T), mask (N, T) → logits (N, T, vocab_size) of the token after each."""
        hidden = self.encode(ids, mask)
        return linear(hidden, self.words.weight) if self.head is None else self.head(hidden)


class LogitsOf(nn.Module):
    """A causal language model of the package ``transformers``, such as a ``GPT2LMHeadModel``, as tasks expect one.

    Shapes: token numbers (N, T) → logits of the next token (N, T, vocab_size), and nothing else. The model itself is
    ``model``, and is trained: token dropping and the like find its blocks there.

    Args:
        model: takes ``input_ids``, and gives an output with ``logits``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module) or not hasattr(model, "config"):
            raise InvalidValue(f"model is a {type(model).__name__}; a causal model of transformers is expected")
        self.model = model

    def forward(self, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n t vocab_size"]:
        """Token numbers (N, T) → logits (N, T, vocab_size)."""
        return self.model(input_ids=ids, use_cache=False).logits
