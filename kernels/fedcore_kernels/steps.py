"""What a server step returns, and what the two steps share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.spectra import column_signs
from fedcore_kernels.stacks import STACK_AXES

EPS_REL = 1e-12
"""Default relative cut-off of the steps; their small problems and sums are fp64."""


class FactorStep(NamedTuple):
    """The next factors of L modules and how well the step determined them.

    Attributes:
        factor: (L, r, k) the new factors.
        rank: (L,) int64, directions kept; those below the cut-off are zero in the factor.
        condition: (L,) largest over smallest kept singular value of the matrix whose spectrum is
            truncated (``F`` for ``truncated``, ``A_prev F^T`` for ``sketched``); inf at rank 0.
        gap: (L,) ``1 - lambda_{r+1} / lambda_r`` of the kept eigenvalues; 0 says that the best
            subspace is not unique. NaN where the step does not know it.
        tail: (L,) ``(sum_{i>r} lambda_i^2)^(1/2)``, the error of the best Gram of rank r. NaN where
            the step does not know it.
        aligned: (L,) int64, directions in which the previous factor fixed the gauge; fewer than
            ``rank`` when the previous factor is rank-deficient, 0 without alignment.
    """

    factor: Tensor
    rank: Tensor
    condition: Tensor
    gap: Tensor
    tail: Tensor
    aligned: Tensor


def with_reports(factor: Tensor, reports: Iterable[tuple[Tensor, ...]]) -> FactorStep:
    """A step from all modules' factors and the reports of consecutive groups of modules."""
    return FactorStep(factor, *(torch.cat(field) for field in zip(*reports, strict=True)))


def spread(values: Tensor, rank: Tensor) -> Tensor:
    """First of the descending ``values (L, s)`` over the ``rank``-th (L,), inf at rank 0.

    Example:
        >>> spread(torch.tensor([[8.0, 2.0, 0.0]]), torch.tensor([2])).tolist()
        [4.0]
    """
    last = values.gather(-1, (rank - 1).clamp(min=0)[:, None])[:, 0]
    return torch.where(rank > 0, values[:, 0] / last, float("inf"))


def principal(factor: Tensor) -> Tensor:
    """The representative of ``factor^T factor`` with orthogonal rows of descending norm.

    The entry of largest modulus of each row is positive.
    """
    _, values, right = torch.linalg.svd(factor, full_matrices=False)
    rows = values[..., :, None] * right * column_signs(right.mT)[..., 0, :, None]
    missing = factor.shape[-2] - rows.shape[-2]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing))


def check_stack_and_previous(
    stack: checks.ArrayLike, previous: checks.ArrayLike
) -> tuple[Tensor, Tensor]:
    """``stack`` (N, L, r, k) and ``previous`` (L, q, k) as matching tensors.

    Raises:
        KernelInputError: a wrong shape, dtype or device.
    """
    uploads = checks.tensor("stack", stack, STACK_AXES)
    before = checks.tensor("previous", previous, ("L", "q", "k"))
    checks.same_device("previous", before, "stack", uploads)
    checks.same_size("previous", before, 0, uploads.shape[1], "the modules of stack")
    checks.same_size("previous", before, 2, uploads.shape[3], "the width of stack")
    return uploads, before
