"""Polar factors of many small matrices by matrix products alone.

A batch of products runs several times as fast as a batch of decompositions. The iteration starts
from a matrix whose largest singular value is at most 1 and carries those above a lower bound to 1
(:mod:`~fedcore_kernels.quintics`). Matrices that have not converged then had a value below the
bound: they get a second run, and those still not converged are left to the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels.quintics import quintics

# Share of the largest singular value that converges in one run of six steps; two runs reach its
# square.
_LOWER = 1e-2
_RUNS = 2
# Distance of the singular values from 1 when they have converged, and a deviation of X^T X from the
# identity that the last step, which leaves 5/16 of its third power, brings below that.
_CONVERGED = 1e-13
_CLOSE = 5e-5

# Numbers of one of the iteration's arrays on the CPU, so that all of them stay in cache.
_CACHE_NUMBERS = 1 << 14

FEWEST = 16
"""Products pay from this many matrices on; below, the calls cost more than a decomposition."""

SMALLEST_SHARE = 1e-6
"""Singular values of a converged matrix are above this share of its largest."""


def _isometries(matrix: Tensor) -> tuple[Tensor, Tensor]:
    gram = matrix.mT @ matrix
    # A bound of the largest eigenvalue, seldom twice as large as it is.
    bound = gram.abs().sum(-1).amax(-1)[:, None, None]
    bound = torch.where(bound > 0, bound, 1.0)
    factor, gram = matrix / bound.sqrt(), gram / bound
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    converged = torch.zeros(len(matrix), dtype=torch.bool, device=matrix.device)
    active, x = torch.arange(len(matrix), device=matrix.device), factor
    for _ in range(_RUNS):
        for step, (a, b, c) in enumerate(quintics(_LOWER, _CONVERGED)):
            if step:
                gram = torch.bmm(x.mT, x)
            x = torch.baddbmm(x, x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
        factor[active] = x
        # The last step carries what is this close to 1 all the way there.
        converged[active] = (gram - eye).abs().amax((-2, -1)) < _CLOSE
        active = (~converged).nonzero()[:, 0]
        if not len(active):
            break
        x = factor[active]
        gram = torch.bmm(x.mT, x)
    return factor, converged


def isometries(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Polar factors of ``matrix (b, p, q)`` and which of them converged.

    Args:
        matrix: fp64, p >= q.

    Returns:
        (b, p, q) and (b,) bool; a converged factor has orthonormal columns and its matrix
        full rank.
    """
    if matrix.device.type == "cpu":
        group = max(FEWEST, _CACHE_NUMBERS // matrix[0].numel())
        parts = [_isometries(part) for part in matrix.split(group)]
        factors, converged = zip(*parts, strict=True)
        return torch.cat(factors), torch.cat(converged)
    return _isometries(matrix)
