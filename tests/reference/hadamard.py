"""FLoRA-NA's problem under HiRA as dense algebra: ``||W0 o (M - B^ A^)||_F^2``, one module."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_product(left: Tensor, right: Tensor, shares: Tensor) -> Tensor:
    """``M = sum_n w_n left_n^T right_n``, (d_out, d_in)."""
    return torch.einsum("n,nro,nrc->oc", shares.double(), left.double(), right.double())


def combined(coefficients: Tensor, stack: Tensor) -> Tensor:
    """``sum_n c_n factor_n``, (r, k)."""
    return torch.einsum("n,nrk->rk", coefficients, stack.double())


def objective(
    left: Tensor, right: Tensor, shares: Tensor, base: Tensor, p: Tensor, q: Tensor
) -> Tensor:
    """``||W0 o (M - B^ A^)||_F^2``."""
    found = combined(p, left).mT @ combined(q, right)
    return (base.double() * (mean_product(left, right, shares) - found)).square().sum()


def target(left: Tensor, right: Tensor, shares: Tensor, base: Tensor) -> Tensor:
    """``||W0 o M||_F^2``."""
    return (base.double() * mean_product(left, right, shares)).square().sum()


def sweep(
    left: Tensor, right: Tensor, shares: Tensor, base: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """The best p for q, then the best q for that p, as least squares in the entries."""
    wanted = (base.double() * mean_product(left, right, shares)).flatten()[:, None]

    def solve(products: Tensor) -> Tensor:
        columns = (base.double() * products).flatten(1).mT
        return torch.linalg.lstsq(columns, wanted, driver="gelsd").solution[:, 0]

    p = solve(left.double().mT @ combined(q, right))
    return p, solve(combined(p, left).mT @ right.double())


def curvatures(
    left: Tensor, right: Tensor, base: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """``R_ij = <E o (B_i A^), B_j A^>`` and ``T_ij = <E o (B^ A_i), B^ A_j>``, (N, N) each."""
    found = []
    for products in (left.mT @ combined(q, right), combined(p, left).mT @ right):
        weighted = (base * products).flatten(1)
        found.append(weighted @ weighted.mT)
    return found[0], found[1]
