"""``eigh_small`` and ``svd_small`` on batches of matrices of 8 to 64 rows.

Ours compute in fp64 and return fp32; the libraries compute in the fp32 that is given to them.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.case import Case, Plan, one_operation
from bench.timing import Call
from bench.workloads import Setting
from fedcore_kernels import eigh_small, svd_small

SIZES = {8: 1280, 16: 1280, 32: 256, 64: 64}
"""Matrices in a batch by their number of rows: a client and module each, or a module each."""

# Nominal: tridiagonal QR with vectors; bidiagonal QR with both factors, for square matrices.
_EIGH_FLOPS, _SVD_FLOPS = 9, 21


def plans(setting: Setting) -> list[Plan]:
    """Both decompositions at every size."""
    sizes = [8, 16] if setting.small else list(SIZES)
    return [
        Plan(f"{op} {size} x {size}", partial(build, size, setting))
        for op, build in (("eigh_small", _eigh), ("svd_small", _svd))
        for size in sizes
    ]


def square_matrices(size: int, setting: Setting) -> Tensor:
    """A batch of fp32 matrices (n, size, size), the same on every call."""
    batch = SIZES[size] // (10 if setting.small else 1)
    random = torch.Generator().manual_seed(size)
    return torch.randn(batch, size, size, generator=random).to(setting.device)


def batch_shape(matrices: Tensor) -> str:
    """What stands in the tables: ``1280 of 8 x 8``."""
    batch, rows, columns = matrices.shape
    return f"{batch} of {rows} x {columns}"


def _eigh(size: int, setting: Setting) -> Case:
    matrices = square_matrices(size, setting)
    symmetric = matrices + matrices.mT
    others: dict[str, Call] = {"torch.linalg.eigh": lambda: torch.linalg.eigh(symmetric)}
    if setting.device.type == "cpu":
        array = symmetric.numpy()
        others["numpy.linalg.eigh"] = lambda: np.linalg.eigh(array)
    return one_operation(
        "eigh_small",
        batch_shape(symmetric),
        symmetric,
        lambda: eigh_small(symmetric),
        others,
        written=symmetric.nbytes + 4 * len(symmetric) * size,
        flops=_EIGH_FLOPS * symmetric.numel() * size,
    )


def _svd(size: int, setting: Setting) -> Case:
    matrices = square_matrices(size, setting)
    others: dict[str, Call] = {
        "torch.linalg.svd": lambda: torch.linalg.svd(matrices, full_matrices=False)
    }
    if setting.device.type == "cpu":
        array = matrices.numpy()
        others["numpy.linalg.svd"] = lambda: np.linalg.svd(array, full_matrices=False)
    return one_operation(
        "svd_small",
        batch_shape(matrices),
        matrices,
        lambda: svd_small(matrices),
        others,
        written=2 * matrices.nbytes + 4 * len(matrices) * size,
        flops=_SVD_FLOPS * matrices.numel() * size,
    )
