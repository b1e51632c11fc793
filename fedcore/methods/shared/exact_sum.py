"""A weighted sum of rows that arrive one by one, in any order."""

from __future__ import annotations

from fractions import Fraction
from math import isfinite

import torch
from torch import Tensor


class WeightedSum:
    """``sum_n w_n x_n`` and ``sum_n w_n``: O(P) memory whatever the number of rows.

    A number of the sum is two fp64 values, the second of which takes what the additions round off,
    about 106 bits together; weights add up exactly. The terms ``w_n x_n`` are rounded to fp64, each
    by itself. Hence

    * sums merge associatively, so that they can be formed in a tree;
    * another order moves the sum by parts in 2^106 of its largest intermediate value. The mean in
      fp32 or fp64 has the same bits in every order, unless it lies that close to the middle between
      two numbers of its dtype;
    * the mean of identical fp32, fp16 or bf16 rows is that row, and so is that of fp64 rows up to
      one unit in the last place.

    Example:
        >>> total = WeightedSum()
        >>> total.add(torch.tensor([1.0, 2.0]), 1.0)
        >>> total.add(torch.tensor([3.0, 4.0]), 3.0)
        >>> total.mean().tolist()
        [2.5, 3.5]
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._lost: Tensor | None = None
        self._weight = Fraction(0)

    @property
    def weight(self) -> float:
        """The total weight, rounded once."""
        return float(self._weight)

    def add(self, row: Tensor, weight: float) -> None:
        """Add one row ``(P,)``, whose values are not looked at; one of weight 0 is not read.

        Raises:
            ValueError: a weight that is negative or not finite, or a row of another shape.
        """
        if not isfinite(weight) or weight < 0:
            raise ValueError(f"weight is {weight}; weights are finite and not negative")
        if self._sum is not None and row.shape != self._sum.shape:
            shapes = tuple(row.shape), tuple(self._sum.shape)
            raise ValueError(f"row has shape {shapes[0]}, those before it {shapes[1]}")
        if weight:
            self._include(row.to(torch.float64) * weight)
            self._weight += Fraction(weight)

    def merge(self, other: WeightedSum) -> None:
        """Add another sum to this one; the other stays as it is.

        Raises:
            ValueError: it is a sum of rows of another shape.
        """
        if other._sum is None or other._lost is None:
            return
        if self._sum is not None and other._sum.shape != self._sum.shape:
            shapes = tuple(other._sum.shape), tuple(self._sum.shape)
            raise ValueError(f"other has rows of shape {shapes[0]}, this sum of {shapes[1]}")
        self._include(other._sum)
        self._lost = other._lost if self._lost is None else self._lost + other._lost
        self._weight += other._weight

    def mean(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weighted mean ``(P,)``.

        Raises:
            ValueError: nothing of positive weight was added.
        """
        if self._sum is None or self._lost is None:
            raise ValueError("nothing of positive weight was added")
        return ((self._sum + self._lost) / self.weight).to(dtype)

    def _include(self, term: Tensor) -> None:
        if self._sum is None or self._lost is None:
            self._sum, self._lost = term, torch.zeros_like(term)
            return
        # Knuth's sum: ``total`` and ``rounded`` add up to the exact sum of two numbers.
        total = self._sum + term
        part = total - self._sum
        rounded = (self._sum - (total - part)) + (term - part)
        self._sum, self._lost = total, self._lost + rounded
