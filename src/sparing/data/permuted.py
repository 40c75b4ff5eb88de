"""Images whose pixels change places: one set becomes several that look unlike each other (permuted MNIST)."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from jaxtyping import Integer, UInt8
from numpy import ndarray

from sparing.core.fingerprint import fingerprint
from sparing.data.images import LabelledImages


class PermutedImages:
    """An image source of every image under every permutation, made when asked for: no pixel is kept twice.

    The places of all pixels of an image are exchanged, its channels stay together (Goodfellow et al. 2013,
    arXiv:1312.6211, section 4.1). Of T permutations, image r under permutation t is row r · T + t, so that the first
    rows are of all of them.

    Args:
        images: of one size.
        permutations: row t holds, for each place of a flattened image, the place its pixel comes from.
    """

    def __init__(self, images: LabelledImages, permutations: Integer[ndarray, "t places"]) -> None:
        self.images, self.permutations = images, permutations

    def __len__(self) -> int:
        return len(self.permutations) * len(self.images)

    def take(self, rows: Integer[ndarray, " n"]) -> UInt8[ndarray, "n h w c"]:
        """The images at ``rows``, at the size of model inputs."""
        row, number = np.divmod(rows, len(self.permutations))
        pixels = self.images.pixels(row)
        flat = pixels.reshape(len(pixels), -1, pixels.shape[-1])
        return np.take_along_axis(flat, self.permutations[number][:, :, None], axis=1).reshape(pixels.shape)

    def where(self, row: int) -> str:
        """The place of an image for messages."""
        row, number = divmod(row, len(self.permutations))
        return f"{self.images.where}: record {self.images.rows[row]} under permutation {number + 1}"

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint([self.images.fingerprint(), self.permutations])

    def fingerprint(self) -> str:
        """Changes with any image and any permutation; computed once."""
        return self._fingerprint
