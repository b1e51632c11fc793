"""Batched problems of order r on the device: the Jacobi kernels up to their limit, then torch."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels.cuda import JACOBI_LIMIT, spectra
from fedcore_kernels.spectra import Eigh, Svd


def eigh(matrix: Tensor) -> Eigh:
    """Eigenvalues, descending, and eigenvectors of symmetric fp64 matrices (L, n, n)."""
    if matrix.shape[-1] <= JACOBI_LIMIT:
        return spectra.eigh_small(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return Eigh(values.flip(-1), vectors.flip(-1))


def svd(matrix: Tensor) -> Svd:
    """Thin SVD of fp64 matrices (L, p, q), values descending."""
    if max(matrix.shape[-2:]) <= JACOBI_LIMIT:
        return spectra.svd_small(matrix)
    return Svd(*torch.linalg.svd(matrix, full_matrices=False))
