"""Polar factors and Procrustes rotations from one batched ``torch.linalg.svd``."""

from __future__ import annotations

import torch
from torch import Tensor


def batched_polar(matrices: Tensor) -> Tensor:
    """``U V^T`` of matrices (..., p, p), in their own dtype."""
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left @ right


def batched_procrustes(sources: Tensor, targets: Tensor) -> Tensor:
    """The matrices ``O`` (..., p, p) that carry sources (..., p, k) to targets (..., p, k)."""
    return batched_polar(targets @ sources.mT)
