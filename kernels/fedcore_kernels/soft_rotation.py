"""The rotation nearest to a matrix, taken part of the way.

``O* = argmax <O, X>`` over SO(r) is ``U diag(1, .., 1, det(U V^T)) V^T`` with ``X = U S V^T``, and

    O = polar((1 - strength) I + strength O*)

rotates each plane by ``atan2(strength sin t, 1 - strength + strength cos t)`` where O* rotates it
by t.
Determinant +1 is needed for that: on the way to a reflection O would jump.

Reference: the soft rotations of FedRot-LoRA, arXiv 2602.23638; S. Umeyama, IEEE PAMI 13, 1991, for
the determinant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.capture import reads_values
from fedcore_kernels.dispatch import register
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.library.operation import call
from fedcore_kernels.steps import EPS_REL


class SoftRotation(NamedTuple):
    """Rotations and how well they were determined.

    Attributes:
        rotation: (..., r, r) fp64, orthogonal with determinant +1.
        rank: (...) int64, directions of ``matrix`` above the cut-off; the others were completed
            towards the identity.
        singular: (...) bool, the identity stands in for an interpolant without a polar factor
            (strength 1/2 on the way to a rotation by pi).
    """

    rotation: Tensor
    rank: Tensor
    singular: Tensor


def completed(
    left: Tensor,
    values: Tensor,
    right: Tensor,
    kept: Tensor,
    svd: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = torch.linalg.svd,
) -> tuple[Tensor, Tensor]:
    """``U`` and ``V^T`` whose null directions are chosen towards the identity, weakest last."""
    inner, outer = left * kept[:, None, :], kept[:, :, None] * right
    largest = torch.where(values[:, :1] > 0, values[:, :1], 1.0)
    eye = torch.eye(left.shape[-1], dtype=left.dtype, device=left.device)
    null = (eye - inner @ inner.mT) @ (eye - outer.mT @ outer)
    # Kept values keep their order in (2, 3], so that null directions, at most 1, stay behind them.
    turned, _, back = svd((inner * (2 + values / largest)[:, None, :]) @ outer + null)
    return turned, back


def _nearest(matrix: Tensor, eps_rel: float) -> tuple[Tensor, Tensor]:
    """``O*`` (b, r, r) of ``matrix`` and the directions (b,) that it determines."""
    left, values, right = torch.linalg.svd(matrix)
    significant = (values > eps_rel * values[:, :1]) & (values > 0)
    rank = significant.sum(-1)
    short = (rank < matrix.shape[-1]).nonzero()[:, 0]
    if len(short):
        left[short], right[short] = completed(
            left[short], values[short], right[short], significant[short]
        )
    # The cheapest way back to determinant +1 gives up the weakest direction.
    flip = torch.ones_like(values)
    flip[:, -1] = torch.linalg.det(left @ right).sign()
    return (left * flip[:, None, :]) @ right, rank


def _torch_body(matrix: Tensor, strength: float, eps_rel: float) -> SoftRotation:
    size = matrix.shape[-1]
    wide = matrix.double().reshape(-1, size, size)
    rotation, rank = _nearest(wide, eps_rel)
    singular = torch.zeros_like(rank, dtype=torch.bool)
    if strength < 1:
        eye = torch.eye(size, dtype=wide.dtype, device=wide.device)
        left, values, right = torch.linalg.svd((1 - strength) * eye + strength * rotation)
        singular = values[:, -1] <= eps_rel
        rotation = torch.where(singular[:, None, None], eye, left @ right)
    batch = matrix.shape[:-2]
    return SoftRotation(
        rotation.reshape(matrix.shape), rank.reshape(batch), singular.reshape(batch)
    )


register("soft_rotation", "torch", _torch_body, reads_values)


def soft_rotation(
    matrix: checks.ArrayLike, strength: float = 1.0, *, eps_rel: float = EPS_REL
) -> SoftRotation:
    """The rotation that maximises ``<O, matrix>``, or a part ``strength`` of the way to it.

    Args:
        matrix: (..., r, r) floating point, for instance ``A_n A_prev^T``: the rotation then
            minimises ``||O^T A_n - A_prev||_F``.
        strength: in [0, 1]; 0 gives the identity, 1 the nearest rotation.
        eps_rel: singular values of ``matrix`` not above this share of the largest say nothing about
            the rotation, which is completed towards the identity there. Singular values of the
            interpolant not above it leave the identity.

    Returns:
        :class:`SoftRotation`.

    Raises:
        KernelInputError: a wrong shape or dtype, or a strength outside [0, 1].

    Example:
        >>> quarter_turn = [[0.0, -2.0], [1.0, 0.0]]
        >>> soft_rotation(quarter_turn, 0.5).rotation.round(decimals=4)
        tensor([[ 0.7071, -0.7071],
                [ 0.7071,  0.7071]], dtype=torch.float64)
    """
    matrices = checks.tensor("matrix", matrix, ("r", "r"), batch=True)
    checks.same_size("matrix", matrices, -1, matrices.shape[-2], "its number of rows")
    if not 0 <= strength <= 1:
        raise KernelInputError(f"strength is {strength}; pass a number in [0, 1]")
    cutoff = checks.fraction("eps_rel", eps_rel)
    return SoftRotation(*call("soft_rotation", matrices, float(strength), cutoff))
