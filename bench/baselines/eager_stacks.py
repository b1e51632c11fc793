"""Grams and products of the clients' factors as loops over modules and clients.

The dtype of the uploads is the dtype of every product, as in scripts that set none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def eager_gram(stack: Tensor, shares: Tensor) -> Tensor:
    """``F F^T`` (L, m, m) of stack (N, L, r, k), one module at a time."""
    grams = []
    for module in range(stack.shape[1]):
        clients = zip(shares, stack[:, module], strict=True)
        rows = torch.cat([share.sqrt() * factor for share, factor in clients])
        grams.append(rows @ rows.T)
    return torch.stack(grams)


def eager_cross_gram(stack: Tensor, reference: Tensor) -> Tensor:
    """``reference A_n^T`` (L, q, N, r), one module and client at a time."""
    modules = [
        torch.stack([before @ factor.T for factor in stack[:, module]], dim=1)
        for module, before in enumerate(reference)
    ]
    return torch.stack(modules)


def eager_apply_cores(cores: Tensor, stack: Tensor) -> Tensor:
    """``sum_n cores_n A_n`` (L, p, k), one module and client at a time."""
    totals = []
    for module, core in enumerate(cores):
        total = stack.new_zeros(core.shape[0], stack.shape[-1])
        for client, factor in enumerate(stack[:, module]):
            total += core[:, client] @ factor
        totals.append(total)
    return torch.stack(totals)
