"""Odd quintics whose composition carries a whole interval of singular values to 1.

``X <- a X + b X X^T X + c (X X^T)^2 X`` applies ``p(x) = a x + b x^3 + c x^5`` to every singular
value. On an interval [l, u] the best such p has ``max |1 - p| = E`` and reaches it four times with
alternating sign (Remez); the next quintic starts from [1 - E, 1 + E], and composing the best
quintic of each step is best for the composition.

Reference: N. Amsel, D. Persson, C. Musco, R. M. Gower, The Polar Express, arXiv 2505.16932.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

Quintic = tuple[float, float, float]

# Upper ends are taken this much wider than exact arithmetic needs: early quintics are so steep
# there that round-off outside of the interval would grow twentyfold with every step.
_SLACK = 1e-2

# Below this relative width the equations of Remez are singular in fp64, and Taylor's quintic,
# whose error is 2.5 (width / 2)^3, is as good.
_NARROW = 1e-3


def value(quintic: Quintic, x: np.ndarray) -> np.ndarray:
    """``a x + b x^3 + c x^5``."""
    a, b, c = quintic
    square = x * x
    return x * (a + square * (b + square * c))


def best_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd quintic closest to 1 on [low, high], ``0 < low < high``, and its distance."""
    if 1 - low / high < _NARROW:
        middle = (low + high) / 2
        taylor = (15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5)
        return taylor, float(np.abs(1 - value(taylor, np.array([low, high]))).max())
    # In x^2 the two inner extrema solve a quadratic; they move little from step to step.
    inner = np.array([(3 * low + high) / 4, (low + 3 * high) / 4])
    error, before = 1.0, 0.0
    while abs(error - before) > 1e-14:
        before = error
        x = np.array([low, *inner, high])
        system = np.stack([x, x**3, x**5, [1, -1, 1, -1]], axis=1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)
        inner = np.sqrt((-3 * b + np.array([-root, root])) / (10 * c))
    return (float(a), float(b), float(c)), float(error)


@lru_cache(maxsize=64)
def quintics(lower: float, tolerance: float) -> tuple[Quintic, ...]:
    """Quintics that carry [lower, 1] to within ``tolerance`` of 1, one after the other.

    Below ``lower`` the composition falls off: up to ``lower / 4`` it stays 3e-3 away from 1, so
    that a value which arrives was above ``lower / 4``.
    """
    low, high, error = lower, 1 + _SLACK, 1.0
    found = []
    while error > tolerance:
        quintic, error = best_quintic(low, high)
        found.append(quintic)
        low, high = 1 - error, 1 + (1 + _SLACK) * error
    return tuple(found)
