"""FLoRG's server steps as the papers write them: through the k x k Gram."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.dense import mean_gram, positive_sign, symmetric_root

Rows = list[Tensor]


def spectrum(stack: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """Descending eigenvalues (L, k) of ``Q`` and its eigenvectors as rows (L, k, k)."""
    values, vectors = torch.linalg.eigh(mean_gram(stack, shares))
    return values.flip(-1), vectors.flip(-1).mT


def leading(stack: Tensor, shares: Tensor, rank: int, eps_rel: float) -> tuple[Rows, Tensor]:
    """Per module the kept rows ``sqrt(lambda_i) v_i^T``, i <= rank, and all eigenvalues."""
    values, vectors = spectrum(stack, shares)
    found = []
    for lam, v in zip(values, vectors, strict=True):
        kept = [i for i in range(min(rank, len(lam))) if lam[i] > max(eps_rel * lam[0], 0)]
        found.append(lam[kept].sqrt()[:, None] * v[kept])
    return found, values


def rectangular_procrustes(til: Tensor, previous: Tensor) -> Tensor:
    """``U V^T Til`` with ``previous Til^T = U S V^T``."""
    left, _, right = torch.linalg.svd(previous @ til.mT, full_matrices=False)
    return left @ right @ til


def truncated(stack: Tensor, shares: Tensor, previous: Tensor, rank: int, eps_rel: float) -> Tensor:
    """Best Gram of rank r, then Procrustes alignment, (L, q, k)."""
    rows, _ = leading(stack, shares, rank, eps_rel)
    pairs = zip(rows, previous.double(), strict=True)
    return torch.stack([rectangular_procrustes(til, before) for til, before in pairs])


def sketched(stack: Tensor, shares: Tensor, previous: Tensor) -> Tensor:
    """All eigenvectors of Q, then rectangular Procrustes alignment, (L, q, k)."""
    return truncated(stack, shares, previous, stack.shape[-1], 1e-12)


def inverse_root_form(
    stack: Tensor, shares: Tensor, previous: Tensor, eps_rel: float = 0.0
) -> Tensor:
    """``K^(-1/2) A_prev Q`` with ``K = A_prev Q A_prev^T``; null directions of K are zero."""
    before = previous.double()
    total = before @ mean_gram(stack, shares)
    return symmetric_root(total @ before.mT, -0.5, eps_rel**2) @ total


def principal(factor: Tensor) -> Tensor:
    """Same Gram, orthogonal rows of descending norm, largest entry of each row positive."""
    _, values, right = torch.linalg.svd(factor, full_matrices=False)
    return values[..., None] * right * positive_sign(right.mT)[..., None]
