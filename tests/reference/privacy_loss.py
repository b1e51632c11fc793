"""Privacy of the Poisson-subsampled Gaussian from its definition, without an accountant.

With one record more, a step shows ``P = (1 - q) N(0, s^2) + q N(1, s^2)`` in place of ``Q = N(0,
s^2)``. Renyi divergences by quadrature in arbitrary precision; deltas of many steps by convolving
the distribution of the privacy loss on a grid, rounded up for one bound and down for the other.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

STEP = 2e-3


def renyi(order: float, noise: float, rate: float) -> float:
    """``max(D(P || Q), D(Q || P))`` of Renyi order ``order``, by quadrature with 30 digits."""
    q, s, a = mpmath.mpf(rate), mpmath.mpf(noise), mpmath.mpf(order)

    def density(x, mean):
        return mpmath.npdf(x, mean, s)

    def mixture(x):
        return (1 - q) * density(x, 0) + q * density(x, 1)

    def divergence(one, other):
        ends = [-40 * s, *(k * s for k in range(-20, 21, 4)), *range(2, math.ceil(order) + 2, 2)]
        ends = sorted({*ends, 40 * s + order})
        value = mpmath.quad(lambda x: one(x) ** a * other(x) ** (1 - a), ends)
        return mpmath.log(value) / (a - 1)

    with mpmath.workdps(30):
        center = divergence(mixture, lambda x: density(x, 0))
        back = divergence(lambda x: density(x, 0), mixture)
        return float(max(center, back))


def epsilon_from_renyi(orders: list[float], divergences: list[float], delta: float) -> float:
    """The least over orders of Canonne, Kamath and Steinke's conversion (arXiv:2004.00010, 12)."""
    return min(
        d + math.log1p(-1 / a) - math.log(delta * a) / (a - 1)
        for a, d in zip(orders, divergences, strict=True)
    )


def exact_epsilon(noise: float, rate: float, steps: int, delta: float) -> tuple[float, float]:
    """A lower and an upper bound of the epsilon of ``steps`` steps, for both adjacencies."""
    bounds = [_epsilon(noise, rate, steps, delta, add) for add in (False, True)]
    return max(low for low, _ in bounds), max(high for _, high in bounds)


def _epsilon(noise, rate, steps, delta, add):
    """Of neighbours in one direction; the pair of losses rounded down and up."""
    found = []
    for up in (False, True):
        losses, masses = _losses(noise, rate, add, up)
        size = 1 << math.ceil(math.log2(steps * len(masses)))
        # The mass of many steps, by the theorem of convolution.
        total = np.fft.irfft(np.fft.rfft(masses, size) ** steps, size)
        total = np.maximum(total[: steps * (len(masses) - 1) + 1], 0)
        values = steps * losses[0] + STEP * np.arange(len(total))
        # The mass that a grid cuts off is lost for one bound and counts whole for the other.
        lost = (1 - masses.sum()) * steps if up else 0.0

        def excess(epsilon, values=values, total=total, lost=lost):
            above = values > epsilon
            return float(total[above] @ -np.expm1(epsilon - values[above])) + lost - delta

        found.append(brentq(excess, 0, values[-1]) if excess(0) > 0 else 0.0)
    return found


def _losses(noise, rate, add, up):
    """The grid of losses and the mass of each, for outputs within 12 deviations."""
    x = np.linspace(-12 * noise, 12 * noise + 1, 400_001)
    edges = (x[1:] + x[:-1]) / 2
    plain = np.diff(norm.cdf(edges, scale=noise))
    shifted = np.diff(norm.cdf(edges, 1, noise))
    masses = plain if add else (1 - rate) * plain + rate * shifted

    # ln P / Q at an output: monotone, so an interval's ends bound it.
    def ratio(at):
        exponent = (2 * at - 1) / (2 * noise**2)
        return logsumexp(
            [
                np.full_like(at, math.log1p(-rate) if rate < 1 else -np.inf),
                math.log(rate) + exponent,
            ],
            axis=0,
        )

    ends = ratio(edges) * (-1 if add else 1)
    low, high = np.minimum(ends[1:], ends[:-1]), np.maximum(ends[1:], ends[:-1])
    places = np.ceil(high / STEP) if up else np.floor(low / STEP)
    places = places.astype(np.int64)
    least = places.min()
    return STEP * np.arange(least, places.max() + 1), np.bincount(places - least, masses)
