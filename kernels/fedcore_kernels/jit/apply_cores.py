"""``sum_n cores_n A_n`` for many factors of different width in one launch.

``cores`` (factors, clients * RANK, ROWS) holds the transposed cores, one row an upload's row.
"""

import triton
import triton.language as tl

from fedcore_kernels.jit.grams import bf16_parts


@triton.jit
def apply_cores_kernel(
    uploads,
    cores,
    out,
    segments,
    tasks,
    client_stride,
    clients,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Outer products on the ordinary units: a thread keeps BLOCK_R sums of its columns."""
    task = tasks + tl.program_id(0).to(tl.int64) * 3
    factor = tl.load(task)
    first = tl.multiple_of(tl.load(task + 1), ALIGNMENT)
    first_row = tl.multiple_of(tl.load(task + 2), BLOCK_R)
    segment = segments + factor * 5
    offset = tl.multiple_of(tl.load(segment), ALIGNMENT)
    stride = tl.multiple_of(tl.load(segment + 1), ALIGNMENT)
    width = tl.multiple_of(tl.load(segment + 2), ALIGNMENT)
    other_offset = tl.multiple_of(tl.load(segment + 3), ALIGNMENT)
    other_stride = tl.multiple_of(tl.load(segment + 4), ALIGNMENT)

    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    # Two axes from the first load on, and only scalars carried through the loops: a vector would
    # pass through shared memory, with a barrier, for every row of the uploads.
    column = first + tl.arange(0, BLOCK_K)[None, :]
    inside = column < width
    row = first_row + tl.arange(0, BLOCK_R)[:, None]
    total = tl.zeros((BLOCK_R, BLOCK_K), dtype)
    upload = uploads + offset
    core = cores + factor * clients * RANK * ROWS
    client = tl.multiple_of(tl.cast(client_stride, tl.int64), ALIGNMENT)
    for _ in tl.range(0, clients):
        here = upload
        for _ in tl.range(0, RANK, loop_unroll_factor=UNROLL):
            x = tl.load(here + column, mask=inside, other=0.0, eviction_policy="evict_first")
            c = tl.load(core + row, mask=row < ROWS, other=0.0)
            total += c * x.to(dtype)
            here += stride
            core += ROWS
        upload += client
    place = out + other_offset + row * other_stride + column
    tl.store(place, total, mask=(row < ROWS) & inside)


@triton.jit
def apply_cores_dot_kernel(
    uploads,
    cores,
    out,
    segments,
    tasks,
    client_stride,
    rows,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """bf16 uploads on the tensor cores; the fp32 cores go in as three bf16 parts."""
    task = tasks + tl.program_id(0).to(tl.int64) * 3
    factor = tl.load(task)
    first = tl.multiple_of(tl.load(task + 1), ALIGNMENT)
    first_row = tl.multiple_of(tl.load(task + 2), BLOCK_R)
    segment = segments + factor * 5
    offset = tl.multiple_of(tl.load(segment), ALIGNMENT)
    stride = tl.multiple_of(tl.load(segment + 1), ALIGNMENT)
    width = tl.multiple_of(tl.load(segment + 2), ALIGNMENT)
    other_offset = tl.multiple_of(tl.load(segment + 3), ALIGNMENT)
    other_stride = tl.multiple_of(tl.load(segment + 4), ALIGNMENT)

    column = first + tl.arange(0, BLOCK_K)
    inside = column < width
    row = first_row + tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in tl.range(0, rows, BLOCK_M):
        index = start + tl.arange(0, BLOCK_M)
        present = index < rows
        client = tl.multiple_of((index // RANK).to(tl.int64) * client_stride, ALIGNMENT)
        upload = uploads + offset + client + (index % RANK) * stride
        x = tl.load(
            upload[:, None] + column[None, :],
            mask=present[:, None] & inside[None, :],
            other=0.0,
        )
        core = cores + (factor * rows + index) * ROWS
        c = tl.load(
            core[None, :] + row[:, None],
            mask=present[None, :] & (row < ROWS)[:, None],
            other=0.0,
        )
        high, middle, low = bf16_parts(c)
        total = tl.dot(low, x, total)
        total = tl.dot(middle, x, total)
        total = tl.dot(high, x, total)
    place = out + other_offset + row[:, None] * other_stride + column[None, :]
    tl.store(place, total, mask=(row < ROWS)[:, None] & inside[None, :])
