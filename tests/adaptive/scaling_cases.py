"""Profiles for tests of the scaling optimiser, drawn or small enough to see through."""

from __future__ import annotations

import numpy as np

from sparing.adaptive.scaling import Profile


def drawn(seed: int, blocks: int = 4, sizes: int = 4, noisy: bool = True) -> Profile:
    """Drops that grow with sparsity and differ between blocks; noise makes some options worse in all respects."""
    draw = np.random.default_rng(seed)
    s = np.linspace(0, 0.9, sizes)
    noise = draw.normal(0, 0.02 if noisy else 0, (blocks, sizes)) * (s > 0)
    drops = draw.uniform(0.5, 2, (blocks, 1)) * (0.02 * s + 0.2 * s**3) + noise
    size = draw.integers(50_000, 1_000_000, (blocks, 1)) * (1 - s * (1.7 - s) * 0.6)
    rel = draw.uniform(0.7, 0.95, (blocks, 1)) * s + (draw.normal(0, 0.05, (blocks, sizes)) * (s > 0) if noisy else 0)
    latency = draw.uniform(2e-3, 8e-3, blocks)
    return Profile(s, drops, np.round(size), latency, rel, float(latency.sum() + 2e-3), 40_000.0, 0.9)
