"""Photographs of hands that sign the digits 0–9, as a task."""

from __future__ import annotations

from pathlib import Path

from sparing.core.errors import DataError
from sparing.data.root import data_root
from sparing.tasks.images.folder import ImageFolder

ARCHIVE = "sign_digits/sign_digits_64.zip"


class SignDigits(ImageFolder):
    """Sign-language digits: colour photographs of hands, 64×64, 10 classes, people disjoint (Mavi 2020).

    The 2,062 photographs of the Sign Language Digits Dataset (arXiv 2011.08927, Apache-2.0), read from
    ``sign_digits/sign_digits_64.zip`` under the data root: ``train|val|test/DIGIT/*.jpg`` with 1,456, 203 and 403
    images. The published archive has no splits; cut at random, it would have the same people in all of them. Do not
    augment by flips: they turn a right hand into a left one.

    Args:
        calibration_share: share of each training class for calibration.
    """

    def __init__(self, calibration_share: float = 0.05) -> None:
        super().__init__(ARCHIVE, size=64, calibration_share=calibration_share)
        self.name = "sign_digits"

    def _located(self) -> Path:
        path = data_root(self._root) / ARCHIVE
        if not path.is_file():
            raise DataError(
                f"{path} is missing. Place there a zip file train|val|test/DIGIT/*.jpg of the photographs of "
                "https://github.com/ardamavi/Sign-Language-Digits-Dataset at 64×64, with each person in one split "
                "only; for a folder of class sub-folders as it is published, use the task image_folder"
            )
        return path
