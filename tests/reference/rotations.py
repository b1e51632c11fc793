"""Rotations towards a reference in fp64, matrix by matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import SoftRotation
from tests.reference.dense import symmetric_root


def nearest(matrix: Tensor, eps_rel: float) -> tuple[Tensor, int]:
    """Argmax of ``<O, matrix>`` over SO(r), null directions completed towards the identity."""
    left, values, right = torch.linalg.svd(matrix)
    rank = sum(1 for value in values.tolist() if value > max(eps_rel * values[0].item(), 0))
    inner, outer = left[:, rank:], right[rank:]
    # <O, I> on the null spaces is largest for the polar factor of their overlap.
    u, _, v = torch.linalg.svd(inner.mT @ outer.mT)
    left = torch.cat([left[:, :rank], inner @ u], dim=1)
    right = torch.cat([right[:rank], v @ outer])
    middle = torch.ones(len(matrix), dtype=matrix.dtype)
    middle[-1] = torch.linalg.det(left) * torch.linalg.det(right)
    return left @ torch.diag(middle) @ right, rank


def soft_rotation(matrix: Tensor, strength: float, eps_rel: float) -> SoftRotation:
    """``B (B^T B)^(-1/2)`` with ``B = (1 - strength) I + strength O*``."""
    size = matrix.shape[-1]
    eye = torch.eye(size, dtype=torch.float64)
    found, ranks, singular = [], [], []
    for one in matrix.double().reshape(-1, size, size):
        hard, rank = nearest(one, eps_rel)
        blend = (1 - strength) * eye + strength * hard
        # Rounding leaves a squared singular value of 0 at about 1e-16.
        lost = torch.linalg.eigvalsh(blend.mT @ blend)[0].item() <= max(eps_rel**2, 1e-14)
        found.append(eye if lost else blend @ symmetric_root(blend.mT @ blend, -0.5))
        ranks.append(rank)
        singular.append(lost)
    batch = matrix.shape[:-2]
    return SoftRotation(
        torch.stack(found).reshape(matrix.shape),
        torch.tensor(ranks).reshape(batch),
        torch.tensor(singular).reshape(batch),
    )
