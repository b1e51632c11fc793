"""The weighted mean of the clients' rows.

    mean = sum_n w_n x_n / sum_n w_n

computed as a running mean ``mean += (w_n / (w_1 + ... + w_n)) (x_n - mean)``. A difference of equal
numbers is exactly zero, so the mean of identical rows *is* that row, whatever the weights; every
intermediate value lies between the rows' extremes, so large counts cannot overflow. A plain matrix
product has neither property, and is no faster: one fused operation a row reads the row once while
the running mean stays in cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.capture import reads_values
from fedcore_kernels.client_weights import client_weights
from fedcore_kernels.dispatch import register
from fedcore_kernels.errors import KernelInputError
from fedcore_kernels.library.operation import call

# Columns of the running mean in cache at a time (8 MiB in fp32), and, for dtypes that are converted
# first, columns and rows of the converted block (2 MiB). Smaller pieces cost more calls than they
# save in memory.
_COLUMNS = 1 << 21
_CONVERTED_COLUMNS, _CONVERTED_ROWS = 1 << 17, 4


def _torch_body(updates: Tensor, shares: Tensor) -> Tensor:
    dtype = checks.accumulator(updates.dtype)
    direct = updates.dtype == dtype
    # Share of each client in the mean of those up to it: 1 for the first that counts, 0 for absent.
    steps = torch.where(shares > 0, shares / shares.cumsum(0), 0.0).tolist()
    mean = torch.empty(updates.shape[1], dtype=dtype, device=updates.device)
    columns = _COLUMNS if direct else _CONVERTED_COLUMNS
    for piece, block in zip(mean.split(columns), updates.split(columns, 1), strict=True):
        empty = True
        for first in range(0, len(steps), _CONVERTED_ROWS):
            part = slice(first, first + _CONVERTED_ROWS)
            for row, step in zip(block[part].to(dtype).unbind(0), steps[part], strict=True):
                if step == 0:
                    continue
                if empty:
                    piece.copy_(row)
                else:
                    piece.lerp_(row, step)
                empty = False
    return mean


register("weighted_mean", "torch", _torch_body, reads_values)


def weighted_mean(
    updates: checks.ArrayLike, weights: checks.ArrayLike, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Average the rows of ``updates`` with ``weights``.

    Args:
        updates: (N, P) floating point, any strides. Not scanned for NaN or infinity.
        weights: (N,) real numbers such as sample counts; normalised in fp64. A client of weight
            zero is not read.
        dtype: dtype of the result; fp32 unless ``updates`` is fp64.

    Returns:
        (P,) the mean, accumulated in fp32 (fp64 for fp64) in the order of the rows. Equal to the
        rows when they are identical. Finite whenever the differences of the rows are.

    Raises:
        KernelInputError: a wrong shape or dtype, or weights that are negative, not finite or all
            zero.

    Cost: reads N P numbers, writes P; no further memory beyond 2 MiB.

    Example:
        >>> weighted_mean([[0.0, 4.0], [3.0, 1.0]], [1, 2])
        tensor([2., 2.])
    """
    rows = checks.tensor("updates", updates, ("N", "P"))
    if dtype is not None and not dtype.is_floating_point:
        raise KernelInputError(f"dtype is {dtype}; pass a floating-point dtype")
    mean: Tensor = call("weighted_mean", rows, client_weights(weights, rows.shape[0]))
    return mean if dtype is None else mean.to(dtype)
