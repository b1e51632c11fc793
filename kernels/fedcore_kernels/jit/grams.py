"""Gram matrices of many factors of different width in one launch.

Products within a block of columns are taken at the precision of the uploads, sums over the blocks
in fp64: bf16 is multiplied as it is (a product of two is exact in fp32), fp32 by three TF32
products or in fp64. Every sum has one fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def bf16_parts(x):
    """Three bf16 numbers that add up to the fp32 ``x``."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def cross_gram_kernel(
    uploads,
    reference,
    partials,
    segments,
    tasks,
    client_stride,
    rows,
    factors,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """``partials[slab, factor, (client, row), q] = sum over the slab of A_client[row] ref[q]``."""
    task = tasks + tl.program_id(0).to(tl.int64) * 5
    factor = tl.load(task)
    first_row = tl.load(task + 1)
    first = tl.multiple_of(tl.load(task + 2), ALIGNMENT)
    last = tl.multiple_of(tl.load(task + 3), ALIGNMENT)
    slab = tl.load(task + 4)
    segment = segments + factor * 5
    offset = tl.multiple_of(tl.load(segment), ALIGNMENT)
    stride = tl.multiple_of(tl.load(segment + 1), ALIGNMENT)
    other_offset = tl.multiple_of(tl.load(segment + 3), ALIGNMENT)
    other_stride = tl.multiple_of(tl.load(segment + 4), ALIGNMENT)

    row = first_row + tl.arange(0, BLOCK_M)
    other = tl.arange(0, ROWS_PAD)
    present = row < rows
    client = tl.multiple_of((row // RANK) * client_stride, ALIGNMENT)
    a_row = uploads + offset + client + (row % RANK) * stride
    b_row = reference + other_offset + other * other_stride
    total = tl.zeros((BLOCK_M, ROWS_PAD), tl.float64)
    for start in tl.range(first, last, BLOCK_K):
        column = tl.multiple_of(start, ALIGNMENT) + tl.arange(0, BLOCK_K)
        inside = column < last
        a = tl.load(
            a_row[:, None] + column[None, :], mask=present[:, None] & inside[None, :], other=0.0
        )
        b = tl.load(
            b_row[:, None] + column[None, :],
            mask=(other < ROWS)[:, None] & inside[None, :],
            other=0.0,
        )
        if MODE == "fp64":
            b_columns = tl.trans(b.to(tl.float64))
            total = tl.dot(a.to(tl.float64), b_columns, total, out_dtype=tl.float64)
        elif MODE == "bf16":
            high, middle, low = bf16_parts(b.to(tl.float32))
            block = tl.dot(a, tl.trans(low))
            block = tl.dot(a, tl.trans(middle), block)
            block = tl.dot(a, tl.trans(high), block)
            total += block.to(tl.float64)
        else:
            a32 = a.to(tl.float32)
            b32 = b.to(tl.float32)
            total += tl.dot(a32, tl.trans(b32), input_precision="tf32x3").to(tl.float64)
    out = partials + ((slab * factors + factor) * rows + row) * ROWS
    keep = present[:, None] & (other < ROWS)[None, :]
    tl.store(out[:, None] + other[None, :], total, mask=keep)


@triton.jit
def gram_kernel(
    uploads,
    root,
    grams,
    segments,
    tasks,
    client_stride,
    rows,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One square tile of ``F F^T`` and its mirror image; tiles above the diagonal have no task."""
    task = tasks + tl.program_id(0).to(tl.int64) * 3
    factor = tl.load(task)
    segment = segments + factor * 5
    offset = tl.multiple_of(tl.load(segment), ALIGNMENT)
    stride = tl.multiple_of(tl.load(segment + 1), ALIGNMENT)
    width = tl.multiple_of(tl.load(segment + 2), ALIGNMENT)

    row = tl.load(task + 1) + tl.arange(0, BLOCK_M)
    col = tl.load(task + 2) + tl.arange(0, BLOCK_M)
    a_client = tl.multiple_of((row // RANK) * client_stride, ALIGNMENT)
    b_client = tl.multiple_of((col // RANK) * client_stride, ALIGNMENT)
    a_row = uploads + offset + a_client + (row % RANK) * stride
    b_row = uploads + offset + b_client + (col % RANK) * stride
    total = tl.zeros((BLOCK_M, BLOCK_M), tl.float64)
    for start in tl.range(0, width, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = column < width
        a = tl.load(
            a_row[:, None] + column[None, :],
            mask=(row < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        b = tl.load(
            b_row[:, None] + column[None, :],
            mask=(col < rows)[:, None] & inside[None, :],
            other=0.0,
        )
        if MODE == "fp64":
            b_columns = tl.trans(b.to(tl.float64))
            total = tl.dot(a.to(tl.float64), b_columns, total, out_dtype=tl.float64)
        else:
            total += tl.dot(a, tl.trans(b)).to(tl.float64)
    left = tl.load(root + row // RANK, mask=row < rows, other=0.0)
    right = tl.load(root + col // RANK, mask=col < rows, other=0.0)
    total *= left[:, None] * right[None, :]
    # A tile on the diagonal holds its mirror image too; each element is written once.
    keep = (row < rows)[:, None] & (col[None, :] <= row[:, None])
    out = grams + factor * rows * rows
    tl.store(out + row[:, None] * rows + col[None, :], total, mask=keep)
    keep = (row < rows)[:, None] & (col[None, :] < row[:, None])
    tl.store(out + col[None, :] * rows + row[:, None], total, mask=keep)
