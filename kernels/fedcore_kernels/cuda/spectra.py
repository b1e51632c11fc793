"""Triton bodies of the small decompositions: one launch for the whole batch.

fp32, bf16 and fp16 are computed in fp32, fp64 in fp64: values are right to a few units of round-off
of the largest. A matrix that holds NaN or infinity, or does not converge in ``SWEEPS`` sweeps,
gives NaN, where torch raises after waiting for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.jit.spectra import eigh_kernel, svd_kernel
from fedcore_kernels.spectra import Eigh, Svd

SWEEPS = 60
"""Bound on the sweeps: 64 columns of condition 1e6 in fp64, the slowest seen, converge in 22."""


def power_of_two(size: int) -> int:
    """``size`` rounded up to a power of two."""
    return 1 << (size - 1).bit_length()


def eigh_small(matrix: Tensor) -> Eigh:
    """Eigenvalues and signed eigenvectors of the symmetric part of ``matrix`` (..., n, n)."""
    *leading, n, _ = matrix.shape
    flat = matrix.reshape(-1, n, n).contiguous()
    dtype = checks.accumulator(matrix.dtype)
    values = torch.empty((len(flat), n), dtype=dtype, device=matrix.device)
    vectors = torch.empty((len(flat), n, n), dtype=dtype, device=matrix.device)
    size = configuration("eigh", matrix.device, dtype.itemsize * 8, n)
    if len(flat):
        eigh_kernel[(-(-len(flat) // size["matrices"]),)](
            flat,
            values,
            vectors,
            len(flat),
            n,
            N=power_of_two(n),
            COUNT=size["matrices"],
            SWEEPS=SWEEPS,
            WIDE=dtype == torch.float64,
            num_warps=size["warps"],
        )
    return Eigh(values.reshape(*leading, n), vectors.reshape(*leading, n, n))


def svd_small(matrix: Tensor) -> Svd:
    """The thin decomposition of ``matrix`` (..., p, q), signed by its left vectors."""
    *leading, p, q = matrix.shape
    flat = matrix.reshape(-1, p, q).contiguous()
    dtype = checks.accumulator(matrix.dtype)
    long, short = max(p, q), min(p, q)
    left = torch.empty((len(flat), p, short), dtype=dtype, device=matrix.device)
    values = torch.empty((len(flat), short), dtype=dtype, device=matrix.device)
    right = torch.empty((len(flat), short, q), dtype=dtype, device=matrix.device)
    size = configuration("svd", matrix.device, dtype.itemsize * 8, long)
    # A wide matrix is decomposed as its transpose, read and written in place of it.
    upright = p >= q
    as_left, as_right = (short, 1), (1, q)
    if len(flat):
        svd_kernel[(-(-len(flat) // size["matrices"]),)](
            flat,
            left if upright else right,
            values,
            right if upright else left,
            len(flat),
            long,
            short,
            *((q, 1) if upright else (1, q)),
            *(as_left if upright else as_right),
            *(as_right if upright else as_left),
            ROWS=power_of_two(long),
            N=power_of_two(short),
            COUNT=size["matrices"],
            SWEEPS=SWEEPS,
            SIGN_TALL=upright,
            WIDE=dtype == torch.float64,
            num_warps=size["warps"],
        )
    return Svd(
        left.reshape(*leading, p, short),
        values.reshape(*leading, short),
        right.reshape(*leading, short, q),
    )
