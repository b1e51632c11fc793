"""Methods whose server needs the weighted mean of the uploads and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.data.validation import check_row, check_weight
from fedcore.errors import FedcoreError
from fedcore.methods.base import EMPTY_ROUND, Aggregate, Broadcast, Method, unchanged
from fedcore.methods.shared.exact_sum import WeightedSum
from fedcore.methods.shared.uploads import with_broadcast_rows
from fedcore_kernels import FactorLayout, weighted_mean


class LinearMethod(Method):
    """The next global row follows from the weighted mean of whatever the clients sent.

    Three ways lead there and agree to rounding: a batch (:meth:`aggregate`), which accumulates in
    fp32 in client order (fp64 uploads in fp64); a stream (:meth:`accumulator`), in fp64 and in any
    order; and a sum formed elsewhere, for instance by secure aggregation (:meth:`from_mean`).
    """

    def aggregate(self, cohort: Cohort, previous: Broadcast) -> Aggregate:
        """:meth:`from_mean` of ``sum_n w_n upload_n``, of the :meth:`completed` cohort.

        Raises:
            FedcoreError: clients of different ranks where the method needs equal ones.
        """
        self.check_cohort(cohort)
        if not len(cohort):
            return unchanged(previous, EMPTY_ROUND)
        full = self.completed(cohort, previous)
        return self.from_mean(weighted_mean(full.updates, full.weights), full.layout, previous)

    def completed(self, cohort: Cohort, previous: Broadcast) -> Cohort:
        """Clients of lower rank leave the rows that they lack as they are."""
        rows_of_factors = self.capabilities.mixed_ranks and self.capabilities.uploads == "factors"
        return with_broadcast_rows(cohort, previous) if rows_of_factors else cohort

    def from_mean(self, mean: Tensor, layout: FactorLayout, previous: Broadcast) -> Aggregate:
        """The mean itself, in the slots of the upload; the rest as it was.

        Raises:
            KernelInputError: ``mean`` is not a row of ``layout``.
        """
        layout.check(mean, "mean")
        row = previous.layout.scatter(previous.row, layout, mean.to(previous.row.dtype))
        return Aggregate(row, layout)

    def accumulator(self, layout: FactorLayout, previous: Broadcast) -> LinearAccumulator:
        """An empty sum for uploads that arrive one by one.

        Args:
            layout: the upload layout of the round.
            previous: the global state that the clients started from.
        """
        return LinearAccumulator(self, layout, previous)


class LinearAccumulator:
    """A round of uploads of which only their sum is kept: O(P) memory whatever their number.

    Accumulators of one round merge in any tree. What arrival order can change is said at
    :class:`~fedcore.methods.shared.exact_sum.WeightedSum`: nothing, in practice, of the sum. Equal
    ranks and distinct clients are for the caller to see to, who knows the clients.
    """

    def __init__(self, method: LinearMethod, layout: FactorLayout, previous: Broadcast) -> None:
        self._method, self._layout, self._previous = method, layout, previous
        self._sum = WeightedSum()
        self._uploads = 0

    def __len__(self) -> int:
        """Uploads added, with those of merged accumulators."""
        return self._uploads

    def add(self, row: Tensor, weight: float) -> None:
        """Add one upload ``(P,)`` with its weight, usually a number of examples.

        Raises:
            FedcoreError: a row of another size, a weight that is negative or not finite, or the
                first tensor of the row that holds such a value; the sum is then what it was.
        """
        if row.shape != (self._layout.size,):
            raise FedcoreError(f"row has shape {tuple(row.shape)}; pass ({self._layout.size},)")
        problem = check_weight(weight) or check_row(row, self._layout)
        if problem:
            raise FedcoreError(problem)
        self._sum.add(row, weight)
        self._uploads += 1

    def merge(self, other: LinearAccumulator) -> None:
        """Add what another accumulator of the same round holds; the other stays as it is.

        Raises:
            FedcoreError: it belongs to another method or layout.
        """
        if (other._method, other._layout) != (self._method, self._layout):
            raise FedcoreError(
                f"an accumulator of {other._method} cannot be merged into one of {self._method} "
                "unless method and layout agree"
            )
        self._sum.merge(other._sum)
        self._uploads += other._uploads

    def result(self) -> Aggregate:
        """What :meth:`LinearMethod.aggregate` of the same uploads gives, to rounding.

        The mean is rounded once, from fp64 to the dtype of the global row. Without an upload the
        global state is kept, flagged.

        Raises:
            FedcoreError: every upload has weight zero.
        """
        if not self._uploads:
            return unchanged(self._previous, EMPTY_ROUND)
        if not self._sum.weight:
            raise FedcoreError("the weights of all uploads are zero")
        return self._method.from_mean(self._sum.mean(torch.float64), self._layout, self._previous)
