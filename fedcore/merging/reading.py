"""From a job to values: its module groups as cohorts and its dense tensors, part after part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fedcore.data.cohort import Cohort
from fedcore.errors import FedcoreError
from fedcore.merging.groups import DensePart
from fedcore.merging.plan import Job
from fedcore_kernels.layout import FactorLayout


def _empty_rows(job: Job, layout: FactorLayout) -> Tensor:
    """``(N, P)`` rows for all adapters, zero unless every element will be written."""
    whole = layout.numel == layout.size and all(
        source.ranks[slot.module] == slot.rows
        for source in job.sources
        for slot in layout.factor_slots
    )
    make = torch.empty if whole else torch.zeros
    return make(len(job.sources), layout.size, dtype=job.work_dtype)


def _check_common(
    job: Job, client_id: str, expected: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> None:
    for name, other in expected.items():
        one = factors[name]
        if one.shape != other.shape or not torch.equal(one.double(), other.double()):
            raise FedcoreError(
                f"{client_id}: {name} differs from that of {job.sources[0].name}; "
                f"{job.method.name} needs it to be common"
            )


def cohorts(job: Job) -> Iterator[Cohort]:
    """Group after group as a cohort of its own; only one is in memory at a time.

    Raises:
        FedcoreError: naming the adapter whose values are not finite, or whose factors differ where
            the method needs a common one.
    """
    for layout in job.groups:
        updates = _empty_rows(job, layout)
        common: dict[str, Tensor] = {}
        frozen = [slot.name for slot in job.method.frozen_layout(layout, 0)]
        for row, source in zip(updates, job.sources, strict=True):
            factors = source.fill_row(layout, row)
            common = common or {name: factors[name] for name in sorted(frozen)}
            _check_common(job, source.name, common, factors)
        modules = layout.modules
        yield Cohort(
            layout=layout,
            updates=updates,
            weights=job.weights,
            client_ids=tuple(source.name for source in job.sources),
            round=0,
            ranks=torch.tensor([[s.ranks[module] for module in modules] for s in job.sources]),
            scalings=torch.tensor(
                [[s.outline.scaling[module] for module in modules] for s in job.sources],
                dtype=torch.float64,
            ),
        )


def dense_rows(job: Job, part: DensePart) -> Tensor:
    """``(N, elements)``: a part of a dense tensor of all adapters.

    Raises:
        FedcoreError: naming the adapter whose values are not finite.
    """
    rows = torch.empty(len(job.sources), part.stop - part.start, dtype=job.work_dtype)
    for row, source in zip(rows, job.sources, strict=True):
        row.copy_(source.dense(part.name, part.start, part.stop))
    return rows
