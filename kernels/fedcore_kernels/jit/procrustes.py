"""The cross product of two batches of thin factors, which a Procrustes problem starts from."""

import triton
import triton.language as tl


@triton.jit
def cross_product_kernel(
    source,
    target,
    partials,
    batch,
    p,
    q,
    k,
    step,
    source_batch,
    source_row,
    source_column,
    target_batch,
    target_row,
    target_column,
    P: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``partials[slab, member] = target source^T`` over ``step`` columns, all in fp64.

    Programs are numbered member first; P and Q are ``p`` and ``q`` padded.
    """
    member = tl.program_id(0).to(tl.int64) % batch
    slab = tl.program_id(0).to(tl.int64) // batch
    above, below = tl.arange(0, Q), tl.arange(0, P)
    goal = target + member * target_batch + above[:, None].to(tl.int64) * target_row
    start = source + member * source_batch + below[:, None].to(tl.int64) * source_row
    total = tl.zeros((Q, P), tl.float64)
    last = tl.minimum(slab * step + step, k)
    for first in tl.range(slab * step, last, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        inside = (column < last)[None, :]
        x = tl.load(goal + column * target_column, mask=(above < q)[:, None] & inside, other=0.0)
        y = tl.load(start + column * source_column, mask=(below < p)[:, None] & inside, other=0.0)
        total = tl.dot(x.to(tl.float64), tl.trans(y.to(tl.float64)), total, out_dtype=tl.float64)
    out = partials + (slab * batch + member) * q * p
    keep = (above < q)[:, None] & (below < p)[None, :]
    tl.store(out + above[:, None] * p + below[None, :], total, mask=keep)
