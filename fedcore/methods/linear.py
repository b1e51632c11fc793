"""Methods whose server only forms the weighted mean of the uploads."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.methods.base import EMPTY_ROUND, Aggregate, Broadcast, Method, unchanged
from fedcore_kernels import weighted_mean
from fedcore_kernels.layout import FactorLayout


class LinearMethod(Method):
    """The next global row takes the weighted mean of whatever the clients sent.

    The batch form accumulates in fp32 in client order (fp64 uploads in fp64); the streaming form
    in fp64, so that arrival order cannot show after rounding.
    """

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """``sum_n w_n upload_n`` for every slot of the upload, the rest as it was."""
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        return self.from_mean(
            weighted_mean(cohort.updates, cohort.weights), cohort.layout, previous
        )

    def from_mean(self, mean: Tensor, layout: FactorLayout, previous: Broadcast) -> Aggregate:
        """The mean itself, in the slots of the upload."""
        row = previous.layout.scatter(previous.row, layout, mean.to(previous.row.dtype))
        return Aggregate(row, layout)

    def accumulator(self) -> LinearAccumulator:
        """An empty sum, for uploads that arrive one by one."""
        return LinearAccumulator()


class LinearAccumulator:
    """A weighted sum of rows in fp64 and its total weight: O(P) memory whatever the cohort.

    Sums merge associatively, so they can be formed in a tree.

    Example:
        >>> total = LinearAccumulator()
        >>> total.add(torch.tensor([1.0, 2.0]), 1.0)
        >>> total.add(torch.tensor([3.0, 4.0]), 3.0)
        >>> total.result().tolist()
        [2.5, 3.5]
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._weight = 0.0

    def add(self, row: Tensor, weight: float) -> None:
        """Add one upload ``(P,)`` with a non-negative weight."""
        term = row.to(torch.float64) * weight
        self._sum = term if self._sum is None else self._sum + term
        self._weight += weight

    def merge(self, other: LinearAccumulator) -> None:
        """Add another sum to this one."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
        self._weight += other._weight

    def result(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weighted mean ``(P,)``.

        Raises:
            ValueError: nothing of positive weight was added.
        """
        if self._sum is None or self._weight <= 0:
            raise ValueError("nothing of positive weight was added")
        return (self._sum / self._weight).to(dtype)
