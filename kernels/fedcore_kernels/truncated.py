"""FLoRG's server step, variant ``truncated``: the best Gram of rank r, aligned with the last one.

With ``F = [sqrt(w_1) A_1; ...]`` and ``Q = F^T F``, ``Til`` holds the r leading directions of F,
so that ``Til^T Til`` is the best approximation of Q of rank r, and

    A = O Til,    O = argmin ||O Til - A_prev||_F over isometries = polar(A_prev Til^T)

The spectrum comes from the Gram on the smaller side of F, without division by singular values, and
from the SVD of F where squaring would cost the weakest kept direction more than 1e-10.

Reference: FLoRG, arXiv 2602.17095; the forms used here are our own algebra.
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
from fedcore_kernels.rows import working_copies
from fedcore_kernels.spectra import column_signs
from fedcore_kernels.stacks import STACK_AXES, row_scale
from fedcore_kernels.steps import (
    EPS_REL,
    FactorStep,
    check_stack_and_previous,
    spread,
    with_reports,
)

# Squared condition of the kept directions up to which the Gram of F is used: an eigenvector of the
# Gram carries an error of about that many units of round-off.
_GRAM_LIMIT = 1e4


def _leading(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Descending eigenvalues (l, s) of ``rows^T rows`` and its ``rank`` leading directions."""
    stacked, width = rows.shape[-2:]
    dual = stacked <= width
    values, vectors = torch.linalg.eigh(rows @ rows.mT if dual else rows.mT @ rows)
    values, vectors = values.flip(-1).clamp(min=0), vectors.flip(-1)[..., :rank]
    leading = vectors.mT @ rows if dual else values[:, :rank, None].sqrt() * vectors.mT
    unsafe = (values[:, rank - 1] * _GRAM_LIMIT <= values[:, 0]).nonzero()[:, 0]
    if len(unsafe):
        _, singular, right = torch.linalg.svd(rows[unsafe], full_matrices=False)
        values[unsafe] = singular.square()
        leading[unsafe] = singular[:, :rank, None] * right[:, :rank]
    return values, leading


def _align(
    leading: Tensor, rank: Tensor, previous: Tensor, eps_rel: float
) -> tuple[Tensor, Tensor]:
    """``O leading`` (l, q, k) nearest to ``previous``, and the directions ``previous`` fixed."""
    out = torch.zeros_like(previous)
    aligned = torch.zeros_like(rank)
    for count in sorted(set(rank.tolist()) - {0}):
        here = (rank == count).nonzero()[:, 0]
        rows = leading[here, :count]
        left, values, right = torch.linalg.svd(previous[here] @ rows.mT, full_matrices=False)
        out[here] = left @ (right @ rows)
        aligned[here] = ((values > eps_rel * values[:, :1]) & (values > 0)).sum(-1)
    return out, aligned


def _torch_body(
    stack: Tensor, root: Tensor, previous: Tensor, rank: int, eps_rel: float, align: bool
) -> FactorStep:
    reports = []
    modules, rows_out = stack.shape[1], previous.shape[1] if align else rank
    factors = stack.new_empty(
        (modules, rows_out, stack.shape[3]), dtype=checks.accumulator(stack.dtype)
    )
    size = min(rank, stack.shape[0] * stack.shape[2], stack.shape[3])
    scale = row_scale(root, stack)[:, None]
    for part, rows in working_copies(stack):
        values, leading = _leading(rows.mul_(scale), size)
        significant = (values[:, :size] > eps_rel * values[:, :1]) & (values[:, :size] > 0)
        leading = leading * significant[:, :, None]
        count = significant.sum(-1)
        if align:
            factor, aligned = _align(leading, count, previous[part].double(), eps_rel)
        else:
            leading = leading * column_signs(leading.mT)[:, 0, :, None]
            factor = torch.nn.functional.pad(leading, (0, 0, 0, rank - size))
            aligned = torch.zeros_like(count)
        rest = torch.nn.functional.pad(values[:, size:], (0, 1))
        last = torch.where(significant[:, -1], values[:, size - 1], 0.0)
        gap = torch.where(last > 0, 1 - rest[:, 0] / last, 1.0)
        tail = torch.linalg.vector_norm(rest, dim=-1)
        condition = spread(values.sqrt(), count)
        factors[part] = factor
        reports.append((count, condition, gap, tail, aligned))
    return with_reports(factors, reports)


register("truncated_step", "torch", _torch_body, reads_values)


def truncated_step(
    stack: checks.ArrayLike,
    weights: checks.ArrayLike,
    previous: checks.ArrayLike | None,
    rank: int,
    *,
    align: bool = True,
    eps_rel: float = EPS_REL,
) -> FactorStep:
    """One ``truncated`` step for every module of ``stack``.

    Args:
        stack: (N, L, r, k) floating point, any strides: the clients' factors.
        weights: (N,) real numbers, normalised in fp64.
        previous: (L, q, k) the factors broadcast at the start of the round, q >= rank; may be
            ``None`` without ``align``.
        rank: directions to keep.
        align: rotate the result towards ``previous`` (reflections allowed); otherwise return the
            factor of the same Gram with orthogonal rows of descending norm.
        eps_rel: eigenvalues of the Gram not above this share of the largest are dropped.

    Returns:
        :class:`FactorStep` with factors (L, q, k), or (L, rank, k) without ``align``; fp32 unless
        ``stack`` is fp64. ``||Q - A^T A||_F = tail``; exact when rank Q <= rank.

    Raises:
        KernelInputError: a wrong shape, dtype, device or rank, unusable weights, or a module whose
            previous factor is all zero.

    Cost: reads N L r k numbers once; L (2 s^2 max(m, k) + 9 s^3) flops with s = min(m, k).

    Example:
        >>> step = truncated_step([[[[2.0, 0.0]]], [[[0.0, 1.0]]]], [1, 1], [[[-1.0, 0.0]]], 1)
        >>> step.factor, step.tail
        (tensor([[[-1.4142,  0.0000]]]), tensor([0.5000], dtype=torch.float64))
    """
    if previous is None:
        if align:
            raise KernelInputError("previous is None; pass (L, q, k) factors, or align=False")
        uploads, before = checks.tensor("stack", stack, STACK_AXES), None
    else:
        uploads, before = check_stack_and_previous(stack, previous)
    if rank < 1:
        raise KernelInputError(f"rank is {rank}; pass at least 1")
    if align and before is not None and rank > before.shape[1]:
        raise KernelInputError(
            f"rank is {rank} and previous has {before.shape[1]} rows; pass a rank up to that number"
        )
    cutoff = checks.fraction("eps_rel", eps_rel)
    counts = client_weights(weights, uploads.shape[0])
    return FactorStep(*call("truncated_step", uploads, counts, before, rank, cutoff, align))
