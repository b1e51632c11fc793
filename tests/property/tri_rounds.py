"""Rounds of tri-factor uploads: cores between bases that may be the clients' own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.methods import Broadcast
from fedcore_kernels.layout import FactorLayout

SHAPES = (("m0", 33, 7), ("m1", 9, 12), ("m2", 4, 4))
"""Modules with their output and input widths; the last is as wide as the rank."""


def tri_layout(rank: int = 4, shapes: Sequence[tuple[str, int, int]] = SHAPES) -> FactorLayout:
    """Bases and cores of ``shapes`` and a head of 3 x 5."""
    factors = [
        (module, factor, rank, width)
        for module, d_out, d_in in shapes
        for factor, width in (("A", d_in), ("B", d_out), ("R", rank))
    ]
    return FactorLayout.build(factors, [("head", (3, 5))])


def normal_row(layout: FactorLayout, seed: int) -> Tensor:
    """Standard normal numbers in every slot, fp64."""
    random = torch.Generator().manual_seed(seed)
    row = torch.zeros(layout.size, dtype=torch.float64)
    for slot in layout:
        view = layout.view(row, slot)
        view.copy_(torch.randn(view.shape, generator=random, dtype=torch.float64))
    return row


def core_round(
    cores: Tensor,
    weights: Sequence[float] | None = None,
    *,
    clients: Sequence[str] | None = None,
    statistics: dict[str, dict[str, Tensor]] | None = None,
) -> tuple[Cohort, Broadcast]:
    """Uploads of ``cores (N, L, r, r)`` for modules of 6 x 5, from a broadcast with ``R = I``."""
    count, modules, rank, _ = cores.shape
    layout = tri_layout(rank, [(f"m{j}", 6, 5) for j in range(modules)])
    previous = Broadcast(layout, normal_row(layout, 99).to(cores.dtype))
    for slot in layout.factor_slots:
        if slot.factor == "R":
            layout.view(previous.row, slot).copy_(torch.eye(rank))
    sent = layout.select("R", dense=False)
    names = [f"c{n:03d}" for n in range(count)] if clients is None else list(clients)
    builder = CohortBuilder(sent, names, round=1, dtype=cores.dtype)
    for n, client in enumerate(names):
        sent.groups[0].view(builder.row(client)).copy_(cores[n])
        builder.receive(client, 1.0 if weights is None else weights[n])
    cohort = builder.finish()
    return Cohort(**{**cohort.__dict__, "statistics": statistics or {}}), previous


def near_identity(count: int, modules: int = 2, rank: int = 4, seed: int = 0) -> Tensor:
    """Cores ``I + 0.3 N(0, 1)``, ``(N, L, r, r)`` fp64."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, modules, rank, rank, generator=random, dtype=torch.float64)
    return torch.eye(rank, dtype=torch.float64) + 0.3 * noise


def tri_product(layout: FactorLayout, row: Tensor, module: str) -> Tensor:
    """``B R A (d_out, d_in)`` of a row that holds all three, in fp64."""
    b, r, a = (layout.view(row, layout.by_name[f"{module}.{f}"]).double() for f in "BRA")
    return b.T @ r @ a
