"""The streaming form of the sketched step, with whitened uploads.

The server writes its factor as ``A_prev = T V`` with orthonormal rows V and broadcasts both. A
client uploads ``Z_n = (V A_n^T) A_n``, as large as its factor. The weighted sum
``Z = sum_n w_n Z_n`` is all the server needs, so memory does not grow with the clients and a
secure sum suffices:

    Z V^T = W diag(e) W^T,    A = polar(T W diag(e)^(1/2)) diag(e)^(-1/2) W^T Z

V holds the right singular vectors in descending order, and only the lower triangle of ``Z V^T`` is
read. Row i of ``Z_n`` then has the size of ``sigma_i^2``, and rounding on the wire reaches a weak
direction through its own small row alone. With an arbitrary basis of the same space, or with both
triangles averaged, single precision loses the square of the condition.

The result equals :func:`~fedcore_kernels.nystrom_step` on the clients' factors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.capture import reads_values
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.dispatch import register
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.library.operation import call
from fedcore_kernels.polar import polar
from fedcore_kernels.rows import working_copies
from fedcore_kernels.stacks import STACK_AXES, row_scale
from fedcore_kernels.steps import EPS_REL, FactorStep, spread


def whiten(previous: Tensor) -> tuple[Tensor, Tensor]:
    """``(T, V)`` with ``previous = T V``, fp64 (L, q, s) and (L, s, k), s = min(q, k)."""
    left, values, right = torch.linalg.svd(previous.double(), full_matrices=False)
    return left * values[:, None], right


def _upload_body(factor: Tensor, basis: Tensor) -> Tensor:
    wide = factor.double()
    return ((basis.double() @ wide.mT) @ wide).to(checks.accumulator(factor.dtype))


def _sum_body(stack: Tensor, root: Tensor, basis: Tensor) -> Tensor:
    wide = basis.double()
    weights = row_scale(root.square(), stack)
    parts = [((wide[part] @ rows.mT) * weights) @ rows for part, rows in working_copies(stack)]
    return torch.cat(parts).to(checks.accumulator(stack.dtype))


def _step_body(total: Tensor, mixing: Tensor, basis: Tensor, eps_rel: float) -> FactorStep:
    wide = total.double()
    energies, vectors = torch.linalg.eigh(wide @ basis.double().mT, UPLO="L")
    energies, vectors = energies.flip(-1), vectors.flip(-1)
    significant = (energies > eps_rel * energies[:, :1]) & (energies > 0)
    scale = torch.where(significant, energies, 0.0).sqrt()
    inverse = torch.where(significant, scale.reciprocal(), 0.0)
    core = mixing.double() @ (vectors * scale[:, None, :])
    turn = polar(core, eps_rel)
    factor = turn.factor @ (inverse[:, :, None] * (vectors.mT @ wide))
    condition = spread(torch.linalg.svdvals(core), turn.rank)
    unknown = torch.full_like(condition, float("nan"))
    dtype = checks.accumulator(total.dtype)
    return FactorStep(factor.to(dtype), turn.rank, condition, unknown, unknown, turn.rank)


register("whitened_basis", "torch", whiten, reads_values)
register("whitened_upload", "torch", _upload_body)
register("whitened_sum", "torch", _sum_body)
register("whitened_step", "torch", _step_body, reads_values)


def whitened_basis(previous: checks.ArrayLike) -> tuple[Tensor, Tensor]:
    """Split ``previous`` into ``T V`` with orthonormal rows V.

    Args:
        previous: (L, q, k) floating point, q <= k.

    Returns:
        T (L, q, q) and V (L, q, k), fp64. Cast V only together with ``T = previous V^T`` of the
        cast.

    Raises:
        KernelInputError: a wrong shape or dtype, or q > k.

    Example:
        >>> mixing, basis = whitened_basis([[[3.0, 4.0]]])
        >>> (mixing @ basis).round(decimals=12), basis.norm()
        (tensor([[[3., 4.]]], dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    before = checks.tensor("previous", previous, ("L", "q", "k"))
    if before.shape[1] > before.shape[2]:
        raise KernelInputError(
            f"previous has shape {tuple(before.shape)}; its rank q must not exceed its width k"
        )
    mixing, basis = call("whitened_basis", before)
    return mixing, basis


def whitened_upload(factor: checks.ArrayLike, basis: checks.ArrayLike) -> Tensor:
    """What one client uploads: ``Z_n = (V A_n^T) A_n``.

    Args:
        factor: (L, r, k) the client's factors.
        basis: (L, q, k) the server's V.

    Returns:
        (L, q, k), computed in fp64; fp32 unless ``factor`` is fp64.

    Raises:
        KernelInputError: a wrong shape, dtype or device.

    Example:
        >>> whitened_upload([[[1.0, 2.0]]], [[[1.0, 0.0]]])
        tensor([[[1., 2.]]])
    """
    factors = checks.tensor("factor", factor, ("L", "r", "k"))
    rows = checks.tensor("basis", basis, ("L", "q", "k"))
    checks.same_device("basis", rows, "factor", factors)
    checks.same_size("basis", rows, 0, factors.shape[0], "the modules of factor")
    checks.same_size("basis", rows, 2, factors.shape[2], "the width of factor")
    upload: Tensor = call("whitened_upload", factors, rows)
    return upload


def whitened_sum(
    stack: checks.ArrayLike, weights: checks.ArrayLike, basis: checks.ArrayLike
) -> Tensor:
    """The weighted sum of all clients' whitened uploads from their factors.

        Z = sum_n w_n (V A_n^T) A_n

    With :func:`whitened_basis` before and :func:`whitened_step` after it, this is the sketched step
    from a single read of the uploads wherever the factors of a few clients fit on the chip.

    Args:
        stack: (N, L, r, k) floating point, any strides: the clients' factors.
        weights: (N,) real numbers, normalised in fp64.
        basis: (L, q, k) the server's V.

    Returns:
        (L, q, k), fp32 unless ``stack`` is fp64; computed in fp64 by torch, accumulated in fp32 on
        a card.

    Raises:
        KernelInputError: a wrong shape, dtype or device, or unusable weights.

    Cost: reads N L r k numbers once; 4 q L m k flops.

    Example:
        >>> whitened_sum([[[[1.0, 2.0]]], [[[3.0, 0.0]]]], [1, 1], [[[1.0, 0.0]]])
        tensor([[[5., 1.]]])
    """
    uploads = checks.tensor("stack", stack, STACK_AXES)
    rows = checks.tensor("basis", basis, ("L", "q", "k"))
    checks.same_device("basis", rows, "stack", uploads)
    checks.same_size("basis", rows, 0, uploads.shape[1], "the modules of stack")
    checks.same_size("basis", rows, 2, uploads.shape[3], "the width of stack")
    counts = client_weights(weights, uploads.shape[0])
    total: Tensor = call("whitened_sum", uploads, counts, rows)
    return total


def whitened_step(
    total: checks.ArrayLike,
    mixing: checks.ArrayLike,
    basis: checks.ArrayLike,
    eps_rel: float = EPS_REL,
) -> FactorStep:
    """The sketched step from the weighted sum of whitened uploads.

    Args:
        total: (L, q, k) ``Z = sum_n w_n Z_n`` with weights that sum to 1.
        mixing: (L, q, q) the server's T.
        basis: (L, q, k) the server's V.
        eps_rel: eigenvalues ``e`` and singular values of ``T W diag(e)^(1/2)`` not above this
            share of the largest are dropped.

    Returns:
        :class:`FactorStep`; gap and tail are not known to this form. The factor is fp32 unless
        ``total`` is fp64.

    Raises:
        KernelInputError: a wrong shape, dtype or device, or ``eps_rel`` outside [0, 1).

    Example:
        >>> whitened_step([[[1.0, 2.0]]], [[[1.0]]], [[[1.0, 0.0]]]).factor
        tensor([[[1., 2.]]])
    """
    summed = checks.tensor("total", total, ("L", "q", "k"))
    outer = checks.tensor("mixing", mixing, ("L", "q", "q"))
    rows = checks.tensor("basis", basis, ("L", "q", "k"))
    for name, value in (("mixing", outer), ("basis", rows)):
        checks.same_device(name, value, "total", summed)
        checks.same_size(name, value, 0, summed.shape[0], "the modules of total")
        checks.same_size(name, value, 1, summed.shape[1], "the rank of total")
    checks.same_size("mixing", outer, 2, summed.shape[1], "the rank of total")
    checks.same_size("basis", rows, 2, summed.shape[2], "the width of total")
    cutoff = checks.fraction("eps_rel", eps_rel)
    return FactorStep(*call("whitened_step", summed, outer, rows, cutoff))
