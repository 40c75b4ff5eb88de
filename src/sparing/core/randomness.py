"""Seeding that never leaks: the caller's generators are put back as they were."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed that depends on every part and on their order, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (CPU and all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def isolated_rng(*parts: int | str) -> Iterator[None]:
    """Run a block under generators seeded from ``parts``; restore the caller's states after it."""
    import torch

    python, numpy_ = random.getstate(), np.random.get_state()
    # devices that are not in use stay untouched: waking CUDA here would forbid forking later
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            seed_everything(derive_seed(*parts))
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_)
