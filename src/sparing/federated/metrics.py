"""How much a model that learns task after task knows at the end, and what it forgot on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparing.core.errors import InvalidValue, shown


class ContinualMetrics:
    """Figures of a matrix A (T, T) of accuracies: row i is after learning task i, column j is task j, both from 0.

    Entries of tasks that are not learnt yet (j > i) are not looked at. Average accuracy and forgetting are those of
    Chaudhry et al. 2018 (arXiv:1801.10112, section 3.1), backward transfer that of Lopez-Paz and Ranzato 2017
    (arXiv:1706.08840, equation 3). FedKNOW (Luopan et al. 2023, arXiv:2212.01738) shows the forgetting rate.

    Args:
        A: accuracies in 0…1; fewer rows than columns where a run has not ended.

    Raises:
        InvalidValue: no matrix with a row and at most as many rows as columns; entries that are looked at outside 0…1.
    """

    def __init__(self, A: Any) -> None:
        matrix = np.asarray(A, dtype=np.float64)
        if matrix.ndim != 2 or not 0 < len(matrix) <= matrix.shape[1]:
            raise InvalidValue(
                f"a matrix of accuracies of shape {matrix.shape}; (tasks learnt, tasks), with a row for each task "
                "learnt, is expected"
            )
        self.A = np.tril(matrix)
        """A, with 0 for tasks that were not learnt yet."""
        if not ((self.A >= 0) & (self.A <= 1)).all():
            wrong = np.argwhere(~((self.A >= 0) & (self.A <= 1)))[0]
            raise InvalidValue(
                f"A[{wrong[0]}, {wrong[1]}] = {shown(float(self.A[tuple(wrong)]))}; an accuracy in 0…1 is expected"
            )

    @property
    def average_accuracy(self) -> Float[ndarray, " rows"]:
        """After each task, the mean of A[i, j] over the tasks j ≤ i learnt so far."""
        return self.A.sum(axis=1) / np.arange(1, len(self.A) + 1)

    @property
    def forgetting(self) -> Float[ndarray, " rows"]:
        """After each task, the mean over j < i of max over j ≤ l < i of A[l, j], less A[i, j]; 0 after the first.

        Negative where old tasks are answered better than ever before.
        """
        lost = [[self.A[j:i, j].max() - self.A[i, j] for j in range(i)] for i in range(len(self.A))]
        return np.array([np.mean(row) if row else 0.0 for row in lost])

    @property
    def forgetting_rate(self) -> Float[ndarray, " rows"]:
        """After each task, the mean over j < i of (A[j, j] − A[i, j]) / A[j, j]; 0 after the first.

        A task on which nothing was ever right (A[j, j] = 0) has nothing to be forgotten and takes no part.
        """
        rates = [
            [(self.A[j, j] - self.A[i, j]) / self.A[j, j] for j in range(i) if self.A[j, j] > 0]
            for i in range(len(self.A))
        ]
        return np.array([np.mean(row) if row else 0.0 for row in rates])

    @property
    def backward_transfer(self) -> float:
        """Mean over j < T − 1 of A[T − 1, j] − A[j, j], T the number of tasks learnt; 0 for a single one.

        Positive where later tasks helped earlier ones.
        """
        last = len(self.A) - 1
        return float(np.mean(self.A[last, :last] - np.diag(self.A)[:last])) if last else 0.0
