"""Triton bodies of the polar factor and the Procrustes problem.

The factor comes from matmuls alone (``quintics.py``) and is accepted where that proves it: quintics
that take all singular values to 1 cannot have started from one below a known bound. Matrices
without that proof, or with a determinant to mend, are decomposed by a second launch, which leaves
the others alone; no value is read back.

A polar factor of fp32, bf16 or fp16 is computed in fp32, of fp64 in fp64: its error is a few units
of round-off times the condition. A Procrustes problem is computed in fp64 whatever its dtype, since
the condition of ``target source^T`` is that of both factors multiplied.
"""

from __future__ import annotations

from functools import cache
from math import ceil, log2, sqrt

import numpy as np
import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.cuda.spectra import SWEEPS, power_of_two
from fedcore_kernels.jit.polar import GENERAL_DOT, polar_jacobi_kernel, polar_kernel
from fedcore_kernels.jit.procrustes import cross_product_kernel
from fedcore_kernels.polar import Polar
from fedcore_kernels.quintics import quintics

# Shares of the largest singular value from which the quintics of one attempt after the other start:
# 6 products of three for most matrices, 9 more for the others. Quintics that start from 1e-4 alone
# would cost a matrix of condition 3 a factor of 30 in accuracy.
_LOWER = (1e-2, 1e-4)

_SHORTEST_SUM = 8 if GENERAL_DOT else 16
"""Terms a ``tl.dot`` adds up at least."""

# Above, fp32 products go to tensor cores in three TF32 parts; below, plain fp32 is as fast.
_PLAIN_SIZE = 16

# Programs that fill any of the cards.
_PROGRAMS = 1024


def _padded(size: int) -> int:
    return max(_SHORTEST_SUM, power_of_two(size))


def _mode(dtype: torch.dtype, size: int) -> str:
    if dtype == torch.float64:
        return "fp64"
    return "ieee" if size <= _PLAIN_SIZE else "tf32x3"


def _attempts(cutoff: float) -> tuple[float, ...]:
    """The lower bounds of the attempts by which singular values can be proven above ``cutoff``.

    From a quarter of the bound no singular value arrives (``quintics``). A high cut-off gets a
    bound of its own, a power of two to keep their number small, or no attempt at all.
    """
    usual = tuple(lower for lower in _LOWER if lower >= 4 * cutoff)
    if usual:
        return usual
    lower = 4 * 2.0 ** ceil(log2(cutoff))
    return (lower,) if lower < 1 else ()


@cache
def _quintics(attempts: tuple[float, ...], eps: float, device: torch.device) -> Tensor:
    """Number and coefficients of the quintics of every attempt, in fp64.

    Kept for good: a captured CUDA graph knows no more than their address.
    """
    flat: list[float] = []
    for lower in attempts:
        chain = quintics(lower, 4 * eps)
        flat += [len(chain), *(number for quintic in chain for number in quintic)]
    return torch.tensor(flat, dtype=torch.float64).to(device)


def _high_and_low(number: float) -> tuple[float, float]:
    """Two fp32 numbers whose sum is ``number`` to 48 bits."""
    high = float(np.float32(number))
    return high, float(np.float32(number - high))


def _factors(
    matrix: Tensor,
    cutoff: float,
    regularisation: float,
    dtype: torch.dtype,
    complete: bool,
    rotation: bool,
) -> tuple[Tensor, Tensor]:
    """Factors (batch, p, q) of ``dtype`` and ranks (batch,) of contiguous ``matrix``."""
    batch, p, q = matrix.shape
    factor = torch.empty((batch, p, q), dtype=dtype, device=matrix.device)
    rank = torch.full((batch,), -1, dtype=torch.int64, device=matrix.device)
    if not batch:
        return factor, rank
    wide = matrix.dtype == torch.float64
    working = checks.accumulator(matrix.dtype)
    eps = torch.finfo(working).eps
    attempts = _attempts(cutoff)
    share = _high_and_low(regularisation)
    long, short = max(p, q), min(p, q)
    sizes = batch, long, short, *((q, 1) if p >= q else (1, q))
    shape = {
        "ROWS": _padded(long),
        "N": _padded(short),
        "MODE": _mode(working, _padded(long)),
        "ROTATION": rotation,
        "WIDE": wide,
    }
    if attempts:
        size = configuration("polar", matrix.device, working.itemsize * 8, _padded(long))
        polar_kernel[(-(-batch // size["matrices"]),)](
            matrix,
            factor,
            rank,
            _quintics(attempts, eps, matrix.device),
            len(attempts),
            *share,
            *sizes,
            16 * eps * sqrt(long),
            COUNT=size["matrices"],
            num_warps=size["warps"],
            **shape,
        )
    size = configuration("polar_jacobi", matrix.device, working.itemsize * 8, _padded(long))
    polar_jacobi_kernel[(-(-batch // size["matrices"]),)](
        matrix,
        factor,
        rank,
        *share,
        *_high_and_low(cutoff),
        *sizes,
        COUNT=size["matrices"],
        SWEEPS=SWEEPS,
        COMPLETE=complete,
        num_warps=size["warps"],
        **shape,
    )
    return factor, rank


def polar(matrix: Tensor, cutoff: float, regularisation: float) -> Polar:
    """The factor of ``matrix`` (..., p, q) without its null directions, and its rank.

    A cut-off below the machine epsilon of the working dtype counts as that epsilon. A matrix that
    holds NaN or infinity gives NaN and rank 0.
    """
    *leading, p, q = matrix.shape
    flat = matrix.reshape(-1, p, q).contiguous()
    dtype = checks.accumulator(matrix.dtype)
    factor, rank = _factors(flat, cutoff, regularisation, dtype, complete=False, rotation=False)
    return Polar(factor.reshape(*leading, p, q), rank.reshape(leading))


def _cross_product(source: Tensor, target: Tensor) -> Tensor:
    """``target source^T`` (batch, q, p) in fp64 of (batch, p, k) and (batch, q, k)."""
    if not GENERAL_DOT:
        source, target = (x.to(checks.accumulator(x.dtype)) for x in (source, target))
    batch, p, k = source.shape
    q = target.shape[1]
    rows, columns = max(16, power_of_two(p)), max(16, power_of_two(q))
    size = configuration("cross_product", source.device, max(rows, columns))
    block = size["block_k"]
    slabs = max(1, min(_PROGRAMS // max(batch, 1), k // (4 * block)))
    step = -(-k // (slabs * block)) * block
    slabs = -(-k // step)
    partials = torch.empty((slabs, batch, q, p), dtype=torch.float64, device=source.device)
    if batch:
        cross_product_kernel[(batch * slabs,)](
            source,
            target,
            partials,
            batch,
            p,
            q,
            k,
            step,
            *source.stride(),
            *target.stride(),
            P=rows,
            Q=columns,
            BLOCK_K=block,
            num_warps=size["warps"],
            num_stages=size["stages"],
        )
    return partials.sum(0) if slabs > 1 else partials[0]


def procrustes(source: Tensor, target: Tensor, rotation_only: bool) -> Tensor:
    """The isometry (..., q, p) that carries ``source`` (..., p, k) to ``target`` (..., q, k).

    Null directions of ``target source^T`` are completed to an isometry.
    """
    p, k = source.shape[-2:]
    q = target.shape[-2]
    leading = torch.broadcast_shapes(source.shape[:-2], target.shape[:-2])
    cross = _cross_product(
        source.expand(*leading, p, k).reshape(-1, p, k),
        target.expand(*leading, q, k).reshape(-1, q, k),
    )
    dtype = checks.accumulator(torch.promote_types(source.dtype, target.dtype))
    factor, _ = _factors(cross, 0.0, 0.0, dtype, complete=True, rotation=rotation_only)
    return factor.reshape(*leading, q, p)
