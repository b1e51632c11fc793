"""How far the mean of a sample is from what it should be."""

from __future__ import annotations

import numpy as np

from fedcore_theory.rounds import Array


def standard_errors(values: Array, expected: float) -> float:
    """``(mean - expected) / (s / sqrt(S))`` of S values with sample deviation s."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    # Values that are all the same are a mistake's: it is to look large, not like NaN.
    return float((values.mean() - expected) / max(error, np.finfo(float).tiny ** 0.5))
