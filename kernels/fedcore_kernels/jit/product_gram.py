"""Inner products of the clients' updates from tiles of their two Grams, which are never stored."""

import triton
import triton.language as tl


@triton.jit
def _gram_tile(
    uploads,
    segment,
    client_stride,
    clients,
    first,
    second,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """``A_i A_j^T`` in fp64 for the clients from ``first`` and from ``second`` on."""
    offset = tl.multiple_of(tl.load(segment), ALIGNMENT)
    stride = tl.multiple_of(tl.load(segment + 1), ALIGNMENT)
    width = tl.multiple_of(tl.load(segment + 2), ALIGNMENT)
    index = tl.arange(0, BLOCK_M)
    row = index % RANK_PAD
    i = first + index // RANK_PAD
    j = second + index // RANK_PAD
    here = (row < RANK) & (i < clients)
    there = (row < RANK) & (j < clients)
    a_row = uploads + offset + i * client_stride + row * stride
    b_row = uploads + offset + j * client_stride + row * stride
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float64)
    for start in tl.range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < width
        a = tl.load(
            a_row[:, None] + column[None, :], mask=here[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(
            b_row[:, None] + column[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        columns = tl.trans(b.to(tl.float64))
        total = tl.dot(a.to(tl.float64), columns, total, out_dtype=tl.float64)
    return total


@triton.jit
def product_gram_kernel(
    left,
    right,
    grams,
    left_segments,
    right_segments,
    tasks,
    left_stride,
    right_stride,
    clients,
    RANK: tl.constexpr,
    RANK_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LEFT_ALIGNMENT: tl.constexpr,
    RIGHT_ALIGNMENT: tl.constexpr,
):
    """``<S^left_ij, S^right_ij>`` for a square of clients and, mirrored, for its transpose."""
    task = tasks + tl.program_id(0).to(tl.int64) * 3
    factor = tl.load(task)
    first = tl.load(task + 1)
    second = tl.load(task + 2)
    one = _gram_tile(
        left, left_segments + factor * 5, left_stride, clients, first, second,
        RANK, RANK_PAD, BLOCK_M, BLOCK_K, LEFT_ALIGNMENT,
    )  # fmt: skip
    other = _gram_tile(
        right, right_segments + factor * 5, right_stride, clients, first, second,
        RANK, RANK_PAD, BLOCK_M, BLOCK_K, RIGHT_ALIGNMENT,
    )  # fmt: skip
    COUNT: tl.constexpr = BLOCK_M // RANK_PAD
    blocks = tl.reshape(one * other, (COUNT, RANK_PAD, COUNT, RANK_PAD))
    inner = tl.sum(tl.sum(blocks, 3), 1)
    i = first + tl.arange(0, COUNT)
    j = second + tl.arange(0, COUNT)
    # A square on the diagonal holds its mirror image too; each element is written once.
    keep = (i < clients)[:, None] & (j[None, :] <= i[:, None])
    out = grams + factor * clients * clients
    tl.store(out + i[:, None] * clients + j[None, :], inner, mask=keep)
    keep = (i < clients)[:, None] & (j[None, :] < i[:, None])
    tl.store(out + j[None, :] * clients + i[:, None], inner, mask=keep)
