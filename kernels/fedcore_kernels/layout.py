"""Where each tensor of each module stands in a flat row.

A round's uploads are one matrix: one row per client, one column per parameter. ``FactorLayout``
says which columns belong to which factor. Factors are stored as ``rank x width`` with contiguous
rows (``A`` as it is, ``B`` transposed, a core as it is); tensors that are not factors (heads,
norms, magnitudes) are *dense* slots of one row. Every offset is a multiple of 16 elements, so that
loads stay wide and one launch can cover modules of any width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from fedcore_kernels.errors import KernelInputError

ALIGNMENT = 16
"""Offsets and strides of slots are multiples of this many elements."""


def _align(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, order=True)
class FactorSlot:
    """One tensor in the flat row: ``rows x width`` elements from ``offset``.

    ``shape`` is empty for a factor and the tensor's own shape for a dense slot, whose ``factor`` is
    ``""`` and whose ``rows`` is 1.
    """

    factor: str
    rows: int
    width: int
    module: str
    offset: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def dense(self) -> bool:
        """Whether the slot is a plain tensor and not a low-rank factor."""
        return self.shape is not None

    @property
    def numel(self) -> int:
        """Elements of the tensor, without padding."""
        return self.rows * self.width

    @property
    def name(self) -> str:
        """``module.factor``, or the tensor's own name for a dense slot."""
        return self.module if self.dense else f"{self.module}.{self.factor}"


@dataclass(frozen=True)
class SlotGroup:
    """Factor slots of one factor, rank and width, standing next to each other in the row."""

    factor: str
    rows: int
    width: int
    offset: int
    stride: int
    modules: tuple[str, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The group's factors in ``flat (..., P)`` as ``(..., L, r, k)``, without a copy."""
        count = len(self.modules)
        slots = flat.narrow(-1, self.offset, count * self.stride).unflatten(-1, (count, -1))
        return slots[..., : self.rows * self.width].unflatten(-1, (self.rows, self.width))


@dataclass(frozen=True)
class FactorLayout:
    """The slots of a flat row, in the order in which they stand.

    Build it with :meth:`build`; two layouts made from the same tensors in any order are equal.

    Example:
        >>> layout = FactorLayout.build([("q", "A", 2, 32), ("v", "A", 2, 32)], [("bias", (5,))])
        >>> layout.size, [slot.name for slot in layout]
        (144, ['q.A', 'v.A', 'bias'])
    """

    slots: tuple[FactorSlot, ...]
    size: int = field(init=False)

    def __post_init__(self) -> None:
        end, names = 0, set()
        for slot in self.slots:
            if slot.offset % ALIGNMENT or slot.offset < end:
                raise KernelInputError(f"slot {slot.name!r} starts at {slot.offset}, after {end}")
            if slot.name in names:
                raise KernelInputError(f"slot {slot.name!r} appears twice in the layout")
            names.add(slot.name)
            end = slot.offset + slot.numel
        object.__setattr__(self, "size", _align(end))
        # torch.compile does not trace the lock that a cached property takes on Python 3.11.
        _ = self.groups, self.dense_slots

    @classmethod
    def build(
        cls,
        factors: Iterable[tuple[str, str, int, int]] = (),
        dense: Iterable[tuple[str, tuple[int, ...]]] = (),
    ) -> FactorLayout:
        """Lay out ``factors`` (module, factor, rank, width) and ``dense`` tensors (name, shape).

        Factors of one kind, rank and width stand next to each other, modules in alphabetical order,
        so that each such group is one strided view.

        Raises:
            KernelInputError: a rank or width below 1, or a name that appears twice.
        """
        wanted = [
            FactorSlot(factor, rows, width, module) for module, factor, rows, width in factors
        ]
        wanted.sort()
        wanted += [
            FactorSlot("", 1, prod(shape), name, shape=tuple(shape))
            for name, shape in sorted(dense)
        ]
        slots, offset = [], 0
        for slot in wanted:
            if slot.rows < 1 or slot.width < 1:
                raise KernelInputError(
                    f"slot {slot.name!r} is {slot.rows} x {slot.width}; both must be at least 1"
                )
            slots.append(
                FactorSlot(slot.factor, slot.rows, slot.width, slot.module, offset, slot.shape)
            )
            offset += _align(slot.numel)
        return cls(tuple(slots))

    def __iter__(self) -> Iterator[FactorSlot]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    @cached_property
    def by_name(self) -> dict[str, FactorSlot]:
        """Slot by its name."""
        return {slot.name: slot for slot in self.slots}

    @cached_property
    def factor_slots(self) -> tuple[FactorSlot, ...]:
        """The low-rank factors, in row order."""
        return tuple(slot for slot in self.slots if not slot.dense)

    @cached_property
    def dense_slots(self) -> tuple[FactorSlot, ...]:
        """The plain tensors, in row order."""
        return tuple(slot for slot in self.slots if slot.dense)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Adapted modules in alphabetical order."""
        return tuple(sorted({slot.module for slot in self.factor_slots}))

    @cached_property
    def groups(self) -> tuple[SlotGroup, ...]:
        """Runs of factor slots of equal factor, rank and width; each is one strided view."""
        runs = groupby(self.factor_slots, key=lambda slot: (slot.factor, slot.rows, slot.width))
        groups = []
        for (factor, rows, width), members in runs:
            run = list(members)
            stride = _align(rows * width)
            start = run[0].offset
            if any(slot.offset != start + i * stride for i, slot in enumerate(run)):
                raise KernelInputError(
                    f"slots of factor {factor!r} do not stand at equal distances"
                )
            names = tuple(slot.module for slot in run)
            groups.append(SlotGroup(factor, rows, width, start, stride, names))
        return tuple(groups)

    @property
    def numel(self) -> int:
        """Elements that carry data, without padding: the traffic of one row."""
        return sum(slot.numel for slot in self.slots)

    def view(self, flat: Tensor, slot: FactorSlot) -> Tensor:
        """The slot's elements of ``flat (..., P)`` as ``(..., r, k)`` or a dense slot's shape."""
        piece = flat.narrow(-1, slot.offset, slot.numel)
        shape = (slot.rows, slot.width) if slot.shape is None else slot.shape
        return piece.view((*piece.shape[:-1], *shape))

    def select(self, factors: Iterable[str], dense: bool = True) -> FactorLayout:
        """A layout with only the named ``factors`` and, with ``dense``, the dense slots."""
        names = set(factors)
        return self.part(s.name for s in self.slots if (dense if s.dense else s.factor in names))

    def part(self, names: Iterable[str]) -> FactorLayout:
        """A layout with only the slots called ``names``, all of which must exist."""
        slots = [self.by_name[name] for name in names]
        return FactorLayout.build(
            [(s.module, s.factor, s.rows, s.width) for s in slots if not s.dense],
            [(s.module, s.shape) for s in slots if s.shape is not None],
        )

    def gather(self, flat: Tensor, part: FactorLayout) -> Tensor:
        """The columns of ``flat (..., P)`` that ``part`` names, as a row of ``part``."""
        out = flat.new_zeros((*flat.shape[:-1], part.size))
        for slot in part:
            source = self.by_name[slot.name]
            out[..., slot.offset : slot.offset + slot.numel] = flat[
                ..., source.offset : source.offset + source.numel
            ]
        return out

    def scatter(self, flat: Tensor, part: FactorLayout, values: Tensor) -> Tensor:
        """A copy of ``flat (..., P)`` with the columns that ``part`` names from ``values``."""
        out = flat.clone()
        for slot in part:
            target = self.by_name[slot.name]
            out[..., target.offset : target.offset + target.numel] = values[
                ..., slot.offset : slot.offset + slot.numel
            ]
        return out

    def check(self, flat: Tensor, name: str = "updates") -> None:
        """Raise unless the last axis of ``flat`` has the layout's size.

        Raises:
            KernelInputError: naming the argument, its size and the size expected.
        """
        if flat.dim() < 1 or flat.shape[-1] != self.size:
            shape = tuple(flat.shape)
            raise KernelInputError(f"{name} has shape {shape}; its last axis must be {self.size}")

    def task_table(self, block: int) -> Tensor:
        """Rows (group, module, offset, first column, last column) of int64, one per kernel tile.

        Grouped kernels walk this table, so that one launch covers every factor slot whatever its
        width. ``block`` is the number of columns a tile covers.
        """
        rows = []
        for g, group in enumerate(self.groups):
            for j in range(len(group.modules)):
                offset = group.offset + j * group.stride
                rows += [
                    (g, j, offset, first, min(first + block, group.width))
                    for first in range(0, group.width, block)
                ]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)
