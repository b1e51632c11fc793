"""The weighted mean of rows, one block of columns per program."""

import triton
import triton.language as tl


@triton.jit
def weighted_mean_kernel(
    updates,
    steps,
    mean,
    row_stride,
    clients,
    columns,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """``mean += step_n (x_n - mean)`` over the clients; ``step`` 0 leaves a row unread."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = tl.float64 if WIDE else tl.float32
    total = tl.zeros((BLOCK,), dtype)
    row = updates + column
    stride = tl.multiple_of(tl.cast(row_stride, tl.int64), ALIGNMENT)
    last = tl.multiple_of(tl.cast(columns, tl.int64), ALIGNMENT)
    # Loads do not wait for the sum, so unrolling keeps that many rows in flight.
    for client in tl.range(0, clients, loop_unroll_factor=UNROLL):
        step = tl.load(steps + client).to(dtype)
        # An absent client has no columns: nothing is loaded and nothing changes.
        here = column < tl.where(step > 0, last, 0)
        x = tl.load(row, mask=here, other=0.0, eviction_policy="evict_first")
        total = tl.where(here, total + step * (x.to(dtype) - total), total)
        row += stride
    tl.store(mean + column, total, mask=column < last)
