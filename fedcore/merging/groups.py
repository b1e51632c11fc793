"""The tensors of all adapters in groups, so that one group of each fits the memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from fedcore.data.rows import widest_layout
from fedcore.merging.sources import Source
from fedcore_kernels.layout import FactorLayout

DEFAULT_GROUP_BYTES = 64 << 20
"""Bytes of one group's rows, all adapters together."""


@dataclass(frozen=True)
class DensePart:
    """Elements ``start`` to ``stop`` of a dense tensor, in row-major order."""

    name: str
    start: int
    stop: int


def work_dtype(sources: Sequence[Source]) -> torch.dtype:
    """The dtype of rows that hold any of the ``sources``: fp64 where a tensor of one is."""
    wide = any(source.outline.dtype == torch.float64 for source in sources)
    return torch.float64 if wide else torch.float32


def different(sources: Sequence[Source]) -> list[Source]:
    """The first source of every outline, as adapters that are alike share theirs."""
    first: dict[int, Source] = {}
    for source in sources:
        first.setdefault(id(source.outline), source)
    return list(first.values())


def widest(sources: Sequence[Source], rank: int | None = None) -> FactorLayout:
    """The tensors of the first source at the largest rank of any, and at ``rank`` if larger."""
    ranks = [source.ranks for source in different(sources)]
    if rank is not None:
        ranks.append(dict.fromkeys(ranks[0], rank))
    return widest_layout(sources[0].outline.layout(), ranks)


def groups_of(layout: FactorLayout, row_bytes: int, group_bytes: int) -> Iterator[FactorLayout]:
    """The modules of ``layout`` in the order of their names, which is the order of files.

    Args:
        row_bytes: of one element of all adapters.
        group_bytes: of all adapters' rows of a group, which holds one module at least.
    """
    slots: dict[str, list[str]] = {module: [] for module in layout.modules}
    sizes = dict.fromkeys(slots, 0)
    for slot in layout.factor_slots:
        slots[slot.module].append(slot.name)
        sizes[slot.module] += slot.numel * row_bytes
    names: list[str] = []
    used = 0
    for module, size in sizes.items():
        if names and used + size > group_bytes:
            yield layout.part(names)
            names, used = [], 0
        names += slots[module]
        used += size
    if names:
        yield layout.part(names)


def parts_of(
    layout: FactorLayout, row_bytes: int, group_bytes: int, but: Collection[str] = ()
) -> Iterator[DensePart]:
    """The dense tensors of ``layout``, in pieces of which one of each adapter fits the budget.

    Args:
        but: names to leave out.
    """
    length = max(1, group_bytes // row_bytes)
    for slot in (slot for slot in layout.dense_slots if slot.name not in but):
        for start in range(0, slot.numel, length):
            yield DensePart(slot.name, start, min(start + length, slot.numel))
