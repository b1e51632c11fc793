"""Eigenvalue and singular-value decompositions with one order and one sign.

Values descend. Vectors are fixed up to sign by the problem; here the entry of largest modulus of
each (left) vector is positive, so that equal input gives equal output on every machine that
computes equal values. Vectors of repeated values are any orthonormal basis of their space.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.capture import reads_values
from fedcore_kernels.dispatch import register
from fedcore_kernels.library.operation import call


class Eigh(NamedTuple):
    """``matrix = vectors diag(values) vectors^T``.

    Attributes:
        values: (..., n) descending.
        vectors: (..., n, n) orthonormal columns.
    """

    values: Tensor
    vectors: Tensor


class Svd(NamedTuple):
    """``matrix = left diag(values) right`` with ``s = min(p, q)``.

    Attributes:
        left: (..., p, s) orthonormal columns.
        values: (..., s) descending, not negative.
        right: (..., s, q) orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def column_signs(vectors: Tensor) -> Tensor:
    """+1 or -1 per column of ``vectors (..., n, s)``: the sign of its entry of largest modulus.

    Example:
        >>> column_signs(torch.tensor([[1.0, 3.0], [-2.0, 1.0]])).tolist()
        [[-1.0, 1.0]]
    """
    largest = vectors.abs().argmax(-2, keepdim=True)
    # A zero column counts as positive, hence no torch.sign.
    return torch.where(vectors.gather(-2, largest) < 0, -1.0, 1.0).to(vectors.dtype)


def _eigh_body(matrix: Tensor) -> Eigh:
    wide = matrix.double()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    dtype = checks.accumulator(matrix.dtype)
    return Eigh(values.to(dtype), (vectors * column_signs(vectors)).to(dtype))


def _svd_body(matrix: Tensor) -> Svd:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    signs = column_signs(left)
    dtype = checks.accumulator(matrix.dtype)
    return Svd((left * signs).to(dtype), values.to(dtype), (right * signs.mT).to(dtype))


register("eigh_small", "torch", _eigh_body, reads_values)
register("svd_small", "torch", _svd_body, reads_values)


def eigh_small(matrix: checks.ArrayLike) -> Eigh:
    """Eigenvalues and eigenvectors of the symmetric part of ``matrix``.

    Computed in fp64; the CUDA kernel solves fp32 and 16-bit input in fp32.

    Args:
        matrix: (..., n, n) floating point, n up to a few hundred.

    Returns:
        :class:`Eigh`, fp32 unless ``matrix`` is fp64.

    Raises:
        KernelInputError: a wrong shape or dtype.

    Example:
        >>> eigh_small([[2.0, 1.0], [1.0, 2.0]]).values
        tensor([3., 1.])
    """
    matrices = checks.tensor("matrix", matrix, ("n", "n"), batch=True)
    checks.same_size("matrix", matrices, -1, matrices.shape[-2], "its number of rows")
    return Eigh(*call("eigh_small", matrices))


def svd_small(matrix: checks.ArrayLike) -> Svd:
    """The thin singular value decomposition of ``matrix``.

    Computed in fp64; the CUDA kernel solves fp32 and 16-bit input in fp32.

    Args:
        matrix: (..., p, q) floating point, its smaller side up to a few hundred.

    Returns:
        :class:`Svd`, fp32 unless ``matrix`` is fp64.

    Raises:
        KernelInputError: a wrong shape or dtype.

    Example:
        >>> left, values, right = svd_small([[3.0, 3.0], [4.0, 4.0]])
        >>> left[:, 0], values.round(decimals=3)
        (tensor([0.6000, 0.8000]), tensor([7.0710, 0.0000]))
    """
    matrices = checks.tensor("matrix", matrix, ("p", "q"), batch=True)
    return Svd(*call("svd_small", matrices))
