"""``polar`` and ``procrustes`` on batches of 8 x 8 and 16 x 16, one for every client and module."""

from __future__ import annotations

from functools import partial

from bench.baselines.batched_procrustes import batched_polar, batched_procrustes
from bench.baselines.scipy_procrustes import scipy_polar, scipy_procrustes
from bench.case import Case, Plan, one_operation
from bench.ops.spectra import batch_shape, square_matrices
from bench.workloads import Setting
from fedcore_kernels import polar, procrustes

SIZES = (8, 16)

SCIPY, SVD = "scipy orthogonal_procrustes, loop", "torch.linalg.svd"

# Nominal: a square SVD and the product of its factors; Procrustes forms the matrix first.
_POLAR_FLOPS, _PROCRUSTES_FLOPS = 23, 25


def plans(setting: Setting) -> list[Plan]:
    """Both operations at both sizes."""
    return [
        Plan(f"{op} {size} x {size}", partial(build, size, setting))
        for op, build in (("polar", _polar), ("procrustes", _procrustes))
        for size in SIZES
    ]


def _polar(size: int, setting: Setting) -> Case:
    matrices = square_matrices(size, setting)
    array = matrices.cpu().numpy()
    return one_operation(
        "polar",
        batch_shape(matrices),
        matrices,
        lambda: polar(matrices),
        {SCIPY: lambda: scipy_polar(array), SVD: lambda: batched_polar(matrices)},
        written=matrices.nbytes,
        flops=_POLAR_FLOPS * matrices.numel() * size,
    )


def _procrustes(size: int, setting: Setting) -> Case:
    sources = square_matrices(size, setting)
    targets = sources.flip(0).contiguous()
    arrays = sources.cpu().numpy(), targets.cpu().numpy()
    return one_operation(
        "procrustes",
        batch_shape(sources),
        sources,
        lambda: procrustes(sources, targets),
        {
            SCIPY: lambda: scipy_procrustes(*arrays),
            SVD: lambda: batched_procrustes(sources, targets),
        },
        read=sources.nbytes + targets.nbytes,
        written=sources.nbytes,
        flops=_PROCRUSTES_FLOPS * sources.numel() * size,
    )
