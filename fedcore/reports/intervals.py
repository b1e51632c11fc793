"""Means over seeds with Student-t intervals.

    mean ± t(0.975, n - 1) · s / sqrt(n),    s² = Σ (x - mean)² / (n - 1)

One run has no interval: its spread is unknown, not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isinf, sqrt
from statistics import fmean, median, stdev

from fedcore.errors import missing_extra

try:
    from scipy.stats import t as student_t
except ImportError as error:
    raise missing_extra("scipy", "run") from error

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean of ``n`` values; ``half_width`` is ``None`` for fewer than two."""

    mean: float | None
    half_width: float | None
    n: int

    @property
    def low(self) -> float | None:
        """Lower end of the interval."""
        return None if self.mean is None or self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        """Upper end of the interval."""
        return None if self.mean is None or self.half_width is None else self.mean + self.half_width


def estimate(values: Sequence[float | None]) -> Estimate:
    """The mean of the values that are not ``None`` and its 95% Student-t interval.

    The interval is not cut off at 0 or 1, even for a rate.

    Example:
        >>> estimate([0.5])
        Estimate(mean=0.5, half_width=None, n=1)
        >>> round(estimate([1.0, 2.0, 3.0]).half_width, 4)
        2.4841
    """
    known = [value for value in values if value is not None]
    n = len(known)
    if n == 0:
        return Estimate(None, None, 0)
    if n == 1:
        return Estimate(known[0], None, 1)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Estimate(fmean(known), quantile * stdev(known) / sqrt(n), n)


def median_until(counts: Sequence[int | None]) -> float | None:
    """The median of waiting times, where ``None`` is a run that never got there.

    Such a run counts as later than any other, so that leaving it out cannot flatter the median;
    ``None`` if the median itself was not reached.

    Example:
        >>> median_until([4, None, 6]), median_until([4, None])
        (6.0, None)
    """
    if not counts:
        return None
    middle = float(median([inf if count is None else count for count in counts]))
    return None if isinf(middle) else middle
