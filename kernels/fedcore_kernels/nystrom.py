"""FLoRG's server step, variant ``sketched``: a Nystrom approximation of the mean Gram.

With ``F = [sqrt(w_1) A_1; ...]`` and ``Q = F^T F = sum_n w_n A_n^T A_n``,

    A = polar(A_prev F^T) F = (A_prev Q A_prev^T)^(-1/2) A_prev Q

so neither Q (k x k) nor an eigendecomposition beyond ``r x r`` is needed. ``Q - A^T A`` is positive
semi-definite and ``A A_prev^T`` symmetric positive semi-definite.

The polar factor of ``C = A_prev F^T`` comes from the ``r x r`` Gram of C where its eigenvalues
prove that accurate, and otherwise through ``A_prev = T V``: ``V F^T = W diag(s) Z^T`` has the
condition of F and not its square, and ``polar(C) = polar(T W diag(s)) Z^T``.

Reference: FLoRG, arXiv 2602.17095; the forms used here are our own algebra.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.capture import reads_values
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.dispatch import register
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.library.operation import call
from fedcore_kernels.rows import working_copies
from fedcore_kernels.stacks import row_scale
from fedcore_kernels.steps import (
    EPS_REL,
    FactorStep,
    check_stack_and_previous,
    principal,
    spread,
    with_reports,
)
from fedcore_kernels.whitened import whiten

OnRankLoss = Literal["zero", "keep_prev"]

# Squared condition of C up to which its r x r Gram is used. The inverse root then loses at most
# 1e4 units of round-off, 1e-12, and a hundredfold margin is left to 1e-10.
_GRAM_LIMIT = 1e4


def _whitened_polar(
    previous: Tensor, rows: Tensor, eps_rel: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor (l, q, m), singular values (l, s) and kept rank (l,) of ``previous rows^T``."""
    mixing, basis = whiten(previous)
    left, values, right = torch.linalg.svd(basis @ rows.mT, full_matrices=False)
    outer, cut, inner = torch.linalg.svd(mixing @ (left * values[:, None, :]), full_matrices=False)
    significant = (cut > eps_rel * cut[:, :1]) & (cut > 0)
    return (outer * significant[:, None, :]) @ inner @ right, cut, significant.sum(-1)


def _coefficients(
    previous: Tensor, rows: Tensor, scale: Tensor, eps_rel: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``polar(previous F^T)`` (l, q, m) for ``F = scale rows``, kept rank (l,), condition (l,)."""
    product = (previous @ rows.mT) * scale
    energies, vectors = torch.linalg.eigh(product @ product.mT)
    unsafe = (energies[:, 0] * _GRAM_LIMIT <= energies[:, -1]).nonzero()[:, 0]
    factor = ((vectors * energies.abs().rsqrt()[:, None, :]) @ vectors.mT) @ product
    rank = torch.full_like(energies[:, 0], previous.shape[1], dtype=torch.int64)
    condition = (energies[:, -1] / energies[:, 0]).sqrt()
    if len(unsafe):
        factor[unsafe], values, rank[unsafe] = _whitened_polar(
            previous[unsafe], scale[:, None] * rows[unsafe], eps_rel
        )
        condition[unsafe] = spread(values, rank[unsafe])
    return factor, rank, condition


def _torch_body(
    stack: Tensor, root: Tensor, previous: Tensor, eps_rel: float, align: bool, on_rank_loss: str
) -> FactorStep:
    # Written module group by module group, so that no second copy of all factors is made.
    factors = stack.new_empty(previous.shape, dtype=checks.accumulator(stack.dtype))
    reports = []
    scale = row_scale(root, stack)
    for part, rows in working_copies(stack):
        before = previous[part].double()
        coefficients, rank, condition = _coefficients(before, rows, scale, eps_rel)
        factor = (coefficients * scale) @ rows
        if on_rank_loss == "keep_prev":
            lost = torch.eye(before.shape[1], dtype=before.dtype, device=before.device)
            lost = lost - coefficients @ coefficients.mT
            short = (rank < before.shape[1])[:, None, None]
            factor = factor + torch.where(short, lost @ before, 0.0)
        if not align:
            factor = principal(factor)
        unknown = torch.full_like(condition, float("nan"))
        aligned = rank if align else torch.zeros_like(rank)
        factors[part] = factor
        reports.append((rank, condition, unknown, unknown, aligned))
    return with_reports(factors, reports)


register("nystrom_step", "torch", _torch_body, reads_values)


def nystrom_step(
    stack: checks.ArrayLike,
    weights: checks.ArrayLike,
    previous: checks.ArrayLike,
    eps_rel: float = EPS_REL,
    *,
    align: bool = True,
    on_rank_loss: OnRankLoss = "zero",
) -> FactorStep:
    """One ``sketched`` step for every module of ``stack``.

    Args:
        stack: (N, L, r, k) floating point, any strides: the clients' factors.
        weights: (N,) real numbers, normalised in fp64.
        previous: (L, q, k) the factors broadcast at the start of the round; ranks of clients and
            server may differ.
        eps_rel: singular triplets of ``A_prev F^T`` not above this share of the largest are
            dropped.
        align: keep the gauge of ``previous``; otherwise the factor of the same Gram with orthogonal
            rows of descending norm.
        on_rank_loss: what becomes of directions of ``previous`` that were dropped: ``"zero"``, or
            ``"keep_prev"`` to carry the previous factor on in them.

    Returns:
        :class:`FactorStep` with factors (L, q, k), fp32 unless ``stack`` is fp64. Gap and tail are
        not known to this step. A dropped direction lowers ``rank``.

    Raises:
        KernelInputError: a wrong shape, dtype, device or option, unusable weights, or a module
            whose previous factor is all zero.

    Cost: reads N L r k numbers once; 4 q L m k flops.

    Example:
        >>> step = nystrom_step([[[[2.0, 0.0]]], [[[0.0, 2.0]]]], [1, 1], [[[1.0, 0.0]]])
        >>> step.factor, step.rank
        (tensor([[[1.4142, 0.0000]]]), tensor([1]))
    """
    uploads, before = check_stack_and_previous(stack, previous)
    if on_rank_loss not in ("zero", "keep_prev"):
        raise KernelInputError(f"on_rank_loss is {on_rank_loss!r}; pass 'zero' or 'keep_prev'")
    cutoff = checks.fraction("eps_rel", eps_rel)
    counts = client_weights(weights, uploads.shape[0])
    return FactorStep(*call("nystrom_step", uploads, counts, before, cutoff, align, on_rank_loss))
