"""Tri-factor adapters ``B R A`` of N clients around common bases."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fedcore_theory.rounds import Array


@dataclass(frozen=True)
class TriClients:
    """Factors of N clients and what they count.

    Attributes:
        A: ``(N, r, d_in)``.
        R: ``(N, r, r)``, the cores.
        B: ``(N, d_out, r)``.
        weights: ``(N,)``, their sum is 1.
    """

    A: Array
    R: Array
    B: Array
    weights: Array

    @property
    def products(self) -> Array:
        """``(N, d_out, d_in)``: ``B_n R_n A_n``."""
        return self.B @ self.R @ self.A

    @property
    def mean_product(self) -> Array:
        """``M = sum_n w_n B_n R_n A_n``."""
        return np.asarray(np.einsum("n,noi->oi", self.weights, self.products))

    @property
    def uploads(self) -> dict[str, Array]:
        """The factors by name, as a round takes them."""
        return {"A": self.A, "R": self.R, "B": self.B}

    def regauged(self, left: Array, right: Array) -> TriClients:
        """``(B X, X^{-1} R Y^{-1}, Y A)``: other factors of the same products.

        Args:
            left: ``(N, r, r)`` invertible, the X of every client.
            right: ``(N, r, r)`` invertible, the Y.
        """
        core = np.linalg.solve(left, self.R) @ np.linalg.inv(right)
        return replace(self, A=right @ self.A, R=core, B=self.B @ left)


@dataclass(frozen=True)
class CommonBases:
    """``A (r, d_in)`` and ``B (d_out, r)``, the same on all clients."""

    A: Array
    B: Array


def drifting_clients(
    random: np.random.Generator, clients: int, width: int, rank: int, drift: float
) -> tuple[TriClients, CommonBases]:
    """Bases ``common + drift * Gaussian`` of entries with variance ``1/width``, cores near I.

    The cores are ``I + 0.3 N(0, 1)``, the weights equal.
    """
    scale = 1 / np.sqrt(width)
    A, B = (scale * random.standard_normal(s) for s in ((rank, width), (width, rank)))
    drifted = TriClients(
        A=A + drift * scale * random.standard_normal((clients, rank, width)),
        R=np.eye(rank) + 0.3 * random.standard_normal((clients, rank, rank)),
        B=B + drift * scale * random.standard_normal((clients, width, rank)),
        weights=np.full(clients, 1 / clients),
    )
    return drifted, CommonBases(A, B)


def haar(random: np.random.Generator, count: int, size: int) -> Array:
    """``(count, size, size)`` orthogonal matrices, uniform."""
    q, r = np.linalg.qr(random.standard_normal((count, size, size)))
    signs = np.sign(np.diagonal(r, axis1=1, axis2=2))
    return np.asarray(q * signs[:, None, :])
