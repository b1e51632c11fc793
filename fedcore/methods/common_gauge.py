"""Orthogonal turns that bring all clients' factor pairs into one gauge.

``(O^T left_n, O^T right_n)`` is the same product for every orthogonal ``O``, but a combination of
the factors of different clients is not the same. Generalised Procrustes on both factors at once
works on the Gram blocks ``S_ij = left_i left_j^T + right_i right_j^T`` alone: turning client n
towards ``sum_i w_i O_i^T factor_i`` is ``O_n = polar(sum_i w_i S_ni O_i)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import procrustes

PASSES = 3
"""Rounds of turning every client towards the mean of all."""


def common_gauge(left: Tensor, right: Tensor, shares: Tensor) -> Tensor:
    """``O_n`` for every module and client, reflections allowed.

    Begins with the client of the largest share as the reference, then turns every client towards
    the weighted mean, :data:`PASSES` times. Where the factors say nothing the choice is arbitrary,
    but still orthogonal, so that no client's product changes.

    Args:
        left, right: ``(L, N, N, r, r)`` fp64 Gram blocks, :func:`fedcore_kernels.block_grams`.
        shares: ``(N,)`` fp64.

    Returns:
        ``(L, N, r, r)`` fp64; a stack is turned by :func:`fedcore_kernels.rotate` with
        ``(N, L, r, r)``, its blocks by :func:`turned_blocks`.
    """
    blocks = left + right
    turns = _polar(blocks[:, :, shares.argmax()])
    for _ in range(PASSES):
        turns = _polar(torch.einsum("i,lniac,licd->lnad", shares, blocks, turns))
    return turns


def turned_blocks(blocks: Tensor, turns: Tensor) -> Tensor:
    """``O_i^T S_ij O_j``, the blocks ``(L, N, N, r, r)`` of turned factors."""
    return turns[:, :, None].mT @ blocks @ turns[:, None]


def _polar(matrix: Tensor) -> Tensor:
    # A partial isometry, as fedcore_kernels.polar gives, would take a part of the client away.
    return procrustes(torch.eye(matrix.shape[-1]).to(matrix).expand_as(matrix), matrix)
