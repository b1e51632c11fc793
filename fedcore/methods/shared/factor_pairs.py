"""The two factors of the same modules: as matching stacks, and drawn afresh.

``A`` and ``B`` of a module stand in different groups of a layout, and a group of equal ``A`` may
hold modules of different ``B``. A pair group holds the modules that agree in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.data.seeding import derive_seed
from fedcore.errors import FedcoreError
from fedcore_kernels import FactorLayout, SlotGroup


def _places(group: SlotGroup, modules: tuple[str, ...]) -> list[int]:
    places = {name: j for j, name in enumerate(group.modules)}
    return [places[name] for name in modules]


def _part(group: SlotGroup, modules: tuple[str, ...], flat: Tensor) -> Tensor:
    stack = group.view(flat)
    if group.modules == modules:
        return stack
    places = torch.tensor(_places(group, modules), device=flat.device)
    return stack.index_select(-3, places)


@dataclass(frozen=True)
class PairGroup:
    """Modules of one rank, output width and input width.

    Attributes:
        modules: in alphabetical order, the order of the stacks.
        rank: rows of each factor in the layout.
        kept: leading rows that are used; ``rank`` by default.
        outer, inner: the layout's groups that hold the modules' ``B`` and ``A``.
    """

    modules: tuple[str, ...]
    rank: int
    kept: int
    outer: SlotGroup
    inner: SlotGroup

    def stacks(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """``B^T (..., L, r, d_out)`` and ``A (..., L, r, d_in)`` of rows ``flat (..., P)``.

        A view where the modules fill their group, a copy of the group's part otherwise.
        """
        return _part(self.outer, self.modules, flat), _part(self.inner, self.modules, flat)

    def write(self, row: Tensor, outer: Tensor, inner: Tensor) -> None:
        """Put ``B^T (L, s, d_out)`` and ``A (L, s, d_in)`` into ``row (P,)``, zeros below."""
        for group, values in ((self.outer, outer), (self.inner, inner)):
            missing = self.rank - values.shape[-2]
            padded = torch.nn.functional.pad(values, (0, 0, 0, missing)).to(row.dtype)
            group.view(row)[_places(group, self.modules)] = padded


def pair_groups(
    layout: FactorLayout, kept: Mapping[str, int] | None = None
) -> tuple[PairGroup, ...]:
    """The modules of ``layout`` by rank, ``d_out`` and ``d_in``, and by rank ``kept`` if given.

    Raises:
        FedcoreError: a module lacks one of its factors, or they differ in rank.
    """
    where = {(group.factor, name): group for group in layout.groups for name in group.modules}
    modules: dict[tuple[int, int, int, int], list[str]] = {}
    for name in layout.modules:
        outer, inner = where.get(("B", name)), where.get(("A", name))
        if outer is None or inner is None or outer.rows != inner.rows:
            raise FedcoreError(f"module {name} needs factors A and B of one rank in the upload")
        limit = inner.rows if kept is None else kept[name]
        modules.setdefault((inner.rows, outer.width, inner.width, limit), []).append(name)
    return tuple(
        PairGroup(tuple(names), key[0], key[3], where["B", names[0]], where["A", names[0]])
        for key, names in modules.items()
    )


def fresh_adapter(row: Tensor, layout: FactorLayout, seed: int, *purpose: str | int) -> Tensor:
    """A copy of ``row (P,)`` with ``B = 0`` and a newly drawn ``A`` in every module.

    Entries of ``A`` are uniform in ``[-1/sqrt(d_in), 1/sqrt(d_in))``, PEFT's default (Kaiming
    uniform with a = sqrt 5). They are drawn in fp32 on the CPU, row by row from
    ``derive_seed(seed, *purpose, module)``: server and clients draw the same ones whatever their
    device and dtype, and a client of lower rank draws the leading rows of the others.

    Args:
        row: in ``layout``; its dense tensors are kept.
        layout: factors A and B.
        seed: the run's.
        purpose: what distinguishes this draw from others, for example the method and the round.
    """
    fresh = row.clone()
    for slot in layout.factor_slots:
        values = layout.view(fresh, slot)
        if slot.factor == "B":
            values.zero_()
            continue
        random = torch.Generator().manual_seed(derive_seed(seed, *purpose, slot.module))
        bound = slot.width**-0.5
        values.copy_(torch.empty(slot.rows, slot.width).uniform_(-bound, bound, generator=random))
    return fresh
