"""The r x r part of the sketched step, one factor per program, in fp64.

Between the two reads of the uploads stand the products ``C_n = A_n V^T`` of every client. One
program adds up their Gram, decomposes it, takes the polar factor and writes the cores that the
second read applies; nothing returns to the host and nothing is launched in between.
"""

import triton
import triton.language as tl

from fedcore_kernels.jit.jacobi import jacobi_svd, symmetric_jacobi


@triton.jit
def product(a, b):
    """``a b`` of two square fp64 tiles, on the tensor cores from order 16 on."""
    if a.shape[0] < 16:
        result = tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        result = tl.dot(a, b)
    return result


@triton.jit
def whiten_kernel(
    grams, mixing, cores, n, N: tl.constexpr, CUTOFF: tl.constexpr, SWEEPS: tl.constexpr
):
    """``T = U L^(1/2)`` and the transposed cores ``U L^(-1/2)`` of one Gram ``U L U^T``."""
    index = tl.arange(0, N)
    place = index[:, None] * n + index[None, :]
    inside = (index < n)[:, None] & (index < n)[None, :]
    first = tl.program_id(0).to(tl.int64) * n * n
    gram = tl.load(grams + first + place, mask=inside, other=0.0)
    energies, vectors = symmetric_jacobi(gram, n, SWEEPS)
    significant = (energies > CUTOFF * tl.max(energies, 0)) & (energies > 0)
    values = tl.sqrt(tl.where(significant, energies, 1.0))
    tl.store(
        mixing + first + place, vectors * tl.where(significant, values, 0.0)[None, :], mask=inside
    )
    tl.store(
        cores + first + place,
        vectors * tl.where(significant, 1 / values, 0.0)[None, :],
        mask=inside,
    )


@triton.jit
def _weighted_rows(
    partials, root, first, start, rows, n, slabs, slab_stride,
    RANK: tl.constexpr, N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows of ``sqrt(w_n) C_n`` (BLOCK_M, N), their weight, and where they stand."""
    row = start + tl.arange(0, BLOCK_M)
    index = tl.arange(0, N)
    inside = (row < rows)[:, None] & (index < n)[None, :]
    place = first + row[:, None] * n + index[None, :]
    total = tl.zeros((BLOCK_M, N), tl.float64)
    for slab in range(0, slabs):
        part = partials + tl.cast(slab, tl.int64) * slab_stride
        total += tl.load(part + place, mask=inside, other=0.0)
    weight = tl.load(root + row // RANK, mask=row < rows, other=0.0)
    return total * weight[:, None], weight, place, inside


@triton.jit
def sketched_core_kernel(
    partials,
    root,
    mixing,
    cores,
    kept_directions,
    spectrum,
    rows,
    n,
    slabs,
    slab_stride,
    floor,
    cutoff,
    RANK: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SWEEPS: tl.constexpr,
):
    """Transposed cores (rows, n), the projector on what was kept and the singular values."""
    factor = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, N)
    square = index[:, None] * n + index[None, :]
    inside = (index < n)[:, None] & (index < n)[None, :]
    gram = tl.zeros((N, N), tl.float64)
    first = factor * rows * n
    for start in range(0, rows, BLOCK_M):
        c, _, _, _ = _weighted_rows(
            partials, root, first, start, rows, n, slabs, slab_stride, RANK, N, BLOCK_M
        )
        gram = tl.dot(tl.trans(c), c, gram, out_dtype=tl.float64)
    energies, w = symmetric_jacobi(gram, n, SWEEPS)
    clear = (energies > floor * floor * tl.max(energies, 0)) & (energies > 0)
    values = tl.sqrt(tl.where(clear, energies, 1.0))
    t = tl.load(mixing + factor * n * n + square, mask=inside, other=0.0)
    x = product(t, w * tl.where(clear, values, 0.0)[None, :])
    u3, cut3, v3, _ = jacobi_svd(tl.reshape(x, (N, 1, N)), SWEEPS)
    u = tl.reshape(u3, (N, N))
    v = tl.reshape(v3, (N, N))
    cut = tl.reshape(cut3, (N,))
    significant = (cut > cutoff * tl.max(cut, 0)) & (cut > 0)
    turned = u * tl.where(significant, 1.0, 0.0)[None, :]
    tl.store(kept_directions + factor * n * n + square, product(turned, tl.trans(u)), mask=inside)
    tl.store(spectrum + factor * n + index, cut, mask=index < n)
    inverse = tl.where(clear, 1 / values, 0.0)
    # The transposed core: W diag(1/s) V U^T.
    core = product(w * inverse[None, :], product(v, tl.trans(turned)))
    for start in range(0, rows, BLOCK_M):
        c, weight, place, present = _weighted_rows(
            partials, root, first, start, rows, n, slabs, slab_stride, RANK, N, BLOCK_M
        )
        c = c * weight[:, None]
        if N < 16:
            tile = tl.sum(c[:, :, None] * core[None, :, :], 1)
        else:
            tile = tl.dot(c, core)
        tl.store(cores + place, tile, mask=present)
