"""Factors with Gaussian noise, in many draws at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedcore_theory.rounds import Array


@dataclass(frozen=True)
class NoisyCase:
    """N clients' factors of an 8 x 10 weight at rank 3, and S draws of noise for each.

    Attributes:
        A: ``(N, 3, 10)``.
        B: ``(N, 8, 3)``.
        noise_A: ``(S, N, 3, 10)``, standard normal.
        noise_B: ``(S, N, 8, 3)``, standard normal.
    """

    A: Array
    B: Array
    noise_A: Array
    noise_B: Array

    @classmethod
    def drawn(cls, seed: int, clients: int, draws: int) -> NoisyCase:
        """Standard normal factors and noise."""
        random = np.random.default_rng(seed)
        return cls(
            random.standard_normal((clients, 3, 10)),
            random.standard_normal((clients, 8, 3)),
            random.standard_normal((draws, clients, 3, 10)),
            random.standard_normal((draws, clients, 8, 3)),
        )


def noise_power(A: Array, B: Array, sigma: float) -> float:
    """``sigma^2 (d_out ||A||_F^2 + d_in ||B||_F^2) + sigma^4 r d_out d_in``."""
    return linear_power(A, B, sigma) + quadratic_power(A, B, sigma)


def linear_power(A: Array, B: Array, sigma: float) -> float:
    """What one factor's noise does beside the other factor."""
    return float(sigma**2 * (len(B) * (A**2).sum() + A.shape[1] * (B**2).sum()))


def quadratic_power(A: Array, B: Array, sigma: float) -> float:
    """What the two noises do to each other."""
    return float(sigma**4 * A.size * len(B))


def squared_distances(products: Array, exact: Array) -> Array:
    """``||product - exact||_F^2`` of every draw, ``(S,)``."""
    return np.asarray(((products - exact) ** 2).sum((1, 2)))
