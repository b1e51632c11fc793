"""FLoRG's server steps on the device: every factor of one rank in the same few launches.

``sketched`` whitens first: with ``A_prev = T V``, V of orthonormal rows, and ``C = V F^T``,

    C C^T = W diag(s^2) W^T,    A = polar(T W diag(s)) diag(1/s) W^T C F

so that only the condition of F enters and no branch on values is needed: the step can be captured
in a CUDA graph. The uploads are read twice, for C and for the sum; everything else is r x r, in
fp64, or as small as one client's factors.

``truncated`` reads them twice as well, for the dual Gram and for its leading directions.

Products of fp32 and 16-bit uploads carry the rounding of fp32, so directions below 1e-6 of the
largest cannot be told from noise: they are dropped and counted like those below ``eps_rel``. For
fp64 uploads that share is 1e-7, since ``C C^T`` carries the rounding of squares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda import small
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.cuda.grouped import (
    apply_rows,
    cross_gram_partials,
    cross_gram_rows,
    gram_rows,
)
from fedcore_kernels.cuda.spectra import SWEEPS
from fedcore_kernels.cuda.stacks import segments_of
from fedcore_kernels.cuda.tasks import Segments
from fedcore_kernels.jit.sketched import sketched_core_kernel, whiten_kernel
from fedcore_kernels.spectra import column_signs
from fedcore_kernels.steps import FactorStep, principal, spread

# Singular values of a product of fp32 or 16-bit uploads, and of an fp64 product through its Gram,
# that stand clear of rounding: shares of the largest.
_FLOOR = 1e-6
_WIDE_FLOOR = 1e-7
# Eigenvalues of the dual Gram of 16-bit uploads, whose products within a tile are fp32.
_GRAM_FLOOR = 1e-6
# Rounding of a Gram in fp64, for any rank the kernels take.
_GRAM_ROUNDING = 1e-14

FUSED_LIMIT = 32
"""Largest rank of the previous factor whose r x r problems fit into one program."""


class Report(NamedTuple):
    """What a step reports for each factor: the fields of :class:`FactorStep` after the factor."""

    rank: Tensor
    condition: Tensor
    gap: Tensor
    tail: Tensor
    aligned: Tensor


def _tile(order: int) -> int:
    return max(2, 1 << (order - 1).bit_length())


def inverse(values: Tensor, kept: Tensor) -> Tensor:
    """``1 / values`` where ``kept``, and zero elsewhere."""
    return torch.where(kept, values, 1.0).reciprocal() * kept


def row_weights(root: Tensor, segments: Segments) -> Tensor:
    """``root (N,)`` once for every row of a factor's stack: (m, 1)."""
    return root.repeat_interleave(segments.rank)[:, None]


def whiten_rows(previous: Tensor, segments: Segments, basis: Tensor) -> Tensor:
    """Write V of ``previous = T V`` into ``basis`` and return T (factors, q, q) fp64.

    Directions without weight are zero in both.
    """
    one = torch.ones(1, dtype=torch.float64, device=previous.device)
    grams = gram_rows(previous, 1, segments, one, exact=True)
    order = segments.rank
    if order <= FUSED_LIMIT:
        mixing, cores = torch.empty_like(grams), torch.empty_like(grams)
        size = configuration("whiten", previous.device, order)
        whiten_kernel[(len(grams),)](
            grams,
            mixing,
            cores,
            order,
            N=_tile(order),
            CUTOFF=_GRAM_ROUNDING,
            SWEEPS=SWEEPS,
            num_warps=size["warps"],
        )
    else:
        energies, vectors = small.eigh(grams)
        significant = (energies > _GRAM_ROUNDING * energies[:, :1]) & (energies > 0)
        values = torch.where(significant, energies, 0.0).sqrt()
        mixing, cores = vectors * values[:, None], vectors * inverse(values, significant)[:, None]
    apply_rows(previous, 1, segments, cores, basis)
    return mixing


class _Middle(NamedTuple):
    """What stands between the two reads of the uploads.

    Attributes:
        cores: (factors, m, q) the transposed cores of the second read.
        projector: (factors, q, q) on the directions of the previous factor that were kept.
        spectrum: (factors, q) singular values of ``T C``, descending.
        significant: (factors, q) which of them count.
    """

    cores: Tensor
    projector: Tensor
    spectrum: Tensor
    significant: Tensor


def _fused_middle(
    partials: Tensor, rank: int, root: Tensor, mixing: Tensor, floor: float, eps_rel: float
) -> _Middle:
    """The middle part with one program per factor."""
    slabs, factors, stacked, rows = partials.shape
    cores = partials.new_empty((factors, stacked, rows))
    projector, spectrum = torch.empty_like(mixing), partials.new_empty((factors, rows))
    size = configuration("sketched_core", partials.device, rows)
    sketched_core_kernel[(factors,)](
        partials,
        root,
        mixing,
        cores,
        projector,
        spectrum,
        stacked,
        rows,
        slabs,
        partials.stride(0),
        floor,
        eps_rel,
        RANK=rank,
        N=_tile(rows),
        BLOCK_M=size["block_m"],
        SWEEPS=SWEEPS,
        num_warps=size["warps"],
    )
    return _Middle(
        cores, projector, spectrum, (spectrum > eps_rel * spectrum[:, :1]) & (spectrum > 0)
    )


def _middle(
    partials: Tensor, rank: int, root: Tensor, mixing: Tensor, floor: float, eps_rel: float
) -> _Middle:
    """The middle part for ranks beyond one program's registers, through batched products."""
    weights = root.repeat_interleave(rank)[:, None]
    half = partials.sum(0) * weights
    energies, vectors = small.eigh(half.mT @ half)
    clear = (energies > floor**2 * energies[:, :1]) & (energies > 0)
    values = torch.where(clear, energies, 0.0).sqrt()
    left, spectrum, right = small.svd(mixing @ (vectors * values[:, None]))
    significant = (spectrum > eps_rel * spectrum[:, :1]) & (spectrum > 0)
    turned = left * significant[:, None]
    core = turned @ right @ (inverse(values, clear)[:, :, None] * vectors.mT)
    return _Middle((half * weights) @ core.mT, turned @ left.mT, spectrum, significant)


def sketched_rows(
    uploads: Tensor,
    clients: int,
    segments: Segments,
    root: Tensor,
    previous: Tensor,
    rows: int,
    eps_rel: float,
    out: Tensor,
) -> tuple[Report, Tensor]:
    """Write the next factors to ``out``, laid out like ``previous``; the step reads no value.

    Returns the report and, (factors, q, q), the projector on the directions of ``previous`` that
    were kept.
    """
    dtype = checks.accumulator(uploads.dtype)
    basis = torch.empty_like(previous, dtype=dtype)
    mixing = whiten_rows(previous, segments.counterparts(rows), basis)
    partials = cross_gram_partials(uploads, clients, segments, basis, rows)
    floor = max(eps_rel, _WIDE_FLOOR if dtype == torch.float64 else _FLOOR)
    middle = _fused_middle if rows <= FUSED_LIMIT else _middle
    cores, projector, spectrum, significant = middle(
        partials, segments.rank, root, mixing, floor, eps_rel
    )
    apply_rows(uploads, clients, segments, cores, out)
    rank = significant.sum(-1)
    unknown = torch.full_like(spectrum[:, 0], float("nan"))
    return Report(rank, spread(spectrum, rank), unknown, unknown, rank), projector


def nystrom_step(
    stack: Tensor, root: Tensor, previous: Tensor, eps_rel: float, align: bool, on_rank_loss: str
) -> FactorStep:
    """The ``sketched`` step of a stack (N, L, r, k)."""
    rows = previous.shape[1]
    dtype = checks.accumulator(stack.dtype)
    factor = torch.empty(previous.shape, dtype=dtype, device=stack.device)
    report, projector = sketched_rows(
        stack,
        stack.shape[0],
        segments_of(stack, rows),
        root,
        previous.contiguous(),
        rows,
        eps_rel,
        factor,
    )
    if on_rank_loss == "keep_prev":
        lost = torch.eye(rows, dtype=torch.float64, device=stack.device) - projector
        short = (report.rank < rows)[:, None, None]
        factor = (factor + torch.where(short, lost @ previous.double(), 0.0)).to(dtype)
    if not align:
        factor = principal(factor.double()).to(dtype)
        report = report._replace(aligned=torch.zeros_like(report.rank))
    return FactorStep(factor, *report)


def truncated_rows(
    uploads: Tensor,
    clients: int,
    segments: Segments,
    root: Tensor,
    rank: int,
    eps_rel: float,
    leading: Tensor,
) -> Report:
    """Write the ``rank`` leading directions of F to ``leading``; the report knows no alignment."""
    gram = gram_rows(uploads, clients, segments, root)
    values, vectors = small.eigh(gram)
    values = values.clamp(min=0)
    size = min(rank, values.shape[1])
    floor = eps_rel if uploads.dtype.itemsize > 2 else max(eps_rel, _GRAM_FLOOR)
    significant = (values[:, :size] > floor * values[:, :1]) & (values[:, :size] > 0)
    cores = row_weights(root, segments) * vectors[:, :, :size] * significant[:, None]
    apply_rows(
        uploads, clients, segments, torch.nn.functional.pad(cores, (0, rank - size)), leading
    )
    count = significant.sum(-1)
    rest = torch.nn.functional.pad(values[:, size:], (0, 1))
    last = torch.where(significant[:, -1], values[:, size - 1], 0.0)
    gap = torch.where(last > 0, 1 - rest[:, 0] / torch.where(last > 0, last, 1.0), 1.0)
    tail = torch.linalg.vector_norm(rest, dim=-1)
    condition = spread(values.sqrt(), count)
    return Report(count, condition, gap, tail, torch.zeros_like(count))


def align_rows(
    leading: Tensor,
    segments: Segments,
    previous: Tensor,
    rank: int,
    rows: int,
    eps_rel: float,
    out: Tensor,
) -> Tensor:
    """Write ``O leading`` nearest to ``previous`` to ``out``; the directions it fixed (factors,).

    ``segments`` places the factors of ``leading``, with counterparts of ``rows`` rows.
    """
    product = cross_gram_rows(leading, 1, segments, previous, rows)
    left, values, right = small.svd(product.mT)
    apply_rows(leading, 1, segments, (left @ right).mT, out)
    return ((values > eps_rel * values[:, :1]) & (values > 0)).sum(-1)


def truncated_step(
    stack: Tensor, root: Tensor, previous: Tensor, rank: int, eps_rel: float, align: bool
) -> FactorStep:
    """The ``truncated`` step of a stack (N, L, r, k)."""
    clients, modules, _, width = stack.shape
    dtype, device = checks.accumulator(stack.dtype), stack.device
    leading = torch.empty((1, modules, rank, width), dtype=dtype, device=device)
    report = truncated_rows(stack, clients, segments_of(stack, rank), root, rank, eps_rel, leading)
    if not align:
        signs = column_signs(leading[0].mT)[:, 0, :, None]
        return FactorStep(leading[0] * signs, *report)
    rows = previous.shape[1]
    factor = torch.empty((modules, rows, width), dtype=dtype, device=device)
    aligned = align_rows(
        leading, segments_of(leading, rows), previous.contiguous(), rank, rows, eps_rel, factor
    )
    aligned = torch.minimum(aligned, report.rank)
    return FactorStep(factor, *report._replace(aligned=aligned))
