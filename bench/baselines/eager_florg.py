"""FLoRG's server step on the factors, without the k x k Gram, as a loop over modules.

What a careful user of torch writes from the formulas ``polar(A_prev F^T) F`` and, for the truncated
step, from the SVD of the stacked factors. fp32 throughout, since torch decomposes nothing smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

State = dict[str, Tensor]

SVD_MODULES = 8
"""Modules that are timed of the truncated step, whose SVDs take seconds for a whole model."""


def eager_sketched(uploads: Sequence[State], weights: Sequence[float], previous: State) -> State:
    """The next factors: rectangular Procrustes of the stack to the previous factor."""
    new = {}
    for key, before in previous.items():
        rows = _stacked(uploads, weights, key)
        left, _, right = torch.linalg.svd(before @ rows.T, full_matrices=False)
        new[key] = left @ (right @ rows)
    return new


def eager_truncated(uploads: Sequence[State], weights: Sequence[float], previous: State) -> State:
    """The next factors: leading directions of the stack, aligned with the previous factor."""
    new = {}
    for key, before in previous.items():
        rank = len(before)
        _, values, right = torch.linalg.svd(_stacked(uploads, weights, key), full_matrices=False)
        leading = values[:rank, None] * right[:rank]
        outer, _, inner = torch.linalg.svd(before @ leading.T)
        new[key] = outer @ inner @ leading
    return new


def _stacked(uploads: Sequence[State], weights: Sequence[float], key: str) -> Tensor:
    total = sum(weights)
    clients = zip(uploads, weights, strict=True)
    return torch.cat([(weight / total) ** 0.5 * upload[key].float() for upload, weight in clients])
