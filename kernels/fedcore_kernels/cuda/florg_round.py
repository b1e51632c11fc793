"""A whole FLoRG round on flat rows: all factors of one rank in the same launches.

The number of launches depends on the number of different ranks, not on modules, widths or clients.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fedcore_kernels import checks
from fedcore_kernels.client_weights import root_shares, shares
from fedcore_kernels.cuda import RANK_LIMIT
from fedcore_kernels.cuda.florg import Report, align_rows, sketched_rows, truncated_rows
from fedcore_kernels.cuda.tasks import Segments, of_slots
from fedcore_kernels.cuda.weighted_mean import weighted_mean
from fedcore_kernels.florg_round import FlorgRound, Variant, by_group
from fedcore_kernels.layout import FactorLayout, SlotGroup
from fedcore_kernels.library.florg_steps import check_gauge
from fedcore_kernels.steps import EPS_REL, FactorStep, principal


@lru_cache(maxsize=64)
def _ranks(
    layout: FactorLayout, client_stride: int
) -> tuple[tuple[Segments, tuple[int, ...]], ...]:
    """Factors of each rank, and which of the layout's factor slots they are."""
    by_rank: dict[int, list[int]] = {}
    for index, slot in enumerate(layout.factor_slots):
        by_rank.setdefault(slot.rows, []).append(index)
    return tuple(
        (of_slots([layout.factor_slots[i] for i in members], client_stride), tuple(members))
        for members in by_rank.values()
    )


@lru_cache(maxsize=64)
def _dense_columns(layout: FactorLayout, device: torch.device) -> tuple[int, Tensor]:
    """The first column of a dense slot, and which columns from there on belong to one."""
    first = min(slot.offset for slot in layout.dense_slots)
    inside = torch.zeros(layout.size - first, dtype=torch.bool)
    for slot in layout.dense_slots:
        inside[slot.offset - first : slot.offset - first + slot.numel] = True
    return first, inside.to(device)


@lru_cache(maxsize=64)
def _slot_order(layout: FactorLayout, device: torch.device) -> Tensor:
    """Where the report of each factor slot stands among those of :func:`_ranks`."""
    # Kept on the device: while a CUDA graph is captured nothing can be copied there.
    members = [index for _, members in _ranks(layout, 0) for index in members]
    return torch.tensor(members).argsort().to(device)


def _step(
    uploads: Tensor,
    root: Tensor,
    before: Tensor,
    segments: Segments,
    variant: Variant,
    row: Tensor,
) -> Report:
    clients, rank = len(uploads), segments.rank
    if variant == "sketched":
        return sketched_rows(uploads, clients, segments, root, before, rank, EPS_REL, row)[0]
    leading = torch.empty_like(row)
    report = truncated_rows(uploads, clients, segments, root, rank, EPS_REL, leading)
    counterparts = segments.counterparts(rank)
    aligned = align_rows(leading, counterparts, before, rank, rank, EPS_REL, row)
    return report._replace(aligned=torch.minimum(aligned, report.rank))


def _reports(
    layout: FactorLayout, reports: list[Report], row: Tensor, align: bool
) -> dict[SlotGroup, FactorStep]:
    """The reports by group of the layout; without alignment the factors take their own gauge."""
    order = _slot_order(layout, row.device)
    fields = [torch.cat(field)[order] for field in zip(*reports, strict=True)]
    steps, first = {}, 0
    for group in layout.groups:
        report = Report(*(field[first : first + len(group.modules)] for field in fields))
        first += len(group.modules)
        factor = group.view(row)
        if not align:
            factor.copy_(principal(factor.double()))
            report = report._replace(aligned=torch.zeros_like(report.aligned))
        steps[group] = FactorStep(factor, *report)
    return steps


def florg_round(
    uploads: Tensor,
    before: Tensor,
    weights: Tensor,
    layout: FactorLayout,
    variant: Variant,
    align: bool,
) -> FlorgRound:
    """One round of ``uploads`` (N, P) from the row ``before`` (P,)."""
    if any(slot.rows > RANK_LIMIT for slot in layout.factor_slots):
        # A rank beyond the kernels' is for each group of factors to take or to refuse.
        return by_group(uploads, before, weights, layout, variant, align)
    for group in layout.groups:
        check_gauge(group.view(before))
    root = root_shares(weights, uploads)
    row = torch.zeros(layout.size, dtype=checks.accumulator(uploads.dtype), device=uploads.device)
    reports = [
        _step(uploads, root, before.contiguous(), segments, variant, row)
        for segments, _ in _ranks(layout, uploads.stride(0))
    ]
    if layout.dense_slots:
        first, inside = _dense_columns(layout, row.device)
        mean = weighted_mean(uploads[:, first:], shares(weights, uploads))
        row[first:] = torch.where(inside, mean, row[first:])
    return FlorgRound(row, _reports(layout, reports, row, align) if reports else {})
