"""A round of uploads for any method, whatever its adapter family and its client half."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort, CohortBuilder
from fedcore.methods import Broadcast, Method
from fedcore_kernels.layout import FactorLayout

SHAPES = (("m0", 9, 7), ("m1", 7, 12), ("m2", 9, 7))
"""Modules with their output and input widths."""


def family_layout(family: str, rank: int = 3) -> FactorLayout:
    """What a method of ``family`` broadcasts for the modules of ``SHAPES`` and a head."""
    factors = []
    for module, d_out, d_in in SHAPES:
        widths = {
            "lora": {"A": d_in, "B": d_out},
            "gram": {"A": d_in},
            "tri": {"A": d_in, "B": d_out, "R": rank},
            "none": {},
        }[family]
        factors += [(module, factor, rank, width) for factor, width in widths.items()]
    return FactorLayout.build(factors, [("head", (3, 5))])


def random_row(layout: FactorLayout, seed: int) -> Tensor:
    """Standard normal numbers in every slot, zeros in between, fp64."""
    random = torch.Generator().manual_seed(seed)
    row = torch.zeros(layout.size, dtype=torch.float64)
    for slot in layout:
        view = layout.view(row, slot)
        view.copy_(torch.randn(view.shape, generator=random, dtype=torch.float64))
    return row


def client_rows(
    method: Method, previous: Broadcast, round: int, seed: int, spread: float = 0.3
) -> tuple[Tensor, Tensor]:
    """A client's model ``(P,)`` after training, ``spread`` away from the broadcast in every slot,
    and what it sends.
    """
    layout = previous.layout
    trained = previous.row + spread * random_row(layout, seed).to(previous.row.dtype)
    read = method.read_layout(layout, round)
    return trained, method.prepare_upload(layout.gather(trained, read), read, previous, round).row


def make_method_round(
    method: Method,
    weights: Sequence[float],
    *,
    seed: int = 0,
    round: int = 1,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float64,
) -> tuple[Cohort, Broadcast]:
    """Clients ``c000, c001, ...`` that start from one broadcast and end ``spread`` away from it."""
    layout = family_layout(method.family)
    previous = Broadcast(layout, (0.5 * random_row(layout, seed)).to(dtype))
    sent = method.upload_layout(layout, round)
    clients = [f"c{n:03d}" for n in range(len(weights))]
    builder = CohortBuilder(sent, clients, round=round, dtype=dtype)
    for n, (client, weight) in enumerate(zip(clients, weights, strict=True)):
        builder.row(client).copy_(client_rows(method, previous, round, seed + n + 1, spread)[1])
        builder.receive(client, weight, round=round)
    return builder.finish(), previous
