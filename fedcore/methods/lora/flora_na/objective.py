"""How far a product of two combinations of the clients' factors is from the mean product.

For factors stored as rows, ``left_n`` (that is ``B_n^T``) and ``right_n`` (``A_n``), shares ``w``
and the mean product ``M = sum_n w_n left_n^T right_n``

    f(p, q) = ||M - (sum_n p_n left_n)^T (sum_n q_n right_n)||_F^2
            = ||M||^2 - 2 p^T H q + p^T R(q) p = ||M||^2 - 2 p^T H q + q^T T(p) q

With the Gram blocks ``S^l_ij = left_i left_j^T`` and ``S^r_ij = right_i right_j^T`` all of it is
small: ``H_ij = sum_n w_n <S^l_ni, S^r_nj>``, ``R_ij(q) = <S^l_ij, sum_ab q_a q_b S^r_ab>`` and
``T_ij(p) = <S^r_ij, sum_ab p_a p_b S^l_ab>``. Arrays carry modules L and starts S in front; there
is no loop over either, nor over clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from fedcore_kernels import product_norm


@dataclass(frozen=True)
class PairObjective:
    """``f`` of every module in terms of Gram blocks, all fp64.

    Attributes:
        left, right: ``(L, N N, r r)`` the blocks ``S^l_ij`` and ``S^r_ij``, one row per pair.
        shares: ``(N,)`` positive, summing to 1.
        cross: ``(L, N, N)`` ``H``, the inner products of M with ``left_i^T right_j``.
        gram: ``(L, N, N)`` the inner products of the clients' own products.
    """

    left: Tensor
    right: Tensor
    shares: Tensor
    cross: Tensor
    gram: Tensor

    @classmethod
    def build(cls, left: Tensor, right: Tensor, shares: Tensor) -> PairObjective:
        """From blocks ``(L, N, N, r, r)`` as :func:`fedcore_kernels.block_grams` returns them."""
        clients = len(shares)
        rows = left.reshape(len(left), clients, -1), right.reshape(len(right), clients, -1)
        # <S_ni, S'_nj> = <S_in, S'_jn>: transposing both blocks changes nothing.
        weighted = left * shares[:, None, None]
        cross = weighted.reshape(rows[0].shape) @ rows[1].mT
        pairs = tuple(side.reshape(len(side), clients * clients, -1) for side in rows)
        gram = (pairs[0] * pairs[1]).sum(-1).unflatten(-1, (clients, clients))
        return cls(pairs[0], pairs[1], shares, cross, gram)

    def select(self, modules: Tensor) -> PairObjective:
        """The objective of some modules."""
        return PairObjective(
            self.left[modules],
            self.right[modules],
            self.shares,
            self.cross[modules],
            self.gram[modules],
        )

    @property
    def target(self) -> Tensor:
        """``||M||_F^2``, (L,)."""
        return self.gram @ self.shares @ self.shares

    @property
    def scale(self) -> Tensor:
        """``(sum_n w_n ||left_n^T right_n||_F)^2``, (L,): what M could be if nothing cancelled."""
        # The trace of a product of positive matrices; rounding can take it below zero.
        sizes = self.gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
        return (sizes @ self.shares).square()

    @property
    def traces(self) -> tuple[Tensor, Tensor]:
        """``<left_i, left_j>`` and ``<right_i, right_j>``, (L, N, N)."""
        clients = len(self.shares)
        rank = isqrt(self.left.shape[-1])
        left, right = (
            side[..., :: rank + 1].sum(-1).unflatten(-1, (clients, clients))
            for side in (self.left, self.right)
        )
        return left, right

    def left_curvature(self, q: Tensor) -> Tensor:
        """``R(q)`` for ``q (L, S, N)``: (L, S, N, N)."""
        return _curvature(self.left, self.right, q)

    def right_curvature(self, p: Tensor) -> Tensor:
        """``T(p)`` for ``p (L, S, N)``: (L, S, N, N)."""
        return _curvature(self.right, self.left, p)

    def value(self, p: Tensor, q: Tensor) -> Tensor:
        """``f(p, q)``, (L, S); its error is about 1e-15 :attr:`scale`, of either sign."""
        return self.value_at(p, q, self.right_curvature(p))

    def value_at(self, p: Tensor, q: Tensor, curvature: Tensor) -> Tensor:
        """``f(p, q)`` when ``T(p)`` is known already."""
        reached = apply(curvature, q) - 2 * p @ self.cross
        return self.target[:, None] + (q * reached).sum(-1)


def exact_objective(left: Tensor, right: Tensor, shares: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``f(p, q)`` without the cancellation of its Gram form, through QR cores in fp64.

    ``M - B^ A^ = sum_j (w_j left_j - q_j sum_i p_i left_i)^T right_j``; rounding is relative to
    these terms and not to their squares, so that f is known to 1e-30 instead of 1e-15.

    Args:
        left: ``(N, L, r, k)``.
        right: ``(N, L, r, k')``.
        shares: ``(N,)`` fp64.
        p, q: ``(L, N)`` fp64.

    Returns:
        ``(L,)`` fp64, never negative.
    """
    wide = left.double().transpose(0, 1)
    combined = torch.einsum("ln,lnrk->lrk", p, wide)[:, None]
    rest = shares[:, None, None] * wide - q[..., None, None] * combined
    stacked = rest.flatten(1, 2), right.transpose(0, 1).flatten(1, 2)
    norm: Tensor = product_norm(*stacked)
    return norm.square()


def apply(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix (..., a, b)`` times ``vector (..., b)``."""
    return (matrix @ vector[..., None])[..., 0]


def _curvature(blocks: Tensor, others: Tensor, coefficients: Tensor) -> Tensor:
    clients = coefficients.shape[-1]
    outer = coefficients[..., :, None] * coefficients[..., None, :]
    core = outer.flatten(-2) @ others
    return (core @ blocks.mT).unflatten(-1, (clients, clients))
