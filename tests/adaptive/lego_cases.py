"""Small networks of blocks whose answers tell which descendants computed them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from sparing.adaptive.scaling import Profile

BASE = 8
"""A network's answer holds the options of its blocks as digits to this base."""


class Counting(nn.Module):
    """A block of two 1×1 convolutions: x → 8·x + digit."""

    def __init__(self, digit: int, width: int = 1) -> None:
        super().__init__()
        self.spread, self.gather = nn.Conv2d(1, width, 1, bias=False), nn.Conv2d(width, 1, 1)
        with torch.no_grad():
            self.spread.weight.fill_(1)
            self.gather.weight.fill_(BASE / width)
            self.gather.bias.fill_(digit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gather(self.spread(x))


class Row(nn.Module):
    """Counting blocks between the parts of a frame; a second tensor passes by the second block."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Counting(0, 2**3) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 0
        beside = x + 0.25
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 1:
                x = x + beside - 0.25
        return torch.flatten(x, 1)


def counting_zoo(blocks: int = 3, sizes: int = 4) -> Any:
    """What :class:`LegoModel` reads of a zoo; option s of a block adds the digit s."""
    traced = fx.symbolic_trace(Row(blocks).eval())
    nodes = [[f"blocks_{b}_spread", f"blocks_{b}_gather"] for b in range(blocks)]
    modules = [[Counting(s, 2 ** max(0, 3 - s)).eval() for s in range(sizes)] for _ in range(blocks)]
    held = [[sum(p.numel() * 4 for p in module.parameters()) for module in row] for row in modules]
    graph = SimpleNamespace(module=traced, blocks=[SimpleNamespace(nodes=names) for names in nodes])
    return SimpleNamespace(
        graph=graph,
        blocks=modules,
        sparsities=tuple(np.linspace(0, 0.9, sizes)),
        bytes=np.array(held, float),
        frame_bytes=0.0,
    )


def counting_profile(zoo: Any, accuracy: float = 0.9) -> Profile:
    """Smaller descendants are faster and less accurate, each block to another degree."""
    blocks = len(zoo.bytes)
    s = np.asarray(zoo.sparsities)
    return Profile(
        sparsities=s,
        drops=np.linspace(0.02, 0.1, blocks)[:, None] * s**2,
        bytes=zoo.bytes,
        latency=np.full(blocks, 1e-3),
        rel=np.tile(s * 0.8, (blocks, 1)),
        model_latency=1e-3 * blocks + 5e-4,
        frame_bytes=zoo.frame_bytes,
        accuracy=accuracy,
    )


def read(output: Any, blocks: int = 3) -> tuple[tuple[int, ...], ...]:
    """The options that each sample's answer holds; the same at every pixel, or the answer is of no one selection."""
    array = np.asarray(output.detach() if isinstance(output, torch.Tensor) else output)
    assert (array == array[:, :1]).all()
    whole = np.rint(array[:, 0]).astype(int)
    np.testing.assert_allclose(array[:, 0], whole, atol=1e-3)
    return tuple(tuple((n // BASE**power) % BASE for power in reversed(range(blocks))) for n in whole.tolist())
