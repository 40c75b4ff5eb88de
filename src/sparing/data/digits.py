"""The 1,797 handwritten digits of 8×8 pixels that scikit-learn embeds (UCI, Alpaydin and Kaynak 1998, test part)."""

from __future__ import annotations

import numpy as np


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """(images uint8 (1797, 8, 8, 1) with pixels 0…16, labels int64 (1797,)); no file of ours, no network."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.uint8)[..., None], digits.target.astype(np.int64)
