"""Three fixed corruptions of uint8 images, for the robustness columns.

Kinds and severities are those of CIFAR-10-C at severity 3 of 5 (Hendrycks and Dietterich 2019, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations"); blur grows with the image above 32 pixels. Each is a pure
function of images and their indices in the split; how they are batched does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from sparing.data.images import Corruption

NOISE = 0.08
"""Standard deviation of the noise as a share of the full pixel value."""
BLUR = 0.7
"""Standard deviation of the blur in pixels, for images of up to 32 pixels."""
CONTRAST = 0.4
"""What remains of each pixel's distance to its channel's mean."""
_SEED = 20_190_402


def gaussian_noise(images: np.ndarray, indices: np.ndarray, full: float = 255.0, sigma: float = NOISE) -> np.ndarray:
    """Add independent noise N(0, (sigma·full)²) to every value of (n, H, W, C); each image's is seeded by its index."""
    noise = np.empty(images.shape, np.float32)
    for position, index in enumerate(indices):
        generator = np.random.Generator(np.random.Philox(key=(_SEED << 32) + int(index)))
        generator.standard_normal(out=noise[position], dtype=np.float32)
    return _to_uint8(images + noise * np.float32(sigma * full), full)


def gaussian_blur(images: np.ndarray, indices: np.ndarray, full: float = 255.0, sigma: float = BLUR) -> np.ndarray:
    """Gaussian filter of ``sigma`` pixels over H and W of (n, H, W, C); edges are repeated. ``indices`` are ignored."""
    from scipy.ndimage import gaussian_filter1d

    # The filter is linear: as matrices for rows and columns it is many times faster on small images.
    rows, columns = (
        gaussian_filter1d(np.eye(n, dtype=np.float32), sigma, 0, mode="nearest") for n in images.shape[1:3]
    )
    channels_first = np.moveaxis(images, -1, 1).astype(np.float32)
    return _to_uint8(np.moveaxis(rows @ channels_first @ columns.T, 1, -1), full)


def contrast(images: np.ndarray, indices: np.ndarray, full: float = 255.0, factor: float = CONTRAST) -> np.ndarray:
    """Shrink each value's distance to the mean of its image's channel to ``factor`` of it. ``indices`` are ignored."""
    mean = images.mean(axis=(1, 2), keepdims=True, dtype=np.float32)
    return _to_uint8((images - mean) * np.float32(factor) + mean, full)


def _to_uint8(values: np.ndarray, full: float) -> np.ndarray:
    return np.clip(np.rint(values), 0, full).astype(np.uint8)


def corruption_functions(full: float, image_size: int) -> Mapping[str, Corruption]:
    """The three by name, for raw values 0…``full`` and images of ``image_size`` pixels."""
    sigma = BLUR * max(1.0, image_size / 32)
    return {
        "gaussian_noise": partial(gaussian_noise, full=full),
        "gaussian_blur": partial(gaussian_blur, full=full, sigma=sigma),
        "contrast": partial(contrast, full=full),
    }
