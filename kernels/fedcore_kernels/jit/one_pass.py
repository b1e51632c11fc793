"""The sum of the sketched step from one read of the uploads.

A program keeps the whole width of a few clients' factors on the chip: the same tile serves the
product with the basis and the sum. ``partials[group, factor]`` is ``sum_n w_n A_n^T (A_n V^T)``
over a group of clients.
"""

import triton
import triton.language as tl

from fedcore_kernels.jit.grams import bf16_parts


@triton.jit
def one_pass_kernel(
    uploads,
    basis,
    weights,
    partials,
    segments,
    client_stride,
    clients,
    clients_per_group,
    partial_stride,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PAD: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    MODE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """One factor and one group of clients, sixteen rows of uploads at a time."""
    factor = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    segment = segments + factor * 5
    offset = tl.multiple_of(tl.load(segment), ALIGNMENT)
    stride = tl.multiple_of(tl.load(segment + 1), ALIGNMENT)
    width = tl.multiple_of(tl.load(segment + 2), ALIGNMENT)
    other_offset = tl.multiple_of(tl.load(segment + 3), ALIGNMENT)
    other_stride = tl.multiple_of(tl.load(segment + 4), ALIGNMENT)

    TOGETHER: tl.constexpr = 16 // RANK
    row = tl.arange(0, 16)
    column = tl.arange(0, WIDTH_PAD)
    other = tl.arange(0, ROWS_PAD)
    inside = column < width
    v = tl.load(
        basis + other_offset + other[:, None] * other_stride + column[None, :],
        mask=(other < ROWS)[:, None] & inside[None, :],
        other=0.0,
    ).to(tl.float32)
    total = tl.zeros((WIDTH_PAD, ROWS_PAD), tl.float32)
    first = group * clients_per_group
    last = tl.minimum(first + clients_per_group, clients)
    for start in tl.range(first, last, TOGETHER):
        client = start + row // RANK
        present = (client < last) & (row < TOGETHER * RANK)
        x = tl.load(
            uploads
            + offset
            + (client * client_stride + (row % RANK) * stride)[:, None]
            + column[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(weights + client, mask=present, other=0.0)
        # The width is split over SPLIT products that run side by side and are added up.
        xs = tl.permute(tl.reshape(x, (16, SPLIT, WIDTH_PAD // SPLIT)), (1, 0, 2))
        vs = tl.permute(tl.reshape(v, (ROWS_PAD, SPLIT, WIDTH_PAD // SPLIT)), (1, 2, 0))
        if MODE == "bf16":
            high, middle, low = bf16_parts(vs)
            p = tl.dot(xs, low)
            p = tl.dot(xs, middle, p)
            p = tl.dot(xs, high, p)
            p = tl.sum(p, 0) * w[:, None]
            high, middle, low = bf16_parts(p)
            xt = tl.trans(x)
            total = tl.dot(xt, low, total)
            total = tl.dot(xt, middle, total)
            total = tl.dot(xt, high, total)
        else:
            x32 = xs.to(tl.float32)
            p = tl.sum(tl.dot(x32, vs, input_precision="tf32x3"), 0) * w[:, None]
            total = tl.dot(tl.trans(x.to(tl.float32)), p, total, input_precision="tf32x3")
    place = partials + group * partial_stride + other_offset
    tl.store(
        place + other[None, :] * other_stride + column[:, None],
        total,
        mask=inside[:, None] & (other < ROWS)[None, :],
    )
