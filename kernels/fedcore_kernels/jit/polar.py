"""Polar factors of many small matrices of one shape, several of them per program.

Matrices are read as ``long`` x ``short``; strides within a matrix say whether they are stored like
that or transposed. ``rank`` (batch,) carries the verdict from :func:`polar_kernel`, which is all
matmuls and gives up where a matrix is not provably regular, to :func:`polar_jacobi_kernel`.

``quintics`` (fp64) holds for every attempt the number of its quintics and their coefficients.
``share`` of the identity to add and ``cutoff`` are sums of two numbers, since a scalar argument is
fp32.
"""

import triton
import triton.language as tl

from fedcore_kernels.jit.jacobi import completed, identity, jacobi_svd, quotient, root, unit_scale

GENERAL_DOT = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))
"""Whether ``tl.dot`` knows batches on tensor cores, sums of 8, and fp64 made of half precision."""


@triton.jit
def product(x, y, MODE: tl.constexpr):
    """``x y`` of every matrix (matrices, rows, columns), in "fp64", "ieee" or "tf32x3"."""
    # fp64 products of one matrix take fewer registers without the axis of matrices, others with it.
    FLAT: tl.constexpr = x.shape[0] == 1 and (MODE == "fp64" or not GENERAL_DOT)
    left = tl.reshape(x, (x.shape[1], x.shape[2])) if FLAT else x
    right = tl.reshape(y, (y.shape[1], y.shape[2])) if FLAT else y
    if MODE == "fp64":
        result = tl.dot(left, right, out_dtype=tl.float64)
    else:
        result = tl.dot(left, right, input_precision=MODE)
    return tl.reshape(result, (1, x.shape[1], y.shape[2])) if FLAT else result


@triton.jit
def both(high, low, dtype: tl.constexpr):
    """``high + low`` in ``dtype``."""
    return tl.cast(high, dtype) + tl.cast(low, dtype)


@triton.jit
def regularised(x, eye, share):
    """``x + share ||x||_F I`` of every matrix (rows, matrices, columns)."""
    norm = root(tl.sum(tl.sum(x * x, 0), 1))
    return x + share * norm[None, :, None] * eye


@triton.jit
def kept_directions(u, values, count, cutoff):
    """``u`` with zeros where values are not above ``cutoff`` times the largest, and how many are.

    NaN stays NaN.
    """
    least = cutoff * tl.max(values, 1)[:, None]
    significant = (values > least) & (tl.arange(0, values.shape[1])[None, :] < count[:, None])
    u = tl.where((significant | (values != values))[None, :, :], u, 0.0)
    return u, tl.sum(significant.to(tl.int32), 1)


@triton.jit
def polar_by_svd(a, cutoff, SWEEPS: tl.constexpr, MODE: tl.constexpr):
    """Polar factor (N, N) of one tile ``a`` (N, N), zero in its padding, and its rank (a scalar).

    Singular values not above ``cutoff`` times the largest are left out.
    """
    N: tl.constexpr = a.shape[0]
    u, values, v, count = jacobi_svd(tl.reshape(a, (N, 1, N)), SWEEPS)
    u, rank = kept_directions(u, values, count, cutoff)
    factor = product(tl.permute(u, (1, 0, 2)), tl.permute(v, (1, 2, 0)), MODE)
    return tl.reshape(factor, (N, N)), tl.sum(rank, 0)


@triton.jit
def determinant_sign(x, n):
    """+1 or -1 per matrix: the sign of the determinant of nearly orthogonal ``x`` (N, matrices, N).

    Householder reflections carry it to a triangle with ``-sign(pivot)`` on the diagonal; each has
    determinant -1, so the signs of the pivots multiply up to the answer. No pivot can vanish.
    """
    COUNT: tl.constexpr = x.shape[1]
    N: tl.constexpr = x.shape[2]
    row = tl.arange(0, N)[:, None]
    column = tl.arange(0, N)[None, None, :]
    sign = tl.full((COUNT,), 1.0, x.dtype)
    for j in range(n):
        below = tl.where(row >= j, tl.sum(tl.where(column == j, x, 0.0), 2), 0.0)
        pivot = tl.sum(tl.where(row == j, below, 0.0), 0)
        turn = tl.where(pivot < 0, -1.0, 1.0).to(x.dtype)
        length = root(tl.sum(below * below, 0))
        normal = below + tl.where(row == j, (turn * length)[None, :], 0.0)
        share = quotient(tl.full((COUNT,), 1.0, x.dtype), length * (length + tl.abs(pivot)))
        along = tl.sum(normal[:, :, None] * x, 0) * share[:, None]
        x -= normal[:, :, None] * along[None, :, :]
        sign *= turn
    return sign


@triton.jit
def polar_kernel(
    matrix,
    factor,
    rank,
    quintics,
    attempts,
    share_high,
    share_low,
    batch,
    long,
    short,
    row_stride,
    column_stride,
    tolerance,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    MODE: tl.constexpr,
    ROTATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The factor by composed quintics, and its rank; -1 stays where a second look is needed.

    That is where some singular value has not converged to 1 within ``tolerance``, or, for a
    ``ROTATION``, where the determinant is negative. Quintics for a small lower bound take some of
    the larger values close to that bound on their way and lose digits there, so a wide interval is
    only attempted for matrices on which a narrow one has not converged.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    member = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    row = tl.arange(0, ROWS)[:, None, None]
    index = tl.arange(0, N)
    column = index[None, None, :]
    inside = (row < long) & (column < short)
    present = member < batch
    here = inside & present[None, :, None]
    first = (member * long * short)[None, :, None]
    offset = row * row_stride + column * column_stride
    on_diagonal = ((index[:, None] == index[None, :]) & (index < short)[None, :])[None, :, :]
    arrived = member >= batch
    attempt = 0
    share = both(share_high, share_low, dtype)
    while (attempt < attempts) & (tl.min(arrived.to(tl.int32), 0) == 0):
        tall = tl.load(matrix + first + offset, mask=here, other=0.0).to(dtype)
        _, inverse = unit_scale(tall)
        tall *= inverse[None, :, None]
        eye = tl.where(inside, identity(ROWS, COUNT, N, dtype), 0.0)
        x = tl.permute(regularised(tall, eye, share), (1, 0, 2))
        # The square root of the Gram's Frobenius norm bounds the largest singular value from above,
        # by a factor of n^(1/4) at most.
        gram = product(tl.permute(x, (0, 2, 1)), x, MODE)
        bound = root(root(tl.sum(tl.sum(gram * gram, 2), 1)))
        one = tl.full((COUNT,), 1.0, dtype)
        x = x * quotient(one, tl.where(bound > 0, bound, 1.0))[:, None, None]
        steps = tl.load(quintics).to(tl.int32)
        for step in range(steps):
            a = tl.load(quintics + 3 * step + 1).to(dtype)
            b = tl.load(quintics + 3 * step + 2).to(dtype)
            c = tl.load(quintics + 3 * step + 3).to(dtype)
            gram = product(tl.permute(x, (0, 2, 1)), x, MODE)
            x = product(x, b * gram + c * product(gram, gram, MODE), MODE) + a * x
        gram = product(tl.permute(x, (0, 2, 1)), x, MODE)
        defect = tl.abs(gram - tl.where(on_diagonal, 1.0, 0.0).to(dtype))
        now = tl.max(tl.max(defect, 2), 1) <= tolerance
        upright = tl.permute(x, (1, 0, 2))
        fresh = inside & (now & ~arrived)[None, :, None]
        tl.store(factor + first + offset, upright, mask=fresh)
        if ROTATION:
            # A matrix of the wrong determinant has converged as well, but to a reflection.
            verdict = tl.where(determinant_sign(upright, short) > 0, short, -1)
        else:
            verdict = tl.full((COUNT,), short, tl.int32)
        tl.store(rank + member, verdict.to(tl.int64), mask=now & ~arrived)
        arrived |= now
        quintics += 1 + 3 * steps
        attempt += 1


@triton.jit
def polar_jacobi_kernel(
    matrix,
    factor,
    rank,
    share_high,
    share_low,
    cutoff_high,
    cutoff_low,
    batch,
    long,
    short,
    row_stride,
    column_stride,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    SWEEPS: tl.constexpr,
    MODE: tl.constexpr,
    COMPLETE: tl.constexpr,
    ROTATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The factor and its rank from singular vectors, for matrices whose rank is -1 so far.

    Directions whose value is not above ``cutoff`` times the largest are left out, or, with
    ``COMPLETE``, completed to an isometry; a ``ROTATION`` flips the weakest where the
    determinant is negative.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    member = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    pending = tl.load(rank + member, mask=member < batch, other=0) < 0
    if tl.max(pending.to(tl.int32), 0) > 0:
        row = tl.arange(0, ROWS)[:, None, None]
        column = tl.arange(0, N)[None, None, :]
        inside = (row < long) & (column < short)
        here = inside & pending[None, :, None]
        first = (member * long * short)[None, :, None]
        offset = row * row_stride + column * column_stride
        a = tl.load(matrix + first + offset, mask=here, other=0.0).to(dtype)
        _, inverse = unit_scale(a)
        a *= inverse[None, :, None]
        eye = tl.where(inside, identity(ROWS, COUNT, N, dtype), 0.0)
        a = regularised(a, eye, both(share_high, share_low, dtype))
        u, values, v, count = jacobi_svd(a, SWEEPS)
        if COMPLETE:
            u = completed(u, count, long, short)
        else:
            cutoff = both(cutoff_high, cutoff_low, dtype)
            u, count = kept_directions(u, values, count, cutoff)
        if ROTATION:
            # Jacobi rotations have determinant +1, hence so has v.
            sign = determinant_sign(u, short)
            u = tl.where(column == short - 1, u * sign[None, :, None], u)
        isometry = product(tl.permute(u, (1, 0, 2)), tl.permute(v, (1, 2, 0)), MODE)
        tl.store(factor + first + offset, tl.permute(isometry, (1, 0, 2)), mask=here)
        tl.store(rank + member, count.to(tl.int64), mask=pending)
