"""A :class:`~sparing.models.bert.Bert` that is told its masks and token types instead of reading them off the ids."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparing.models.bert import MASKED, Bert


class Served(nn.Module):
    """(ids, keep, segments), each (N, T), to the head's output."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def forward(
        self, ids: Int[Tensor, "n t"], keep: Bool[Tensor, "n t"], segments: Int[Tensor, "n t"] | None = None
    ) -> Float[Tensor, "..."]:
        """The output that the engine is to give."""
        bert, parts = self.bert, self.bert.embeddings
        if parts.position_offset:
            counted = keep.long()
            positions = parts.positions(counted.cumsum(1) * counted + parts.position_offset - 1)
        else:
            positions = parts.positions.weight[: ids.shape[1]]
        x = parts.words(ids) + positions
        if segments is not None:
            x = x + parts.segments(segments)
        x = parts.norm(x)
        mask = torch.zeros_like(keep, dtype=x.dtype).masked_fill(~keep, MASKED)[:, None, None]
        for block in bert.blocks:
            x = block(x, mask)
        if bert.task_head in ("tokens", "span", "classifier"):
            return x if bert.task_head == "tokens" else bert.head(x)
        if bert.pooling == "first":
            return x[:, 0]
        real = keep.unsqueeze(2).to(x.dtype)
        return (x * real).sum(1) / real.sum(1)
