"""Whole numbers for real ones: the binnings of click-through data. Pure functions of arrays without missing values."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

LARGEST = 1 << 30
"""Bins end here."""


def _whole(values: Float[ndarray, " n"]) -> Int[ndarray, " n"]:
    return np.clip(np.floor(values), -LARGEST, LARGEST).astype(np.int64)


def log_square_bins(x: Float[ndarray, " n"]) -> Int[ndarray, " n"]:
    """⌊ln(x² + 1)⌋ of each number (n,), the binning of xDeepInt's published recipe; the sign is lost."""
    with np.errstate(over="ignore"):
        return _whole(np.log1p(np.square(x.astype(np.float64))))


def libffm_bins(x: Float[ndarray, " n"]) -> Int[ndarray, " n"]:
    """⌊ln(x)²⌋ of numbers above 2, others apart (Juan et al. 2016, section 3.1 and libFFM's recipe for Criteo).

    A number x ≤ 2 becomes ⌊x⌋, −3 at the least, and all is moved up by 6 for x > 2 and by 3 for the rest, so that every
    bin is at least 0 and none is of both kinds.
    """
    large = x > 2
    log = np.log(np.where(large, x, 1.0).astype(np.float64))
    return np.where(large, _whole(log * log) + 6, np.clip(_whole(x), -3, 2) + 3)


def linear_bins(x: Float[ndarray, " n"], width: float = 1.0) -> Int[ndarray, " n"]:
    """⌊x / width⌋ of each number (n,)."""
    return _whole(x.astype(np.float64) / width)


def log2_bins(x: Float[ndarray, " n"], width: float = 1.0) -> Int[ndarray, " n"]:
    """⌊log₂(x + 1) / width⌋ of each number (n,); those below 0 count as 0."""
    return _whole(np.log2(np.maximum(x, 0).astype(np.float64) + 1) / width)


def quantile_bins(x: Float[ndarray, " n"], edges: Float[ndarray, " e"]) -> Int[ndarray, " n"]:
    """How many of the rising ``edges`` (e,) are at most each number (n,): 0 … e."""
    return np.searchsorted(edges, x, side="right").astype(np.int64)


def signed_log(x: Float[ndarray, " n"]) -> Float[ndarray, " n"]:
    """sign(x) ln(abs(x) + 1) of each number (n,): for numbers that are fed to a network as they are."""
    return np.sign(x) * np.log1p(np.abs(x))
