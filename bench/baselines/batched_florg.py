"""FLoRG's server step on the factors in batched torch: all modules in one expression, in fp32.

Faster than a loop, at the price of a second copy of all uploads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines.batched_stacks import stacked


def batched_sketched(stack: Tensor, shares: Tensor, previous: Tensor) -> Tensor:
    """The next factors (L, r, k) from stack (N, L, r, k): ``polar(A_prev F^T) F``."""
    rows = stacked(stack.float(), shares)
    left, _, right = torch.linalg.svd(previous @ rows.mT, full_matrices=False)
    return left @ (right @ rows)


def batched_truncated(stack: Tensor, shares: Tensor, previous: Tensor) -> Tensor:
    """The next factors (L, r, k): leading eigenvectors of ``F F^T``, then square Procrustes."""
    rows = stacked(stack.float(), shares)
    rank = previous.shape[1]
    _, vectors = torch.linalg.eigh(rows @ rows.mT)
    leading = vectors[..., -rank:].mT @ rows
    outer, _, inner = torch.linalg.svd(previous @ leading.mT)
    return outer @ inner @ leading
