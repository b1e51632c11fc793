"""FLoRA-NA's problem as dense algebra: products are formed, half-steps fit their entries."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.products import mean_product


def combined(coefficients: Tensor, stack: Tensor) -> Tensor:
    """``sum_n c_n factor_n`` for ``c (L, N)`` and ``stack (N, L, r, k)``."""
    return torch.einsum("ln,nlrk->lrk", coefficients, stack.double())


def objective(left: Tensor, right: Tensor, shares: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """``||M - B^ A^||_F^2`` of every module, (L,)."""
    found = combined(p, left).mT @ combined(q, right)
    return (mean_product(left, right, shares) - found).square().sum((-2, -1))


def target(left: Tensor, right: Tensor, shares: Tensor) -> Tensor:
    """``||M||_F^2``, (L,)."""
    return mean_product(left, right, shares).square().sum((-2, -1))


def tail(left: Tensor, right: Tensor, shares: Tensor) -> Tensor:
    """The squared error of the best product of rank r, (L,)."""
    values = torch.linalg.svdvals(mean_product(left, right, shares))
    return values[:, left.shape[2] :].square().sum(-1)


def sweep(left: Tensor, right: Tensor, shares: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    """The best p for q, then the best q for that p, for modules without flat directions."""
    mean = mean_product(left, right, shares).flatten(1)[..., None]
    columns = (left.mT @ combined(q, right)).flatten(2).permute(1, 2, 0)
    p = torch.linalg.lstsq(columns, mean, driver="gelsd").solution[..., 0]
    columns = (combined(p, left).mT @ right).flatten(2).permute(1, 2, 0)
    q = torch.linalg.lstsq(columns, mean, driver="gelsd").solution[..., 0]
    return p, q
