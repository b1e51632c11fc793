"""One-sided Jacobi on tiles: eigenvalues, singular values and vectors of small matrices.

A tile (rows, matrices, columns) holds the matrices of one program, padded with zeros to powers of
two, padding last. Columns lie across the lanes of a warp, so that the partner of every column is
one shuffle away. Step k of a sweep pairs column i with ``i ^ k``: N - 1 steps meet every pair once,
and every column works in every step.

Rotations stop when all columns of W are orthogonal *relative to their norms*, which makes left
vectors orthogonal however small their singular value is. Columns below round-off of the largest are
left alone: they would never converge. Both members of a pair compute their rotation from bitwise
equal numbers. Where the longer column is the right one, the two change places as well, so that
values come out sorted and zeros, hence padding, last.

An indefinite symmetric matrix is shifted until it is positive: then the columns of W are multiples
of its eigenvectors and W is all there is to rotate, a third of the work of a two-sided iteration.

References: G. H. Golub, C. F. Van Loan, Matrix Computations, 4th edition, section 8.6.3;
P. P. M. de Rijk, SIAM J. Sci. Stat. Comput. 10, 1989 (sorting while rotating); H. Rutishauser,
Numer. Math. 9, 1966 (a rotation as a small correction, for its round-off is proportional to the
angle: in fp32, n = 64, ten times more accurate than ``c x + s y``).
"""

import triton
import triton.language as tl


@triton.jit
def epsilon(dtype: tl.constexpr):
    """The distance from 1 to the next number."""
    spacing: tl.constexpr = 2.0**-52 if dtype == tl.float64 else 2.0**-23
    return spacing


@triton.jit
def root(x):
    """The square root, correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def quotient(x, y):
    """``x / y``, correctly rounded."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def unit_scale(x):
    """For each matrix the power of two ``s`` with ``1 <= max |x| / s < 2``, and ``1 / s``.

    Squares then neither overflow nor vanish, and scaling rounds nothing.
    """
    largest = tl.max(tl.max(tl.abs(x), 0), 1)
    if x.dtype == tl.float64:
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 2047
        exponent = tl.minimum(tl.maximum(exponent, 1), 2045)
        scale = (exponent << 52).to(tl.float64, bitcast=True)
        inverse = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, inverse


@triton.jit
def identity(ROWS: tl.constexpr, COUNT: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr):
    """The leading N columns of the identity, for every matrix."""
    diagonal = tl.arange(0, ROWS)[:, None, None] == tl.arange(0, N)[None, None, :]
    return tl.where(diagonal, 1.0, tl.zeros((ROWS, COUNT, N), DTYPE))


@triton.jit
def rotated(x, other, keep, own, cross):
    """``keep x + (own x + cross other)``: the first product is exact."""
    correction = own[None, :, :] * x + cross[None, :, :] * other
    return keep[None, :, :] * x + correction


@triton.jit
def orthogonalised(w, v, SWEEPS: tl.constexpr, CARRY: tl.constexpr):
    """Rotate the columns of ``w`` (rows, matrices, N) until they are orthogonal, longest first.

    Entries are around 1 at most (:func:`unit_scale`). With ``CARRY`` the columns of ``v`` take the
    same rotations.

    Returns ``w``, ``v``, the squared norms (matrices, N) of the columns of ``w``, and per matrix
    whether it converged within ``SWEEPS`` sweeps; one that holds NaN or infinity did not.
    """
    ROWS: tl.constexpr = w.shape[0]
    COUNT: tl.constexpr = w.shape[1]
    N: tl.constexpr = w.shape[2]
    EPS: tl.constexpr = epsilon(w.dtype)
    column = tl.arange(0, N)
    norms = tl.sum(w * w, 0)
    moving = tl.full((COUNT,), 1, tl.int32)
    unsettled = 1
    sweep = 0
    while (sweep < SWEEPS) & (unsettled > 0):
        norms = tl.sum(w * w, 0)
        floor = EPS * EPS * tl.max(norms, 1)[:, None]
        moved = tl.zeros((COUNT, N), tl.int32)
        for k in range(1, N):
            partner = column ^ k
            on_left = (column < partner)[None, :]
            other = tl.gather(w, tl.broadcast_to(partner[None, None, :], (ROWS, COUNT, N)), 2)
            theirs = tl.gather(norms, tl.broadcast_to(partner[None, :], (COUNT, N)), 1)
            inner = tl.sum(w * other, 0)
            left = tl.where(on_left, norms, theirs)
            right = tl.where(on_left, theirs, norms)
            turn = tl.abs(inner) > 4 * EPS * root(left * right)
            turn &= tl.minimum(left, right) > floor
            swap = left < right

            # tan, cos and sin of the smaller angle that makes the pair orthogonal.
            cotangent = quotient(right - left, tl.where(turn, 2 * inner, 1.0))
            tangent = quotient(
                tl.where(cotangent >= 0, 1.0, -1.0).to(w.dtype),
                tl.abs(cotangent) + root(1 + cotangent * cotangent),
            )
            tangent = tl.where(turn, tangent, 0.0)
            cosine = quotient(tl.full((COUNT, N), 1.0, w.dtype), root(1 + tangent * tangent))
            sine = tangent * cosine

            keep = tl.where(swap, 0.0, 1.0).to(w.dtype)
            direct = tl.where(swap, sine, -sine * sine / (1 + cosine))
            cross = tl.where(swap, -cosine, sine)
            cross = tl.where(on_left, -cross, cross)
            w = rotated(w, other, keep, direct, cross)
            if CARRY:
                WIDE: tl.constexpr = v.shape[0]
                index = tl.broadcast_to(partner[None, None, :], (WIDE, COUNT, N))
                v = rotated(v, tl.gather(v, index, 2), keep, direct, cross)
            # Exact up to round-off of the longer column; a sweep that changes nothing measures
            # every norm afresh, so no matrix converges on these.
            gain = tangent * inner
            # Never below zero, or a column of almost nothing would change places with the padding,
            # whose norm is 0, and come back with another sign.
            norms = tl.where(on_left == swap, right + gain, left - gain)
            norms = tl.where(norms < 0, 0.0, norms)
            moved |= (turn | swap).to(tl.int32)
        moving = tl.max(moved, 1)
        unsettled = tl.max(moving, 0)
        sweep += 1
    return w, v, norms, (moving == 0) & (tl.sum(norms, 1) < float("inf"))


@triton.jit
def jacobi_eigh(a, n, SWEEPS: tl.constexpr):
    """Eigenvalues (matrices, N), descending, and eigenvectors (N, matrices, N) of symmetric ``a``.

    ``a`` (N, matrices, N) is zero beyond ``n``; so are the results. A matrix that does not
    converge gives NaN.
    """
    COUNT: tl.constexpr = a.shape[1]
    N: tl.constexpr = a.shape[2]
    scale, inverse = unit_scale(a)
    a *= inverse[None, :, None]
    eye = identity(N, COUNT, N, a.dtype)
    here = tl.arange(0, N)[None, :] < n
    # Gershgorin's bounds; the shift brings the condition to 5 or less, where it is not already.
    diagonal = tl.sum(a * eye, 0)
    radius = tl.sum(tl.abs(a), 0) - tl.abs(diagonal)
    least = tl.min(tl.where(here, diagonal - radius, float("inf")), 1)
    most = tl.max(tl.where(here, diagonal + radius, -float("inf")), 1)
    bound = tl.maximum(-least, most)
    shift = tl.where(bound > 0, tl.maximum(0.5 * bound - least, 0.0), 1.0)
    positive = a + tl.where(here[None, :, :], eye, 0.0) * shift[None, :, None]
    w, _, norms, settled = orthogonalised(positive, 0, SWEEPS, False)
    lengths = root(norms)
    good = settled[:, None]
    values = tl.where(here, (lengths - shift[:, None]) * scale[:, None], 0.0)
    vectors = w / tl.where(here, lengths, 1.0)[None, :, :]
    nan = float("nan")
    return tl.where(good, values, nan), tl.where(good[None, :, :], vectors, nan)


@triton.jit
def completed(u, rank, p, n):
    """``u`` with orthonormal columns from ``rank`` (matrices,) to ``n``; the input is zero there.

    Each is the unit vector with the largest part outside of the span, orthogonalised twice. That
    part is at least 1 / p, so twice is enough.
    """
    ROWS: tl.constexpr = u.shape[0]
    N: tl.constexpr = u.shape[2]
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, N)[None, None, :]
    for j in range(tl.min(rank, 0), n):
        outside = 1 - tl.sum(u * u, 2)
        # A comparison that NaN fails, for the largest of nothing but NaN is undefined.
        outside = tl.where((row < p) & (outside > -1), outside, -1.0)
        pivot = tl.argmax(outside, 0)[None, :] == row
        x = tl.where(pivot, 1.0, 0.0).to(u.dtype)
        for _ in range(2):
            x -= tl.sum(u * tl.sum(u * x[:, :, None], 0)[None, :, :], 2)
        x = quotient(x, root(tl.sum(x * x, 0))[None, :])
        missing = (column == j) & (rank <= j)[None, :, None]
        u = tl.where(missing, x[:, :, None], u)
    return u


@triton.jit
def column_signs(u):
    """+1 or -1 per column (matrices, N) of ``u``: the sign of its entry of largest modulus."""
    row = tl.arange(0, u.shape[0])[:, None, None]
    size = tl.abs(u)
    # The largest of nothing but NaN is undefined.
    largest = row == tl.argmax(tl.where(size >= 0, size, 0.0), 0)[None, :, :]
    return tl.where(tl.sum(tl.where(largest, u, 0.0), 0) < 0, -1.0, 1.0).to(u.dtype)


@triton.jit
def jacobi_svd(a, SWEEPS: tl.constexpr):
    """``u``, ``values`` and ``v`` with ``a = u diag(values) v^T``, and how many values count.

    ``a`` (ROWS, matrices, N) with ROWS >= N is zero in its padding. Values (matrices, N) descend
    and ``v`` (N, matrices, N) is orthogonal. Columns of ``u`` (ROWS, matrices, N) are orthonormal
    up to the rank (matrices,), zero beyond: there, values are below round-off of the largest.
    """
    COUNT: tl.constexpr = a.shape[1]
    N: tl.constexpr = a.shape[2]
    scale, inverse = unit_scale(a)
    v = identity(N, COUNT, N, a.dtype)
    w, v, norms, settled = orthogonalised(a * inverse[None, :, None], v, SWEEPS, True)
    lengths = root(norms)
    counts = lengths > epsilon(a.dtype) * tl.max(lengths, 1)[:, None]
    u = tl.where(counts[None, :, :], w / tl.where(counts, lengths, 1.0)[None, :, :], 0.0)
    good, nan = settled[:, None], float("nan")
    values = tl.where(good, lengths * scale[:, None], nan)
    u, v = tl.where(good[None, :, :], u, nan), tl.where(good[None, :, :], v, nan)
    return u, values, v, tl.sum(counts.to(tl.int32), 1)


@triton.jit
def symmetric_jacobi(a, n, SWEEPS: tl.constexpr):
    """:func:`jacobi_eigh` of one tile (N, N): values (N,) and vectors (N, N)."""
    N: tl.constexpr = a.shape[0]
    values, vectors = jacobi_eigh(tl.reshape(a, (N, 1, N)), n, SWEEPS)
    return tl.reshape(values, (N,)), tl.reshape(vectors, (N, N))
