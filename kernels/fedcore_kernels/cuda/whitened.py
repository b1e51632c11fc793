"""Triton bodies of the whitened form of the sketched step.

``whitened_sum`` reads the uploads once where the factors of a few clients fit on the chip, and
twice where they do not; both sum in fp32 (fp64 for fp64).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda import small
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.cuda.florg import inverse, row_weights, whiten_rows
from fedcore_kernels.cuda.grouped import apply_rows, cross_gram_rows
from fedcore_kernels.cuda.stacks import segments_of
from fedcore_kernels.jit.one_pass import one_pass_kernel
from fedcore_kernels.steps import FactorStep, spread

# Rows of uploads that one tensor-core instruction takes.
_TILE = 16


def whitened_basis(previous: Tensor) -> tuple[Tensor, Tensor]:
    """``(T, V)`` fp64 with ``previous = T V``; rows of V without weight are zero."""
    wide = previous.double()[None]
    basis = torch.empty(previous.shape, dtype=torch.float64, device=previous.device)
    return whiten_rows(wide, segments_of(wide, previous.shape[1]), basis), basis


def _one_pass(stack: Tensor, shares: Tensor, basis: Tensor) -> Tensor | None:
    """The sum from one read, or ``None`` where a client's factor does not fit on the chip."""
    clients, modules, rank, width = stack.shape
    rows = basis.shape[1]
    padded = max(8, 1 << (rows - 1).bit_length())
    bits = stack.dtype.itemsize * 8
    if rank > _TILE or padded > _TILE or bits > 32 or stack.dtype == torch.float16:
        return None
    size = configuration("one_pass", stack.device, bits, padded)
    if width > size["width"]:
        return None
    segments = segments_of(stack, rows)
    # A few groups of clients per factor keep the card busy and the partial sums few.
    groups = min(clients, max(1, 264 // modules))
    share = -(-clients // groups)
    groups = -(-clients // share)
    partials = torch.empty((groups, modules, rows, width), dtype=torch.float32, device=stack.device)
    one_pass_kernel[(modules, groups)](
        stack,
        basis.contiguous(),
        shares.float(),
        partials,
        segments.to(stack.device),
        segments.client_stride,
        clients,
        share,
        partials.stride(0),
        RANK=rank,
        ROWS=rows,
        ROWS_PAD=padded,
        WIDTH_PAD=max(128, 1 << (width - 1).bit_length()),
        SPLIT=size["split"],
        MODE="bf16" if stack.dtype == torch.bfloat16 else "tf32x3",
        ALIGNMENT=segments.alignment,
        num_warps=size["warps"],
        num_stages=size["stages"],
    )
    return partials.sum(0)


def whitened_sum(stack: Tensor, root: Tensor, basis: Tensor) -> Tensor:
    """``sum_n w_n (V A_n^T) A_n`` (L, q, k)."""
    shares = root.square()
    total = _one_pass(stack, shares, basis)
    if total is not None:
        return total
    clients, rows = stack.shape[0], basis.shape[1]
    segments = segments_of(stack, rows)
    cross = cross_gram_rows(stack, clients, segments, basis.contiguous(), rows)
    out = torch.empty(basis.shape, dtype=checks.accumulator(stack.dtype), device=stack.device)
    apply_rows(stack, clients, segments, cross * row_weights(shares, segments), out)
    return out


def whitened_upload(factor: Tensor, basis: Tensor) -> Tensor:
    """``(V A^T) A`` (L, q, k) of one client."""
    one = torch.ones(1, dtype=torch.float64, device=factor.device)
    return whitened_sum(factor[None], one, basis)


def whitened_step(total: Tensor, mixing: Tensor, basis: Tensor, eps_rel: float) -> FactorStep:
    """The next factors (L, q, k) from the sum; only the lower triangle of ``Z V^T`` is read."""
    rows, wide = total.shape[1], total.double()[None]
    segments = segments_of(wide, rows)
    product = cross_gram_rows(wide, 1, segments, basis.double().contiguous(), rows)
    energies, vectors = small.eigh(product.tril() + product.tril(-1).mT)
    clear = (energies > eps_rel * energies[:, :1]) & (energies > 0)
    values = torch.where(clear, energies, 0.0).sqrt()
    left, cut, right = small.svd(mixing.double() @ (vectors * values[:, None]))
    significant = (cut > eps_rel * cut[:, :1]) & (cut > 0)
    core = (left * significant[:, None]) @ right @ (inverse(values, clear)[:, :, None] * vectors.mT)
    factor = torch.empty(total.shape, dtype=torch.float64, device=total.device)
    apply_rows(wide, 1, segments, core.mT, factor)
    rank = significant.sum(-1)
    unknown = torch.full_like(cut[:, 0], float("nan"))
    dtype = checks.accumulator(total.dtype)
    return FactorStep(factor.to(dtype), rank, spread(cut, rank), unknown, unknown, rank)
