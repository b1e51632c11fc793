"""``fedcore::polar`` and ``procrustes``, differentiated where their result is unique.

With ``X = U S V^T`` of full rank and the gradient H of ``U V^T``,

    dX = U K V^T + (I - U U^T) H V S^-1 V^T + U S^-1 U^T H (I - V V^T),
    K_ij = (U^T H V - V^T H^T U)_ij / (s_i + s_j)

of which a square X has the first term alone, a tall one the second, a wide one the third. For a
rotation of negative determinant before the flip, the last column of U and the last of S change
sign. Where the result is not unique no gradient exists, and it is NaN.

Reference: N. J. Higham, Functions of Matrices, SIAM 2008, section 8.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedcore_kernels.checks import accumulator
from fedcore_kernels.dispatch import run
from fedcore_kernels.library.operation import Gradient, Promise, define


def _polar(matrix: Tensor, cutoff: float, regularisation: float) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run("polar", (matrix,), cutoff, regularisation)
    return result


def _polar_promise(matrix: Tensor, cutoff: float, regularisation: float) -> list[Promise]:
    return [(matrix.shape, accumulator(matrix.dtype)), (matrix.shape[:-2], torch.int64)]


def _procrustes(source: Tensor, target: Tensor, rotation_only: bool) -> Tensor:
    isometry: Tensor = run("procrustes", (source, target), rotation_only)
    return isometry


def _procrustes_promise(source: Tensor, target: Tensor, rotation_only: bool) -> list[Promise]:
    lead = torch.broadcast_shapes(source.shape[:-2], target.shape[:-2])
    dtype = accumulator(torch.promote_types(source.dtype, target.dtype))
    return [((*lead, target.shape[-2], source.shape[-2]), dtype)]


def _through_isometry(matrix: Tensor, grad: Tensor, cutoff: float, rotation: bool) -> Tensor:
    """The gradient of ``matrix`` (..., p, q) from that of its polar factor, both fp64."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    p, q, least = *matrix.shape[-2:], values[..., -1]
    if rotation:
        last = torch.arange(p, device=matrix.device) == p - 1
        sign = torch.linalg.det(left @ right).sign()[..., None]
        flip = torch.where(last, sign, 1.0)
        left, values = left * flip[..., None, :], values * flip
        # A rotation is unique when no second reflection is as cheap.
        least = values[..., -2:].sum(-1) if p > 1 else torch.ones_like(least)
    inner = left.mT @ grad @ right.mT
    sums = values[..., :, None] + values[..., None, :]
    # The skew part has no diagonal, and a rotation may have s = 0 there.
    sums = torch.where(torch.eye(min(p, q), dtype=torch.bool, device=matrix.device), 1.0, sums)
    gradient = left @ ((inner - inner.mT) / sums) @ right
    if p > q:
        outside = grad - left @ (left.mT @ grad)
        gradient = gradient + (outside @ right.mT / values[..., None, :]) @ right
    elif p < q:
        outside = grad - (grad @ right.mT) @ right
        gradient = gradient + left @ ((left.mT @ outside) / values[..., :, None])
    unique = (least > cutoff * values[..., 0]) & (least > 0)
    return torch.where(unique[..., None, None], gradient, float("nan"))


def _keep_polar(context: Any, inputs: tuple[Any, ...], _output: Any) -> None:
    matrix, context.cutoff, context.regularisation = inputs
    context.save_for_backward(matrix)


def _polar_backward(context: Any, grad: Tensor, _rank: Any) -> tuple[Tensor, None, None]:
    (matrix,) = context.saved_tensors
    wide, lam = matrix.double(), context.regularisation
    if not lam:
        gradient = _through_isometry(wide, grad.double(), context.cutoff, False)
        return gradient.to(matrix.dtype), None, None
    size = torch.linalg.matrix_norm(wide, keepdim=True)
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    gradient = _through_isometry(wide + lam * size * eye, grad.double(), context.cutoff, False)
    trace = gradient.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return (gradient + lam * trace * wide / size).to(matrix.dtype), None, None


def _keep_procrustes(context: Any, inputs: tuple[Any, ...], _output: Any) -> None:
    source, target, context.rotation_only = inputs
    context.save_for_backward(source, target)


def _procrustes_backward(context: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    source, target = context.saved_tensors
    start, goal = source.double(), target.double()
    product = goal @ start.mT
    cutoff = max(product.shape[-2:]) * torch.finfo(product.dtype).eps
    gradient = _through_isometry(product, grad.double(), cutoff, context.rotation_only)
    to_source = (gradient.mT @ goal).sum_to_size(source.shape).to(source.dtype)
    to_target = (gradient @ start).sum_to_size(target.shape).to(target.dtype)
    return to_source, to_target, None


define(
    "polar(Tensor matrix, float cutoff, float regularisation) -> (Tensor, Tensor)",
    _polar,
    _polar_promise,
    Gradient(("matrix",), _polar_backward, _keep_polar),
)
define(
    "procrustes(Tensor source, Tensor target, bool rotation_only) -> Tensor",
    _procrustes,
    _procrustes_promise,
    Gradient(("source", "target"), _procrustes_backward, _keep_procrustes),
)
