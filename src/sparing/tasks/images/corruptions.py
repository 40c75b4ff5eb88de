"""Three fixed corruptions of uint8 images, for the robustness columns.

Kinds and severities are those of CIFAR-10-C at severity 3 of 5 (Hendrycks and Dietterich 2019, "Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations"); blur grows with the image above 32 pixels. Each is a pure
function of the image and its index in the split, so batch size and order do not matter.
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


def gaussian_noise(image: np.ndarray, index: int, full: float = 255.0, sigma: float = NOISE) -> np.ndarray:
    """Add independent noise N(0, (sigma·full)²) to every value of (H, W, C); seeded by ``index``."""
    noise = np.random.RandomState((_SEED + index) % (1 << 32)).standard_normal(image.shape)
    return _to_uint8(image + noise * (sigma * full), full)


def gaussian_blur(image: np.ndarray, index: int, full: float = 255.0, sigma: float = BLUR) -> np.ndarray:
    """Gaussian filter of standard deviation ``sigma`` pixels over (H, W); edges are repeated. ``index`` is ignored."""
    from scipy.ndimage import gaussian_filter

    return _to_uint8(gaussian_filter(image.astype(np.float32), (sigma, sigma, 0), mode="nearest"), full)


def contrast(image: np.ndarray, index: int, full: float = 255.0, factor: float = CONTRAST) -> np.ndarray:
    """Shrink the distance of every value to its channel's mean to ``factor`` of it. ``index`` is ignored."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return _to_uint8((image - mean) * factor + mean, full)


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
