"""How far the clients' updates are from each other, from the Gram matrix of their products."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.methods.pairs import pair_groups
from fedcore_kernels import product_gram

# Gram matrices of so many modules exist at a time.
_GRAM_BYTES = 64 << 20

NOISE = 64 * torch.finfo(torch.float64).eps
"""A squared distance is a difference of squared norms; below this share of them it is rounding."""


def cohort_gram(cohort: Cohort) -> Tensor:
    """``K_ij = sum over modules of <B_i A_i, B_j A_j>``, fp64 ``(N, N)``, on the CPU.

    Cost: ``(d_in + d_out) m^2`` flops a module with m = N r; nothing of a weight's size is formed.
    """
    clients = len(cohort)
    total = torch.zeros(clients, clients, dtype=torch.float64)
    size = max(1, _GRAM_BYTES // (8 * clients**2))
    for group in pair_groups(cohort.layout):
        outer, inner = group.stacks(cohort.updates)
        for parts in zip(outer.split(size, dim=1), inner.split(size, dim=1), strict=True):
            total += product_gram(*parts).sum(0).cpu()
    return total


def norms(gram: Tensor) -> Tensor:
    """``||B_n A_n||_F`` over all modules, ``(N,)``."""
    return gram.diagonal().clamp(min=0).sqrt()


def distances(gram: Tensor) -> Tensor:
    """``||B_i A_i - B_j A_j||_F``, ``(N, N)``: 0 where less than 1e-7 of the norms is left.

    ``K_ii + K_jj - 2 K_ij`` cancels. What is below :data:`NOISE` may have either sign, and equal
    models in different gauges would be told apart by it.
    """
    squares = gram.diagonal()
    size = squares[:, None] + squares
    gaps = size - 2 * gram
    return torch.where(gaps > NOISE * size, gaps, 0.0).sqrt()
