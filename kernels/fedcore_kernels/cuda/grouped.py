"""Launchers of the grouped kernels: one launch for all factors of a rank, whatever their width.

They take the uploads as they lie in memory together with :class:`~.tasks.Segments`, so that a stack
and a whole flat row go the same way. ``rows`` counts the rows of the other operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.cuda.configurations import configuration
from fedcore_kernels.cuda.tasks import Segments, column_tasks, slab_tasks, tile_tasks
from fedcore_kernels.jit.apply_cores import apply_cores_dot_kernel, apply_cores_kernel
from fedcore_kernels.jit.grams import cross_gram_kernel, gram_kernel

# Rows that one program can keep: beyond, the torch body runs.
ROW_LIMIT = 128


def _bits(dtype: torch.dtype) -> int:
    return dtype.itemsize * 8


def _padded(rows: int) -> int:
    """``rows`` up to a power of two that a tensor core takes."""
    return max(16, 1 << (rows - 1).bit_length())


def cross_gram_partials(
    uploads: Tensor, clients: int, segments: Segments, reference: Tensor, rows: int
) -> Tensor:
    """``A_n ref^T`` of every factor, slab by slab of columns: fp64 (slabs, factors, N r, rows)."""
    device, stacked = uploads.device, clients * segments.rank
    mode = {torch.float64: "fp64", torch.bfloat16: "bf16"}.get(uploads.dtype, "tf32x3")
    # fp16 is multiplied as fp32 and takes as many registers.
    bits = 32 if mode == "tf32x3" else _bits(uploads.dtype)
    size = configuration("cross_gram", device, bits, _padded(rows))
    table = segments.to(device)
    tasks, slabs = slab_tasks(segments, stacked, size["block_m"], size["block_k"], device)
    partials = torch.empty((slabs, len(table), stacked, rows), dtype=torch.float64, device=device)
    cross_gram_kernel[(len(tasks),)](
        uploads,
        reference,
        partials,
        table,
        tasks,
        segments.client_stride,
        stacked,
        len(table),
        RANK=segments.rank,
        ROWS=rows,
        ROWS_PAD=_padded(rows),
        BLOCK_M=size["block_m"],
        BLOCK_K=size["block_k"],
        MODE=mode,
        ALIGNMENT=segments.alignment,
        num_warps=size["warps"],
        num_stages=size["stages"],
    )
    return partials


def cross_gram_rows(
    uploads: Tensor, clients: int, segments: Segments, reference: Tensor, rows: int
) -> Tensor:
    """``A_n ref^T`` of every factor: fp64 (factors, N r, rows)."""
    partials = cross_gram_partials(uploads, clients, segments, reference, rows)
    return partials.sum(0) if len(partials) > 1 else partials[0]


def gram_rows(
    uploads: Tensor, clients: int, segments: Segments, root: Tensor, exact: bool = False
) -> Tensor:
    """``F F^T`` of every factor: fp64 (factors, m, m), with ``root`` (N,) folded in.

    Products of 16-bit uploads are summed in fp32 within a block of columns unless ``exact``.
    """
    device, stacked = uploads.device, clients * segments.rank
    wide = exact or uploads.dtype.itemsize > 2
    size = configuration("gram", device, max(32, _bits(uploads.dtype)) if wide else 16, stacked)
    table = segments.to(device)
    tasks = tile_tasks(len(table), stacked, size["block_m"], device)
    grams = torch.empty((len(table), stacked, stacked), dtype=torch.float64, device=device)
    gram_kernel[(len(tasks),)](
        uploads,
        root,
        grams,
        table,
        tasks,
        segments.client_stride,
        stacked,
        RANK=segments.rank,
        BLOCK_M=size["block_m"],
        BLOCK_K=size["block_k"],
        MODE="fp64" if wide else "native",
        ALIGNMENT=segments.alignment,
        num_warps=size["warps"],
        num_stages=size["stages"],
    )
    return grams


def apply_rows(
    uploads: Tensor, clients: int, segments: Segments, cores: Tensor, out: Tensor
) -> None:
    """Write ``sum_n cores_n A_n`` of every factor to its counterpart in ``out``.

    ``cores`` (factors, N r, rows) holds the transposed cores; the counterparts have ``rows`` rows.
    """
    device, rows = uploads.device, cores.shape[-1]
    rank = segments.rank
    table = segments.to(device)
    dot = uploads.dtype == torch.bfloat16 and max(rank, rows) > 16
    name = "apply_cores_dot" if dot else "apply_cores"
    size = configuration(name, device, _bits(uploads.dtype), rows)
    tasks = column_tasks(segments, rows, size["block_r"], size["block_k"], device)
    arguments = (
        uploads,
        cores.to(checks.accumulator(uploads.dtype)).contiguous(),
        out,
        table,
        tasks,
        segments.client_stride,
        clients * rank if dot else clients,
    )
    shape = {
        "RANK": rank,
        "ROWS": rows,
        "BLOCK_R": size["block_r"],
        "BLOCK_K": size["block_k"],
        "ALIGNMENT": segments.alignment,
        "num_warps": size["warps"],
        "num_stages": size["stages"],
    }
    if dot:
        apply_cores_dot_kernel[(len(tasks),)](*arguments, BLOCK_M=size["block_m"], **shape)
    else:
        wide = uploads.dtype == torch.float64
        apply_cores_kernel[(len(tasks),)](
            *arguments, UNROLL=min(rank, size["unroll"]), WIDE=wide, **shape
        )
