"""``fedcore::eigh_small`` and ``svd_small``, without gradients.

The vectors of a repeated value are any basis of its space, and those of close values rotate without
bound: what one differentiates is a function of the spaces, such as ``polar``.
"""

from __future__ import annotations

from torch import Tensor

from fedcore_kernels.checks import accumulator
from fedcore_kernels.dispatch import run
from fedcore_kernels.library.operation import Promise, define


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run("eigh_small", (matrix,))
    return result


def _eigh_promise(matrix: Tensor) -> list[Promise]:
    dtype = accumulator(matrix.dtype)
    return [(matrix.shape[:-1], dtype), (matrix.shape, dtype)]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = run("svd_small", (matrix,))
    return result


def _svd_promise(matrix: Tensor) -> list[Promise]:
    *lead, p, q = matrix.shape
    short, dtype = min(p, q), accumulator(matrix.dtype)
    return [((*lead, p, short), dtype), ((*lead, short), dtype), ((*lead, short, q), dtype)]


define("eigh_small(Tensor matrix) -> (Tensor, Tensor)", _eigh, _eigh_promise)
define("svd_small(Tensor matrix) -> (Tensor, Tensor, Tensor)", _svd, _svd_promise)
