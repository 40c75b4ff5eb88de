"""Training: which samples when, optimizers by name, an exactly resumable loop by Lightning, and the step ``train``.

Importing this imports neither torch nor Lightning.
"""

from sparing.core.training.batches import Batches, IndexBatch, SeededItems, reseed
from sparing.core.training.fit import FitResult, fit
from sparing.core.training.optimization import (
    decay_groups,
    make_optimizer,
    make_scheduler,
    optimizer_class,
    scheduler_class,
)
from sparing.core.training.step import Train

__all__ = [
    "Batches",
    "FitResult",
    "IndexBatch",
    "SeededItems",
    "Train",
    "decay_groups",
    "fit",
    "make_optimizer",
    "make_scheduler",
    "optimizer_class",
    "reseed",
    "scheduler_class",
]
