"""The adapter that clients start from after a round whose result went into the base weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcore.data.seeding import derive_seed
from fedcore_kernels.layout import FactorLayout


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
