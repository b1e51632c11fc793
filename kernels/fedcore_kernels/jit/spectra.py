"""Decompositions of many small matrices of one shape, several of them per program.

Arguments: ``rows`` and ``columns`` of each of ``batch`` contiguous matrices.
"""

import triton
import triton.language as tl

from fedcore_kernels.jit.jacobi import column_signs, completed, jacobi_eigh, jacobi_svd


@triton.jit
def eigh_kernel(
    matrix,
    values,
    vectors,
    batch,
    n,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    SWEEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Eigenvalues, descending, and signed eigenvectors of the symmetric parts."""
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    member = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    row = tl.arange(0, N)[:, None, None]
    index = tl.arange(0, N)
    column = index[None, None, :]
    first = member[None, :, None] * n * n
    here = (row < n) & (column < n) & (member < batch)[None, :, None]
    above = tl.load(matrix + first + row * n + column, mask=here, other=0.0).to(dtype)
    below = tl.load(matrix + first + column * n + row, mask=here, other=0.0).to(dtype)
    spectrum, basis = jacobi_eigh(above * 0.5 + below * 0.5, n, SWEEPS)
    basis *= column_signs(basis)[None, :, :]
    tl.store(vectors + first + row * n + column, basis, mask=here)
    stored = (member < batch)[:, None] & (index < n)[None, :]
    tl.store(values + member[:, None] * n + index[None, :], spectrum, mask=stored)


@triton.jit
def svd_kernel(
    matrix,
    tall,
    values,
    square,
    batch,
    long,
    short,
    row_stride,
    column_stride,
    tall_row,
    tall_column,
    square_row,
    square_column,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    SWEEPS: tl.constexpr,
    SIGN_TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``matrix = tall diag(values) square^T`` with matrices read as ``long`` x ``short``.

    The strides within a matrix of the input and of both bases say which is the left one and whether
    it is stored transposed; signs are fixed on ``tall`` or on ``square``.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    member = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    present = (member < batch)[None, :, None]
    row = tl.arange(0, ROWS)[:, None, None]
    lower = tl.arange(0, N)[:, None, None]
    index = tl.arange(0, N)
    column = index[None, None, :]
    here = (row < long) & (column < short) & present
    first = member[None, :, None] * long * short
    a = tl.load(matrix + first + row * row_stride + column * column_stride, mask=here, other=0.0)
    u, spectrum, v, rank = jacobi_svd(a.to(dtype), SWEEPS)
    u = completed(u, rank, long, short)
    signs = column_signs(u) if SIGN_TALL else column_signs(v)
    place = tall + first + row * tall_row + column * tall_column
    tl.store(place, u * signs[None, :, :], mask=here)
    place = square + member[None, :, None] * short * short
    place += lower * square_row + column * square_column
    inside = (lower < short) & (column < short) & present
    tl.store(place, v * signs[None, :, :], mask=inside)
    stored = (member < batch)[:, None] & (index < short)[None, :]
    tl.store(values + member[:, None] * short + index[None, :], spectrum, mask=stored)
