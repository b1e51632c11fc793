"""Odd quintics whose composition carries a whole interval of singular values to 1.

``X <- a X + b X X^T X + c (X X^T)^2 X`` applies ``p(x) = a x + b x^3 + c x^5`` to every singular
value. On an interval [l, u] the best such p has ``max |1 - p| = E`` and reaches it four times with
alternating sign (Remez); the next quintic starts from [1 - E, 1 + E], and composing the best
quintic of each step is best for the composition.

Reference: N. Amsel, D. Persson, C. Musco, R. M. Gower, The Polar Express, arXiv 2505.16932.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt

import torch

Quintic = tuple[float, float, float]

# Upper ends are taken this much wider than exact arithmetic needs: early quintics are so steep
# there that round-off outside of the interval would grow twentyfold with every step.
_SLACK = 1e-2

# Below this relative width the equations of Remez are singular in fp64, and Taylor's quintic,
# whose error is 2.5 (width / 2)^3, is as good.
_NARROW = 1e-3


def value(quintic: Quintic, x: torch.Tensor) -> torch.Tensor:
    """``a x + b x^3 + c x^5``."""
    a, b, c = quintic
    square = x * x
    return x * (a + square * (b + square * c))


def best_quintic(low: float, high: float) -> tuple[Quintic, float]:
    """The odd quintic closest to 1 on [low, high], ``0 < low < high``, and its distance."""
    if 1 - low / high < _NARROW:
        middle = (low + high) / 2
        taylor = (15 / 8 / middle, -10 / 8 / middle**3, 3 / 8 / middle**5)
        ends = torch.tensor([low, high], dtype=torch.float64, device="cpu")
        return taylor, (1 - value(taylor, ends)).abs().max().item()
    # On the CPU whatever the default device is: a handful of numbers, read back at every step.
    # In x^2 the two inner extrema solve a quadratic; they move little from step to step.
    inner = [(3 * low + high) / 4, (low + 3 * high) / 4]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64, device="cpu")
    error, before = 1.0, 0.0
    while abs(error - before) > 1e-14:
        before = error
        x = torch.tensor([low, *inner, high], dtype=torch.float64, device="cpu")
        system = torch.stack([x, x**3, x**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones_like(x)).tolist()
        root = sqrt(9 * b * b - 20 * a * c)
        inner = [sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
    return (a, b, c), error


@lru_cache(maxsize=64)
def quintics(lower: float, tolerance: float) -> tuple[Quintic, ...]:
    """Quintics that carry [lower, 1] to within ``tolerance`` of 1, one after the other.

    Below ``lower`` the composition falls off: up to ``lower / 4`` it stays 3e-3 away from 1, so
    that a value which arrives was above ``lower / 4``.
    """
    low, high, error = lower, 1 + _SLACK, 1.0
    chain = []
    while error > tolerance:
        quintic, error = best_quintic(low, high)
        chain.append(quintic)
        low, high = 1 - error, 1 + (1 + _SLACK) * error
    return tuple(chain)
