"""Double-precision working copies of a few modules' uploads at a time.

Everything quadratic in the uploads is accumulated in fp64. A stack ``(N, L, r, k)`` is therefore
copied, a cache-sized group of modules at a time, into fp64 rows ``(l, m, k)`` with ``m = N r``; all
passes of a step then run on that copy, so that the uploads themselves are read once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHE_BYTES = 4 << 20
"""Size of a working copy on the CPU: a share of the last-level cache."""

DEVICE_BYTES = 256 << 20
"""Size of a working copy elsewhere: few launches count for more than cache."""

# Rows whose distance is a power of two fall into the same cache sets, and a product over 160 rows
# of 4096 numbers then takes four times as long; two cache lines between rows avoid it.
_PADDING = 16


def copy_bytes(device: torch.device) -> int:
    """Bytes that the working copies of one group of modules may take on ``device``."""
    return CACHE_BYTES if device.type == "cpu" else DEVICE_BYTES


def joint_copies(*stacks: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
    """Consecutive slices of the modules of ``stacks (N, L, r, k_i)`` with their fp64 rows.

    The rows (l, m, k_i) of each stack are client-major and live in one buffer: they are overwritten
    by the next group.

    Example:
        >>> left, right = torch.ones(5, 2, 3, 8), torch.ones(5, 2, 3, 6)
        >>> [(part, *(copy.shape for copy in rows)) for part, rows in joint_copies(left, right)]
        [(slice(0, 2, None), torch.Size([2, 15, 8]), torch.Size([2, 15, 6]))]
    """
    clients, modules, rank, _ = stacks[0].shape
    strides = [stack.shape[3] + _PADDING for stack in stacks]
    module_bytes = 8 * clients * rank * sum(strides)
    size = min(modules, max(1, copy_bytes(stacks[0].device) // module_bytes))
    buffers = [
        torch.empty((size, clients, rank, stride), dtype=torch.float64, device=stack.device)
        for stack, stride in zip(stacks, strides, strict=True)
    ]
    for first in range(0, modules, size):
        part = slice(first, min(first + size, modules))
        rows = []
        for stack, buffer in zip(stacks, buffers, strict=True):
            width = stack.shape[3]
            copy = buffer[: part.stop - first]
            copy[..., :width].copy_(stack[:, part].transpose(0, 1))
            rows.append(copy.flatten(1, 2)[..., :width])
        yield part, rows


def working_copies(stack: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """:func:`joint_copies` of a single stack: slices of its modules with their fp64 rows."""
    for part, (rows,) in joint_copies(stack):
        yield part, rows
