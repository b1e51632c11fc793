"""Double-precision working copies of a few modules' uploads at a time.

Everything quadratic in the uploads is accumulated in fp64. A stack ``(N, L, r, k)`` is therefore
copied, a cache-sized group of modules at a time, into fp64 rows ``(l, m, k)`` with ``m = N r``; all
passes of a step then run on that copy, so that the uploads themselves are read once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CACHE_BYTES = 8 << 20
"""Size of a working copy on the CPU: a share of the last-level cache."""

DEVICE_BYTES = 256 << 20
"""Size of a working copy elsewhere: few launches count for more than cache."""

# Rows whose distance is a power of two fall into the same cache sets, and a product over 160 rows
# of 4096 numbers then takes four times as long; two cache lines between rows avoid it.
_PADDING = 16


def module_groups(stack: Tensor) -> Iterator[slice]:
    """Consecutive slices of the module axis of ``stack (N, L, r, k)``, each one working copy."""
    clients, modules, rank, width = stack.shape
    budget = CACHE_BYTES if stack.device.type == "cpu" else DEVICE_BYTES
    size = max(1, budget // (8 * clients * rank * (width + _PADDING)))
    for first in range(0, modules, size):
        yield slice(first, min(first + size, modules))


def working_rows(stack: Tensor, root: Tensor | None = None) -> Tensor:
    """The fp64 rows ``(l, m, k)`` of ``stack (N, l, r, k)``, scaled by ``root (N,)``."""
    clients, modules, rank, width = stack.shape
    padded = torch.empty(
        (modules, clients, rank, width + _PADDING), dtype=torch.float64, device=stack.device
    )
    rows = padded[..., :width]
    rows.copy_(stack.transpose(0, 1))
    if root is not None:
        rows.mul_(root[:, None, None])
    return padded.view(modules, clients * rank, width + _PADDING)[..., :width]
