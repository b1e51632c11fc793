"""The best rank-r adapter of a mean of products by the dense route: form it, decompose it.

FlexLoRA's server step (arXiv 2402.11505) as it reads, one module at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_svd(left: Tensor, right: Tensor, shares: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (L, r, p) and (L, r, q) of ``sum_n w_n B_n A_n``, from the clients' (N, L, r, .).

    ``left`` holds the transposes of the B factors, as flat rows do.
    """
    outer, inner = [], []
    for module in range(left.shape[1]):
        clients = zip(shares, left[:, module], right[:, module], strict=True)
        dense = left.new_zeros(left.shape[-1], right.shape[-1])
        for share, b, a in clients:
            dense += share * (b.T @ a)
        u, values, v = torch.linalg.svd(dense, full_matrices=False)
        root = values[:rank].sqrt()
        outer.append(root[:, None] * u[:, :rank].T)
        inner.append(root[:, None] * v[:rank])
    return torch.stack(outer), torch.stack(inner)
