"""Triton bodies of the operations on products of two factors.

``product_svd`` goes through the Grams of both sides, in fp64 whatever the dtype of the uploads:
with ``F F^T = U L U^T`` the orthonormal basis of F is ``L^(-1/2) U^T F`` and the core of M is
``L_F^(1/2) U_F^T U_G L_G^(1/2)``. Squaring costs half of the digits of fp64, which leaves those of
fp32; fp64 uploads take Householder's QR in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda import small
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.cuda.florg import inverse
from fedcore_kernels.cuda.grouped import apply_rows, gram_rows
from fedcore_kernels.cuda.stacks import segments_of
from fedcore_kernels.cuda.tasks import tile_tasks
from fedcore_kernels.jit.product_gram import product_gram_kernel
from fedcore_kernels.product_svd import ProductSvd, kept_directions, tail_and_gap
from fedcore_kernels.rows import copy_bytes
from fedcore_kernels.spectra import column_signs

# Eigenvalues of a Gram in fp64 that stand clear of its rounding, as a share of the largest.
_FLOOR = 1e-14


def _whitened(stack: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """``L^(1/2) U^T`` (L, m, m) and ``U L^(-1/2)`` with one row per row of the uploads."""
    clients, _, rank, _ = stack.shape
    gram = gram_rows(stack, clients, segments_of(stack, 1), root, exact=True)
    energies, vectors = small.eigh(gram)
    clear = (energies > _FLOOR * energies[:, :1]) & (energies > 0)
    values = torch.where(clear, energies, 0.0).sqrt()
    weights = root.repeat_interleave(rank)[:, None]
    return values[:, :, None] * vectors.mT, weights * vectors * inverse(values, clear)[:, None]


def _directions(stack: Tensor, cores: Tensor, dtype: torch.dtype) -> Tensor:
    """``cores^T`` times the stacked rows of ``stack``: (L, s, k)."""
    _, modules, _, width = stack.shape
    size = cores.shape[-1]
    out = torch.empty(
        (modules, size, width), dtype=checks.accumulator(stack.dtype), device=stack.device
    )
    apply_rows(stack, stack.shape[0], segments_of(stack, size), cores, out)
    return out.to(dtype)


def product_svd(
    left: Tensor,
    right: Tensor,
    root: Tensor,
    rank: int,
    energy: float | None,
    balanced: bool,
    eps_rel: float,
) -> ProductSvd:
    """The best approximation of ``sum_n w_n left_n^T right_n`` through Gram cores."""
    dtype = checks.accumulator(torch.promote_types(left.dtype, right.dtype))
    core_left, basis_left = _whitened(left, root)
    core_right, basis_right = _whitened(right, root)
    u, values, v = small.svd(core_left @ core_right.mT)
    # F has no more directions than columns; the rest of the core is rounding.
    values = values[:, : min(values.shape[1], left.shape[3], right.shape[3])]
    count = kept_directions(values, rank, energy, eps_rel)
    size = rank if energy is None else int(count.max())
    leading = torch.arange(size, device=values.device) < count[:, None]
    weight = torch.where(leading, values[:, :size], 0.0)
    share = weight.sqrt() if balanced else leading.to(weight.dtype)
    outer = (basis_left @ u[:, :, :size]) * (share if balanced else weight)[:, None]
    inner = (basis_right @ v[:, :size].mT) * share[:, None]
    one = _directions(left, outer, dtype)
    two = _directions(right, inner, dtype)
    signs = column_signs(one.mT).mT
    return ProductSvd(one * signs, values, two * signs, count, *tail_and_gap(values, count))


def product_gram(left: Tensor, right: Tensor) -> Tensor:
    """``<left_i^T right_i, left_j^T right_j>`` (L, N, N) fp64."""
    clients, modules, rank, _ = left.shape
    device = left.device
    padded = 1 << (rank - 1).bit_length()
    size = configuration("product_gram", device, padded)
    block = max(size["block_m"], padded)
    first, second = segments_of(left, 1), segments_of(right, 1)
    tasks = tile_tasks(modules, clients, block // padded, device)
    grams = torch.empty((modules, clients, clients), dtype=torch.float64, device=device)
    product_gram_kernel[(len(tasks),)](
        left,
        right,
        grams,
        first.to(device),
        second.to(device),
        tasks,
        first.client_stride,
        second.client_stride,
        clients,
        RANK=rank,
        RANK_PAD=padded,
        BLOCK_M=block,
        BLOCK_K=size["block_k"],
        LEFT_ALIGNMENT=first.alignment,
        RIGHT_ALIGNMENT=second.alignment,
        num_warps=size["warps"],
        num_stages=size["stages"],
    )
    return grams


def mean_pair_gram(left: Tensor, right: Tensor, root: Tensor) -> Tensor:
    """``sum_n w_n <S^left_ni, S^right_nj>`` (L, N, N) fp64, from the Grams of a few modules."""
    clients, modules, rank, _ = left.shape
    one = torch.ones(clients, dtype=torch.float64, device=left.device)
    group = max(1, copy_bytes(left.device) // (16 * (clients * rank) ** 2))
    grams = []
    for start in range(0, modules, group):
        sides = (stack[:, start : start + group] for stack in (left, right))
        first, second = (
            gram_rows(side, clients, segments_of(side, 1), one, exact=True)
            .unflatten(2, (clients, rank))
            .unflatten(1, (clients, rank))
            # (l, n, a, j, c) as (l, j, (n, a, c)).
            .permute(0, 3, 1, 2, 4)
            for side in sides
        )
        shares = root.square()[:, None, None]
        grams.append((first * shares).flatten(2) @ second.flatten(2).mT)
    return torch.cat(grams)
