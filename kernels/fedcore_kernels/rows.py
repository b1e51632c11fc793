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


def working_copies(stack: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive slices of the modules of ``stack (N, L, r, k)`` with their fp64 rows (l, m, k).

    The rows are client-major and live in one buffer: they are overwritten by the next group.
    """
    clients, modules, rank, width = stack.shape
    budget = CACHE_BYTES if stack.device.type == "cpu" else DEVICE_BYTES
    stride = width + _PADDING
    size = min(modules, max(1, budget // (8 * clients * rank * stride)))
    buffer = torch.empty((size, clients, rank, stride), dtype=torch.float64, device=stack.device)
    for first in range(0, modules, size):
        part = slice(first, min(first + size, modules))
        copy = buffer[: part.stop - first]
        copy[..., :width].copy_(stack[:, part].transpose(0, 1))
        yield part, copy.flatten(1, 2)[..., :width]
