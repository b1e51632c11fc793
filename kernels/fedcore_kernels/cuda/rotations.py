"""Triton body of the soft rotation: both decompositions by the Jacobi kernel, no value read."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels.cuda import small
from fedcore_kernels.soft_rotation import SoftRotation, completed


def soft_rotation(matrix: Tensor, strength: float, eps_rel: float) -> SoftRotation:
    """Rotations (..., r, r) nearest to ``matrix``, taken ``strength`` of the way."""
    order, batch = matrix.shape[-1], matrix.shape[:-2]
    wide = matrix.double().reshape(-1, order, order)
    eye = torch.eye(order, dtype=wide.dtype, device=wide.device)
    left, values, right = small.svd(wide)
    significant = (values > eps_rel * values[:, :1]) & (values > 0)
    rank = significant.sum(-1)
    short = (rank < order)[:, None, None]
    turned, back = completed(left, values, right, significant, small.svd)
    left, right = torch.where(short, turned, left), torch.where(short, back, right)
    flip = torch.ones_like(values)
    flip[:, -1] = torch.linalg.det(left @ right).sign()
    rotation = (left * flip[:, None]) @ right
    singular = torch.zeros_like(rank, dtype=torch.bool)
    if strength < 1:
        left, values, right = small.svd((1 - strength) * eye + strength * rotation)
        singular = values[:, -1] <= eps_rel
        rotation = torch.where(singular[:, None, None], eye, left @ right)
    return SoftRotation(
        rotation.reshape(matrix.shape), rank.reshape(batch), singular.reshape(batch)
    )
