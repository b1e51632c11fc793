"""What a grouped launch covers: factors of one rank and any width, and one task per program.

``Segments`` are the factors: where each stands in a client's row and where its counterpart (the
previous factor, or the result) stands. Tables are built once for each shape and kept on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import gcd

import torch
from torch import Tensor

from fedcore_kernels.layout import ALIGNMENT, FactorSlot

# Programs that fill any of the cards; below, a launch is split into smaller blocks.
_PROGRAMS = 1024


def power_of_two_in(*values: int) -> int:
    """The largest power of two, up to 16, that divides every one of ``values``."""
    return gcd(ALIGNMENT, *values)


@dataclass(frozen=True)
class Segments:
    """Factors of rank ``rank`` in the rows of the uploads.

    Attributes:
        rank: rows of every factor.
        client_stride: elements between two clients.
        table: for every factor its offset and row stride in an upload, its width, and offset and
            row stride of its counterpart.
    """

    rank: int
    client_stride: int
    table: tuple[tuple[int, int, int, int, int], ...]

    @property
    def alignment(self) -> int:
        """The power of two up to 16 that divides every offset, stride and width."""
        return power_of_two_in(self.client_stride, *chain.from_iterable(self.table))

    def counterparts(self, rows: int) -> Segments:
        """The counterparts, of ``rows`` rows, as the factors of a single client; their own too."""
        table = tuple((at, step, width, at, step) for _, _, width, at, step in self.table)
        return Segments(rows, 0, table)

    def to(self, device: torch.device) -> Tensor:
        """The table on ``device`` (factors, 5)."""
        return _on_device(self.table, device)


@lru_cache(maxsize=256)
def _on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).to(device)


@lru_cache(maxsize=256)
def of_stack(
    shape: tuple[int, int, int, int], strides: tuple[int, int, int, int], rows: int
) -> Segments:
    """The factors of a stack (N, L, r, k); their counterparts are contiguous (L, rows, k)."""
    _, modules, rank, width = shape
    client, module, row, _ = strides
    return Segments(
        rank,
        client,
        tuple((j * module, row, width, j * rows * width, width) for j in range(modules)),
    )


def of_slots(slots: Sequence[FactorSlot], client_stride: int) -> Segments:
    """Slots of equal rank of a flat row, each its own counterpart in another flat row."""
    return Segments(
        slots[0].rows,
        client_stride,
        tuple((slot.offset, slot.width, slot.width, slot.offset, slot.width) for slot in slots),
    )


@lru_cache(maxsize=256)
def column_tasks(
    segments: Segments, rows: int, block_rows: int, block: int, device: torch.device
) -> Tensor:
    """(factor, first column, first row) for every block of the counterparts."""
    tasks = [
        (j, first, row)
        for j, segment in enumerate(segments.table)
        for first in range(0, segment[2], block)
        for row in range(0, rows, block_rows)
    ]
    return torch.tensor(tasks, dtype=torch.int64).to(device)


@lru_cache(maxsize=256)
def slab_tasks(
    segments: Segments, rows: int, block_rows: int, block: int, device: torch.device
) -> tuple[Tensor, int]:
    """(factor, first row, first and last column, slab) for every block of rows, and the slabs.

    Every factor is split into the same number of slabs, so that their sum is one reduction. Narrow
    factors may have slabs without columns.
    """
    blocks = len(segments.table) * -(-rows // block_rows)
    widest = max(segment[2] for segment in segments.table)
    slabs = max(1, min(_PROGRAMS // blocks, widest // (4 * block)))
    tasks = []
    for j, segment in enumerate(segments.table):
        width = segment[2]
        step = -(-width // (slabs * block)) * block
        tasks += [
            (j, row, min(s * step, width), min((s + 1) * step, width), s)
            for s in range(slabs)
            for row in range(0, rows, block_rows)
        ]
    return torch.tensor(tasks, dtype=torch.int64).to(device), slabs


@lru_cache(maxsize=256)
def tile_tasks(factors: int, rows: int, block: int, device: torch.device) -> Tensor:
    """(factor, first row, first column) for every tile on or below the diagonal."""
    tasks = [
        (j, row, column)
        for j in range(factors)
        for row in range(0, rows, block)
        for column in range(0, row + 1, block)
    ]
    return torch.tensor(tasks, dtype=torch.int64).to(device)
