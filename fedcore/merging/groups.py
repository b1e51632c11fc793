"""Modules in groups whose tensors, of all adapters together, fit a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedcore.data.adapter_state import AdapterState
from fedcore.merging.sources import Source
from fedcore_kernels.layout import FactorLayout

DEFAULT_GROUP_BYTES = 64 << 20
"""Bytes of one group's rows, all adapters together."""


@dataclass(frozen=True)
class ModuleGroup:
    """Modules that are aggregated together, in the layout of their factors."""

    modules: tuple[str, ...]
    layout: FactorLayout

    @property
    def slots(self) -> list[tuple[str, str, int, int]]:
        """Module, factor, rank and width of every factor."""
        return [(s.module, s.factor, s.rows, s.width) for s in self.layout.factor_slots]


@dataclass(frozen=True)
class DensePart:
    """Elements ``start`` to ``stop`` of a dense tensor, in row-major order."""

    name: str
    start: int
    stop: int


def module_groups(
    sources: Sequence[Source], rank: int | None, group_bytes: int, itemsize: int
) -> list[ModuleGroup]:
    """All modules in the order of their names, which is the order in which files hold them.

    Each factor has the largest rank that any adapter has in the module, and ``rank`` if that is
    larger. A group holds one module at least.
    """
    first, ranks = sources[0].outline, [source.ranks for source in sources]
    slots = {
        module: [
            (slot.factor, max(rank or 0, *(own.get(module, 0) for own in ranks)), slot.width)
            for slot in AdapterState(first.family, {module: first.factors[module]}).layout()
        ]
        for module in sorted(first.factors)
    }
    found: list[list[str]] = []
    used = 0
    for module, factors in slots.items():
        size = len(sources) * itemsize * sum(rows * width for _, rows, width in factors)
        if not found or used + size > group_bytes:
            found.append([])
            used = 0
        found[-1].append(module)
        used += size
    return [
        ModuleGroup(
            tuple(names),
            FactorLayout.build([(name, *slot) for name in names for slot in slots[name]]),
        )
        for names in found
    ]


def dense_parts(
    state: AdapterState, adapters: int, group_bytes: int, itemsize: int
) -> list[DensePart]:
    """All dense tensors, in pieces of which one of each adapter fits the budget."""
    length = max(1, group_bytes // (adapters * itemsize))
    return [
        DensePart(name, start, min(start + length, tensor.numel()))
        for name, tensor in sorted(state.dense.items())
        for start in range(0, tensor.numel(), length)
    ]
