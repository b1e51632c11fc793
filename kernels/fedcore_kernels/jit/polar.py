"""Polar factors of many small matrices of one shape, several of them a program.

Matrices are read as ``long`` x ``short``; strides within a matrix say whether that is how they lie or
their transposes. ``rank`` (batch,) carries the verdict from :func:`polar_kernel`, which is all
matmuls and gives up where a matrix is not provably regular, to :func:`polar_jacobi_kernel`.
``settings`` (fp64) holds the share of the identity to add, the cut-off, and for every attempt the
number of its quintics and their coefficients.
"""

import triton
import triton.language as tl

from fedcore_kernels.jit.jacobi import completed, identity, jacobi_svd, quotient, root, unit_scale


@triton.jit
def product(x, y, MODE: tl.constexpr):
    """``x y`` of every matrix (matrices, rows, columns)."""
    if MODE == "fp64":
        found = tl.dot(x, y, out_dtype=tl.float64)
    else:
        found = tl.dot(x, y, input_precision=MODE)
    return found


@triton.jit
def regularised(x, eye, share):
    """``x + share ||x||_F I`` of every matrix (rows, matrices, columns)."""
    norm = root(tl.sum(tl.sum(x * x, 0), 1))
    return x + share * norm[None, :, None] * eye


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
    for j in range(0, n):
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
    settings,
    attempts,
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

    That is where some singular value has not arrived at 1 within ``tolerance``, or, for a
    ``ROTATION``, where the determinant is negative. Quintics for a small lower bound take some of
    the larger values close to that bound on their way and lose digits there, so a wide interval is
    only attempted for matrices that a narrow one has not settled.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    member = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    row = tl.arange(0, ROWS)[:, None, None]
    index = tl.arange(0, N)
    column = index[None, None, :]
    inside = (row < long) & (column < short)
    present = member < batch
    place = member[None, :, None] * long * short + row * row_stride + column * column_stride
    on_diagonal = ((index[:, None] == index[None, :]) & (index < short)[None, :])[None, :, :]
    arrived = member >= batch
    attempt = 0
    settings += 2
    share = tl.load(settings - 2).to(dtype)
    while (attempt < attempts) & (tl.min(arrived.to(tl.int32), 0) == 0):
        tall = tl.load(matrix + place, mask=inside & present[None, :, None], other=0.0).to(dtype)
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
        steps = tl.load(settings).to(tl.int32)
        for step in range(0, steps):
            a = tl.load(settings + 3 * step + 1).to(dtype)
            b = tl.load(settings + 3 * step + 2).to(dtype)
            c = tl.load(settings + 3 * step + 3).to(dtype)
            gram = product(tl.permute(x, (0, 2, 1)), x, MODE)
            x = product(x, b * gram + c * product(gram, gram, MODE), MODE) + a * x
        gram = product(tl.permute(x, (0, 2, 1)), x, MODE)
        defect = tl.abs(gram - tl.where(on_diagonal, 1.0, 0.0).to(dtype))
        now = tl.max(tl.max(defect, 2), 1) <= tolerance
        found = tl.permute(x, (1, 0, 2))
        fresh = inside & (now & ~arrived)[None, :, None]
        tl.store(factor + place, found, mask=fresh)
        if ROTATION:
            # A matrix to be turned around has arrived as well, but not where it should.
            verdict = tl.where(determinant_sign(found, short) > 0, short, -1)
        else:
            verdict = tl.full((COUNT,), short, tl.int32)
        tl.store(rank + member, verdict.to(tl.int64), mask=now & ~arrived)
        arrived |= now
        settings += 1 + 3 * steps
        attempt += 1


@triton.jit
def polar_jacobi_kernel(
    matrix,
    factor,
    rank,
    settings,
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
    ``COMPLETE``, completed to an isometry; a ``ROTATION`` turns the weakest around where the
    determinant asks for it.
    """
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    member = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    pending = tl.load(rank + member, mask=member < batch, other=0) < 0
    if tl.max(pending.to(tl.int32), 0) > 0:
        row = tl.arange(0, ROWS)[:, None, None]
        column = tl.arange(0, N)[None, None, :]
        inside = (row < long) & (column < short)
        here = inside & pending[None, :, None]
        place = member[None, :, None] * long * short + row * row_stride + column * column_stride
        a = tl.load(matrix + place, mask=here, other=0.0).to(dtype)
        _, inverse = unit_scale(a)
        a *= inverse[None, :, None]
        eye = tl.where(inside, identity(ROWS, COUNT, N, dtype), 0.0)
        a = regularised(a, eye, tl.load(settings).to(dtype))
        u, values, v, count = jacobi_svd(a, SWEEPS)
        if COMPLETE:
            u = completed(u, count, long, short)
        else:
            least = tl.load(settings + 1).to(dtype) * tl.max(values, 1)
            kept = (values > least[:, None]) & (tl.arange(0, N)[None, :] < count[:, None])
            count = tl.sum(kept.to(tl.int32), 1)
            u = tl.where(kept[None, :, :] | (values != values)[None, :, :], u, 0.0)
        if ROTATION:
            # Jacobi rotations have determinant +1, hence so has v.
            sign = determinant_sign(u, short)
            u = tl.where(column == short - 1, u * sign[None, :, None], u)
        found = product(tl.permute(u, (1, 0, 2)), tl.permute(v, (1, 2, 0)), MODE)
        tl.store(factor + place, tl.permute(found, (1, 0, 2)), mask=here)
        tl.store(rank + member, count.to(tl.int64), mask=pending)
