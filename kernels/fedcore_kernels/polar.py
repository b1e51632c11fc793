"""Orthogonal polar factors and the Procrustes problem they solve.

``polar(X) = U V^T`` with the thin SVD ``X = U S V^T`` is the partial isometry closest to X.

Reference: N. J. Higham, Functions of Matrices, SIAM 2008, chapter 8; P. H. Schönemann, A
generalized solution of the orthogonal Procrustes problem, Psychometrika 31, 1966.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.capture import reads_values
from fedcore_kernels.dispatch import register
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.isometries import FEWEST, SMALLEST_SHARE, isometries
from fedcore_kernels.library.operation import call


class Polar(NamedTuple):
    """A polar factor and how many directions of it are determined.

    Attributes:
        factor: (..., p, q) ``sum_i u_i v_i^T`` over the kept singular triplets.
        rank: (...) int64, triplets kept; below min(p, q) the factor is a partial isometry.
    """

    factor: Tensor
    rank: Tensor


def _polar_body(matrix: Tensor, cutoff: float, regularisation: float) -> Polar:
    wide = matrix.double()
    if regularisation:
        shift = regularisation * torch.linalg.matrix_norm(wide, keepdim=True)
        wide = wide + shift * torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    factor, rank = _partial_isometries(wide.reshape(-1, *wide.shape[-2:]), cutoff)
    dtype = checks.accumulator(matrix.dtype)
    return Polar(factor.reshape(wide.shape).to(dtype), rank.reshape(wide.shape[:-2]))


def _partial_isometries(wide: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Polar factors (b, p, q) of fp64 matrices without null directions, and their ranks (b,)."""
    factor, rest = _converged(wide if cutoff < SMALLEST_SHARE else wide[:0], len(wide))
    rank = torch.full((len(wide),), min(wide.shape[-2:]), device=wide.device)
    if len(rest):
        left, values, right = torch.linalg.svd(wide[rest], full_matrices=False)
        significant = (values > cutoff * values[:, :1]) & (values > 0)
        factor = _filled(factor, wide, rest, (left * significant[:, None, :]) @ right)
        rank[rest] = significant.sum(-1)
    return factor, rank


def _converged(wide: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Factors that products alone determine, and the indices of the ``count`` that are missing."""
    everything = torch.arange(count, device=wide.device)
    if len(wide) < FEWEST:
        return wide, everything
    upright = wide.shape[-2] >= wide.shape[-1]
    factor, converged = isometries(wide if upright else wide.mT)
    return factor if upright else factor.mT, everything[~converged]


def _filled(factor: Tensor, wide: Tensor, rest: Tensor, replacement: Tensor) -> Tensor:
    """``factor`` with ``replacement`` at ``rest``; ``replacement`` itself where that is all."""
    if len(rest) == len(wide):
        return replacement
    factor[rest] = replacement
    return factor


def _procrustes_body(source: Tensor, target: Tensor, rotation_only: bool) -> Tensor:
    product = target.double() @ source.double().mT
    wide = product.reshape(-1, *product.shape[-2:])
    factor, rest = _converged(wide, len(wide))
    if rotation_only and len(rest) < len(wide):
        # A reflection gives up its weakest direction, which a polar factor does not know.
        missing = torch.linalg.det(factor) < 0
        missing[rest] = True
        rest = missing.nonzero()[:, 0]
    if len(rest):
        left, _, right = torch.linalg.svd(wide[rest], full_matrices=False)
        if rotation_only:
            # The cheapest way back to determinant +1 gives up the weakest direction.
            flip = torch.ones_like(left[:, :1, :])
            flip[:, 0, -1] = torch.linalg.det(left @ right).sign()
            left = left * flip
        factor = _filled(factor, wide, rest, left @ right)
    dtype = checks.accumulator(torch.promote_types(source.dtype, target.dtype))
    return factor.reshape(product.shape).to(dtype)


register("polar", "torch", _polar_body, reads_values)
register("procrustes", "torch", _procrustes_body, reads_values)


def polar(
    matrix: checks.ArrayLike, cutoff: float | None = None, regularisation: float = 0.0
) -> Polar:
    """The polar factor ``U V^T`` of ``matrix = U S V^T``, without its null directions.

    Args:
        matrix: (..., p, q) floating point.
        cutoff: singular values not above this share of the largest count as null; the machine
            epsilon of ``matrix`` times max(p, q) by default.
        regularisation: lam > 0 takes the factor of ``matrix + lam ||matrix||_F I`` (square only).
            It chooses the completion nearest to the identity in null directions and is *another
            function*: at condition 1e3 a lam of 1e-3 moves the factor by 0.27.

    Returns:
        :class:`Polar`, the factor in fp32 unless ``matrix`` is fp64. Null directions are zero in
        the factor and missing from the rank: no choice is made for them.

    Raises:
        KernelInputError: a wrong shape or dtype, a cutoff outside [0, 1), a regularisation that is
            negative or not finite, or one set for a matrix that is not square.

    Example:
        >>> polar([[0.0, 2.0], [0.0, 0.0]])
        Polar(factor=tensor([[0., 1.],
                [0., 0.]]), rank=tensor(1))
    """
    matrices = checks.tensor("matrix", matrix, ("p", "q"), batch=True)
    if cutoff is None:
        cutoff = max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps
    if not 0 <= regularisation < float("inf"):
        raise KernelInputError(f"regularisation is {regularisation}; pass a finite number >= 0")
    if regularisation:
        checks.same_size("matrix", matrices, -1, matrices.shape[-2], "its rows, to be regularised")
    return Polar(*call("polar", matrices, checks.fraction("cutoff", cutoff), float(regularisation)))


def procrustes(
    source: checks.ArrayLike, target: checks.ArrayLike, rotation_only: bool = False
) -> Tensor:
    """The isometry ``O`` (q, p) that carries ``source`` (p, k) to ``target`` (q, k).

    ``O = U V^T`` with ``target source^T = U S V^T``.

    For q >= p, O has orthonormal columns and minimises ``||O source - target||_F`` among such
    matrices. For q < p it has orthonormal rows and maximises the inner product
    ``<O source, target>``; since ``||O source||`` then varies with O, it does *not* in general
    minimise the distance.

    Args:
        source: (..., p, k) floating point.
        target: (..., q, k) floating point, leading axes broadcast with those of ``source``.
        rotation_only: restrict to determinant +1 (p = q); reflections are allowed otherwise.

    Returns:
        (..., q, p), computed in fp64; fp32 unless an argument is fp64. Where ``target source^T`` is
        singular the isometry is not unique and one of them is returned.

    Raises:
        KernelInputError: a wrong shape, dtype or device, or ``rotation_only`` with p != q.

    Example:
        >>> procrustes([[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]])
        tensor([[0., 1.],
                [1., 0.]])
    """
    start = checks.tensor("source", source, ("p", "k"), batch=True)
    goal = checks.tensor("target", target, ("q", "k"), batch=True)
    checks.same_device("source", start, "target", goal)
    checks.same_size("target", goal, -1, start.shape[-1], "the width of source")
    if rotation_only:
        checks.same_size("target", goal, -2, start.shape[-2], "the rows of source for a rotation")
    isometry: Tensor = call("procrustes", start, goal, rotation_only)
    return isometry
