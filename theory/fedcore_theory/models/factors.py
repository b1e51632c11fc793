"""Random factors of N clients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedcore_theory.rounds import Array


@dataclass(frozen=True)
class ClientFactors:
    """Factors of N clients and what they count.

    Attributes:
        A: ``(N, r, d_in)``.
        B: ``(N, d_out, r)``.
        weights: ``(N,)``, their sum is 1.
    """

    A: Array
    B: Array
    weights: Array

    @property
    def mean_product(self) -> Array:
        """``M = sum_n w_n B_n A_n``, formed entry by entry."""
        return np.asarray(np.einsum("n,nor,nri->oi", self.weights, self.B, self.A))


def random_factors(
    random: np.random.Generator, clients: int, d_out: int, d_in: int, rank: int
) -> ClientFactors:
    """Standard normal factors and Dirichlet(1) weights."""
    return ClientFactors(
        A=random.standard_normal((clients, rank, d_in)),
        B=random.standard_normal((clients, d_out, rank)),
        weights=random.dirichlet(np.ones(clients)),
    )


def relative(found: Array, exact: Array) -> float:
    """``||found - exact||_F / ||exact||_F``."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
