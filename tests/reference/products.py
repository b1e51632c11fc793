"""Means of products ``M = sum_n w_n left_n^T right_n`` as dense matrices in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import ProductSvd
from tests.reference.dense import positive_sign


def mean_product(left: Tensor, right: Tensor, shares: Tensor) -> Tensor:
    """``M`` of every module, (L, p, q)."""
    pairs = zip(shares.double(), left.double(), right.double(), strict=True)
    return sum((w * b.mT @ a for w, b, a in pairs), torch.zeros(()))


def product_gram(left: Tensor, right: Tensor) -> Tensor:
    """``<left_i^T right_i, left_j^T right_j>``, (L, N, N)."""
    products = (left.double().mT @ right.double()).flatten(2)
    return torch.einsum("ilx,jlx->lij", products, products)


def mean_pair_gram(left: Tensor, right: Tensor, root: Tensor) -> Tensor:
    """``<M, left_i^T right_j>``, (L, N, N)."""
    mean = mean_product(left, right, root.square())
    pairs = torch.einsum("ilap,jlaq->lijpq", left.double(), right.double())
    return torch.einsum("lpq,lijpq->lij", mean, pairs)


def _energy_rank(values: list[float], energy: float) -> int:
    """The smallest p whose first values hold the share ``energy`` of the squares."""
    wanted = (1 - energy) * sum(value**2 for value in values)
    rest = [sum(value**2 for value in values[p:]) for p in range(len(values) + 1)]
    return next(p for p, left_over in enumerate(rest) if left_over <= wanted)


def product_svd(
    left: Tensor,
    right: Tensor,
    root: Tensor,
    rank: int,
    energy: float | None,
    balanced: bool,
    eps_rel: float,
) -> ProductSvd:
    """The truncated SVD of the dense mean product of every module."""
    size = min(left.shape[0] * left.shape[2], left.shape[3], right.shape[3])
    outer, inner, spectra, counts, tails, gaps = [], [], [], [], [], []
    for matrix in mean_product(left, right, root.square()):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        count = sum(1 for value in values.tolist() if value > max(eps_rel * values[0].item(), 0))
        if energy is not None:
            count = min(count, _energy_rank(values.tolist(), energy))
        count = min(count, rank)
        u = u[:, :count] * positive_sign(u[:, :count])
        kept = values[:count]
        v = torch.diag(1 / kept) @ u.mT @ matrix
        share = kept.sqrt() if balanced else torch.ones_like(kept)
        outer.append((u * (kept / share)).mT)
        inner.append(share[:, None] * v)
        spectra.append(values[:size])
        counts.append(count)
        tails.append(values[count:].norm())
        after = values[count] if count < size else torch.zeros(())
        gaps.append(1 - after / kept[-1] if count else torch.ones(()))
    rows = min(rank, size) if energy is None else max(counts)
    padded = [
        torch.stack([torch.nn.functional.pad(f, (0, 0, 0, rows - len(f))) for f in side])
        for side in (outer, inner)
    ]
    reports = torch.tensor(counts), torch.stack(tails).double(), torch.stack(gaps).double()
    return ProductSvd(padded[0], torch.stack(spectra), padded[1], *reports)
