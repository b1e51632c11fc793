"""Rounds in which honest clients stand close together and others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedcore.data.cohort import Cohort
from fedcore.methods import Broadcast
from tests.property.lora_rounds import LoraRound, make_lora_round

SHAPES = ((33, 7), (7, 33), (12, 12))


def clustered_round(
    clients: int,
    faulty: Sequence[int] = (),
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    scale: float = -1.0,
    dtype: torch.dtype = torch.float64,
) -> LoraRound:
    """Clients a thousandth from the broadcast; the update of those in ``faulty`` is ``scale`` M."""
    case = make_lora_round("near", weights or [1.0] * clients, SHAPES, 3, seed)
    updates = case.cohort.updates.clone()
    for slot in case.cohort.layout.factor_slots:
        if slot.factor == "B":
            for n in faulty:
                case.cohort.layout.view(updates[n], slot).mul_(scale)
    cohort = replace(case.cohort, updates=updates.to(dtype))
    return LoraRound(
        case.kind, cohort, Broadcast(case.previous.layout, case.previous.row.to(dtype))
    )


def regauged(cohort: Cohort, seed: int, *, scales: bool = True) -> Cohort:
    """The same products from other factors: ``(B_n X, X^-1 A_n)`` with X of every client's own."""
    random = torch.Generator().manual_seed(seed)
    layout, updates = cohort.layout, cohort.updates.clone()
    for module in layout.modules:
        outer, inner = (layout.view(updates, layout.by_name[f"{module}.{f}"]) for f in "BA")
        rank, clients = inner.shape[1], len(cohort)
        draws = torch.randn(2, clients, rank, rank, generator=random, dtype=torch.float64)
        left, right = torch.linalg.qr(draws).Q
        values = torch.rand(clients, rank, generator=random, dtype=torch.float64) * 3 + 0.5
        turn = left * (values[:, None] if scales else 1.0) @ right
        # Rows of ``outer`` are the columns of B.
        outer.copy_((turn.mT @ outer.double()).to(outer.dtype))
        inner.copy_(torch.linalg.solve(turn, inner.double()).to(inner.dtype))
    return replace(cohort, updates=updates)
